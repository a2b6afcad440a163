package main

// handoff_leave_test.go: servers that leave, one or all at once; messages that come
// again; and what comes while a cluster is on its way. Time is virtual.

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

// leavingRig are servers that share a view, each with its store on a disk.
type leavingRig struct {
	nodes []*handNode
	m     *handModel
	mu    sync.Mutex // guards the rest
	view  *View
}

func newLeavingRig(t *testing.T, n int) *leavingRig {
	m := &handModel{t: t, clock: newStoreClock(), calm: true}
	r := &leavingRig{m: m}
	for i := range n {
		node := &handNode{m: m, name: string(rune('a' + i)), slot: i, fsys: newStoreFS(uint64(i))}
		node.kit = newStoreKit(t, node.fsys)
		node.kit.cfg.Now = time.Now
		node.store = node.kit.open()
		node.handoff = NewHandoff(HandoffConfig{
			Name: node.name, Store: node.store, Now: time.Now, Interval: time.Second, Log: slog.New(slog.DiscardHandler), Metrics: NewMetrics(),
			View: func() *View {
				r.mu.Lock()
				defer r.mu.Unlock()
				return r.view
			},
			Send: func(ctx context.Context, to Peer, msg HandoffMessage) error {
				for _, o := range r.nodes {
					if o.name == to.Name {
						err := o.handoff.Take(ctx, node.name, msg)
						if err != nil && !errors.Is(err, ErrNotOwner) {
							return &RefusedByOwner{err}
						}
						return err
					}
				}
				return errLost
			},
		})
		r.nodes = append(r.nodes, node)
	}
	return r
}

// see has all see these servers as owners.
func (r *leavingRig) see(owners ...string) {
	v := &View{Peers: map[string]Peer{}}
	var claims []Claim
	for _, n := range r.nodes {
		v.Peers[n.name] = Peer{Name: n.name, Session: 1}
		if slices.Contains(owners, n.name) {
			claims = append(claims, Claim{Slot: n.slot, Lamport: uint64(n.slot + 1), Name: n.name})
		}
	}
	v.Ring = NewRing(claims, len(r.nodes))
	r.mu.Lock()
	defer r.mu.Unlock()
	r.view = v
}

// All servers end at once: each keeps on disk what it holds, and none waits for ever,
// whether it hears that the others leave or not. One alone leaves nothing behind.
func TestHandoffLeave(t *testing.T) {
	all := []string{"a", "b", "c"}
	for name, test := range map[string]struct {
		leaving []string
		heard   []string // who is seen as an owner after a second
		most    time.Duration
	}{
		"all, and it is heard":      {all, nil, 3 * time.Second},
		"all, and nobody hears it":  {all, all, 31 * time.Second},
		"all, and one is not heard": {all, []string{"b"}, 31 * time.Second},
		"one":                       {all[:1], all[1:], 3 * time.Second},
		"two":                       {all[:2], all[2:], 3 * time.Second},
		"one, and nobody hears it":  {all[:1], all, 31 * time.Second},
		"two, and one is not heard": {all[:2], all[1:], 31 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newLeavingRig(t, 3)
				r.see(all...)
				want := map[heldSample]float64{}
				for i := range 60 {
					// Some are hints: held by another than the owner.
					n := r.nodes[i%3]
					id := fmt.Sprint("s", i/2)
					p := point{"m", i, time.Now().UnixMilli(), float64(i)}
					n.kit.push(n.store, id, p)
					maps.Copy(want, pushed(id, p))
				}
				ctx, stop := context.WithCancel(t.Context())
				var running, leaving sync.WaitGroup
				for _, n := range r.nodes {
					running.Go(func() { n.handoff.Run(ctx) })
				}
				begin := time.Now()
				for _, n := range r.nodes {
					if slices.Contains(test.leaving, n.name) {
						n.handoff.SetLeaving()
						leaving.Go(func() { n.handoff.Leave(ctx) })
					}
				}
				wait(time.Second)
				r.see(test.heard...)
				leaving.Wait()
				if took := time.Since(begin); took > test.most {
					t.Errorf("it took %v", took)
				}
				if test.most < 30*time.Second && len(test.heard) > 0 {
					for _, n := range r.nodes {
						if left := len(n.store.Stats().Clusters); left > 0 && slices.Contains(test.leaving, n.name) {
							t.Errorf("%s leaves with %d clusters", n.name, left)
						}
					}
				}
				stop()
				running.Wait()
				got := map[heldSample]float64{}
				for _, n := range r.nodes {
					if err := n.store.Close(); err != nil {
						t.Error(err)
					}
					n.fsys.crash()
					s := n.kit.open()
					for s, v := range allHeld(t, s) {
						if _, both := got[s]; both {
							t.Errorf("%v is kept twice", s)
						}
						got[s] = v
					}
					s.Close()
				}
				wantHeld(t, name, got, want)
			})
		})
	}
}

// That this server leaves is heard at any moment: what it owned until then is still to go.
func TestHandoffLeaveHeardMeanwhile(t *testing.T) {
	for after := range 8 {
		synctest.Test(t, func(t *testing.T) {
			r := newHandRig(t, "b")
			defer r.store.Close()
			r.push(r.owned("a", 1)[0])
			r.h.SetLeaving()
			view, due := r.h.due()
			for owner, held := range due {
				r.h.Pass(t.Context(), view, owner, held) // so b knows that there is no more on this ring
			}
			heard := &View{Ring: NewRing([]Claim{{Slot: 1, Lamport: 2, Name: "b"}}, 6), Peers: view.Peers}
			looks := after
			r.h.cfg.View = func() *View {
				if looks--; looks < 0 {
					return heard
				}
				return view
			}
			begin := time.Now()
			r.h.Leave(t.Context()) // and nothing is handed over here
			if time.Since(begin) < leaveWithin {
				t.Errorf("it leaves with what it owned, heard after %d looks", after)
			}
		})
	}
}

// A leaving server waits for what can go, whatever was refused before and is not there
// any more.
func TestHandoffLeaveCountsRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newHandRig(t, "b", "c")
		gone, full, slow := r.owned("b", 1)[0], r.owned("b", 2)[1], r.owned("c", 1)[0]
		for _, id := range []string{gone, full, slow} {
			r.push(id)
		}
		r.answers(func(ctx context.Context, to string, m HandoffMessage) error {
			switch {
			case to == "b" && m.Cluster != "":
				return &RefusedByOwner{ErrFull}
			case to == "c":
				wait := time.NewTimer(3 * time.Second)
				<-wait.C
			}
			return nil
		})
		r.h.SetLeaving()
		r.run()
		wait(time.Second)
		seq := uint64(1 << 60)
		if done, err := r.store.Release(t.Context(), gone, seq, r.store.Oldest()); err != nil || !done {
			t.Fatal(done, err)
		}
		r.h.Leave(t.Context())
		if got := r.held(gone, full, slow); !slices.Equal(got, []string{full}) {
			t.Errorf("left with %v", got)
		}
	})
}

// Who leaves with clusters says what becomes of them.
func TestHandoffLeaveSaysWhatIsKept(t *testing.T) {
	for dir, want := range map[string]string{"": "lost", "/s": "kept on disk"} {
		for _, answer := range []error{&RefusedByOwner{ErrFull}, errLost} {
			synctest.Test(t, func(t *testing.T) {
				r := newHandRig(t, "b")
				kit := newStoreKit(t, newStoreFS(1))
				kit.cfg.Dir, kit.cfg.Now = dir, time.Now
				r.store = kit.open()
				r.h.cfg.Store = r.store
				said := ""
				r.h.cfg.Log = slog.New(handLog(func(what string) {
					if strings.HasPrefix(what, "leaving") {
						said = what
					}
				}))
				r.push(r.owned("b", 1)[0])
				r.answers(func(context.Context, string, HandoffMessage) error { return answer })
				r.h.SetLeaving()
				r.run()
				r.h.Leave(t.Context())
				if !strings.Contains(said, want) {
					t.Errorf("in %q, %v: %s", dir, answer, said)
				}
			})
		}
	}
}

// taker is a server that takes what handRig sends, under its name.
func (r *handRig) taker(name string) *Handoff {
	store, err := OpenStore(StoreConfig{Retention: 2 * time.Hour, MaxSampleAge: time.Hour, Now: time.Now, OnError: func(err error) { r.t.Error(err) }})
	if err != nil {
		r.t.Fatal(err)
	}
	return NewHandoff(HandoffConfig{
		Name: name, Store: store, View: r.h.cfg.View, Now: time.Now, Interval: time.Second, Log: slog.New(slog.DiscardHandler), Metrics: NewMetrics(),
		Send: func(context.Context, Peer, HandoffMessage) error { return errLost },
	})
}

// A message that comes again, after a lost answer, a minute late, or with the version of
// a ring that is no more, adds nothing; and nothing is read twice of it.
func TestHandoffRepeatedMessage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newHandRig(t, "b")
		b := r.taker("b")
		id := r.owned("b", 1)[0]
		var messages []HandoffMessage
		lost := true
		r.answers(func(ctx context.Context, to string, m HandoffMessage) error {
			err := b.Take(ctx, "a", m)
			if m.Cluster != "" {
				messages = append(messages, m)
				if lost {
					return errLost // the answer
				}
			}
			return err
		})
		want := map[heldSample]float64{}
		for i := range 3 {
			p := point{"m", 0, time.Now().UnixMilli(), float64(i)}
			r.push(id, p)
			maps.Copy(want, pushed(id, p))
			wait(time.Second)
		}
		reading, _, err := b.cfg.Store.Consumers.Begin(1, "p", "", "c1", time.Now())
		if err != nil {
			t.Fatal(err)
		}
		read := func() int {
			x := &Scraper{Store: b.cfg.Store, MaxAge: -time.Second, Now: time.Now}
			_, n, _ := x.Unread(reading, 0, false, nil)
			b.cfg.Store.Consumers.Begin(1, "p", "", "c1", time.Now())
			return n
		}
		pass := func() {
			wait(6 * time.Second)
			view, due := r.h.due()
			for owner, held := range due {
				r.h.Pass(t.Context(), view, owner, held)
			}
		}
		pass()
		if n := read(); n != 3 || len(r.held(id)) != 1 {
			t.Errorf("read %d", n)
		}
		lost = false
		pass()
		if len(r.held(id)) != 0 || len(messages) != 2 {
			t.Errorf("%v is still here after %d messages", id, len(messages))
		}
		wait(time.Minute)
		messages[0].Ring = 1
		for _, m := range messages {
			if err := b.Take(t.Context(), "a", m); err != nil {
				t.Error(err)
			}
		}
		wantHeld(t, "at the owner", allHeld(t, b.cfg.Store), want)
		if n := read(); n != 0 {
			t.Errorf("%d samples are read again", n)
		}
		// A ring later b owns it no more, nor takes it; nor while it leaves.
		r.see()
		if err := b.Take(t.Context(), "a", messages[0]); !errors.Is(err, ErrNotOwner) {
			t.Error(err)
		}
		r.see("b")
		b.SetLeaving()
		if err := b.Take(t.Context(), "a", messages[0]); !errors.Is(err, ErrNotOwner) {
			t.Error(err)
		}
	})
}

// While a piece is on its way there are pushes, new, late and repeated, and the log is
// compacted: all arrives, once.
func TestHandoffMeanwhile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newHandRig(t, "b")
		b := r.taker("b")
		id := r.owned("b", 1)[0]
		want := map[heldSample]float64{}
		now := time.Now().UnixMilli()
		push := func(points ...point) {
			r.push(id, points...)
			maps.Copy(want, pushed(id, points...))
		}
		repeated := point{"m", 0, now, 1}
		push(repeated, point{"m", 1, now, 1})
		push(point{"m", 0, now + 1, 1})
		during := []func(){
			func() {
				push(point{"m", 0, now + 2, 2}, point{"new", 0, now, 3}) // newer
				push(repeated, point{"m", 1, now - 1000, 4})             // late, and one that is on its way
			},
			func() {
				push(point{"m", 0, now + 3, 5})
				site := r.store.clusters[id]
				if err := site.Take(t.Context()); err != nil {
					t.Error(err)
				}
				if err := site.Rewrite(nil, r.store.Oldest()); err != nil {
					t.Error(err)
				}
				site.Free()
			},
			func() { push(point{"m", 0, now + 4, 5}) },
		}
		n := 0
		r.answers(func(ctx context.Context, to string, m HandoffMessage) error {
			if err := b.Take(ctx, "a", m); err != nil || m.Cluster == "" {
				return err
			}
			if n++; n <= len(during) {
				during[n-1]()
			}
			return nil
		})
		r.run()
		wait(10 * time.Second)
		if len(r.held(id)) > 0 || n < 4 {
			t.Errorf("still here after %d pieces", n)
		}
		wantHeld(t, "at the owner", allHeld(t, b.cfg.Store), want)
	})
}

// Two servers hold pushes of one site, some of them the same, and have shifted its slow
// clock by what each measured: where both meet, each sample of the source is there once.
func TestHandoffMergesBySourceTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newHandRig(t, "b")
		b := r.taker("b")
		id := r.owned("b", 1)[0]
		r.answers(func(ctx context.Context, to string, m HandoffMessage) error { return b.Take(ctx, "a", m) })
		source := time.Now().UnixMilli() - 120_000
		at := func(store *Store, n int, offset int64) {
			p := storePush(id, point{"m", 0, source + int64(n)*1000, float64(n)})
			p.Clock = ScrapeClock{Known: true, Offset: offset, Base: source, Boot: 7}
			if _, err := store.Append(t.Context(), id, p); err != nil {
				t.Fatal(err)
			}
		}
		for n := range 6 {
			if n != 2 {
				at(b.cfg.Store, n, 120_000)
			}
			if n != 4 {
				at(r.store, n, 121_500)
			}
		}
		r.run()
		wait(10 * time.Second)
		if len(r.held(id)) > 0 {
			t.Error("still here")
		}
		values := map[float64]int{}
		for _, v := range allHeld(t, b.cfg.Store) {
			values[v]++
		}
		if want := map[float64]int{0: 1, 1: 1, 2: 1, 3: 1, 4: 1, 5: 1}; !maps.Equal(values, want) {
			t.Errorf("held, by value: %v", values)
		}
	})
}

// What an owner does not take of what is handed to it, and who hands it over drops, is
// counted: what its retention has outlived, as elsewhere, and values in conflict.
func TestHandoffCountsWhatIsDropped(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newHandRig(t, "b")
		b := r.taker("b")
		b.cfg.Store.cfg.Retention = 10 * time.Minute
		id := r.owned("b", 1)[0]
		r.answers(func(ctx context.Context, to string, m HandoffMessage) error { return b.Take(ctx, "a", m) })
		now := time.Now().UnixMilli()
		push := func(store *Store, points ...point) {
			if _, err := store.Append(t.Context(), id, storePush(id, points...)); err != nil {
				t.Fatal(err)
			}
		}
		scrape := func(store *Store) *Reading {
			reading, _, err := store.Consumers.Begin(1, "p", "", "c", time.Now())
			if err != nil {
				t.Fatal(err)
			}
			return reading
		}
		push(b.cfg.Store, point{"m", 9, now, 1})
		scrape(b.cfg.Store)
		push(r.store, point{"m", 0, now - 3600_000, 1}, point{"m", 9, now, 2})
		(&Scraper{Store: r.store, MaxAge: -time.Second, Now: time.Now}).Unread(scrape(r.store), 0, false, nil)
		scrape(r.store) // so what it was served has arrived
		push(r.store, point{"m", 1, now - 3600_000, 1}, point{"m", 2, now - 3600_000, 1}, point{"m", 2, now, 1})
		r.run()
		wait(10 * time.Second)
		if len(r.held(id)) > 0 {
			t.Error("still here")
		}
		if st := b.cfg.Store.Stats(); st.Expired != 3 || st.Unread != 2 {
			t.Errorf("%d expired, of which %d were not had", st.Expired, st.Unread)
		}
		if text := metricsText(t, b.cfg.Metrics); !strings.Contains(text, "\ntelemeter_handoff_conflicting_samples_total 1\n") {
			t.Errorf("the conflict is not counted:\n%s", text)
		}
	})
}
