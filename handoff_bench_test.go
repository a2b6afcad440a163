package main

// handoff_bench_test.go: what handing over costs when there is nothing to hand over.

import (
	"context"
	"fmt"
	"log/slog"
	"testing"
	"time"
)

// benchHandoff is a member of eleven that holds 10,000 clusters, all its own.
func benchHandoff(b *testing.B) *Handoff {
	store, err := OpenStore(StoreConfig{Retention: time.Hour, MaxSampleAge: time.Hour, Now: time.Now, OnError: func(err error) { b.Error(err) }})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { store.Close() })
	v := &View{Peers: map[string]Peer{}}
	var claims []Claim
	for i := range 11 {
		name := fmt.Sprint("n", i)
		claims = append(claims, Claim{Slot: i, Lamport: uint64(i + 1), Name: name})
		v.Peers[name] = Peer{Name: name}
	}
	v.Ring = NewRing(claims, 11)
	for i, n := 0, 0; n < 10_000; i++ {
		id := fmt.Sprint("site", i)
		if owner, _ := v.Ring.Owner(RingKey(id)); owner == "n0" {
			n++
			if _, err := store.Append(b.Context(), id, storePush(id, point{"m", 0, time.Now().UnixMilli(), 1})); err != nil {
				b.Fatal(err)
			}
		}
	}
	now := time.Now()
	h := NewHandoff(HandoffConfig{
		Name: "n0", Store: store, View: func() *View { return v }, Now: func() time.Time { return now }, Interval: time.Second,
		Log: slog.New(slog.DiscardHandler), Metrics: NewMetrics(),
		Send: func(context.Context, Peer, HandoffMessage) error { return nil },
	})
	h.Hidden("x")
	now = now.Add(10 * time.Second)
	return h
}

// What each tick costs, as a part of a core.
func BenchmarkHandoffTick(b *testing.B) {
	h := benchHandoff(b)
	for b.Loop() {
		view, due := h.due()
		for owner, held := range due {
			h.Pass(b.Context(), view, owner, held)
		}
	}
	b.ReportMetric(100*b.Elapsed().Seconds()/float64(b.N)/handoffTick.Seconds(), "%core")
}

// What hiding adds to a scrape of 10,000 clusters of one sample each.
func BenchmarkHandoffHidden(b *testing.B) {
	for _, heldBack := range []bool{false, true} {
		h := benchHandoff(b)
		for i := range 11 {
			if !heldBack {
				h.Take(b.Context(), fmt.Sprint("n", i), HandoffMessage{Ring: h.cfg.View().Ring.Version()})
			}
		}
		for name, hidden := range map[string]func(string, bool) bool{"without": nil, "with": h.HiddenFrom} {
			b.Run(fmt.Sprintf("heldBack=%t/%s", heldBack, name), func(b *testing.B) {
				x := &Scraper{Store: h.cfg.Store, MaxAge: time.Hour, Now: time.Now, Hidden: hidden}
				for b.Loop() {
					x.Newest(0, nil)
				}
			})
		}
	}
}
