package main

// The ring keeper makes this server a member of the ring. From the members that gossip reports, it
// computes which slot to claim, and builds the ring. With a storage directory, it saves a new claim
// before gossip announces the claim. It also saves the session number of this start before gossip
// begins, unless the disk is full. If gossip later begins a new session by itself, the keeper saves
// that session's number soon afterwards. The ring changes only when members join, leave, die or
// claim a slot. The hashring family must not know of pushes, metrics or HTTP.

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"path/filepath"
	"slices"
	"sync/atomic"
	"time"
)

const (
	memberFile       = "member" + LogSuffix
	memberRecordKind = 1 // kind of the only record in memberFile

	// The keeper claims a slot when no member has joined, restarted, left or died for
	// quietIntervals. A server without seeds that knows no other member claims at once. Every
	// server tries to make its first claim about settleIntervals after the start, if it has not
	// done so earlier. A member that claims before it has heard of the other members may choose a
	// slot that another member holds. Both constants are in gossip intervals.
	quietIntervals  = 3
	settleIntervals = 10

	// slotReserved is how long the slot of a dead or departed member stays reserved, so that the
	// member gets its sites back if it returns.
	slotReserved = 24 * time.Hour

	// idleCheck is how often Run wakes up once the ring is quiet, unless the latest save failed.
	// Run also wakes up at once when gossip reports a change. Waking up much more often would cost
	// several times as much CPU time as gossip itself.
	idleCheck = time.Minute
)

// A RingMember is a live member of the ring.
type RingMember struct {
	Name    string
	Addr    string // host:port, for both UDP and TCP
	Session uint64
	KeyID   uint32 // ID of the first cluster key of the member; a message to it is sealed with this key
}

// A RingView holds the live members and the ring that assigns sites to them. It is immutable.
type RingView struct {
	Ring    *Ring
	Members map[string]RingMember // by name, this server included
}

// Owner returns the live member that owns siteKey. It returns false if the view has no such member.
func (v *RingView) Owner(siteKey uint64) (RingMember, bool) {
	name, ok := v.Ring.Owner(siteKey)
	p, live := v.Members[name]
	return p, ok && live
}

// LoadRestartState returns the state that SaveRestartState stored in dir. It returns the zero state
// if dir is "" or holds no state. If the file is damaged so that the state is lost, it also returns
// the zero state, because the other members know this member's session and claim. It returns an
// error if the file cannot be read or is of another version.
func LoadRestartState(fsys FS, dir string) (RestartState, error) {
	var st RestartState
	if dir == "" {
		return st, nil
	}
	_, _, err := OpenLog(fsys, filepath.Join(dir, memberFile), func(kind byte, payload []byte) error {
		if kind != memberRecordKind {
			return fmt.Errorf("unknown kind of record %d", kind)
		}
		return json.Unmarshal(payload, &st)
	})
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return st, fmt.Errorf("reading the state of this member: %w", err)
	}
	return st, nil
}

// SaveRestartState stores st durably in dir. It does nothing if dir is "".
func SaveRestartState(fsys FS, dir string, st RestartState) error {
	if dir == "" {
		return nil
	}
	b, err := json.Marshal(st)
	if err == nil {
		err = NewLog(fsys, filepath.Join(dir, memberFile), []byte("member")).RewriteWith(AppendRecord(nil, memberRecordKind, b))
	}
	if err != nil {
		return fmt.Errorf("saving the state of this member: %w", err)
	}
	return nil
}

// RingKeeperConfig configures a RingKeeper.
type RingKeeperConfig struct {
	Name     string
	Gossip   *Gossip
	FS       FS
	Dir      string        // where to save the state of this member; "" saves nothing
	HasSeeds bool          // seed addresses are configured
	Interval time.Duration // the gossip interval
	Log      *slog.Logger
	OnView   func(*RingView) // receives every new view, in order; must not block
	OnError  func(error)     // receives every failure to save the state of this member
}

// A RingKeeper claims a slot of the ring for this server, and keeps this server's view of the ring
// up to date. View and Settled are safe for concurrent use.
type RingKeeper struct {
	cfg     RingKeeperConfig
	view    atomic.Pointer[RingView]
	settled chan struct{} // closed when Run has published the first ring

	saved      RestartState // the state that was last saved, zero if none was; after NewRingKeeper only Run uses saved and saveFailed
	saveFailed bool         // the latest save failed
}

// NewRingKeeper saves the number of the new session, so that gossip may begin. It returns an error
// if that fails, except on a full disk. On a full disk it goes on without saving, because the
// server must still serve the samples that the disk holds. Two starts are then still very unlikely
// to use the same session: half of the session number is random, and at the next start the other
// members report the highest session. While the state cannot be saved, Run makes no new claim.
func NewRingKeeper(cfg RingKeeperConfig) (*RingKeeper, error) {
	m := &RingKeeper{cfg: cfg, settled: make(chan struct{})}
	m.view.Store(&RingView{Ring: NewRing(nil, 0)})
	if err := m.saveIfChanged(cfg.Gossip.RestartState()); IsDiskFull(err) {
		m.reportSaveResult(err)
	} else if err != nil {
		return nil, err
	}
	return m, nil
}

// Settled returns a channel that is closed when View has the first ring.
func (m *RingKeeper) Settled() <-chan struct{} { return m.settled }

// View returns the newest view. The view is empty before the first ring.
func (m *RingKeeper) View() *RingView { return m.view.Load() }

// Run claims a slot and keeps the ring up to date until ctx ends. It returns nil.
func (m *RingKeeper) Run(ctx context.Context) error {
	begin := time.Now()
	lastChange := begin // when a member last joined, restarted, left or died
	var starts []memberSession
	for {
		v := m.cfg.Gossip.View()
		// A new claim does not restart the quiet period, because each claim would then delay all
		// other members' claims.
		if now := memberSessions(v); !slices.Equal(now, starts) {
			starts, lastChange = now, time.Now()
		}
		alone := !m.cfg.HasSeeds && len(v.Members) == 1
		quiet := time.Since(lastChange) >= quietIntervals*m.cfg.Interval && (v.Joined || !m.cfg.HasSeeds)
		overdue := !m.hasFirstRing() && time.Since(begin) >= settleIntervals*m.cfg.Interval
		settle := alone || quiet || overdue
		claimSaved := true
		if settle {
			claimSaved = m.claimSlot(v)
			v = m.cfg.Gossip.View()
		}
		hadRing := m.hasFirstRing()
		if hadRing || settle {
			m.publishView(v)
		}
		if !hadRing && settle {
			close(m.settled)
		}
		if claimSaved { // otherwise the state is saved together with the claim in the next round
			m.saveAndReport(m.cfg.Gossip.RestartState())
		}
		wait := m.cfg.Interval / 4
		if quiet && !m.saveFailed {
			wait = idleCheck
		}
		if _, ok := Sleep(ctx, wait, m.cfg.Gossip.Changed()); !ok {
			return nil
		}
	}
}

func (m *RingKeeper) hasFirstRing() bool {
	select {
	case <-m.settled:
		return true
	default:
		return false
	}
}

// A memberSession is one session of one member, and whether the member is live.
type memberSession struct {
	name    string
	session uint64
	live    bool
}

func memberSessions(v GossipView) []memberSession {
	var starts []memberSession
	for _, mv := range v.Members {
		starts = append(starts, memberSession{mv.Name, mv.Session, mv.State.IsLive()})
	}
	return starts
}

// saveIfChanged stores st durably, unless st equals the last saved state.
func (m *RingKeeper) saveIfChanged(st RestartState) error {
	if st == m.saved {
		return nil
	}
	err := SaveRestartState(m.cfg.FS, m.cfg.Dir, st)
	if err == nil {
		m.saved = st
	}
	return err
}

// saveAndReport saves st if it has changed, reports any failure, and returns whether st is saved.
// After a failure, Run tries again at the next change, or after idleCheck at the latest.
func (m *RingKeeper) saveAndReport(st RestartState) (saved bool) {
	err := m.saveIfChanged(st)
	m.reportSaveResult(err)
	return err == nil
}

// reportSaveResult passes a failure of saveIfChanged to OnError. It logs only the first of several
// failures in a row.
func (m *RingKeeper) reportSaveResult(err error) {
	if err != nil {
		m.cfg.OnError(err)
		if !m.saveFailed {
			m.cfg.Log.Error("cannot save the state of this member", "err", err)
		}
	}
	m.saveFailed = err != nil
}

// claimOf returns the claim in r. The claim has Lamport 0 if r claims no slot.
func claimOf(r MemberRecord) Claim {
	c := Claim{Name: r.Name, Provisional: r.Provisional}
	if r.Lamport > 0 && r.Slot != NoSlot {
		c.Slot, c.Lamport = int(r.Slot), r.Lamport
	}
	return c
}

// claimSlot saves and announces the claim that this server has to make, given the members in v. It
// announces nothing if that claim is announced already. It returns false, and announces nothing, if
// the claim cannot be saved.
func (m *RingKeeper) claimSlot(v GossipView) (saved bool) {
	var live, reserved []Claim
	for _, mv := range v.Members {
		switch {
		case mv.State.IsLive():
			live = append(live, claimOf(mv.MemberRecord))
		case time.Duration(mv.Age)*time.Second < slotReserved:
			reserved = append(reserved, claimOf(mv.MemberRecord))
		}
	}
	c, changed := ChooseClaim(m.cfg.Name, m.cfg.HasSeeds && !v.Joined, live, reserved, v.MaxLamport)
	if !changed {
		return true
	}
	slot := uint16(NoSlot)
	if c.Lamport > 0 {
		slot = uint16(c.Slot)
	}
	// Save the claim before announcing it. Otherwise a restart could bring back an older claim, to
	// a slot that belongs to another member by then.
	st := m.cfg.Gossip.RestartState()
	st.Slot, st.Lamport, st.Provisional = slot, c.Lamport, c.Provisional
	if !m.saveAndReport(st) {
		return false
	}
	if slot == NoSlot {
		m.cfg.Log.Warn("all slots of the ring are taken, so this server owns no sites: run fewer servers, or wait for a day after a server has left", "slots", MaxSlots)
	} else {
		m.cfg.Log.Info("slot claimed", "slot", slot, "claim", c.Lamport, "provisional", c.Provisional)
	}
	m.cfg.Gossip.AnnounceClaim(slot, c.Lamport, c.Provisional)
	return true
}

// publishView replaces the view with the view of the members in v, and passes it to OnView.
func (m *RingKeeper) publishView(v GossipView) {
	next := newRingView(v)
	if next.Ring.Digest() != m.View().Ring.Digest() {
		m.cfg.Log.Info("ring changed", "members", len(next.Members), "buckets", next.Ring.Buckets(), "share", next.Ring.Shares()[m.cfg.Name])
	}
	m.view.Store(next)
	m.cfg.OnView(next)
}

// newRingView returns the view of all live members in v. A member that is leaving is in the view,
// but not in its ring, so that it owns no sites.
func newRingView(v GossipView) *RingView {
	view := &RingView{Members: map[string]RingMember{}}
	var claims []Claim
	for _, mv := range v.Members {
		if !mv.State.IsLive() {
			continue
		}
		if !mv.Leaving {
			claims = append(claims, claimOf(mv.MemberRecord))
		}
		view.Members[mv.Name] = RingMember{Name: mv.Name, Addr: mv.Addr, Session: mv.Session, KeyID: mv.KeyID}
	}
	view.Ring = NewRing(claims, int(v.Buckets))
	return view
}
