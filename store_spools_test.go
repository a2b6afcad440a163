package main

// Scrapes that a push names by their numbers. A scrape is held once its samples are on disk, and
// read once every consumer has read its samples. A store does not list a scrape as held if a crash
// or damage lost samples of the scrape, or if the store refused all its samples because of their
// times.

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"
)

// spoolLists returns the held and the read scrapes of spool 1 of site x.
func spoolLists(s *Store) string {
	st := s.RefreshSpoolStatus("x", 1)
	return fmt.Sprintf("held %v, read %v", st.Held, st.Read)
}

// The process is killed, or the disk fails, at any file operation of a push. Afterwards the store
// lists the scrape as held only if it holds the scrape's samples. An acknowledged push is not lost.
// When the client repeats the push, each sample is stored once.
func TestNamedPushCrashAnywhere(t *testing.T) {
	faults := []struct {
		name  string
		fault fault
		crash bool // the machine crashes after the fault; otherwise only a new process starts
	}{
		{"disk error, then crash", fault{Err: errDisk}, true},
		{"full disk, then crash", fault{Err: errFull}, true},
		{"killed, then restart", fault{Kill: true}, false},
		{"killed, then crash", fault{Kill: true}, true},
	}
	seed := testSeed(t, 1)
	for _, compact := range []bool{false, true} {
		for at, reached := uint64(0), true; reached; at++ {
			for i, f := range faults {
				name := fmt.Sprintf("rewrite %t, file operation %d, %s", compact, at, f.name)
				reached = namedPushWithFault(t, name, compact, seed<<32|at<<2|uint64(i), at, f.fault, f.crash)
				if t.Failed() {
					t.FailNow()
				}
			}
		}
	}
}

// namedPushWithFault pushes scrape 3 of site x, and then rewrites the log if compact is true. The
// argument at is the number, from 0, of the file operation that has the fault f. After a crash or a
// restart the push is checked, sent again, and checked again. The result reports whether there was
// such an operation.
func namedPushWithFault(t *testing.T, name string, compact bool, seed, at uint64, f fault, crash bool) (reached bool) {
	t.Helper()
	fsys := newStoreFS(seed)
	k := newStoreKit(t, fsys)
	s := k.open()
	old, pts := point{"m", 0, k.clock.ms(9), 7}, []point{{"m", 1, k.clock.ms(5), 1}, {"n", 1, k.clock.ms(5), 2}}
	k.pushNamed(s, "x", names1(1), old)
	seen := uint64(0)
	fsys.hook = func(int, string, string) fault {
		if seen++; seen-1 != at {
			return fault{}
		}
		reached = true
		return f
	}
	res, err := s.Append(t.Context(), "x", storePush("x", pts...), names1(3), false)
	if compact {
		c := s.sites["x"]
		if c.Lock(t.Context()) == nil {
			c.RewriteLog(nil, s.KeptSince()) // the rewrite may fail because of the fault
			c.Unlock()
		}
	}
	fsys.hook = nil
	if crash {
		fsys.crash()
	} else {
		fsys.restart()
	}
	s = k.open()
	got := allHeld(t, s)
	want, wantLists := pushed("x", old), "held 1, read "
	if len(got) == 3 {
		want, wantLists = pushed("x", append(pts, old)...), "held 1,3, read "
	} else if err == nil {
		t.Errorf("%s: the push was acknowledged and is lost", name)
	}
	wantHeld(t, name, got, want)
	// A scrape whose samples the store holds is listed as held, with one exception. A crash may
	// leave a later part of a write on disk without an earlier part. Recovery takes such a write
	// for damage, and forgets which scrapes are held.
	damaged := len(k.errors) > 0
	if lists := spoolLists(s); lists != wantLists && !(damaged && lists == "held , read ") {
		t.Errorf("%s: the push returned %+v, %v; %d samples are held, and the scrapes are %q, want %q", name, res, err, len(got), lists, wantLists)
	}
	again, err := s.Append(t.Context(), "x", storePush("x", pts...), names1(3), false)
	if err != nil || again.Accepted != 3-len(got) || again.Duplicates != len(got)-1 {
		t.Errorf("%s: the repeated push returned %+v, %v", name, again, err)
	}
	fsys.crash()
	s = k.open()
	wantHeld(t, name+", after the repeated push", allHeld(t, s), pushed("x", append(pts, old)...))
	if lists := spoolLists(s); lists != "held 1,3, read " && !(damaged && lists == "held 3, read ") {
		t.Errorf("%s: after the repeated push the scrapes are %q", name, lists)
	}
	return reached
}

// spoolStore is a store in which the tests push scrapes of site x. Consumer p scrapes the store on
// the connection conn.
type spoolStore struct {
	*storeKit
	fsys *crashFS
	s    *Store
	conn *AnswerReadTracker
}

func newSpoolStore(t *testing.T) *spoolStore {
	fsys := newStoreFS(1)
	k := newStoreKit(t, fsys)
	return &spoolStore{storeKit: k, fsys: fsys, s: k.open(), conn: &AnswerReadTracker{}}
}

// scrape has consumer p scrape all unread samples. The scrape confirms the samples of p's previous
// scrape on the same connection.
func (p *spoolStore) scrape() {
	p.t.Helper()
	r, _, err := p.s.Consumers.BeginScrape(1, "p", "", p.conn, p.clock.Now())
	if err != nil {
		p.t.Fatal(err)
	}
	scraper(p.s, time.Minute).ServeUnreadAndNewest(r, 0, false, nil)
}

// read has consumer p scrape and confirm all unread samples.
func (p *spoolStore) read() {
	p.t.Helper()
	p.scrape()
	p.scrape()
}

// reopen closes the store and opens it as a new process. Consumer p gets a new connection.
func (p *spoolStore) reopen() {
	p.t.Helper()
	if err := p.s.Close(); err != nil {
		p.t.Fatal(err)
	}
	p.s = p.open()
	p.conn = &AnswerReadTracker{}
}

// want fails the test unless the held and the read scrapes of spool 1 are those in lists.
func (p *spoolStore) want(when, lists string) {
	p.t.Helper()
	if got := spoolLists(p.s); got != lists {
		p.t.Errorf("%s: the scrapes are %q, want %q", when, got, lists)
	}
}

// A scrape whose samples are in time is held once its push is acknowledged, even if an earlier push
// brought the same samples, or if the scrape has no samples. A scrape is read once every consumer
// has confirmed its samples.
func TestScrapesAreHeldThenRead(t *testing.T) {
	p := newSpoolStore(t)
	old := p.clock.ms(60)
	p.pushNamed(p.s, "x", names1(1), point{"m", 1, old, 1})
	p.want("before any scrape", "held 1, read ")
	p.pushNamed(p.s, "x", names1(2), point{"m", 1, old, 1}) // the same sample as in scrape 1
	p.pushNamed(p.s, "x", names1(3))
	p.want("after pushes without a new sample", "held 1-3, read ")
	p.scrape()
	p.want("served, not confirmed", "held 1-3, read ")
	p.scrape()
	p.want("confirmed", "held , read 1-3")
	p.pushNamed(p.s, "x", names1(4), point{"m", 1, old + 1, 2})
	p.want("after another push", "held 4, read 1-3")
	p.wantNoErrors("at the end")
}

// A held scrape stays held through a rewrite and a restart. A read scrape stays read through
// rewrites, restarts, eviction and expiry. A repeated push of a read scrape adds nothing.
func TestReadScrapesStayRead(t *testing.T) {
	p := newSpoolStore(t)
	old := p.clock.ms(60)
	p.pushNamed(p.s, "x", names1(1), point{"m", 1, old, 1})
	p.read()
	p.pushNamed(p.s, "x", names1(2), point{"m", 1, old + 1, 2})
	rewriteLog(t, p.s, "x")
	p.want("after a rewrite", "held 2, read 1")
	p.reopen()
	p.want("after a restart", "held 2, read 1")
	p.read()
	p.want("after the consumer read all", "held , read 1-2")
	evictOldest(t, p.s, "x")
	rewriteLog(t, p.s, "x")
	p.reopen()
	p.want("after an eviction", "held , read 1-2")
	before := len(allHeld(t, p.s))
	if res := p.pushNamed(p.s, "x", names1(1), point{"m", 1, old, 1}); res.Accepted != 0 || res.Duplicates != 1 || len(allHeld(t, p.s)) != before {
		t.Errorf("the repeated push of a read scrape: %+v; %d samples are held, want %d", res, len(allHeld(t, p.s)), before)
	}
	p.clock.Add(3 * time.Hour)
	rewriteLog(t, p.s, "x")
	p.reopen()
	p.want("after all samples expired", "held , read 1-2")
	p.wantNoErrors("at the end")
}

// A scrape that the store reported as read stays read when a new consumer begins to scrape. A later
// scrape is read only if the new consumer has read it too, or if the new consumer has not scraped
// for the retention time.
func TestScrapesWithNewConsumer(t *testing.T) {
	p := newSpoolStore(t)
	old := p.clock.ms(60)
	p.pushNamed(p.s, "x", names1(1), point{"m", 1, old, 1})
	p.read()
	p.want("read by the only consumer", "held , read 1")
	p.s.Consumers.BeginScrape(2, "new", "", &AnswerReadTracker{}, p.clock.Now())
	p.want("after the first scrape of a new consumer", "held , read 1")
	p.pushNamed(p.s, "x", names1(2), point{"m", 1, old + 2, 3})
	p.read()
	p.want("read by consumer p alone", "held 2, read 1")
	p.clock.Add(3 * time.Hour)
	p.scrape()
	rewriteLog(t, p.s, "x")
	p.reopen()
	p.want("after consumer new did not scrape for 3h", "held , read 1-2")
	p.wantNoErrors("at the end")
}

// A push of one scrape does not make the scrape held if all its samples are too old or from the
// future, because this server's clock may be wrong. If a push of several scrapes has at least one
// such sample, none of the scrapes becomes held, because the store cannot tell to which scrape the
// sample belongs.
func TestUntimelyScrapesAreNotHeld(t *testing.T) {
	k := newStoreKit(t, newStoreFS(1))
	s := k.open()
	good, old, ahead := k.clock.ms(5), k.clock.ms(7201), k.clock.ms(-61)
	for _, test := range []struct {
		name    string
		times   []int64
		numbers Ranges
		held    bool
	}{
		{"one scrape in time", []int64{good}, Ranges{{1, 1}}, true},
		{"one scrape, too old", []int64{old}, Ranges{{2, 2}}, false},
		{"one scrape, from the future", []int64{ahead}, Ranges{{3, 3}}, false},
		{"one scrape, partly too old", []int64{good + 1, old}, Ranges{{4, 4}}, true},
		{"one scrape, partly too old, the rest duplicates", []int64{good + 1, old}, Ranges{{5, 5}}, true},
		{"two scrapes, partly too old", []int64{good + 2, old}, Ranges{{6, 7}}, false},
		{"two scrapes, partly from the future", []int64{good + 3, ahead}, Ranges{{8, 8}, {10, 10}}, false},
		{"two scrapes in time", []int64{good + 3}, Ranges{{11, 12}}, true},
		{"one scrape without samples", nil, Ranges{{13, 13}}, true},
	} {
		var pts []point
		for _, at := range test.times {
			pts = append(pts, point{"m", 1, at, 1})
		}
		k.pushNamed(s, "x", ScrapeNames{1, test.numbers}, pts...)
		if held := s.RefreshSpoolStatus("x", 1).Held.Has(test.numbers[0].From); held != test.held {
			t.Errorf("%s (%s): held %t, want %t", test.name, test.numbers, held, test.held)
		}
	}
}

// A scrape whose batch was evicted stays read after a rewrite, even if the cursors are lost. The
// new log itself records that the scrape is read.
func TestReadScrapeSurvivesLossOfCursors(t *testing.T) {
	p := newSpoolStore(t)
	for n := range uint64(2) {
		p.pushNamed(p.s, "x", names1(n+1), point{"m", 1, p.clock.ms(60) + int64(n), 1})
	}
	p.read()
	evictOldest(t, p.s, "x")
	rewriteLog(t, p.s, "x")
	if err := p.s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := p.fsys.Remove(consumersPath); err != nil {
		t.Fatal(err)
	}
	p.s = p.open()
	p.want("after the cursors were lost", "held 2, read 1")
}

// A client pushes a scrape every second, and no consumer scrapes for two hours. The client does not
// have to send a scrape again, because the server remembers all numbers, first as held and later as
// read.
func TestSiteSpoolsRememberTwoHours(t *testing.T) {
	var s SiteSpools
	for seq := range uint64(7200) {
		s.AddHeldScrapes(names1(seq+1), seq+1)
	}
	if held, read := s.HeldAndRead(1); held.String() != "1-7200" || len(read) > 0 {
		t.Errorf("held %v, read %v; want 1-7200 held", held, read)
	}
	s.MarkReadUpTo(3600)
	held, read := s.HeldAndRead(1)
	// SiteSpools merges its entries for held scrapes in pairs. The scrapes of a merged entry become
	// read together, so that up to 8 read scrapes may still be listed as held.
	if len(held) != 1 || len(read) != 1 || read[0].To > 3600 || read[0].To < 3600-8 || held[0].From != read[0].To+1 {
		t.Errorf("half is read: held %v, read %v", held, read)
	}
	s.MarkReadUpTo(7200)
	if held, read := s.HeldAndRead(1); len(held) > 0 || read.String() != "1-7200" {
		t.Errorf("all is read: held %v, read %v; want 1-7200 read", held, read)
	}
}

// spoolListsOf returns the held and the read scrapes of spool 1.
func spoolListsOf(s *SiteSpools) string {
	held, read := s.HeldAndRead(1)
	return fmt.Sprintf("held %v, read %v", held, read)
}

// A spool behaves like two sets of numbers, held and read, whatever scrapes are added, read and
// forgotten in whatever order. A copy, and a spool that was encoded and decoded, has the same sets.
func TestSiteSpoolsAreSets(t *testing.T) {
	for seed := range testSeeds(t, 300) {
		rng := rand.New(rand.NewPCG(seed, 1))
		randomNames := func() (r Ranges) {
			for range 1 + rng.IntN(3) {
				from := 1 + rng.Uint64N(50)
				r = r.Add(from, from+rng.Uint64N(4))
			}
			return r
		}
		var s SiteSpools
		heldUpTo, read, readUpTo := map[uint64]uint64{}, map[uint64]bool{}, uint64(0)
		for seq := range uint64(40) {
			copied, lists := s.Clone(), spoolListsOf(&s)
			switch rng.IntN(8) {
			case 0:
				s = s.Clone()
			case 1:
				var decoded SiteSpools
				for _, payload := range s.EncodeRecords() {
					if err := decoded.DecodeRecord(payload); err != nil {
						t.Fatalf("seed %d: %v", seed, err)
					}
				}
				s = decoded
			case 2, 3:
				readUpTo = max(readUpTo, rng.Uint64N(seq+1))
				s.MarkReadUpTo(readUpTo)
				for n, upTo := range heldUpTo {
					if upTo <= readUpTo {
						delete(heldUpTo, n)
						read[n] = true
					}
				}
			default:
				names := randomNames()
				for n := range uint64(60) {
					// A scrape that is held twice is read with the batch of its first push.
					if _, held := heldUpTo[n]; names.Has(n) && !held {
						heldUpTo[n] = seq + 1
					}
				}
				s.AddHeldScrapes(ScrapeNames{1, names}, seq+1)
			}
			if now := spoolListsOf(&copied); now != lists {
				t.Fatalf("seed %d, step %d: a copy changed with its original from %q to %q", seed, seq, lists, now)
			}
			held, isRead := s.HeldAndRead(1)
			hasAll := true
			names := randomNames()
			for n := range uint64(60) {
				_, wantHeld := heldUpTo[n]
				wantHeld = wantHeld && !read[n]
				if held.Has(n) != wantHeld || isRead.Has(n) != read[n] {
					t.Fatalf("seed %d, step %d: scrape %d: held %v, read %v; want %t, %t", seed, seq, n, held, isRead, wantHeld, read[n])
				}
				hasAll = hasAll && (!names.Has(n) || wantHeld || read[n])
			}
			if got := s.HasAll(ScrapeNames{1, names}); got != hasAll {
				t.Fatalf("seed %d, step %d: HasAll(%v) is %t; held %v, read %v", seed, seq, names, got, held, isRead)
			}
		}
	}
}

// The number of ranges of a spool and the number of spools of a site are bounded. The newest ranges
// and spools are kept, also when they are encoded as records of a log and decoded.
func TestSiteSpoolsAreBounded(t *testing.T) {
	var s SiteSpools
	for n := range uint64(3 * MaxRanges) { // odd numbers only, so that no two ranges merge
		s.AddHeldScrapes(ScrapeNames{2, Ranges{{2*n + 1, 2*n + 1}}}, n+1)
	}
	if held, _ := s.HeldAndRead(2); len(held) > MaxRanges || !held.Has(6*MaxRanges-1) {
		t.Errorf("%d ranges are held, want at most %d with the newest number", len(held), MaxRanges)
	}
	// The oldest entries have the highest numbers, and are forgotten.
	var falling SiteSpools
	for n := uint64(3 * MaxRanges); n > 0; n-- {
		falling.AddHeldScrapes(ScrapeNames{2, Ranges{{2*n + 1, 2*n + 1}}}, 3*MaxRanges-n+1)
	}
	falling.MarkReadUpTo(MaxSeq)
	if held, _ := falling.HeldAndRead(2); len(held) > 0 {
		t.Errorf("all entries are read, and still %d ranges are held", len(held))
	}
	for id := range uint64(20) {
		s.AddHeldScrapes(ScrapeNames{id + 10, Ranges{{1, 1}}}, 3*MaxRanges+id)
	}
	if n := len(s.spools); n != maxSpools {
		t.Errorf("%d spools are known, want %d", n, maxSpools)
	}
	var decoded SiteSpools
	for _, payload := range s.EncodeRecords() {
		if err := decoded.DecodeRecord(payload); err != nil {
			t.Fatal(err)
		}
	}
	if held, _ := decoded.HeldAndRead(29); !held.Has(1) {
		t.Errorf("the newest spool is lost in the records: held %v", held)
	}
}

// A scrape whose samples were lost is not listed as held. This holds for a log that is cut or
// damaged at any byte.
func TestDamagedLogClaimsNoLostScrape(t *testing.T) {
	for _, rewritten := range []bool{false, true} {
		p := newSpoolStore(t)
		at := func(n uint64) int64 { return p.clock.ms(60) + int64(n) }
		for n := range uint64(6) { // scrape n+1 has one sample, of series n
			p.pushNamed(p.s, "x", names1(n+1), point{"m", int(n), at(n), 1})
			if n < 2 {
				p.read()
			}
		}
		p.pushNamed(p.s, "x", names1(7), point{"m", 3, at(3), 1}) // the same sample as scrape 4
		p.want("before the damage", "held 3-7, read 1-2")
		if rewritten {
			rewriteLog(t, p.s, "x")
		}
		path := p.s.logPathOf("x")
		if err := p.s.Close(); err != nil {
			t.Fatal(err)
		}
		whole, err := p.fsys.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for offset := range whole {
			flipped := slices.Clone(whole)
			flipped[offset] ^= 0x55
			for what, content := range map[string][]byte{"flipped": flipped, "cut": slices.Clone(whole[:offset])} {
				name := fmt.Sprintf("rewritten %t, %s at byte %d", rewritten, what, offset)
				p.fsys.put(path, content)
				s := p.open()
				held := s.RefreshSpoolStatus("x", 1).Held
				got := allHeld(t, s)
				for n := range uint64(6) {
					line := string(storePush("x", point{"m", int(n), 0, 1}).Arena)
					if _, has := got[heldSample{line, at(n)}]; !has && held.Has(n+1) {
						t.Fatalf("%s: scrape %d is held without its sample; held: %v", name, n+1, held)
					}
				}
				if held.Has(7) && len(got) < 4 {
					t.Fatalf("%s: scrape 7 is held without the sample that it repeats", name)
				}
				s.Close()
				p.fsys.put(path, whole)
			}
		}
	}
}
