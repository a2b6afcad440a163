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

// indexOf returns a spool index with scrapes 1, 2 and so on. Each letter of text is the state of
// one scrape: u is undelivered, h is held, e is elsewhere (ScrapeElsewhere), and ? is uncertain.
func indexOf(text string) *spoolIndex {
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

// states is the inverse of indexOf: it returns one letter for each scrape, in the order of their
// numbers. For a number that is not in the index it returns "-", unless no higher number follows.
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

// pickNumbers begins the next push and returns the numbers of the scrapes in it, such as "1-2,4".
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

// The index chooses the next step and the scrapes of the next push by the states of the scrapes. If
// the state of a scrape is uncertain, the next step is to ask the server which scrapes it holds.
// Undelivered scrapes are pushed before scrapes in state ScrapeElsewhere, which another server
// held, unless a server declined the undelivered scrapes.
func TestSpoolIndexStep(t *testing.T) {
	const now = 1_000_000
	for _, tt := range []struct {
		have   string // the states of the scrapes, as letters of indexOf
		change func(p *spoolIndex)
		want   DrainStep     // wanted next step
		wait   time.Duration // wanted wait, if the next step is StepWait
		picks  string        // wanted numbers of the scrapes in the next push
	}{
		{have: "", want: StepDone},
		{have: "uu", want: StepPush, picks: "1-2"},
		{have: "u?u", want: StepAsk, picks: "1,3"}, // a scrape in an uncertain state is not pushed
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
		// Rows with declined scrapes, which must not hold up the other scrapes.
		{have: "uuu", change: func(p *spoolIndex) { p.entries[0].declined = true }, want: StepPush, picks: "2-3"},
		{have: "uee", change: func(p *spoolIndex) { p.entries[0].declined, p.entries[1].declined = true, true }, want: StepPush, picks: "3"},
		{have: "ue", change: func(p *spoolIndex) { p.entries[0].declined, p.elsewhereAt = true, now+1 }, want: StepPush, picks: "1"},
		{have: "ue", change: func(p *spoolIndex) { p.entries[0].declined, p.entries[1].declined = true, true }, want: StepPush, picks: "1"},
	} {
		p := indexOf(tt.have)
		if tt.change != nil {
			tt.change(p)
		}
		step, wait := p.nextStep(now)
		if picks := p.pickNumbers(now, noLimits); step != tt.want || wait != tt.wait || picks != tt.picks {
			t.Errorf("%+v: got step %d, wait %v and a push of %s", tt, step, wait, picks)
		}
	}
}

// A push is bounded by its number of ranges, its bytes and its number of scrapes, but has at least
// one scrape.
func TestSpoolIndexLimits(t *testing.T) {
	sparse := &spoolIndex{}
	for i := range uint64(MaxPushRanges + 5) {
		sparse.add(spoolEntry{Scrape: Scrape{Number: 2*i + 1}})
		if i < 3 { // fill the gaps between the first numbers, so that 1 to 7 are one range
			sparse.add(spoolEntry{Scrape: Scrape{Number: 2*i + 2}})
		}
	}
	if got := sparse.beginPush(0, noLimits, func(*spoolEntry) bool { return true }); len(got) != MaxPushRanges+6 {
		t.Errorf("a push has %d scrapes, want %d in %d ranges", len(got), MaxPushRanges+6, MaxPushRanges)
	}
	for _, tt := range []struct {
		l    PushLimits
		want string
	}{
		{PushLimits{25, 1000, 10}, "1-2"}, {PushLimits{1000, 25, 10}, "1-2"}, {PushLimits{1000, 1000, 3}, "1-3"}, {PushLimits{1, 1, 0}, "1"},
	} {
		for _, have := range []string{"uuuu", "eeee"} {
			if got := indexOf(have).pickNumbers(0, tt.l); got != tt.want {
				t.Errorf("limits %+v, states %s: got a push of %s, want %s", tt.l, have, got, tt.want)
			}
		}
	}
}

// An answer changes the states of the scrapes in the index. It removes the scrapes that every
// consumer has read. If no consumer is known, or if the server does not support spools, it removes
// the pushed scrapes that the server has accepted.
func TestSpoolIndexAnswer(t *testing.T) {
	for _, tt := range []struct {
		name string
		have string // the states of the scrapes before the answer, as letters of indexOf
		push bool   // the answer is to a push; otherwise to the question which scrapes the server holds
		// The numbers that the answer lists as held and as read. "!" as held means that the server
		// does not support spools. "!" as read means that no consumer is known.
		held, read string
		want       string // wanted states after the answer
		declined   string // wanted numbers of the scrapes that the answer declines
	}{
		{"held", "uu", true, "1-2", "", "hh", ""},
		{"held and read at once", "uu", true, "", "1-2", "", ""},
		{"read, not in the push", "hhe?u", true, "5", "1-4", "----h", ""},
		{"one declined", "uuu", true, "1,3", "", "huh", "2"},
		{"all declined", "uu", true, "", "", "uu", "1-2"},
		{"a question to another server", "hhe", false, "2", "", "ehe", ""},
		{"a question about uncertain states", "???", false, "2", "3", "uh", ""},
		{"elsewhere, now held again", "ee", true, "1-2", "", "hh", ""},
		{"elsewhere, one declined", "ee", true, "1", "", "he", "2"},
		{"no consumer", "hu?u", true, "1-2", "!", "h-uu", "4"},
		{"no consumer, not held", "hu", true, "", "!", "eu", "2"},
		{"no consumer, a question", "h?", false, "1-2", "!", "hh", ""},
		{"a server without spools", "u?he", true, "!", "!", "-uee", ""},
		{"a server without spools, a question", "u?he", false, "!", "!", "uuee", ""},
		{"numbers that are not in the spool", "u", true, "1,7-9", "2-5", "h", ""},
	} {
		p := indexOf(tt.have)
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
			t.Errorf("%s: got the states %q and declined %q; %d removed, %d bytes", tt.name, got, out.Declined, len(done), p.diskBytes)
		}
		if slices.ContainsFunc(p.entries, func(e spoolEntry) bool { return e.inFlight }) {
			t.Errorf("%s: a scrape is still in flight after the answer", tt.name)
		}
	}
}

// A scrape that a server declines (does not store) in a push of its own is pushed again after a
// minute. Only the first decline of the scrape sets FirstDecline.
func TestSpoolIndexDeclined(t *testing.T) {
	p := indexOf("u")
	for i, now := range []int64{0, 60_000, 120_000} {
		if got := p.pickNumbers(now, noLimits); got != "1" {
			t.Errorf("at %d ms: got a push of %q, want scrape 1", now, got)
		}
		_, out := p.applyAnswer(now, SpoolAnswer{KnowsSpools: true})
		if out.FirstDecline != (i == 0) || out.Declined.String() != "1" || p.pickNumbers(now+59_999, noLimits) != "" {
			t.Errorf("at %d ms: got the outcome %+v, want scrape 1 declined and no push within a minute", now, out)
		}
	}
}

// After an attempt without an answer, the states of the pushed scrapes are uncertain and the other
// states stay. The next answer resolves the uncertain states.
func TestSpoolIndexFailed(t *testing.T) {
	for have, want := range map[string]string{"uhu": "?h?", "he": "h?", "hh": "hh"} {
		p := indexOf(have)
		p.pickNumbers(0, noLimits)
		if p.markPushFailed(false); p.states() != want {
			t.Errorf("states %s: after a failed push got %s, want %s", have, p.states(), want)
		}
		if p.applyAnswer(0, SpoolAnswer{KnowsSpools: true, Held: mustRanges("1-9")}); p.states() != strings.Repeat("h", len(have)) {
			t.Errorf("states %s: after the next answer got %s, want all held", have, p.states())
		}
	}
}

// If a push of a scrape in state ScrapeElsewhere has no answer, and the next answer does not list
// the scrape as held, the scrape is in state ScrapeElsewhere again.
func TestSpoolIndexFailedElsewhere(t *testing.T) {
	p := indexOf("e")
	p.pickNumbers(0, noLimits)
	p.markPushFailed(false)
	if p.applyAnswer(0, SpoolAnswer{KnowsSpools: true}); p.states() != "e" {
		t.Errorf("got the state %s, want e", p.states())
	}
}

// If a server refuses a push for now (429 or 503), the states of all scrapes stay. Scrapes in state
// ScrapeElsewhere are not pushed again before a server has answered which scrapes it holds.
func TestSpoolIndexRefused(t *testing.T) {
	for have, want := range map[string]DrainStep{"uhu": StepPush, "uhe": StepPush, "he": StepAsk} {
		p := indexOf(have)
		p.pickNumbers(0, noLimits)
		p.markPushFailed(true)
		if step, _ := p.nextStep(time.Hour.Milliseconds()); p.states() != have || step != want {
			t.Errorf("states %s: after the refusal got %s and step %v, want the same states and step %v", have, p.states(), step, want)
		}
	}
}

// Of the scrapes that the server that answered last still holds, noReadProgressSince finds the one
// that it has held longest. It returns the time since when the server's answers list this scrape as
// held. ok is false if that server holds no scrape.
func TestSpoolIndexHeldSince(t *testing.T) {
	p := indexOf("uu")
	if _, ok := p.noReadProgressSince(); ok {
		t.Error("got a time without a held scrape")
	}
	for _, tt := range []struct {
		now   int64
		to    string // name of the server that answers
		held  string // numbers that the answer lists as held
		since int64  // wanted result, in ms
		ok    bool   // wanted: whether the server holds a scrape
	}{
		{5, "a", "1", 5, true}, {7, "a", "1-2", 5, true}, {8, "b", "1-2", 8, true}, {9, "b", "2", 8, true}, {10, "b", "1", 10, true}, {11, "b", "", 0, false},
	} {
		p.applyAnswer(tt.now, SpoolAnswer{Server: tt.to, KnowsSpools: true, Held: mustRanges(tt.held)})
		if since, ok := p.noReadProgressSince(); since != tt.since || ok != tt.ok {
			t.Errorf("%+v: got %d, %v", tt, since, ok)
		}
	}
}

// noReadProgressSince counts a scrape that was read as progress, even if other scrapes stay unread.
func TestSpoolIndexReadProgress(t *testing.T) {
	p := indexOf("uu")
	p.applyAnswer(3, SpoolAnswer{Server: "a", KnowsSpools: true, Held: mustRanges("1-2")})
	p.applyAnswer(20, SpoolAnswer{Server: "a", KnowsSpools: true, Held: mustRanges("2"), Read: mustRanges("1")})
	p.applyAnswer(30, SpoolAnswer{Server: "a", KnowsSpools: true, Held: mustRanges("2"), Read: mustRanges("1")})
	if since, ok := p.noReadProgressSince(); since != 20 || !ok {
		t.Errorf("scrape 1 was read at 20: got %d, %v", since, ok)
	}
}

// drop first removes the scrapes that a server holds or held, oldest first. Then it removes the
// other scrapes, oldest first. A scrape in an uncertain state counts as undelivered.
func TestSpoolIndexDrop(t *testing.T) {
	for need, want := range map[int]string{0: "uhe?u", 1: "u-e?u", 2: "u--?u", 3: "---?u", 4: "----u"} {
		p := indexOf("uhe?u")
		held, lost := p.drop(func(*spoolEntry) bool { return len(p.entries) > 0 && p.diskBytes > int64(5-need) })
		if p.states() != want || len(held)+len(lost) != need || len(held) != min(need, 2) {
			t.Errorf("dropping %d scrapes: got the states %s, with %d held and %d lost", need, p.states(), len(held), len(lost))
		}
	}
}

// drop does not remove scrapes in flight (in a push that has no answer yet).
func TestSpoolIndexDropKeepsInFlight(t *testing.T) {
	p := indexOf("hu")
	p.pickNumbers(0, noLimits)
	p.drop(func(*spoolEntry) bool { return true })
	if p.states() != "-u" {
		t.Errorf("got the states %q, want the scrape in flight to stay", p.states())
	}
}

// spoolWorld is a simulation: an index whose scrapes are pushed to two servers. Requests and
// answers are lost, the servers lose their disks or are restored from old copies, and a consumer
// reads from the servers now and then.
type spoolWorld struct {
	t       *testing.T
	rnd     *rand.Rand
	index   *spoolIndex
	now     int64  // the simulated boot-time clock, in ms
	added   uint64 // the highest scrape number used so far
	servers [2]worldServer
	to      int             // index of the server of the next attempt
	got     map[uint64]bool // the scrapes that the consumer has read
	lastE   int64           // ms; when scrapes in state ScrapeElsewhere were last pushed
}

// worldServer is a simulated server. held has the numbers of the scrapes that it holds, and read
// the numbers of the scrapes that the consumer has read from it. oldHeld and oldRead are an old
// copy of both.
type worldServer struct{ held, read, oldHeld, oldRead map[uint64]bool }

// exchange pushes the scrapes of batch to a server. If batch is empty, it asks the server which
// scrapes the server holds. Unless calm is true, some requests are lost, some answers are lost, and
// some requests are refused for now.
func (w *spoolWorld) exchange(batch []spoolEntry, calm bool) {
	s := &w.servers[w.to]
	luck := w.rnd.IntN(10)
	if calm {
		luck = 9
	}
	if luck == 2 {
		w.index.markPushFailed(true)
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
		w.index.markPushFailed(false)
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
	gone, out := w.index.applyAnswer(w.now, a)
	for _, e := range gone {
		if !w.got[e.Number] {
			w.t.Fatalf("scrape %d was removed, but no consumer has read it", e.Number)
		}
	}
	if len(out.Declined) > 0 {
		w.t.Fatalf("the scrapes %v are declined, although the server declines none", out.Declined)
	}
}

// drain takes the steps that nextStep returns, until the step is StepDone or 50 steps are taken. It
// fails the test if a push has scrapes that should not be pushed now.
func (w *spoolWorld) drain(calm bool) {
	for range 50 {
		step, wait := w.index.nextStep(w.now)
		switch step {
		case StepDone:
			return
		case StepWait:
			w.now += wait.Milliseconds()
		case StepAsk:
			w.exchange(nil, calm)
		case StepPush:
			batch := w.index.beginPush(w.now, PushLimits{1 << 30, 1 << 30, 1 + w.rnd.IntN(5)}, func(*spoolEntry) bool { return true })
			if len(batch) == 0 {
				w.t.Fatal("the step is StepPush, but no scrape is picked")
			}
			s := w.servers[w.to]
			for _, e := range batch {
				if e.uncertain || e.state != batch[0].state || w.index.server == fmt.Sprint(w.to) && (s.held[e.Number] || s.read[e.Number]) && e.state == ScrapeUndelivered {
					w.t.Fatalf("%+v is pushed, although its state is uncertain or differs from the rest of the push, or the server holds it", e)
				}
			}
			if batch[0].state == ScrapeElsewhere {
				if w.now < w.lastE+1000 || slices.ContainsFunc(w.index.entries, func(e spoolEntry) bool { return e.state == ScrapeUndelivered }) {
					w.t.Fatalf("scrapes that are elsewhere are pushed at %d ms, after %d ms or before undelivered scrapes", w.now, w.lastE)
				}
				w.lastE = w.now
			}
			w.exchange(batch, calm)
		}
	}
}

// After random faults of the connections, the servers and the client, the consumer reads every
// scrape once the connections work again. When all scrapes are read, the spool is empty.
func TestSweepSpoolIndex(t *testing.T) {
	sweep(t)
	for seed := range testSeeds(t, 4_000) {
		w := &spoolWorld{t: t, rnd: rand.New(rand.NewPCG(seed, 1)), index: &spoolIndex{}, got: map[uint64]bool{}, now: 1_000_000}
		for i := range w.servers {
			w.servers[i] = worldServer{map[uint64]bool{}, map[uint64]bool{}, map[uint64]bool{}, map[uint64]bool{}}
		}
		for range 40 {
			s := &w.servers[w.rnd.IntN(2)]
			switch w.rnd.IntN(12) {
			case 0, 1, 2:
				w.added++
				w.index.add(spoolEntry{Scrape: Scrape{Number: w.added}, footprint: 1})
			case 3, 4, 5:
				w.drain(false)
			case 6:
				w.read(s)
			case 7: // the server loses its disk
				clear(s.held)
				clear(s.read)
			case 8: // a copy of the server's disk is made
				s.oldHeld, s.oldRead = maps.Clone(s.held), maps.Clone(s.read)
			case 9: // the old copy is restored
				s.held, s.read = maps.Clone(s.oldHeld), maps.Clone(s.oldRead)
			case 10: // the client restarts
				old := w.index.entries
				w.index = &spoolIndex{}
				for _, e := range old {
					w.index.add(spoolEntry{Scrape: e.Scrape, footprint: 1, uncertain: true})
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
		if len(w.index.entries) > 0 || w.index.diskBytes != 0 || uint64(len(w.got)) != w.added {
			t.Fatalf("seed %d: %d scrapes are left, and the consumer has read %d of %d", seed, len(w.index.entries), len(w.got), w.added)
		}
	}
}

// read makes the consumer read all scrapes that the server holds.
func (w *spoolWorld) read(s *worldServer) {
	for n := range s.held {
		w.got[n], s.read[n] = true, true
	}
	clear(s.held)
}
