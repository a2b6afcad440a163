package main

// handoff_owners_test.go: one server hands over to others that are full, hang, forget,
// restart or come and go: each hurts what it owns and no more, nothing is lost, and
// nothing is hidden for longer than it may be. Time is virtual.

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// handRig is server a and what it sends to others, which exist by name only.
type handRig struct {
	t     *testing.T
	store *Store
	h     *Handoff

	mu     sync.Mutex // guards the rest
	view   *View
	answer func(ctx context.Context, to string, m HandoffMessage) error
	sent   []handSent
}

type handSent struct {
	to  string
	m   HandoffMessage
	err error
	at  time.Duration // since the rig was made
}

func newHandRig(t *testing.T, peers ...string) *handRig {
	r := &handRig{t: t, answer: func(context.Context, string, HandoffMessage) error { return nil }}
	var err error
	if r.store, err = OpenStore(StoreConfig{Retention: 2 * time.Hour, MaxSampleAge: time.Hour, Now: time.Now, OnError: func(err error) { t.Error(err) }}); err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	r.h = NewHandoff(HandoffConfig{
		Name: "a", Store: r.store, Now: time.Now, Interval: time.Second, Log: slog.New(slog.DiscardHandler), Metrics: NewMetrics(),
		View: func() *View {
			r.mu.Lock()
			defer r.mu.Unlock()
			return r.view
		},
		Send: func(ctx context.Context, to Peer, m HandoffMessage) error {
			r.mu.Lock()
			answer := r.answer
			r.mu.Unlock()
			err := answer(ctx, to.Name, m)
			r.mu.Lock()
			defer r.mu.Unlock()
			r.sent = append(r.sent, handSent{to.Name, m, err, time.Since(begin)})
			return err
		},
	})
	r.see(peers...)
	return r
}

// see has a see these members: a name, and after a colon a session other than 1, which
// "-" before the name has leave. Slots go by name, so that they stay.
func (r *handRig) see(peers ...string) {
	v := &View{Peers: map[string]Peer{"a": {Name: "a", Session: 1}}}
	claims := []Claim{{Slot: 0, Lamport: 1, Name: "a"}}
	for _, p := range peers {
		name, leaving := strings.CutPrefix(p, "-")
		name, session, _ := strings.Cut(name, ":")
		v.Peers[name] = Peer{Name: name, Session: 1 + uint64(len(session))}
		if slot := int(name[0] - 'a'); !leaving {
			claims = append(claims, Claim{Slot: slot, Lamport: uint64(slot + 1), Name: name})
		}
	}
	v.Ring = NewRing(claims, 6)
	r.mu.Lock()
	r.view = v
	r.mu.Unlock()
	r.h.Hidden("x") // as a scrape would, soon
}

func (r *handRig) answers(answer func(ctx context.Context, to string, m HandoffMessage) error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.answer = answer
}

// all returns what was sent.
func (r *handRig) all() []handSent {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.sent)
}

// owned returns n IDs that a member owns, by what a sees.
func (r *handRig) owned(name string, n int) (ids []string) {
	ring := r.h.cfg.View().Ring
	for i := 0; len(ids) < n; i++ {
		if owner, _ := ring.Owner(RingKey(fmt.Sprint("s", i))); owner == name {
			ids = append(ids, fmt.Sprint("s", i))
		}
	}
	return ids
}

func (r *handRig) push(id string, points ...point) {
	r.t.Helper()
	if len(points) == 0 {
		points = []point{{"m", 0, time.Now().UnixMilli(), 1}}
	}
	if _, err := r.store.Append(r.t.Context(), id, storePush(id, points...)); err != nil {
		r.t.Fatal(err)
	}
}

// held returns which of the IDs the store holds.
func (r *handRig) held(ids ...string) (held []string) {
	for _, id := range ids {
		if r.store.Look(id, func(*Cluster) {}) {
			held = append(held, id)
		}
	}
	return held
}

// run has the handoff run until the test's bubble ends.
func (r *handRig) run() {
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error)
	go func() { ended <- r.h.Run(ctx) }()
	r.t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			r.t.Error(err)
		}
		if err := r.store.Close(); err != nil {
			r.t.Error(err)
		}
	})
}

// wait lets time pass.
func wait(d time.Duration) {
	timer := time.NewTimer(d)
	<-timer.C
	synctest.Wait()
}

// hang answers nothing for as long as a request may take.
func hang(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, forwardTimeout)
	defer cancel()
	<-ctx.Done()
	return ctx.Err()
}

// However many clusters there are, and whether their owner takes them or not, what
// goes to one owner is bounded in bytes a second.
func TestHandoffRate(t *testing.T) {
	for name, answer := range map[string]error{"taken": nil, "refused": &RefusedByOwner{ErrFull}} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newHandRig(t, "b")
				r.answers(func(_ context.Context, _ string, m HandoffMessage) error { return answer })
				for _, id := range r.owned("b", 160) {
					points := make([]point, 2000)
					for i := range points {
						points[i] = point{strings.Repeat("x", 100), i, time.Now().UnixMilli(), 1}
					}
					r.push(id, points...)
				}
				r.run()
				wait(8 * time.Second)
				bytes, first, last := 0, time.Hour, time.Duration(0)
				for _, s := range r.all() {
					first, last = min(first, s.at), max(last, s.at)
					bytes += len(s.m.Batches)
				}
				if rate := float64(bytes) / max(1, (last-first).Seconds()); rate > 1.1*handoffRate || bytes < handoffRate {
					t.Errorf("%d bytes in %v", bytes, last-first)
				}
			})
		})
	}
}

// Several clusters are on their way to one owner at once, a bounded number, and never
// two messages of one. The first goes alone, that there is no more is told last, and
// a failure or a change of the ring ends it all.
func TestHandoffAtOnce(t *testing.T) {
	for name, test := range map[string]struct {
		does func(r *handRig) error // the seventh message
		sent int                    // to b, in the first pass
		took time.Duration
	}{
		"all are taken":    {func(*handRig) error { return nil }, 42, 9 * time.Second},
		"one fails":        {func(*handRig) error { return errors.New("broken") }, 11, 3 * time.Second},
		"the ring changes": {func(r *handRig) error { r.see("b", "c", "d"); return nil }, 11, 3 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newHandRig(t, "b", "c")
				ids := r.owned("b", 41)
				for _, id := range ids {
					r.push(id)
				}
				var mu sync.Mutex // guards the rest
				var begin, end time.Time
				begun, most := 0, 0
				now := map[string]bool{}
				r.answers(func(ctx context.Context, to string, m HandoffMessage) error {
					if to != "b" {
						return nil
					}
					mu.Lock()
					if begun++; begun == 1 {
						begin = time.Now()
					}
					last := m.Cluster == ""
					if len(now) > 0 && (begun == 2 || last) || last && begun <= len(ids) {
						t.Errorf("message %d, of cluster %q, comes while %v are on their way", begun, m.Cluster, now)
					}
					if now[m.Cluster] {
						t.Errorf("two messages of %s are on their way", m.Cluster)
					}
					seventh := begun == 7
					now[m.Cluster] = true
					most = max(most, len(now))
					mu.Unlock()
					var err error
					if seventh {
						time.Sleep(time.Second / 2)
						err = test.does(r)
					} else if !last {
						time.Sleep(time.Second)
					}
					mu.Lock()
					defer mu.Unlock()
					delete(now, m.Cluster)
					end = time.Now()
					return err
				})
				r.run()
				wait(5*time.Second + test.took + time.Second)
				mu.Lock()
				defer mu.Unlock()
				if begun != test.sent || most != handoffAtOnce/3 || end.Sub(begin) != test.took {
					t.Errorf("%d messages, %d at once, in %v; want %d, %d, %v", begun, most, end.Sub(begin), test.sent, handoffAtOnce/3, test.took)
				}
			})
		})
	}
}

// A full owner keeps back what it refuses, which is shown meanwhile and tried again;
// all else goes, to it and to others.
func TestHandoffFullOwner(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newHandRig(t, "b", "c")
		bs, cs, mine := r.owned("b", 5), r.owned("c", 5), r.owned("a", 2)
		r.answers(func(_ context.Context, to string, m HandoffMessage) error {
			if to == "b" && (m.Cluster == bs[0] || m.Cluster == bs[3]) {
				return &RefusedByOwner{ErrFull}
			}
			return nil
		})
		for _, id := range slices.Concat(bs, cs, mine) {
			r.push(id)
			wait(time.Millisecond)
		}
		r.run()
		wait(6500 * time.Millisecond)
		if got := r.held(slices.Concat(bs, cs, mine)...); !slices.Equal(got, slices.Concat([]string{bs[0], bs[3]}, mine)) {
			t.Errorf("%v are still here", got)
		}
		for range 30 {
			if r.h.Hidden(bs[0]) || r.h.Hidden(bs[3]) {
				t.Error("a refused cluster is hidden")
			}
			wait(time.Second)
		}
		tried, done := 0, 0
		for _, s := range r.all() {
			if s.m.Cluster == bs[0] {
				tried++
			}
			if s.to == "b" && s.m.Cluster == "" {
				done++
			}
		}
		if tried < 3 || tried > 8 || done > 0 {
			t.Errorf("tried %d times in 30 s; told %d times that there is no more", tried, done)
		}
		r.answers(func(context.Context, string, HandoffMessage) error { return nil })
		wait(8 * time.Second)
		if st := r.h.Status(); len(r.held(bs...)) != 0 || st.Left+st.Refused != 0 {
			t.Errorf("%+v", st)
		}
	})
}

// While an owner that failed is asked again, what it is asked to take is shown, but
// served to no consumer: the message says who had it.
func TestHandoffServesNoConsumerMeanwhile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newHandRig(t, "b")
		id := r.owned("b", 1)[0]
		r.push(id)
		unread := func() int {
			reading, _, err := r.store.Consumers.Begin(1, "p", "", &Conn{}, time.Now())
			if err != nil {
				t.Fatal(err)
			}
			x := &Scraper{Store: r.store, MaxAge: time.Hour, Now: time.Now, Hidden: r.h.HiddenFrom}
			_, n, _ := x.Unread(reading, 0, false, nil)
			return n
		}
		tries := 0
		r.answers(func(context.Context, string, HandoffMessage) error {
			if tries++; tries > 1 && r.h.Hidden(id) {
				t.Error("it is hidden, though its owner fails")
			}
			if n := unread(); n != 0 {
				t.Errorf("try %d: a consumer is served %d samples that are on their way", tries, n)
			}
			return errLost
		})
		r.run()
		wait(30 * time.Second)
		if n := unread(); n == 0 || tries < 2 {
			t.Errorf("between %d tries a consumer is served %d samples", tries, n)
		}
	})
}

// An owner that hangs stops nobody else's. What it owns is shown from when that is
// known until it answers again; then it is hidden until it is gone from here.
func TestHandoffHangingOwner(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newHandRig(t, "b", "c")
		bs, cs := r.owned("b", 5), r.owned("c", 5)
		for _, id := range slices.Concat(bs, cs) {
			r.push(id)
			wait(time.Millisecond)
		}
		hanging := func(ctx context.Context, to string, m HandoffMessage) error {
			if to == "b" {
				return hang(ctx)
			}
			return nil
		}
		r.answers(hanging)
		r.run()
		wait(7 * time.Second)
		if got := r.held(cs...); len(got) > 0 {
			t.Errorf("%v wait for another's owner", got)
		}
		for _, id := range bs {
			if !r.h.Hidden(id) {
				t.Errorf("%s is shown while it is on its way", id)
			}
		}
		wait(20 * time.Second)
		for range 60 { // also while it is tried again
			for _, id := range bs {
				if r.h.Hidden(id) {
					t.Fatalf("%s is shown by nobody", id)
				}
			}
			wait(time.Second)
		}
		late := r.owned("c", 6)[5]
		r.push(late)
		wait(time.Second)
		if got := r.held(late); len(got) > 0 {
			t.Errorf("%v waits for another's owner", got)
		}
		r.answers(func(_ context.Context, to string, m HandoffMessage) error {
			if to == "b" && m.Cluster != "" && m.Cluster != bs[0] && !r.h.Hidden(m.Cluster) {
				t.Errorf("%s is shown while its owner takes it", m.Cluster)
			}
			return nil
		})
		wait(30 * time.Second)
		if got := r.held(bs...); len(got) > 0 {
			t.Errorf("%v are still here", got)
		}
	})
}

// The log may be slow: it keeps no scrape waiting.
func TestHandoffLogsWithoutLock(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newHandRig(t, "b")
		id := r.owned("b", 1)[0]
		said := 0
		r.h.cfg.Log = slog.New(handLog(func(string) { said++; r.h.Hidden(id) }))
		for _, err := range []error{errors.New("broken"), &RefusedByOwner{ErrFull}, nil} {
			r.answers(func(context.Context, string, HandoffMessage) error { return err })
			r.push(id)
			wait(10 * time.Second)
			view, due := r.h.due()
			for owner, held := range due {
				r.h.Pass(t.Context(), view, owner, held)
			}
		}
		if said != 3 {
			t.Errorf("logged %d times", said)
		}
	})
}

// handLog is a log that calls it.
type handLog func(what string)

func (handLog) Enabled(context.Context, slog.Level) bool { return true }
func (l handLog) Handle(_ context.Context, rec slog.Record) error {
	l(rec.Message)
	return nil
}
func (l handLog) WithAttrs([]slog.Attr) slog.Handler { return l }
func (l handLog) WithGroup(string) slog.Handler      { return l }

// A member that came back without having been missed has forgotten what it was told.
func TestHandoffTellsNewSession(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newHandRig(t, "b", "c")
		r.run()
		wait(7 * time.Second)
		r.see("b:new", "c")
		wait(3 * time.Second)
		told := map[string]int{}
		for _, s := range r.all() {
			told[s.to]++
		}
		if want := map[string]int{"b": 2, "c": 1}; !maps.Equal(told, want) {
			t.Errorf("told %v, want %v", told, want)
		}
	})
}

// A member that leaves takes nothing, and listens no more: it is told nothing, or it
// would be taken for an owner that fails.
func TestHandoffTellsNoLeaver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newHandRig(t, "b", "-c")
		r.run()
		wait(20 * time.Second)
		for _, s := range r.all() {
			if s.to != "b" {
				t.Errorf("told %s", s.to)
			}
		}
		r.h.SetLeaving()
		r.see("b", "-c")
		if !r.h.toldAll() {
			t.Error("waits for one that leaves as well")
		}
	})
}

// done has a member say that it has no more.
func (r *handRig) done(from string, ring uint64) {
	r.t.Helper()
	if err := r.h.Take(r.t.Context(), from, HandoffMessage{Ring: ring}); err != nil {
		r.t.Fatal(err)
	}
}

func (r *handRig) version() uint64 { return r.h.cfg.View().Ring.Version() }

// A new owner holds a cluster back for half a minute at most, whoever does not speak,
// and however often the ring changes meanwhile.
func TestHandoffHoldsBack(t *testing.T) {
	// Slots 1 to 5 are of b to f. What is b's goes to others without it.
	setup := func(t *testing.T) (r *handRig, id string) {
		r = newHandRig(t, "b", "c", "d")
		moved := r.owned("b", 300)
		r.done("b", r.version())
		r.done("c", r.version())
		r.done("d", r.version())
		r.see("c", "d", "e")
		with := r.owned("a", 2000)
		r.see("c", "d")
		without := r.owned("a", 2000)
		r.see("b", "c", "d")
		for _, id = range moved {
			if slices.Contains(with, id) && slices.Contains(without, id) {
				r.push(id)
				return r, id
			}
		}
		t.Fatal("no cluster goes from b to a")
		return nil, ""
	}
	for name, test := range map[string]struct {
		then     func(r *handRig) // when b has gone
		from, to time.Duration    // when it has to be shown first
	}{
		"nobody speaks": {func(r *handRig) {}, 29 * time.Second, 31 * time.Second},
		"all speak":     {func(r *handRig) { wait(3 * time.Second); r.done("c", r.version()); r.done("d", r.version()) }, 2 * time.Second, 4 * time.Second},
		"one speaks":    {func(r *handRig) { r.done("c", r.version()) }, 29 * time.Second, 31 * time.Second},
		"the others die": {func(r *handRig) {
			r.done("c", r.version())
			wait(3 * time.Second)
			r.see("c")
			r.done("c", r.version())
		}, 2 * time.Second, 4 * time.Second},
		"of another ring": {func(r *handRig) { r.done("c", 5); r.done("d", 5) }, 29 * time.Second, 31 * time.Second},
		"an old word comes late": {func(r *handRig) {
			old := r.version()
			wait(time.Second)
			r.see("c", "d", "e")
			r.done("c", r.version())
			r.done("d", r.version())
			r.done("c", old)
			r.done("e", r.version())
		}, time.Second, 2 * time.Second},
		"one comes and goes": {func(r *handRig) {
			for i := range 24 {
				time.AfterFunc(time.Duration(i)*5*time.Second, func() { r.see([][]string{{"c", "d", "e"}, {"c", "d"}}[i%2]...) })
			}
		}, 29 * time.Second, 31 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r, id := setup(t)
				defer r.store.Close()
				r.see("c", "d")
				begin := time.Now()
				test.then(r)
				for r.h.Hidden(id) && time.Since(begin) < time.Minute {
					wait(250 * time.Millisecond)
				}
				if at := time.Since(begin); at < test.from || at > test.to {
					t.Errorf("shown after %v", at)
				}
				wait(2 * time.Minute)
				if r.h.Hidden(id) {
					t.Error("hidden again")
				}
			})
		})
	}
}
