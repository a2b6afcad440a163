package main

// This server as a member of the ring: it turns the members that gossip hears into a claim to
// a slot and a ring. State that the next start needs is durable before it is announced, but
// for a session that a full disk has no room for. The ring changes only when members come, go
// or claim.

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"path/filepath"
	"slices"
	"time"
)

const (
	memberFile  = "member" + LogSuffix
	memberState = 1 // the kind of its one record
	// A slot is chosen when no member came or went for quietFor intervals, or after
	// settleFor: whoever chooses before it has heard of the others chooses badly.
	quietFor  = 3
	settleFor = 10
	// A dead member's slot stays reserved, so that its keys come back to it.
	reservedFor = 24 * time.Hour
)

// LoadMemberState reads what SaveMemberState wrote; of a member without past, or
// with dir "", it is zero.
func LoadMemberState(fsys FS, dir string) (SwimState, error) {
	var st SwimState
	if dir == "" {
		return st, nil
	}
	_, _, err := OpenLog(fsys, filepath.Join(dir, memberFile), func(kind byte, payload []byte) error {
		if kind != memberState {
			return fmt.Errorf("unknown kind of record %d", kind)
		}
		return json.Unmarshal(payload, &st)
	})
	if errors.Is(err, fs.ErrNotExist) {
		return st, nil
	}
	if err != nil {
		return st, fmt.Errorf("reading what is kept of this member: %w", err)
	}
	return st, nil // of a damaged file zero: the others tell the rest
}

// SaveMemberState keeps st durably; with dir "" it does nothing.
func SaveMemberState(fsys FS, dir string, st SwimState) error {
	if dir == "" {
		return nil
	}
	b, err := json.Marshal(st)
	if err == nil {
		err = NewLog(fsys, filepath.Join(dir, memberFile), []byte("member")).Rewrite(func(w io.Writer) error {
			_, err := w.Write(AppendRecord(nil, memberState, b))
			return err
		})
	}
	if err != nil {
		return fmt.Errorf("keeping the state of this member: %w", err)
	}
	return nil
}

// RingMemberConfig configures a RingMember.
type RingMemberConfig struct {
	Name     string
	Gossip   *Gossip
	Forward  *Forwarder
	FS       FS
	Dir      string // "" keeps nothing
	Seeds    bool   // addresses to join at are configured
	Interval time.Duration
	Log      *slog.Logger
	Metrics  *Metrics
}

// RingMember keeps the ring. Its handlers are safe for concurrent use.
type RingMember struct {
	cfg     RingMemberConfig
	saved   SwimState
	failing bool          // to save: said once
	settled chan struct{} // closed when the first ring is made
	errors  *Counter
}

// NewRingMember keeps the new session's number, so that gossip may begin. On a full disk
// it goes on without: what is held there has to be served, sessions are unlike by their
// random half, and the others tell the next start which was the highest. No slot is
// claimed until there is room.
func NewRingMember(cfg RingMemberConfig) (*RingMember, error) {
	m := &RingMember{cfg: cfg, settled: make(chan struct{})}
	reg := cfg.Metrics
	m.errors = reg.Counter("telemeter_member_state_errors_total", "Failures to keep the state of this member, logged.")
	members := reg.Gauge("telemeter_members", "Servers of the cluster by state, this one included.", "state")
	share := reg.Gauge("telemeter_ring_share_ratio", "Share of the cluster IDs that this server owns.")
	health := reg.Gauge("telemeter_gossip_local_health", "0 is good; each point slows this server's judgement of others.")
	sent := reg.Counter("telemeter_gossip_sent_packets_total", "Gossip packets sent.")
	sentBytes := reg.Counter("telemeter_gossip_sent_bytes_total", "Bytes of gossip sent.")
	received := reg.Counter("telemeter_gossip_received_packets_total", "Gossip packets received.")
	refused := reg.Counter("telemeter_gossip_refused_packets_total", "Gossip packets that were dropped unanswered, by reason.", "reason")
	reg.OnCollect(func() {
		count := map[MemberState]int{StateAlive: 0, StateSuspect: 0, StateDead: 0, StateLeft: 0}
		for _, mv := range cfg.Gossip.View().Members {
			count[mv.State]++
		}
		for state, n := range count {
			members.Set(float64(n), state.String())
		}
		share.Set(cfg.Forward.View().Ring.Shares()[cfg.Name])
		st := cfg.Gossip.Stats()
		health.Set(float64(st.Health))
		sent.SetTotal(float64(st.Sent))
		sentBytes.SetTotal(float64(st.SentBytes))
		received.SetTotal(float64(st.Received))
		for i, reason := range RefusedReasons() {
			refused.SetTotal(float64(st.Refused[i]), reason)
		}
	})
	if err := m.keep(cfg.Gossip.State()); err != nil && !DiskFull(err) {
		return nil, err
	}
	return m, nil
}

// Settled is closed when there is a ring to go by.
func (m *RingMember) Settled() <-chan struct{} { return m.settled }

// Run keeps the ring until ctx ends.
func (m *RingMember) Run(ctx context.Context) error {
	begin := time.Now()
	heard := begin
	var known []memberKey
	for {
		v := m.cfg.Gossip.View()
		// Claims alone are no reason to wait longer: each would delay all others.
		if now := membersOf(v); !slices.Equal(now, known) {
			known, heard = now, time.Now()
		}
		alone := !m.cfg.Seeds && len(v.Members) == 1
		quiet := time.Since(heard) >= quietFor*m.cfg.Interval && (v.Joined || !m.cfg.Seeds)
		if alone || quiet || time.Since(begin) >= settleFor*m.cfg.Interval && !m.isSettled() {
			m.claim(v)
			v = m.cfg.Gossip.View()
			m.settle()
		}
		if m.isSettled() {
			m.ring(v)
		}
		m.keep(m.cfg.Gossip.State())
		// At rest only a change can ask for anything; to wake up for nothing would cost
		// several times what gossip does.
		wait := m.cfg.Interval / 4
		if quiet && !m.failing {
			wait = time.Minute
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
		case <-m.cfg.Gossip.Changed():
		case <-timer.C:
		}
		timer.Stop()
		if ctx.Err() != nil {
			return nil
		}
	}
}

// memberKey is one start of one member.
type memberKey struct {
	name    string
	session uint64
	live    bool
}

func membersOf(v GossipView) []memberKey {
	var keys []memberKey
	for _, mv := range v.Members {
		keys = append(keys, memberKey{mv.Name, mv.Session, mv.State.IsLive()})
	}
	return keys
}

func (m *RingMember) isSettled() bool {
	select {
	case <-m.settled:
		return true
	default:
		return false
	}
}

func (m *RingMember) settle() {
	if !m.isSettled() {
		close(m.settled)
	}
}

// keep stores st if it is not what is kept. A failure is counted, logged if it is the
// first in a row, and tried again at the next change or tick.
func (m *RingMember) keep(st SwimState) error {
	if st == m.saved {
		return nil
	}
	err := SaveMemberState(m.cfg.FS, m.cfg.Dir, st)
	if err == nil {
		m.saved, m.failing = st, false
		return nil
	}
	m.errors.Inc()
	if !m.failing {
		m.cfg.Log.Error("member", "err", err)
	}
	m.failing = true
	return err
}

func claimOf(r MemberRecord) Claim {
	c := Claim{Name: r.Name, Provisional: r.Provisional}
	if r.Lamport > 0 && r.Slot != NoSlot {
		c.Slot, c.Lamport = int(r.Slot), r.Lamport
	}
	return c
}

// claim takes the slot that is this server's by what it has heard.
func (m *RingMember) claim(v GossipView) {
	var live, reserved []Claim
	for _, mv := range v.Members {
		switch {
		case mv.State.IsLive():
			live = append(live, claimOf(mv.MemberRecord))
		case time.Duration(mv.Age)*time.Second < reservedFor:
			reserved = append(reserved, claimOf(mv.MemberRecord))
		}
	}
	c, changed := ResolveClaim(m.cfg.Name, m.cfg.Seeds && !v.Joined, live, reserved, v.Lamport)
	if !changed {
		return
	}
	slot := uint16(NoSlot)
	if c.Lamport > 0 {
		slot = uint16(c.Slot)
	}
	// Durable before it is told: a restart must not claim another's slot by it.
	st := m.cfg.Gossip.State()
	st.Slot, st.Lamport, st.Provisional = slot, c.Lamport, c.Provisional
	if m.keep(st) == nil {
		m.cfg.Log.Info("slot claimed", "slot", c.Slot, "claim", c.Lamport, "provisional", c.Provisional)
		m.cfg.Gossip.SetClaim(slot, c.Lamport, c.Provisional)
	}
}

// ring makes forwarding go by what is heard.
func (m *RingMember) ring(v GossipView) {
	next := &RingView{Peers: map[string]RingPeer{}}
	var claims []Claim
	for _, mv := range v.Members {
		if !mv.State.IsLive() {
			continue
		}
		if !mv.Leaving {
			claims = append(claims, claimOf(mv.MemberRecord))
		}
		next.Peers[mv.Name] = RingPeer{Name: mv.Name, Addr: mv.Addr, Session: mv.Session, KeyID: mv.KeyID}
	}
	next.Ring = NewRing(claims, int(v.Buckets))
	if old := m.cfg.Forward.View(); old.Ring.Version() != next.Ring.Version() {
		m.cfg.Log.Info("ring changed", "members", len(next.Peers), "buckets", next.Ring.Buckets(), "share", next.Ring.Shares()[m.cfg.Name])
	}
	m.cfg.Forward.SetView(next)
}
