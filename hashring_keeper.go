package main

// This server as a member of the ring: it turns the members that gossip hears of into a claim to
// a slot, and into a ring. State that the next start needs is durable before it is announced,
// except for a session that a full disk has no room for. The ring changes only when members
// come, go or claim. This family must not know of pushes, metrics or HTTP.

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
	memberRecordKind = 1 // of the only record in that file

	// A slot is claimed when no member came or went for quietIntervals, and at the latest after
	// settleIntervals: a member that claims before it has heard of the others chooses badly.
	quietIntervals  = 3
	settleIntervals = 10

	// slotReserved is how long a dead member's slot stays reserved, so that it gets its sites
	// back when it returns.
	slotReserved = 24 * time.Hour

	// idleCheck is how often a member at rest looks for something to do. It acts on changes at
	// once; more wake-ups would cost several times what gossip does.
	idleCheck = time.Minute
)

// RingMember is a live member of the ring.
type RingMember struct {
	Name    string
	Addr    string // host:port of its UDP and TCP port
	Session uint64
	KeyID   uint32 // of the key that it seals with, and so holds
}

// RingView says which members are live and which of them owns what. It is immutable.
type RingView struct {
	Ring    *Ring
	Members map[string]RingMember // by name, this server included
}

// Owner returns the live member that owns a site key; false if the view knows none.
func (v *RingView) Owner(siteKey uint64) (RingMember, bool) {
	name, ok := v.Ring.Owner(siteKey)
	p, live := v.Members[name]
	return p, ok && live
}

// LoadRestartState reads what SaveRestartState wrote. It returns the zero state if nothing is
// there, if dir is "", or if the file is damaged: the other members have the rest.
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

// SaveRestartState stores st durably; with dir "" it does nothing.
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
	Dir      string // "" saves nothing
	HasSeeds bool   // addresses to join at are configured
	Interval time.Duration
	Log      *slog.Logger
	OnView   func(*RingView) // gets every new view, in order; must not block
	OnError  func(error)     // gets every failure to save the state of this member
}

// RingKeeper keeps this server's place in the ring.
type RingKeeper struct {
	cfg     RingKeeperConfig
	view    atomic.Pointer[RingView]
	settled chan struct{} // closed when the first ring is made

	saved      RestartState // on disk; this and the next are Run's
	saveFailed bool         // the last time
}

// NewRingKeeper saves the number of the new session, so that gossip may begin. On a full disk it
// goes on without: the samples held there have to be served, the random half of a session makes
// it unlike any other, and the next start hears from the others which session was the highest. No
// slot is claimed until there is room.
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

// Settled is closed when there is a ring to go by.
func (m *RingKeeper) Settled() <-chan struct{} { return m.settled }

// View returns the newest view. It is empty until Settled.
func (m *RingKeeper) View() *RingView { return m.view.Load() }

// Run claims a slot and keeps the ring up to date until ctx ends.
func (m *RingKeeper) Run(ctx context.Context) error {
	begin := time.Now()
	lastChange := begin // of the members
	var starts []memberSession
	for {
		v := m.cfg.Gossip.View()
		// Claims alone are no reason to wait longer: each would delay all others.
		if now := memberSessions(v); !slices.Equal(now, starts) {
			starts, lastChange = now, time.Now()
		}
		alone := !m.cfg.HasSeeds && len(v.Members) == 1
		quiet := time.Since(lastChange) >= quietIntervals*m.cfg.Interval && (v.Joined || !m.cfg.HasSeeds)
		overdue := !m.hasFirstRing() && time.Since(begin) >= settleIntervals*m.cfg.Interval
		if alone || quiet || overdue {
			m.claimSlot(v)
			v = m.cfg.Gossip.View()
			if !m.hasFirstRing() {
				close(m.settled)
			}
		}
		if m.hasFirstRing() {
			m.publishView(v)
		}
		m.saveAndReport(m.cfg.Gossip.RestartState())
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

// memberSession is one start of one member.
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

// saveIfChanged stores st durably, unless the last saved state is equal.
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

// saveAndReport saves st and reports a failure. It returns whether st is saved; if not, Run tries
// again at the next change or tick.
func (m *RingKeeper) saveAndReport(st RestartState) (saved bool) {
	err := m.saveIfChanged(st)
	m.reportSaveResult(err)
	return err == nil
}

// reportSaveResult reports an error of saveIfChanged, and logs the first in a row.
func (m *RingKeeper) reportSaveResult(err error) {
	if err != nil {
		m.cfg.OnError(err)
		if !m.saveFailed {
			m.cfg.Log.Error("state of this member not saved", "err", err)
		}
	}
	m.saveFailed = err != nil
}

func claimOf(r MemberRecord) Claim {
	c := Claim{Name: r.Name, Provisional: r.Provisional}
	if r.Lamport > 0 && r.Slot != NoSlot {
		c.Slot, c.Lamport = int(r.Slot), r.Lamport
	}
	return c
}

// claimSlot claims the slot that the claims heard so far leave to this server.
func (m *RingKeeper) claimSlot(v GossipView) {
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
		return
	}
	slot := uint16(NoSlot)
	if c.Lamport > 0 {
		slot = uint16(c.Slot)
	}
	// The claim is durable before it is announced: otherwise a restart could claim another's slot.
	st := m.cfg.Gossip.RestartState()
	st.Slot, st.Lamport, st.Provisional = slot, c.Lamport, c.Provisional
	if m.saveAndReport(st) {
		m.cfg.Log.Info("slot claimed", "slot", c.Slot, "claim", c.Lamport, "provisional", c.Provisional)
		m.cfg.Gossip.AnnounceClaim(slot, c.Lamport, c.Provisional)
	}
}

// publishView replaces the view with that of the members that gossip knows.
func (m *RingKeeper) publishView(v GossipView) {
	next := newRingView(v)
	if next.Ring.Digest() != m.View().Ring.Digest() {
		m.cfg.Log.Info("ring changed", "members", len(next.Members), "buckets", next.Ring.Buckets(), "share", next.Ring.Shares()[m.cfg.Name])
	}
	m.view.Store(next)
	m.cfg.OnView(next)
}

// newRingView returns the view of all live members. A member that is leaving owns nothing.
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
