package main

// Sessions of a consumer, one for each connection. A scrape on the same connection confirms the
// scrape before it. A new connection gets unconfirmed samples again. Slow or unconfirmed scrapes
// may make later scrapes shorter.

import (
	"io"
	"testing"
	"time"
)

// The first scrapes of a consumer serve at most 50,000 unread samples. Later scrapes serve at most
// twice as many as the largest scrape that the consumer has confirmed and that ended in time.
func TestUnreadLimit(t *testing.T) {
	const allowed = time.Second
	cs, err := OpenConsumers(nil, "", &StoreMeta{}, time.Hour, consumersNow)
	if err != nil {
		t.Fatal(err)
	}
	conn := &AnswerReadTracker{}
	for i, c := range []struct {
		served int
		took   time.Duration
		err    error
		lost   bool // the next scrape comes on a new connection
		want   int  // limit of the next scrape
	}{
		{20_000, 0, nil, false, 50_000},
		{50_000, allowed, nil, false, 100_000},
		{100_000, allowed + 1, nil, false, 100_000},
		{100_000, 0, io.ErrShortWrite, false, 100_000},
		{100_000, 0, nil, true, 100_000},
		{100_000, 0, nil, false, 200_000},
		{1000, 0, nil, false, 200_000},
	} {
		session := beginScrape(t, cs, "c", conn, consumersNow)
		session.MarkServed(1, ReadPosition{Seq: uint64(i + 1)}, c.served)
		session.EndScrapeAndLimitNext(c.took, allowed, c.err)
		if c.lost {
			conn = &AnswerReadTracker{}
		}
		if got := beginScrape(t, cs, "c", conn, consumersNow).UnreadLimit(); got != c.want {
			t.Errorf("after scrape %d the limit is %d, want %d", i, got, c.want)
		}
	}
}

// A scrape that serves unread samples may lower the sample limit of the next scrapes: if its answer
// is written slowly, or if its connection is replaced before the next scrape confirms it. A scrape
// of unread samples that is written in time and confirmed doubles a lowered limit.
func TestSessionSampleLimit(t *testing.T) {
	const allowed = time.Second
	const cut = time.Duration(-1) // the connection broke before the whole answer was written
	type step struct {
		served int // unread samples that the scrape serves
		took   time.Duration
		lost   bool // the next scrape comes on a new connection
		want   int  // sample limit of the next scrape
	}
	for _, test := range []struct {
		name  string
		steps []step
	}{
		{"in time", []step{{8000, allowed, false, 100_000}}},
		{"slow once", []step{{8000, 2 * allowed, false, 4000}, {4000, allowed, false, 8000}, {8000, allowed, false, 16_000}}},
		{"slow several times", []step{{8000, 2 * allowed, false, 4000}, {4000, 2 * allowed, false, 2000}, {2000, 5 * allowed, false, 1000}}},
		{"never below minConsumerLimit", []step{{8000, 100 * allowed, false, 1000}, {500, 100 * allowed, false, 1000}}},
		{"lost once", []step{{8000, 0, true, 4000}, {4000, 0, false, 8000}}},
		{"slow and lost", []step{{8000, 4 * allowed, true, 2000}, {2000, 0, true, 1000}}},
		{"without unread samples", []step{{8000, 2 * allowed, false, 4000}, {0, 2 * allowed, false, 4000}, {0, 0, true, 4000}}},
		{"back to the configured limit", []step{
			{8000, 2 * allowed, false, 4000}, {80_000, 0, false, 8000}, {8000, 0, false, 16_000}, {1, 0, false, 32_000},
			{1, 0, false, 64_000}, {1, 0, false, 100_000}, {1, 0, false, 100_000},
		}},
		// A proxy may lose every answer that the server wrote in time. After three lost answers in a
		// row the limit no longer falls, because the length of the answers is not the cause.
		{"lost for ever", []step{
			{64_000, 0, true, 32_000}, {32_000, 0, true, 16_000}, {16_000, 0, true, 8000}, {8000, 0, true, 8000},
			{8000, 0, true, 8000}, {8000, 0, false, 16_000}, {8000, 0, true, 4000},
		}},
		{"lost, then cut", []step{{64_000, 0, true, 32_000}, {32_000, 0, true, 16_000}, {16_000, 0, true, 8000}, {8000, cut, true, 4000}, {4000, cut, true, 2000}}},
		{"lost, then slow", []step{
			{64_000, 0, true, 32_000}, {32_000, 0, true, 16_000}, {16_000, 0, true, 8000}, {8000, 2 * allowed, true, 4000}, {4000, 2 * allowed, true, 2000},
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			cs, err := OpenConsumers(nil, "", &StoreMeta{}, time.Hour, consumersNow)
			if err != nil {
				t.Fatal(err)
			}
			conn := &AnswerReadTracker{}
			r := beginScrape(t, cs, "c", conn, consumersNow)
			if got := r.SampleLimit(100_000); got != 100_000 {
				t.Fatalf("the first limit is %d, want 100000", got)
			}
			for i, s := range test.steps {
				r.MarkServed(1, ReadPosition{Seq: uint64(i + 1)}, s.served)
				if s.took == cut {
					r.EndScrapeAndLimitNext(0, allowed, io.ErrClosedPipe)
				} else {
					r.EndScrapeAndLimitNext(s.took, allowed, nil)
				}
				if s.lost {
					conn = &AnswerReadTracker{}
				}
				r = beginScrape(t, cs, "c", conn, consumersNow)
				if got := r.SampleLimit(100_000); got != s.want {
					t.Fatalf("after step %d the limit is %d, want %d", i, got, s.want)
				}
			}
		})
	}
}

// If the samples of a scrape were not written, the next scrape on the same connection does not
// confirm them, and its limit is lower if the time was exceeded.
func TestFailedAnswerConfirmsNothing(t *testing.T) {
	cs := openConsumers(t, newStoreFS(1), consumersNow, false)
	conn := &AnswerReadTracker{}
	for _, fails := range []bool{true, false} {
		session := beginScrape(t, cs, "c", conn, consumersNow)
		session.MarkServed(1, ReadPosition{Seq: 5}, 8000)
		var err error
		if fails {
			err = io.ErrClosedPipe
		}
		session.EndScrapeAndLimitNext(2*time.Second, time.Second, err)
		session = beginScrape(t, cs, "c", conn, consumersNow)
		confirmed := session.Position(1).Seq == 5
		if limit := session.SampleLimit(100_000); confirmed == fails || cs.HasConfirmed(session.Key) == fails || limit != 4000 {
			t.Errorf("the answer failed: %t; the next scrape confirms it: %t, the limit is %d, want 4000", fails, confirmed, limit)
		}
	}
}

// A scrape whose samples were not written does not double a lowered limit, even if it ended in time
// and the next scrape comes on the same connection.
func TestFailedAnswerDoublesNoLimit(t *testing.T) {
	cs := openConsumers(t, newStoreFS(1), consumersNow, false)
	conn := &AnswerReadTracker{}
	for i, step := range []struct {
		took time.Duration
		err  error
		want int
	}{{2 * time.Second, nil, 4000}, {0, io.ErrClosedPipe, 4000}, {0, nil, 8000}} {
		session := beginScrape(t, cs, "c", conn, consumersNow)
		session.MarkServed(1, ReadPosition{Seq: uint64(i + 1)}, 8000)
		session.EndScrapeAndLimitNext(step.took, time.Second, step.err)
		if limit := beginScrape(t, cs, "c", conn, consumersNow).SampleLimit(100_000); limit != step.want {
			t.Errorf("after scrape %d the limit is %d, want %d", i, limit, step.want)
		}
	}
}

// sessionRig is a store and three connections of one consumer.
type sessionRig struct {
	*storeKit
	s     *Store
	conns [3]*AnswerReadTracker
}

func newSessionRig(t *testing.T) *sessionRig {
	k := newStoreKit(t, newStoreFS(1))
	return &sessionRig{k, k.open(), [3]*AnswerReadTracker{{}, {}, {}}}
}

// scrape serves all unread samples on a connection, and returns their values. repeats is true if
// the answer repeats samples that were served, but not confirmed, on another connection.
func (r *sessionRig) scrape(conn int) (values string, repeats bool) {
	r.t.Helper()
	session, repeats, err := r.s.Consumers.BeginScrape(1, "c", "", r.conns[conn], r.clock.Now())
	if err != nil {
		r.t.Fatal(err)
	}
	fams, _, _ := scraper(r.s, 0).ServeUnreadAndNewest(session, 0, false, nil)
	return valuesIn(fams), repeats
}

// Each connection of a consumer continues at its own position. A new connection begins at the
// consumer's cursor, which is the newest batch that any of its connections has confirmed.
func TestSessionsOfOneConsumer(t *testing.T) {
	r := newSessionRig(t)
	for i, step := range []struct { // before each scrape one more sample is pushed, with the value 1, 2, …
		conn    int
		want    string
		repeats bool
	}{
		{0, "1 ", false},
		{1, "1 2 ", true}, // connection 0 has not confirmed value 1
		{0, "2 3 ", false},
		{1, "3 4 ", false},
		{0, "4 5 ", false},
		{2, "4 5 6 ", true}, // connection 0 has confirmed the values up to 3
		{0, "6 7 ", false},
		{2, "7 8 ", false},
	} {
		r.push(r.s, "a", point{"x", 1, r.clock.ms(100 - i), float64(i + 1)})
		got, repeats := r.scrape(step.conn)
		if got != step.want || repeats != step.repeats {
			t.Errorf("step %d, connection %d: got values %q, repeats %t; want %q, %t", i, step.conn, got, repeats, step.want, step.repeats)
		}
	}
}

// Each connection of a consumer gets the samples of a site that appears later.
func TestSessionsGetNewSite(t *testing.T) {
	r := newSessionRig(t)
	r.push(r.s, "a", point{"x", 1, r.clock.ms(100), 1})
	for range 4 {
		for conn := range r.conns {
			r.scrape(conn)
		}
	}
	r.push(r.s, "b", point{"x", 1, r.clock.ms(1), -1})
	for conn := range r.conns {
		if got, _ := r.scrape(conn); got != "-1 " {
			t.Errorf("connection %d gets %q of the new site, want -1", conn, got)
		}
		r.scrape(conn)
	}
}

// A connection that has read a part of a batch continues in the batch after a rewrite of the log.
// If samples of the batch expired, the connection gets all remaining samples of the batch, from the
// first one on.
func TestSessionInMiddleOfBatch(t *testing.T) {
	for _, test := range []struct {
		expired int      // number of samples of the batch that expire
		want    []string // by scrape: values of its samples
	}{
		{0, []string{"0 1 2 3 ", "4 5 6 7 ", "8 9 "}},
		{2, []string{"2 3 4 5 ", "2 3 4 5 ", "6 7 8 9 "}},
	} {
		k := newStoreKit(t, newStoreFS(1))
		s := k.open()
		// The rewrite drops this series, and so changes the IDs of the other series.
		k.push(s, "a", point{"x", 100, k.clock.ms(7100), 100})
		evictOldest(t, s, "a")
		var points []point
		for i := range 10 {
			ago := 10
			if i < test.expired {
				ago = 7190
			}
			points = append(points, point{"x", i, k.clock.ms(ago), float64(i)})
		}
		k.push(s, "a", points...)
		k.clock.Add(20 * time.Second)
		conn := &AnswerReadTracker{}
		for i, want := range test.want {
			fams, _, _ := scraper(s, -time.Second).ServeUnreadAndNewest(beginScrape(t, s.Consumers, "c", conn, k.clock.Now()), 4, false, nil)
			if got := valuesIn(fams); got != want {
				t.Errorf("%d samples expired, scrape %d: got values %q, want %q", test.expired, i, got, want)
			}
			rewriteLog(t, s, "a")
		}
	}
}
