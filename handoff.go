package main

// Clusters on their way to the server that owns them: after the ring changed, when
// this server leaves, and when an owner that could not be reached can be again.
// Invariants: nothing is dropped here before its owner has it durable; what is on its
// way is shown by one server or by none, and by its holder again when it cannot go; an
// owner shows a cluster that is new to it when every member has handed over what it had,
// or after half a minute. This file must not know of sealing, sockets or scrapes.

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"
)

const (
	// In intervals of gossip, a second unless it is configured:
	stableFor    = 5  // a ring that changed may change again
	holdBackFor  = 30 // for a member that does not answer
	handoffRetry = 5  // after an owner failed, or refused a cluster

	handoffTick  = 500 * time.Millisecond
	leaveWithin  = 30 * time.Second
	handoffChunk = 1 << 20  // bytes of samples in one request: see AppendBatches
	handoffRate  = 32 << 20 // bytes a second, to each owner
	// Messages on their way from one server, to all owners: each waits for disks more than
	// for anything. Half of what an owner takes from all at a time (maxForwards), for each
	// other server may send it as many as this one does.
	handoffAtOnce = 16
)

// HandoffConfig configures a Handoff.
type HandoffConfig struct {
	Name  string // this server's
	Store *Store
	View  func() *View
	Send  func(ctx context.Context, to Peer, m HandoffMessage) error
	Now   func() time.Time
	// Interval is gossip's, which says how soon all see one ring.
	Interval time.Duration
	Log      *slog.Logger
	Metrics  *Metrics
}

// Handoff hands clusters over. It is safe for concurrent use.
type Handoff struct {
	cfg    HandoffConfig
	chunk  int // handoffChunk
	atOnce int // handoffAtOnce

	mu      sync.Mutex // guards the rest
	leaving bool
	ring    *Ring                  // as last seen
	since   time.Time              // when it was first seen
	settled *Ring                  // the last one for which nothing is held back any more
	holding time.Time              // since when there was another
	done    map[string]handoffDone // by member
	owners  map[string]*handoffOwner
	refused map[string]time.Time // cluster → when its owner refused it
	sending map[string]bool      // clusters of which a message is on its way

	clusters, samples, bytes, conflicts *Counter
}

// handoffDone is a member's word that it has no more for this server.
type handoffDone struct {
	ring uint64 // its version
	at   time.Time
}

// handoffOwner is what is known of a member to which clusters go.
type handoffOwner struct {
	session uint64
	busy    bool      // something is on its way
	told    bool      // it knows that there is no more for it on this ring
	failed  time.Time // not zero: it could not be reached, and what it owns is shown here
	unsure  time.Time // not zero: since when it says that it is not the owner
}

// NewHandoff returns a Handoff that knows of no ring.
func NewHandoff(cfg HandoffConfig) *Handoff {
	m := cfg.Metrics
	h := &Handoff{
		cfg: cfg, chunk: handoffChunk, atOnce: handoffAtOnce, ring: NewRing(nil, 0), done: map[string]handoffDone{},
		owners: map[string]*handoffOwner{}, refused: map[string]time.Time{}, sending: map[string]bool{},
		clusters:  m.Counter("telemeter_handoff_clusters_total", "Cluster IDs handed to their owner, by result.", "result"),
		samples:   m.Counter("telemeter_handoff_samples_total", "Samples that their owner took over from this server."),
		bytes:     m.Counter("telemeter_handoff_bytes_total", "Bytes handed over."),
		conflicts: m.Counter("telemeter_handoff_conflicting_samples_total", "Samples that were handed to this server and dropped, because it holds another value of their series and time."),
	}
	for _, result := range []string{"handed", "failed", "refused"} {
		h.clusters.Add(0, result)
	}
	left := m.Gauge("telemeter_handoff_clusters_left", "Cluster IDs that this server holds and does not own.")
	held := m.Gauge("telemeter_handoff_held_back", "1 while clusters that are new to this server are not shown yet, because other members may have older samples of them.")
	m.OnCollect(func() {
		st := h.Status()
		left.Set(float64(st.Left))
		held.Set(0)
		if st.HeldBack {
			held.Set(1)
		}
	})
	return h
}

// HandoffStatus is what is to be told of handing over.
type HandoffStatus struct {
	Left     int            `json:"left"` // clusters held and not owned
	To       map[string]int `json:"to,omitempty"`
	Refused  int            `json:"refused"`           // of these, such as their owner does not take
	Failing  []string       `json:"failing,omitempty"` // owners that cannot be reached
	HeldBack bool           `json:"held_back"`
	Waiting  []string       `json:"waiting_for,omitempty"` // members that may have more for this server
	Leaving  bool           `json:"leaving"`
}

// Status tells how far it is.
func (h *Handoff) Status() HandoffStatus {
	view := h.cfg.View()
	st := HandoffStatus{To: map[string]int{}}
	held := h.cfg.Store.Held(func(_ string, hash uint64) bool { return h.owner(view, hash) != "" })
	for _, c := range held {
		st.To[h.owner(view, c.Hash)]++
	}
	st.Left = len(held)
	h.mu.Lock()
	defer h.mu.Unlock()
	view = h.see()
	for name, o := range h.owners {
		if !o.failed.IsZero() {
			st.Failing = append(st.Failing, name)
		}
	}
	slices.Sort(st.Failing)
	st.Leaving = h.leaving
	for _, c := range held { // what was refused may have expired meanwhile
		if _, refused := h.refused[c.ID]; refused {
			st.Refused++
		}
	}
	st.Waiting = h.waiting(view)
	st.HeldBack = h.settled != h.ring
	return st
}

// owner returns the member that owns a cluster; "" if that is this one, or nobody.
func (h *Handoff) owner(view *View, hash uint64) string {
	name, ok := view.Ring.Owner(hash)
	if _, live := view.Peers[name]; !ok || !live || name == h.cfg.Name {
		return ""
	}
	return name
}

// see looks at the ring, and notes its change. h.mu is held: nobody sees what was
// before afterwards.
func (h *Handoff) see() *View {
	view := h.cfg.View()
	now := h.cfg.Now()
	if h.ring.Version() != view.Ring.Version() {
		if h.settled == h.ring || h.ring.Buckets() == 0 {
			h.holding = now // and not since the last change, which may never come
		}
		h.ring, h.since = view.Ring, now
		clear(h.refused)
		for _, o := range h.owners {
			o.told = false
		}
		// A member that has seen the change first may have spoken already; of what it
		// said of an equal ring before, nothing is left.
		maps.DeleteFunc(h.done, func(_ string, d handoffDone) bool {
			return d.ring != h.ring.Version() || now.Sub(d.at) > stableFor*h.cfg.Interval
		})
	}
	maps.DeleteFunc(h.owners, func(name string, o *handoffOwner) bool {
		p, live := view.Peers[name]
		return !o.busy && (!live || p.Session != o.session)
	})
	maps.DeleteFunc(h.done, func(name string, _ handoffDone) bool { _, live := view.Peers[name]; return !live })
	if h.settled != h.ring && h.ring.Buckets() > 0 && (now.Sub(h.holding) >= holdBackFor*h.cfg.Interval || len(h.waiting(view)) == 0) {
		h.settled = h.ring
	}
	return view
}

// waiting returns the members that may have more for this server. h.mu is held.
func (h *Handoff) waiting(view *View) (names []string) {
	for name := range view.Peers {
		if name != h.cfg.Name && h.done[name].ring != h.ring.Version() {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

// Hidden reports whether a cluster is not shown by this server for now: it is on its
// way to its owner, or older samples of it may be on their way here.
func (h *Handoff) Hidden(id string) bool {
	hash := RingKey(id)
	h.mu.Lock()
	defer h.mu.Unlock()
	view := h.see()
	if owner := h.owner(view, hash); owner != "" {
		o := h.owners[owner]
		_, refused := h.refused[id]
		return !refused && (o == nil || o.failed.IsZero())
	}
	if h.settled == h.ring {
		return false
	}
	if h.settled != nil {
		if before, ok := h.settled.Owner(hash); ok && before == h.cfg.Name {
			return false // it was shown here all the time
		}
	}
	return true
}

// HiddenFrom is Hidden as a scrape has to ask. From a consumer that is hidden as well of
// which a message is on its way to an owner that failed before: who is served now is not
// among those of which the message says that they had it, and would be served again.
func (h *Handoff) HiddenFrom(id string, consumer bool) bool {
	return h.Hidden(id) || consumer && h.isSending(id)
}

func (h *Handoff) isSending(id string) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.sending[id]
}

// Take takes what another member hands over: durable when it returns nil.
func (h *Handoff) Take(ctx context.Context, from string, m HandoffMessage) error {
	h.mu.Lock()
	view := h.see()
	leaving := h.leaving
	// A word that comes late must not undo the one on this ring.
	if m.Cluster == "" && (m.Ring == h.ring.Version() || h.done[from].ring != h.ring.Version()) {
		h.done[from] = handoffDone{m.Ring, h.cfg.Now()}
		h.see()
	}
	h.mu.Unlock()
	if m.Cluster == "" {
		return nil
	}
	if name, ok := view.Ring.Owner(RingKey(m.Cluster)); leaving || !ok || name != h.cfg.Name {
		return ErrNotOwner
	}
	pushes, err := DecodeBatches(m.Batches, m.Cluster)
	if err != nil {
		return err
	}
	res, err := h.cfg.Store.AppendAll(ctx, m.Cluster, pushes)
	if err != nil {
		return err
	}
	h.conflicts.Add(float64(res.Conflicts))
	h.cfg.Log.Debug("took over", "cluster", m.Cluster, "from", from, "samples", res.Accepted, "known", res.Duplicates)
	return nil
}

// Run hands over until ctx ends.
func (h *Handoff) Run(ctx context.Context) error {
	tick := time.NewTicker(handoffTick)
	defer tick.Stop()
	var passes sync.WaitGroup
	defer passes.Wait()
	for {
		view, due := h.due()
		for owner, held := range due {
			passes.Go(func() { h.Pass(ctx, view, owner, held) })
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// due returns the members to which something may go now, with what they own of what
// is held. Each has to be given a Pass of its own, so that one that answers slowly stops
// no other.
func (h *Handoff) due() (*View, map[string][]HeldSite) {
	h.mu.Lock()
	view := h.see()
	early := !h.leaving && h.cfg.Now().Sub(h.since) < stableFor*h.cfg.Interval
	h.mu.Unlock()
	if early {
		return view, nil
	}
	// Once for all members, and without the lock, which is taken with a site locked.
	held := map[string][]HeldSite{}
	for _, c := range h.cfg.Store.Held(func(_ string, hash uint64) bool { return h.owner(view, hash) != "" }) {
		owner := h.owner(view, c.Hash)
		held[owner] = append(held[owner], c)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	due := map[string][]HeldSite{}
	if h.see().Ring.Version() != view.Ring.Version() {
		return view, due
	}
	now := h.cfg.Now()
	owns := view.Ring.Shares()
	for name, p := range view.Peers {
		if _, owner := owns[name]; !owner { // it leaves, and listens no more, or has no slot yet
			continue
		}
		o := h.owners[name]
		if o == nil {
			o = &handoffOwner{session: p.Session}
			h.owners[name] = o
		}
		nothing := len(held[name]) == 0 && o.told && o.failed.IsZero() && o.unsure.IsZero()
		if name != h.cfg.Name && !o.busy && !nothing && (o.failed.IsZero() || now.Sub(o.failed) >= handoffRetry*h.cfg.Interval) {
			o.busy = true
			due[name] = held[name]
		}
	}
	return view, due
}

// Pass hands one member all that it owns of what is held, oldest first, and tells it
// when there is no more.
func (h *Handoff) Pass(ctx context.Context, view *View, name string, held []HeldSite) {
	err := h.pass(ctx, view, name, held)
	if h.ended(ctx, name, err) {
		h.cfg.Log.Warn("owner cannot be handed what it owns; it is shown here", "owner", name, "err", err)
	}
}

// ended notes how a pass went, and reports whether an owner fails now that did not.
func (h *Handoff) ended(ctx context.Context, name string, err error) (fails bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	o := h.owners[name]
	if o == nil {
		return false
	}
	o.busy = false
	switch {
	case err == nil:
		o.failed, o.unsure = time.Time{}, time.Time{}
	case errors.Is(err, ErrNotOwner) && (o.unsure.IsZero() || h.cfg.Now().Sub(o.unsure) < 2*stableFor*h.cfg.Interval):
		// It has not seen the change of the ring yet, or it sees another.
		if o.unsure.IsZero() {
			o.unsure = h.cfg.Now()
		}
	case ctx.Err() == nil:
		h.clusters.Inc("failed")
		fails = o.failed.IsZero()
		o.failed = h.cfg.Now()
	}
	return fails
}

func (h *Handoff) pass(ctx context.Context, view *View, name string, held []HeldSite) error {
	to, live := view.Peers[name]
	if !live {
		return nil
	}
	p := &handoffPass{h: h, to: to, ring: view.Ring.Version(), left: held}
	// The first goes alone: an owner that hangs must not keep more from consumers.
	p.run(ctx, 1)
	var workers sync.WaitGroup
	for range max(1, h.atOnce/len(view.Peers)) {
		workers.Go(func() { p.run(ctx, len(held)) })
	}
	workers.Wait()
	if p.handed > 0 {
		h.cfg.Log.Info("handed over", "owner", name, "clusters", p.handed, "bytes", p.bytes, "left", len(held)-p.handed)
	}
	if p.err != nil || p.handed < len(held) || h.isTold(name) {
		return p.err
	}
	if err := h.cfg.Send(ctx, to, HandoffMessage{Ring: p.ring}); err != nil {
		return err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if o := h.owners[name]; o != nil && o.session == to.Session {
		o.told = h.ring.Version() == p.ring
	}
	return nil
}

// handoffPass hands one owner clusters, several at once.
type handoffPass struct {
	h    *Handoff
	to   Peer
	ring uint64 // its version

	mu     sync.Mutex // guards the rest
	left   []HeldSite
	free   time.Time // when the rate lets the next message go
	handed int
	bytes  int
	err    error // the first
}

// run hands over n of what is left, one after the other.
func (p *handoffPass) run(ctx context.Context, n int) {
	for range n {
		c, ok := p.next()
		if !ok {
			return
		}
		if p.h.wait(c.ID) {
			continue
		}
		bytes, err := p.hand(ctx, c)
		var refusal *RefusedByOwner
		if errors.As(err, &refusal) {
			p.h.refuse(c.ID, p.to.Name, refusal)
		}
		p.mu.Lock()
		p.bytes += bytes
		switch {
		case err == nil:
			p.handed++
		case refusal == nil && p.err == nil:
			p.err = err
		}
		p.mu.Unlock()
	}
}

// next takes one of what is left: none after a failure, or when the ring has changed, for
// then others may own the rest.
func (p *handoffPass) next() (c HeldSite, ok bool) {
	changed := p.h.cfg.View().Ring.Version() != p.ring
	p.mu.Lock()
	defer p.mu.Unlock()
	if changed || p.err != nil || len(p.left) == 0 {
		return c, false
	}
	c, p.left = p.left[0], p.left[1:]
	return c, true
}

// pace waits until n bytes that took since begin to send fit the rate, and reports
// whether ctx is still good.
func (p *handoffPass) pace(ctx context.Context, n int, begin time.Time) bool {
	p.mu.Lock()
	if p.free.Before(begin) {
		p.free = begin
	}
	p.free = p.free.Add(time.Duration(n) * time.Second / handoffRate)
	free := p.free
	p.mu.Unlock()
	return idle(ctx, time.Until(free))
}

func (h *Handoff) isTold(name string) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	o := h.owners[name]
	return o != nil && o.told
}

// wait reports whether a cluster's owner refused it a short while ago.
func (h *Handoff) wait(id string) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	at, refused := h.refused[id]
	return refused && h.cfg.Now().Sub(at) < handoffRetry*h.cfg.Interval
}

func (h *Handoff) refuse(id, owner string, err error) {
	h.mu.Lock()
	_, again := h.refused[id]
	h.refused[id] = h.cfg.Now()
	h.mu.Unlock()
	h.clusters.Inc("refused")
	if !again {
		h.cfg.Log.Warn("owner does not take a cluster; it is shown here", "cluster", id, "owner", owner, "err", err)
	}
}

// hand hands one cluster over. It begins with what is oldest, whatever was handed
// before: what the owner has is dropped here. It returns how many bytes the owner took.
func (p *handoffPass) hand(ctx context.Context, c HeldSite) (bytes int, err error) {
	h := p.h
	h.setSending(c.ID, true)
	defer h.setSending(c.ID, false)
	for {
		begin := time.Now()
		var chunk []byte
		var upTo uint64
		n := 0
		oldest := h.cfg.Store.Oldest()
		known := h.cfg.Store.Look(c.ID, func(held *Cluster) {
			chunk, upTo, n = AppendBatches(nil, held, oldest, h.chunk, func(b *Batch) []uint64 {
				return h.cfg.Store.Consumers.Have(c.Hash, b)
			})
		})
		if !known {
			return bytes, nil
		}
		done := false
		err = h.cfg.Send(ctx, p.to, HandoffMessage{Cluster: c.ID, Ring: p.ring, Batches: chunk})
		if err == nil {
			h.taken(p.to, c.ID)
			h.samples.Add(float64(n))
			h.bytes.Add(float64(len(chunk)))
			bytes += len(chunk)
			done, err = h.cfg.Store.Release(ctx, c.ID, upTo, oldest)
		}
		goOn := p.pace(ctx, len(chunk), begin) // also after a refusal
		switch {
		case err != nil:
			return bytes, fmt.Errorf("handing over cluster %q: %w", c.ID, err)
		case done:
			h.clusters.Inc("handed")
			return bytes, nil
		case !goOn:
			return bytes, ctx.Err()
		}
	}
}

func (h *Handoff) setSending(id string, sending bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if sending {
		h.sending[id] = true
	} else {
		delete(h.sending, id)
	}
}

// taken notes that an owner takes what it owns: the rest is on its way as well. Until
// then all is shown, for an owner that hangs would have it hidden in vain.
func (h *Handoff) taken(to Peer, id string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.refused, id)
	if o := h.owners[to.Name]; o != nil && o.session == to.Session {
		o.failed, o.unsure = time.Time{}, time.Time{}
	}
}

// idle waits, and reports whether ctx is still good.
func idle(ctx context.Context, d time.Duration) bool {
	if d <= 0 {
		return ctx.Err() == nil
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return true
	}
}

// SetLeaving has this server take nothing any more, and hand over all at once.
func (h *Handoff) SetLeaving() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.leaving = true
	clear(h.refused)
	for _, o := range h.owners {
		o.failed = time.Time{}
	}
}

// Leave returns when all is handed over, or when it cannot be.
func (h *Handoff) Leave(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, leaveWithin)
	defer cancel()
	kept := "they are kept on disk"
	if !h.cfg.Store.OnDisk() {
		kept = "they are lost, as they are in memory only"
	}
	for {
		// Looked at first: what is left counts only if it was heard before that this server
		// leaves.
		_, owns := h.cfg.View().Ring.Shares()[h.cfg.Name]
		st := h.Status()
		if !owns && st.Left == 0 && h.toldAll() {
			return
		}
		if st.Left > 0 && st.Left <= st.Refused {
			h.cfg.Log.Warn("leaving with clusters that their owners do not take; "+kept, "clusters", st.Left)
			return
		}
		if !idle(ctx, handoffTick/5) {
			h.cfg.Log.Warn("leaving with clusters that could not be handed over; "+kept, "clusters", st.Left, "failing", st.Failing)
			return
		}
	}
}

// toldAll reports whether every owner knows that there is no more for it.
func (h *Handoff) toldAll() bool {
	view := h.cfg.View()
	owns := view.Ring.Shares()
	h.mu.Lock()
	defer h.mu.Unlock()
	for name := range owns {
		if o := h.owners[name]; name != h.cfg.Name && (o == nil || !o.told && o.failed.IsZero()) {
			return false
		}
	}
	return true
}
