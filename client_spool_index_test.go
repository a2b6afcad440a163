package main

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"
)

// planOf returns a plan of scrapes as text says, numbers from 1: u undelivered, h held,
// e elsewhere, ? uncertain.
func planOf(text string) *spoolIndex {
	p := &spoolIndex{}
	for i, b := range []byte(text) {
		e := spoolEntry{Scrape: Scrape{Number: uint64(i + 1), Size: 10, Samples: 1}, gzipSize: 10, footprint: 1}
		switch b {
		case 'h':
			e.state = ScrapeHeld
		case 'e':
			e.state = ScrapeElsewhere
		case '?':
			e.uncertain = true
		}
		p.add(e)
	}
	return p
}

// states is the reverse of planOf, with the numbers of what is there, "-" for others.
func (p *spoolIndex) states() string {
	b := []byte(strings.Repeat("-", 10))
	for _, e := range p.entries {
		b[e.Number-1] = "uhe"[e.state]
		if e.uncertain {
			b[e.Number-1] = '?'
		}
	}
	return strings.TrimRight(string(b), "-")
}

// pickNumbers returns the numbers that make the next push.
func (p *spoolIndex) pickNumbers(now int64, l PushLimits) string {
	var r Ranges
	for _, e := range p.beginPush(now, l, func(*spoolEntry) bool { return true }) {
		r = r.Add(e.Number, e.Number)
	}
	return r.String()
}

func mustRanges(text string) Ranges {
	r, err := ParseRanges(text, MaxRanges)
	if err != nil {
		panic(err)
	}
	return r
}

func TestSpoolPlanStep(t *testing.T) {
	const now = 1_000_000
	for _, tt := range []struct {
		have   string
		change func(p *spoolIndex)
		want   DrainStep
		wait   time.Duration
		picks  string
	}{
		{have: "", want: StepDone},
		{have: "uu", want: StepPush, picks: "1-2"},
		{have: "u?u", want: StepAsk, picks: "1,3"}, // never what is uncertain
		{have: "hue", want: StepPush, picks: "2"},
		{have: "hehe", want: StepPush, picks: "2,4"},
		{have: "he", change: func(p *spoolIndex) { p.elsewhereAt = now + 300 }, want: StepWait, wait: 300 * time.Millisecond},
		{have: "he", change: func(p *spoolIndex) { p.failing = true }, want: StepAsk},
		{have: "heu", change: func(p *spoolIndex) { p.failing = true }, want: StepPush, picks: "3"},
		{have: "hh", want: StepAsk},
		{have: "hh", change: func(p *spoolIndex) { p.askAt = now + 1 }, want: StepDone},
		{have: "uh", change: func(p *spoolIndex) { p.entries[0].retryAt, p.askAt = now+1, now+1 }, want: StepDone},
		{have: "ue", change: func(p *spoolIndex) { p.entries[0].retryAt = now + 1 }, want: StepPush, picks: "2"},
		{have: "ue", change: func(p *spoolIndex) { p.entries[0].retryAt = now }, want: StepPush, picks: "1"},
		// A scrape that no server takes holds up nothing else.
		{have: "uuu", change: func(p *spoolIndex) { p.entries[0].declined = true }, want: StepPush, picks: "2-3"},
		{have: "uee", change: func(p *spoolIndex) { p.entries[0].declined, p.entries[1].declined = true, true }, want: StepPush, picks: "3"},
		{have: "ue", change: func(p *spoolIndex) { p.entries[0].declined, p.elsewhereAt = true, now+1 }, want: StepPush, picks: "1"},
		{have: "ue", change: func(p *spoolIndex) { p.entries[0].declined, p.entries[1].declined = true, true }, want: StepPush, picks: "1"},
	} {
		p := planOf(tt.have)
		if tt.change != nil {
			tt.change(p)
		}
		step, wait := p.nextStep(now)
		if picks := p.pickNumbers(now, noLimits); step != tt.want || wait != tt.wait || picks != tt.picks {
			t.Errorf("%+v: step %d, wait %v, picks %s", tt, step, wait, picks)
		}
	}
}

func TestSpoolPlanLimits(t *testing.T) {
	sparse := &spoolIndex{}
	for i := range uint64(MaxPushRanges + 5) {
		sparse.add(spoolEntry{Scrape: Scrape{Number: 2*i + 1}})
		if i < 3 { // in one range with the one before
			sparse.add(spoolEntry{Scrape: Scrape{Number: 2*i + 2}})
		}
	}
	if got := sparse.beginPush(0, noLimits, func(*spoolEntry) bool { return true }); len(got) != MaxPushRanges+6 {
		t.Errorf("%d scrapes in one push", len(got))
	}
	for _, tt := range []struct {
		l    PushLimits
		want string
	}{
		{PushLimits{25, 1000, 10}, "1-2"}, {PushLimits{1000, 25, 10}, "1-2"}, {PushLimits{1000, 1000, 3}, "1-3"}, {PushLimits{1, 1, 0}, "1"},
	} {
		for _, have := range []string{"uuuu", "eeee"} {
			if got := planOf(have).pickNumbers(0, tt.l); got != tt.want {
				t.Errorf("%+v of %s: picks %s", tt.l, have, got)
			}
		}
	}
}

func TestSpoolPlanAnswer(t *testing.T) {
	for _, tt := range []struct {
		name       string
		have       string
		push       bool
		held, read string // "!" in held: the server does not know spools; in read: 200 is the end
		want       string
		declined   string
	}{
		{"held", "uu", true, "1-2", "", "hh", ""},
		{"read at once", "uu", true, "", "1-2", "", ""},
		{"read, not in the push", "hhe?u", true, "5", "1-4", "----h", ""},
		{"one declined", "uuu", true, "1,3", "", "huh", "2"},
		{"all declined", "uu", true, "", "", "uu", "1-2"},
		{"another server", "hhe", false, "2", "", "ehe", ""},
		{"uncertain", "???", false, "2", "3", "uh", ""},
		{"elsewhere again", "ee", true, "1-2", "", "hh", ""},
		{"elsewhere declined", "ee", true, "1", "", "he", "2"},
		{"no consumer", "hu?u", true, "1-2", "!", "h-uu", "4"},
		{"no consumer, not held", "hu", true, "", "!", "eu", "2"},
		{"no consumer, a question", "h?", false, "1-2", "!", "hh", ""},
		{"an old server", "u?he", true, "!", "!", "-uee", ""},
		{"an old server, a question", "u?he", false, "!", "!", "uuee", ""},
		{"what is not in the spool", "u", true, "1,7-9", "2-5", "h", ""},
	} {
		p := planOf(tt.have)
		if tt.push {
			p.pickNumbers(5, noLimits)
		}
		a := SpoolAnswer{Server: "a", KnowsSpools: tt.held != "!", DoneWhenHeld: tt.read == "!"}
		if a.KnowsSpools {
			a.Held = mustRanges(tt.held)
		}
		if !a.DoneWhenHeld {
			a.Read = mustRanges(tt.read)
		}
		before := len(p.entries)
		done, out := p.applyAnswer(5, a)
		if got := p.states(); got != tt.want || out.Declined.String() != tt.declined || len(done) != before-len(p.entries) || p.diskBytes != int64(len(p.entries)) {
			t.Errorf("%s: %q, declined %q; %d gone, %d bytes", tt.name, got, out.Declined, len(done), p.diskBytes)
		}
		if slices.ContainsFunc(p.entries, func(e spoolEntry) bool { return e.inFlight }) {
			t.Errorf("%s: some are still in flight", tt.name)
		}
	}
}

// A scrape that is declined alone waits a minute, and is reported once.
func TestSpoolPlanDeclined(t *testing.T) {
	p := planOf("u")
	for i, now := range []int64{0, 60_000, 120_000} {
		if got := p.pickNumbers(now, noLimits); got != "1" {
			t.Errorf("at %d: picks %q", now, got)
		}
		_, out := p.applyAnswer(now, SpoolAnswer{KnowsSpools: true})
		if out.FirstDecline != (i == 0) || out.Declined.String() != "1" || p.pickNumbers(now+59_999, noLimits) != "" {
			t.Errorf("at %d: %+v", now, out)
		}
	}
}

// An attempt without an answer: what was pushed is uncertain, what was held stays held.
func TestSpoolPlanFailed(t *testing.T) {
	for have, want := range map[string]string{"uhu": "?h?", "he": "h?", "hh": "hh"} {
		p := planOf(have)
		p.pickNumbers(0, noLimits)
		if p.markPushFailed(false); p.states() != want {
			t.Errorf("%s: %s", have, p.states())
		}
		// The next answer says what is so.
		if p.applyAnswer(0, SpoolAnswer{KnowsSpools: true, Held: mustRanges("1-9")}); p.states() != strings.Repeat("h", len(have)) {
			t.Errorf("%s: then %s", have, p.states())
		}
	}
	p := planOf("e")
	p.pickNumbers(0, noLimits)
	p.markPushFailed(false)
	if p.applyAnswer(0, SpoolAnswer{KnowsSpools: true}); p.states() != "e" {
		t.Errorf("what a server held is %s", p.states())
	}
}

// An attempt that a server refused for now: all is as it was, but what is elsewhere waits
// until a question is answered.
func TestSpoolPlanRefused(t *testing.T) {
	for have, want := range map[string]DrainStep{"uhu": StepPush, "uhe": StepPush, "he": StepAsk} {
		p := planOf(have)
		p.pickNumbers(0, noLimits)
		p.markPushFailed(true)
		if step, _ := p.nextStep(time.Hour.Milliseconds()); p.states() != have || step != want {
			t.Errorf("%s: %s, step %v, want %v", have, p.states(), step, want)
		}
	}
}

func TestSpoolPlanHeldSince(t *testing.T) {
	p := planOf("uu")
	if _, ok := p.noReadProgressSince(); ok {
		t.Error("nothing is held")
	}
	for _, tt := range []struct {
		now   int64
		to    string
		held  string
		since int64
		ok    bool
	}{
		{5, "a", "1", 5, true}, {7, "a", "1-2", 5, true}, {8, "b", "1-2", 8, true}, {9, "b", "2", 8, true}, {10, "b", "1", 10, true}, {11, "b", "", 0, false},
	} {
		p.applyAnswer(tt.now, SpoolAnswer{Server: tt.to, KnowsSpools: true, Held: mustRanges(tt.held)})
		if since, ok := p.noReadProgressSince(); since != tt.since || ok != tt.ok {
			t.Errorf("%+v: since %d, %v", tt, since, ok)
		}
	}
	// A center that catches up reads on, though not all.
	p = planOf("uu")
	p.applyAnswer(3, SpoolAnswer{Server: "a", KnowsSpools: true, Held: mustRanges("1-2")})
	p.applyAnswer(20, SpoolAnswer{Server: "a", KnowsSpools: true, Held: mustRanges("2"), Read: mustRanges("1")})
	p.applyAnswer(30, SpoolAnswer{Server: "a", KnowsSpools: true, Held: mustRanges("2"), Read: mustRanges("1")})
	if since, ok := p.noReadProgressSince(); since != 20 || !ok {
		t.Errorf("one of two was read at 20: since %d, %v", since, ok)
	}
}

func TestSpoolPlanDrop(t *testing.T) {
	for need, want := range map[int]string{0: "uhe?u", 1: "u-e?u", 2: "u--?u", 3: "---?u", 4: "----u"} {
		p := planOf("uhe?u")
		held, lost := p.drop(func(*spoolEntry) bool { return len(p.entries) > 0 && p.diskBytes > int64(5-need) })
		if p.states() != want || len(held)+len(lost) != need || len(held) != min(need, 2) {
			t.Errorf("%d: %s is left, %d and %d gone", need, p.states(), len(held), len(lost))
		}
	}
	p := planOf("hu")
	p.pickNumbers(0, noLimits)
	p.drop(func(*spoolEntry) bool { return true })
	if p.states() != "-u" {
		t.Errorf("what is in flight is dropped: %q is left", p.states())
	}
}

func TestSpoolMetaMerge(t *testing.T) {
	at := Moment{Wall: 1000, Boot: 1000, BootID: "b"}
	later := func(d time.Duration) Moment {
		return Moment{Wall: 1000 + d.Milliseconds(), Boot: 1000 + d.Milliseconds(), BootID: "b"}
	}
	var many []ConsumerAge
	for i := range uint64(MaxConsumers) {
		many = append(many, ConsumerAge{i, time.Duration(i) * time.Second})
	}
	for name, tt := range map[string]struct {
		have  []ConsumerAge
		after time.Duration
		told  []ConsumerAge
		want  string
	}{
		"nobody":          {nil, time.Hour, nil, ""},
		"ages grow":       {[]ConsumerAge{{1, time.Second}}, time.Minute, nil, "0000000000000001:61"},
		"for a day":       {[]ConsumerAge{{1, time.Hour}, {2, time.Hour + time.Second}}, 23 * time.Hour, nil, "0000000000000001:86400"},
		"the smaller":     {[]ConsumerAge{{1, time.Second}, {2, time.Hour}}, 0, []ConsumerAge{{1, time.Hour}, {2, time.Second}}, "0000000000000001:1,0000000000000002:1"},
		"new":             {[]ConsumerAge{{2, 0}}, 0, []ConsumerAge{{1, 0}}, "0000000000000001:0,0000000000000002:0"},
		"told too old":    {nil, 0, []ConsumerAge{{1, 25 * time.Hour}}, ""},
		"told twice":      {nil, 0, []ConsumerAge{{1, time.Hour}, {1, time.Second}}, "0000000000000001:1"},
		"no more than 64": {many, 0, []ConsumerAge{{1000, 0}}, FormatConsumers(append(slices.Clone(many[:MaxConsumers-1]), ConsumerAge{1000, 0}))},
	} {
		l := spoolMeta{ID: 1, At: at, Consumers: tt.have}
		got := l.mergedWith(later(tt.after), tt.told)
		if text := FormatConsumers(got.Consumers); text != tt.want || got.ID != 1 || got.At != later(tt.after) {
			t.Errorf("%s: %s, want %s", name, text, tt.want)
		}
	}
}

// planWorld is a plan among servers that fail, lose their disks and come back with old
// ones, and a consumer that reads now and then. It notes what a server told last.
type planWorld struct {
	t       *testing.T
	rnd     *rand.Rand
	plan    *spoolIndex
	now     int64
	added   uint64
	servers [2]planServer
	to      int
	got     map[uint64]bool // by the consumer
	lastE   int64           // when scrapes that are elsewhere were pushed last
}

type planServer struct{ held, read, oldHeld, oldRead map[uint64]bool }

// exchange makes a push of the scrapes in flight, or asks. Some attempts do not arrive, some
// answers neither, and some are refused for now.
func (w *planWorld) exchange(batch []spoolEntry, calm bool) {
	s := &w.servers[w.to]
	luck := w.rnd.IntN(10)
	if calm {
		luck = 9
	}
	if luck == 2 {
		w.plan.markPushFailed(true)
		w.to = w.rnd.IntN(2)
		return
	}
	if luck > 0 {
		for _, e := range batch {
			if !s.read[e.Number] {
				s.held[e.Number] = true
			}
		}
	}
	if luck <= 1 {
		w.plan.markPushFailed(false)
		w.to = w.rnd.IntN(2)
		return
	}
	a := SpoolAnswer{Server: fmt.Sprint(w.to), KnowsSpools: true}
	for n := range s.held {
		a.Held = a.Held.Add(n, n)
	}
	for n := range s.read {
		a.Read = a.Read.Add(n, n)
	}
	gone, out := w.plan.applyAnswer(w.now, a)
	for _, e := range gone {
		if !w.got[e.Number] {
			w.t.Fatalf("%d is removed, and nobody has read it", e.Number)
		}
	}
	if len(out.Declined) > 0 {
		w.t.Fatalf("%v are declined", out.Declined)
	}
}

// drain does what the plan says until it says that it is enough.
func (w *planWorld) drain(calm bool) {
	for range 50 {
		step, wait := w.plan.nextStep(w.now)
		switch step {
		case StepDone:
			return
		case StepWait:
			w.now += wait.Milliseconds()
		case StepAsk:
			w.exchange(nil, calm)
		case StepPush:
			batch := w.plan.beginPush(w.now, PushLimits{1 << 30, 1 << 30, 1 + w.rnd.IntN(5)}, func(*spoolEntry) bool { return true })
			if len(batch) == 0 {
				w.t.Fatal("nothing to push")
			}
			s := w.servers[w.to]
			for _, e := range batch {
				if e.uncertain || e.state != batch[0].state || w.plan.server == fmt.Sprint(w.to) && (s.held[e.Number] || s.read[e.Number]) && e.state == ScrapeUndelivered {
					w.t.Fatalf("%+v is pushed", e)
				}
			}
			if batch[0].state == ScrapeElsewhere {
				if w.now < w.lastE+1000 || slices.ContainsFunc(w.plan.entries, func(e spoolEntry) bool { return e.state == ScrapeUndelivered }) {
					w.t.Fatalf("what is elsewhere is pushed at %d, after %d", w.now, w.lastE)
				}
				w.lastE = w.now
			}
			w.exchange(batch, calm)
		}
	}
}

// The consumer gets every scrape, whatever happens to connections, servers and the client,
// and then the spool is empty.
func TestSweepSpoolIndex(t *testing.T) {
	sweep(t)
	for seed := range testSeeds(t, 4_000) {
		w := &planWorld{t: t, rnd: rand.New(rand.NewPCG(seed, 1)), plan: &spoolIndex{}, got: map[uint64]bool{}, now: 1_000_000}
		for i := range w.servers {
			w.servers[i] = planServer{map[uint64]bool{}, map[uint64]bool{}, map[uint64]bool{}, map[uint64]bool{}}
		}
		for range 40 {
			s := &w.servers[w.rnd.IntN(2)]
			switch w.rnd.IntN(12) {
			case 0, 1, 2:
				w.added++
				w.plan.add(spoolEntry{Scrape: Scrape{Number: w.added}, footprint: 1})
			case 3, 4, 5:
				w.drain(false)
			case 6:
				w.read(s)
			case 7: // its disk is lost
				clear(s.held)
				clear(s.read)
			case 8:
				s.oldHeld, s.oldRead = maps.Clone(s.held), maps.Clone(s.read)
			case 9: // or an old copy of it is restored
				s.held, s.read = maps.Clone(s.oldHeld), maps.Clone(s.oldRead)
			case 10: // the client starts again
				old := w.plan.entries
				w.plan = &spoolIndex{}
				for _, e := range old {
					w.plan.add(spoolEntry{Scrape: e.Scrape, footprint: 1, uncertain: true})
				}
				w.lastE = 0
			case 11:
				w.now += w.rnd.Int64N(100_000)
			}
		}
		for range 60 {
			w.now += 61_000
			w.drain(true)
			w.read(&w.servers[w.to])
		}
		if len(w.plan.entries) > 0 || w.plan.diskBytes != 0 || uint64(len(w.got)) != w.added {
			t.Fatalf("seed %d: %d scrapes are left, %d of %d are read", seed, len(w.plan.entries), len(w.got), w.added)
		}
	}
}

func (w *planWorld) read(s *planServer) {
	for n := range s.held {
		w.got[n], s.read[n] = true, true
	}
	clear(s.held)
}
