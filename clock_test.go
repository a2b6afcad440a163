package main

// clock_test.go: what is learned of a source's clock, from pushes that are slow, clocks
// that step, machines that boot, and senders that say nonsense.

import (
	"math"
	"math/rand/v2"
	"net/http"
	"strconv"
	"testing"
	"time"
)

func TestNewScrapeClock(t *testing.T) {
	const now = 1_700_000_000_000
	for _, test := range []struct {
		name                           string
		source, bootTime, age, arrival int64
		want                           ScrapeClock
	}{
		{"right", now - 5000, 100_000, 5000, now, ScrapeClock{true, 0, now - 105_000, 7}},
		{"an hour behind", now - 3_605_000, 100_000, 5000, now, ScrapeClock{true, 3_600_000, now - 3_705_000, 7}},
		{"never set", 0, 0, 0, now, ScrapeClock{true, now, 0, 7}},
		{"far ahead", MaxClockTime, MaxClockTime, MaxClockTime, now, ScrapeClock{true, now - 2*MaxClockTime, 0, 7}},
		{"source before its time", -1, 0, 0, now, ScrapeClock{}},
		{"boot-time clock before its time", now, -1, 0, now, ScrapeClock{}},
		{"sent before it was scraped", now, 0, -1, now, ScrapeClock{}},
		{"beyond any clock", MaxClockTime + 1, 0, 0, now, ScrapeClock{}},
		{"overflows", math.MaxInt64, math.MaxInt64, math.MaxInt64, now, ScrapeClock{}},
		{"overflows below", math.MinInt64, math.MinInt64, math.MinInt64, now, ScrapeClock{}},
	} {
		if got, ok := NewScrapeClock(test.source, test.bootTime, 7, test.age, test.arrival); got != test.want || ok != test.want.Known {
			t.Errorf("%s: %+v, %t, want %+v", test.name, got, ok, test.want)
		}
		// What is known comes back from disk.
		b := &Batch{Seq: 1, Clock: test.want, Shift: test.want.Offset}
		if got, err := DecodeBatch(EncodeBatch(nil, b)); err != nil || got.Clock != test.want {
			t.Errorf("%s: read back %+v, %v", test.name, got, err)
		}
	}
}

// What the headers say that no clock can is as if they were not there: it costs the
// clock, not the samples.
func TestPushClock(t *testing.T) {
	arrival := time.UnixMilli(1_700_000_000_000)
	now := arrival.UnixMilli()
	source := strconv.FormatInt(now-65_000, 10)
	for _, test := range []struct {
		name                     string
		source, boot, id, age    string
		known, bootKnown, sayNow bool
	}{
		{"all", source, "1000", "b", "5000", true, true, false},
		{"none", "", "", "", "", false, false, true},
		{"no boot ID", source, "1000", "", "5000", true, false, false},
		{"no source", "", "1000", "b", "5000", false, false, true},
		{"no boot-time clock", source, "", "b", "5000", false, false, true},
		{"no age", source, "1000", "b", "", false, false, true},
		{"text", "soon", "1000", "b", "5000", false, false, true},
		{"a fraction", source, "1000.5", "b", "5000", false, false, true},
		{"negative", source, "1000", "b", "-5000", false, false, true},
		{"absurd", "9007199254740993", "1000", "b", "5000", false, false, true},
		{"overflow", source, "1000", "b", "99999999999999999999", false, false, true},
	} {
		h := http.Header{}
		for name, value := range map[string]string{SourceClockHeader: test.source, BootClockHeader: test.boot, BootIDHeader: test.id, ScrapeAgeHeader: test.age} {
			if value != "" {
				h.Set(name, value)
			}
		}
		clock, at := PushClock(h, arrival)
		want := ScrapeClock{}
		if test.known {
			want = ScrapeClock{Known: true, Offset: 60_000, Base: now - 66_000, Boot: clock.Boot}
		}
		if clock != want || (clock.Boot != 0) != test.bootKnown || (at == now) != test.sayNow {
			t.Errorf("%s: %+v, %d", test.name, clock, at)
		}
	}
	a, _ := PushClock(http.Header{SourceClockHeader: {source}, BootClockHeader: {"1"}, BootIDHeader: {"a"}, ScrapeAgeHeader: {"1"}}, arrival)
	b, _ := PushClock(http.Header{SourceClockHeader: {source}, BootClockHeader: {"1"}, BootIDHeader: {"b"}, ScrapeAgeHeader: {"1"}}, arrival)
	if a.Same(b) || !a.Same(a) {
		t.Error("two boots are one")
	}
}

// clockPush is a push, in ms.
type clockPush struct {
	ahead int64  // of the source's clock before the truth
	delay int64  // on its way
	boot  uint64 // that the client runs in, 0 if it does not say; one lasts an hour before another
	want  int64  // shift
}

func TestSourceClock(t *testing.T) {
	const (
		second = int64(1000)
		minute = 60 * second
		hour   = 60 * minute
		day    = 24 * hour
	)
	again := func(n int, p clockPush) (all []clockPush) {
		for range n {
			all = append(all, p)
		}
		return all
	}
	join := func(parts ...[]clockPush) (all []clockPush) {
		for _, p := range parts {
			all = append(all, p...)
		}
		return all
	}
	for _, test := range []struct {
		name   string
		pushes []clockPush
	}{
		{"right", again(20, clockPush{0, 50, 1, 0})},
		{"a little wrong", again(20, clockPush{59 * second, 0, 1, 0})},
		{"wrong by a minute", again(20, clockPush{minute, 0, 1, -minute})},
		{"an hour behind", again(20, clockPush{-hour, 50, 1, hour + 50})},
		{"slow pushes of a right clock", join(
			again(1, clockPush{0, 50, 1, 0}), again(7, clockPush{0, 10 * minute, 1, 0}),
			again(1, clockPush{0, 50, 1, 0}), again(7, clockPush{0, 2 * hour, 1, 0}))},
		{"slow pushes of a wrong clock", join(
			again(1, clockPush{hour, 50, 1, 50 - hour}), again(7, clockPush{hour, 10 * minute, 1, 50 - hour}))},
		{"a slow push first", join(
			again(1, clockPush{0, 10 * minute, 1, 10 * minute}), again(3, clockPush{0, 50, 1, 50}))},
		{"an hour forward, and back", join(
			again(9, clockPush{0, 50, 1, 0}), again(9, clockPush{hour, 50, 1, 50 - hour}), again(9, clockPush{0, 50, 1, 50}))},
		{"an hour back, and forward", join(
			again(9, clockPush{0, 50, 1, 0}), again(9, clockPush{-hour, 50, 1, hour + 50}), again(9, clockPush{0, 50, 1, 50}))},
		{"forward with a slow push", join(
			again(9, clockPush{0, 50, 1, 0}), again(1, clockPush{hour, minute, 1, minute - hour}), again(9, clockPush{hour, 50, 1, 50 - hour}))},
		{"drift", join(
			again(9, clockPush{hour, 0, 1, -hour}), again(9, clockPush{hour - 5*second, 0, 1, -hour}),
			// The other way only when none of the last is as it was.
			again(7, clockPush{hour - 6*second, 0, 1, -hour}), again(9, clockPush{hour - 6*second, 0, 1, 6*second - hour}),
			again(1, clockPush{hour, 0, 1, -hour}))},
		{"set right, and under watch", join(
			again(9, clockPush{hour, 0, 1, -hour}), again(1, clockPush{0, 0, 1, 1}), again(9, clockPush{20 * second, 0, 1, -20 * second}))},
		{"boots, and is right", join(
			again(9, clockPush{0, 50, 1, 0}), again(9, clockPush{0, 60, 2, 0}))},
		{"boots, and is wrong", join(
			again(9, clockPush{0, 50, 1, 0}), again(9, clockPush{day, 50, 2, 50 - day}))},
		{"was wrong, boots, and is right", join(
			again(9, clockPush{-day, 50, 1, day + 50}), again(9, clockPush{0, 50, 2, 50}))},
		{"boots, and the first push is slow", join(
			again(9, clockPush{0, 50, 1, 0}), again(1, clockPush{0, 29 * second, 2, 0}), again(9, clockPush{0, 50, 2, 0}))},
		{"boots are not told", join(
			again(9, clockPush{0, 50, 0, 0}), again(7, clockPush{0, 10 * minute, 0, 0}), again(1, clockPush{0, 50, 0, 0}),
			again(9, clockPush{hour, 50, 0, 50 - hour}), again(9, clockPush{0, 50, 0, 50}))},
		// As when a source states its clock only at times, and else the client's counts.
		{"two clocks in turn", join(
			again(1, clockPush{0, 50, 1, 0}), again(1, clockPush{hour, 50, 1, 50 - hour}), again(1, clockPush{0, 50, 1, 50}),
			again(1, clockPush{hour, 50, 1, 50 - hour}))},
	} {
		t.Run(test.name, func(t *testing.T) {
			var c, kept SourceClock
			now := int64(1_700_000_000_000)
			began := now - hour
			for i, p := range test.pushes {
				if now += 15 * second; i > 0 && p.boot != test.pushes[i-1].boot {
					now += hour
					began = now - minute
				}
				s, ok := NewScrapeClock(now+p.ahead, now-began, p.boot, 10*second, now+10*second+p.delay)
				if !ok {
					t.Fatal("not a clock")
				}
				// A copy that is stored with each batch, and taken up at each, goes on alike:
				// only that it knows but the least of the last measurements.
				if i > 0 && i%3 == 0 {
					kept = SourceClock{}
					kept.Resume(c.State())
				} else {
					kept = c
				}
				if got := kept.Observe(s); got != p.want {
					t.Fatalf("push %d, taken up: shifted by %d, want %d", i, got, p.want)
				}
				if got := c.Observe(s); got != p.want {
					t.Fatalf("push %d: shifted by %d, want %d", i, got, p.want)
				}
				if got := c.Observe(ScrapeClock{}); got != 0 {
					t.Fatalf("who tells nothing is shifted by %d", got)
				}
			}
			if offset, known := c.Offset(); !known || len(c.offsets) > clockWindow {
				t.Errorf("offset %d, known %t, of %d", offset, known, len(c.offsets))
			}
		})
	}
}

// What another server followed counts where nothing was measured, or for a clock that
// seemed right.
func TestSourceClockLearns(t *testing.T) {
	s := ScrapeClock{Known: true, Offset: 50, Base: 1, Boot: 1}
	for _, test := range []struct {
		name         string
		own, learned ScrapeClock
		shift, want  int64 // shift that was learned; that the next measurement gives
	}{
		{"nothing of nothing", ScrapeClock{}, ScrapeClock{}, 0, 0},
		{"wrong of nothing", ScrapeClock{}, s, 40, 40},
		{"wrong of right", s, s, 40, 40},
		{"right of right", s, s, 0, 0},
	} {
		var c SourceClock
		c.Observe(test.own)
		c.Learn(test.learned, test.shift)
		if got := c.Observe(s); got != test.want {
			t.Errorf("%s: shifted by %d, want %d", test.name, got, test.want)
		}
	}
	var c SourceClock
	c.Observe(ScrapeClock{Known: true, Offset: 3_600_000, Base: 1, Boot: 1})
	c.Learn(s, 40)
	if got, _ := c.Offset(); got != 3_600_000 {
		t.Errorf("what was measured is overridden: %d", got)
	}
}

// clockSite is a client with a source whose clock steps, seen from outside: what it
// scraped and no server has confirmed, and what a push tells.
type clockSite struct {
	id           string
	ahead        int64 // ms; of the source's clock before the truth
	boot         uint64
	booted       int64
	scrapes      int // so far; each is one sample, of that value
	times        []int64
	spool        []clockScrape
	acknowledged int
}

type clockScrape struct {
	source, bootTime int64
	boot             uint64
	at               int64 // the truth
	v                float64
}

func (c *clockSite) scrape(now int64) {
	c.scrapes++
	c.times = append(c.times, now)
	c.spool = append(c.spool, clockScrape{now + c.ahead, now - c.booted, c.boot, now, float64(c.scrapes)})
}

// next returns the oldest scrapes that may travel together, as the spool has it.
func (c *clockSite) next() (n int) {
	for n < len(c.spool) && n < 20 {
		a, b := c.spool[0], c.spool[n]
		if a.boot != b.boot || !near(a.source-a.bootTime, b.source-b.bootTime, sameClock.Milliseconds()) {
			break
		}
		n++
	}
	return n
}

// Whatever a site's clocks do, and however slow or repeated its pushes are, no sample of
// it is there twice; while nothing of another site changes.
func TestClocksOfTwoSites(t *testing.T) {
	for seed := range uint64(200) {
		rng := rand.New(rand.NewPCG(seed, 0))
		k := newStoreKit(t, newStoreFS(seed))
		s := k.open()
		wrong, right := &clockSite{id: "wrong", boot: 1}, &clockSite{id: "right", boot: 1}
		wrong.booted, right.booted = k.clock.ms(60), k.clock.ms(3600)
		if rng.IntN(2) == 0 {
			wrong.ahead = rng.Int64N(2*3600_000) - 3600_000
		}
		push := func(c *clockSite, slow int64) {
			n := c.next()
			if n == 0 {
				return
			}
			sent := k.clock.ms(0)
			k.clock.Add(time.Duration(slow) * time.Millisecond) // the head arrives late
			newest := c.spool[n-1]
			var points []point
			for _, sc := range c.spool[:n] {
				points = append(points, point{"m", 0, sc.source, sc.v})
			}
			p := storePush(c.id, points...)
			var ok bool
			if p.Clock, ok = NewScrapeClock(newest.source, newest.bootTime, newest.boot, sent-newest.at, k.clock.ms(0)); !ok {
				t.Fatal("not a clock")
			}
			res, err := s.Append(t.Context(), c.id, p)
			if err != nil {
				t.Fatal(err)
			}
			if c == right && res.Conflicts+res.TooOld+res.Future > 0 {
				t.Errorf("seed %d: %+v", seed, res)
			}
			c.acknowledged += res.Accepted
			if rng.IntN(4) > 0 { // else the answer is lost
				c.spool = c.spool[n:]
			}
		}
		for range 150 {
			k.clock.Add(15 * time.Second)
			now := k.clock.ms(0)
			right.scrape(now)
			push(right, 0)
			wrong.scrape(now)
			switch rng.IntN(40) {
			case 0:
				wrong.ahead += 3600_000
			case 1:
				wrong.ahead -= 3600_000
			case 2:
				wrong.boot++
				wrong.booted = k.clock.ms(1)
			case 3:
				wrong.ahead += rng.Int64N(40_000) - 20_000 // as ntpd does after a while
			case 4, 5, 6, 7:
				continue // the path is down
			}
			slow := rng.Int64N(200)
			if rng.IntN(10) == 0 {
				slow = rng.Int64N(20_000)
			}
			push(wrong, slow)
		}
		for _, c := range []*clockSite{right, wrong} {
			seen := map[float64]int{}
			for key, v := range heldOf(t, s, c.id) {
				if seen[v]++; seen[v] > 1 {
					t.Errorf("seed %d: sample %v of %s is there twice", seed, v, c.id)
				}
				// Less than a minute is not shifted, and a push that took long is not known to have.
				off, most := key.t-c.times[int(v)-1], clockTrust+clockStep
				if c == right {
					most = 0
				}
				if !near(off, 0, int64(most)) {
					t.Errorf("seed %d: sample %v of %s is off by %d ms", seed, v, c.id, off)
				}
			}
			if len(seen) != c.acknowledged {
				t.Errorf("seed %d: %s: %d samples are there of %d accepted", seed, c.id, len(seen), c.acknowledged)
			}
		}
	}
}
