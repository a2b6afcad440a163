package main

// Scrapes over all sites: they get the newest sample of each series, or the samples that a consumer
// has not read. A scrape keeps to its sample limit, unless the newest samples of the first site
// alone exceed the limit. Every site gets its turn.

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"slices"
	"strings"
	"testing"
	"time"
)

// A scrape without a consumer's name gets the newest sample of each series up to MaxSampleAge,
// grouped into families. A late sample does not replace a newer sample.
func TestNewestPerSeries(t *testing.T) {
	k := newStoreKit(t, newStoreFS(1))
	s := k.open()
	k.push(s, "a", point{"x", 1, k.clock.ms(20), 1}, point{"y", 1, k.clock.ms(700), 2})
	k.push(s, "a", point{"x", 1, k.clock.ms(10), 3}, point{"x", 2, k.clock.ms(30), 4})
	k.push(s, "a", point{"x", 1, k.clock.ms(25), 5}) // a late sample, older than the newest sample of its series
	k.push(s, "b", point{"x", 1, k.clock.ms(5), 6}, point{"a.b", 1, k.clock.ms(5), math.NaN()})
	fams, truncated := scraper(s, 10*time.Minute).NewestPerSeries(0, nil)
	var got []string
	for _, f := range fams {
		for l := range f.Samples {
			got = append(got, fmt.Sprintf("%s: %s %g %d %t", f.Name, l.Line, l.V, (k.clock.ms(0)-l.T)/1000, l.Quoted))
		}
	}
	want := []string{ // each string is: family: line, value, age in seconds, whether the line has a quoted name
		`a.b: {"a.b",_id="b",instance="",job="",n="1"} NaN 5 true`,
		`x: x{_id="a",instance="",job="",n="1"} 3 10 false`,
		`x: x{_id="a",instance="",job="",n="2"} 4 30 false`,
		`x: x{_id="b",instance="",job="",n="1"} 6 5 false`,
	}
	if truncated || !slices.Equal(got, want) {
		t.Errorf("got %q, truncated %t\nwant %q", got, truncated, want)
	}
	fams, _ = scraper(s, 10*time.Minute).NewestPerSeries(0, func(line []byte) bool { return bytes.Contains(line, []byte(`n="2"`)) })
	if got := valuesIn(fams); got != "4 " {
		t.Errorf("with a filter for n=2: got the values %q, want 4", got)
	}
}

// A scrape whose MaxSampleAge exceeds retention shows no expired sample, whether or not a rewrite
// has dropped the sample from the log.
func TestNewestPerSeriesWithinRetention(t *testing.T) {
	k := newStoreKit(t, newStoreFS(1))
	s := k.open()
	k.push(s, "a", point{"x", 1, k.clock.ms(10), 3}, point{"x", 2, k.clock.ms(30), 4}, point{"y", 1, k.clock.ms(700), 2})
	k.push(s, "b", point{"x", 1, k.clock.ms(5), 6}, point{"a.b", 1, k.clock.ms(5), 7})
	k.clock.Add(2*time.Hour - 20*time.Second)
	before := shown(s, 24*time.Hour)
	s.expireAndCompact(context.Background(), true)
	wantHeld(t, "after the rewrite", shown(s, 24*time.Hour), before)
	if len(before) != 3 {
		t.Errorf("shown: %v; want 3 samples", before)
	}
}

// The lines in an answer do not change while later pushes insert many series, and roll many series
// back.
func TestNewestPerSeriesLinesStay(t *testing.T) {
	k := newStoreKit(t, newStoreFS(1))
	k.cfg.LimitSamples = 100
	s := k.open()
	k.push(s, "a", point{"x", 1, k.clock.ms(0), 1})
	fams, _ := scraper(s, time.Hour).NewestPerSeries(0, nil)
	var line []byte
	for l := range fams[0].Samples {
		line = l.Line
	}
	want := string(line)
	tooMany := k.series("z", 101)
	for i := range 90 {
		k.push(s, "a", point{"x", 2 + i, k.clock.ms(0), 1})
		if _, err := k.tryPush(s, "a", tooMany...); !errors.Is(err, ErrFull) {
			t.Fatalf("got %v, want ErrFull", err)
		}
	}
	if string(line) != want || cap(line) != len(line) {
		t.Errorf("the line changed to %q with capacity %d, want %q", line, cap(line), want)
	}
}

// A push is stored while a scrape applies slow selectors to the samples of the same site. The
// selectors are applied once to each series, however many samples of it the scrape serves.
func TestPushDuringSlowMatch(t *testing.T) {
	k := newStoreKit(t, newStoreFS(1))
	s := k.open()
	k.push(s, "a", point{"x", 1, k.clock.ms(30), 1}, point{"x", 2, k.clock.ms(30), 2})
	k.push(s, "a", point{"x", 1, k.clock.ms(20), 3}, point{"x", 2, k.clock.ms(20), 4})
	scrapes := map[string]func(match func(line []byte) bool) []Family{
		"newest": func(match func(line []byte) bool) []Family {
			fams, _ := scraper(s, time.Hour).NewestPerSeries(0, match)
			return fams
		},
		"unread": func(match func(line []byte) bool) []Family {
			session := beginScrape(t, s.Consumers, "c", &AnswerReadTracker{}, k.clock.Now())
			fams, _, _ := scraper(s, time.Hour).ServeUnreadAndNewest(session, 0, false, match)
			return fams
		},
	}
	for i, name := range []string{"newest", "unread"} {
		matching, goOn := make(chan bool), make(chan bool)
		matched := 0
		result := make(chan []Family, 1)
		go func() {
			result <- scrapes[name](func(line []byte) bool {
				if matched++; matched == 1 {
					matching <- true
					<-goOn
				}
				return bytes.Contains(line, []byte(`n="1"`))
			})
		}()
		<-matching
		stored := make(chan error, 1)
		go func() {
			_, err := k.tryPush(s, "a", point{"x", 1, k.clock.ms(10 - i), 5})
			stored <- err
		}()
		select {
		case err := <-stored:
			if err != nil {
				t.Errorf("%s: the push failed: %v", name, err)
			}
		case <-time.After(20 * time.Second):
			t.Errorf("%s: the push is not stored while the scrape applies its selectors", name)
		}
		close(goOn)
		got, want := valuesIn(<-result), []string{"3 ", "1 3 5 "}[i]
		if got != want || matched != 2 {
			t.Errorf("%s: got the values %q with %d calls of match, want %q with a call for each of 2 series", name, got, matched, want)
		}
	}
}

// When a scrape cannot show all sites, the sites take turns. If several scrapers alternate, each of
// them still sees every site in turn.
func TestNewestPerSeriesRotates(t *testing.T) {
	k := newStoreKit(t, newStoreFS(1))
	s := k.open()
	for c := range 10 {
		var points []point
		for n := range 1 + c {
			points = append(points, point{"x", n, k.clock.ms(0), 1})
		}
		k.push(s, fmt.Sprint("c", c), points...)
	}
	for _, limit := range []int{1, 10, 23, 54, 55, 100} {
		for scrapers := 1; scrapers <= 4; scrapers++ {
			x := scraper(s, time.Hour)
			seen := map[string]int{} // by site: number of scrapes of the first scraper that showed the site
			for scrape := range 40 * scrapers {
				fams, truncated := x.NewestPerSeries(limit, nil)
				n := 0
				ids := map[string]bool{}
				for _, f := range fams {
					n += sampleCount(f)
					for l := range f.Samples {
						_, labels, _ := (&SeriesParser{}).ParseLine(l.Line)
						ids[string(labels[0].Value)] = true
					}
				}
				// The site at which a scrape begins is shown completely, even over the limit. The
				// largest site has 10 samples.
				if n > max(limit, 10) || truncated != (len(ids) < 10) {
					t.Errorf("limit %d, scrape %d: %d samples of %d sites, truncated %t", limit, scrape, n, len(ids), truncated)
				}
				for id := range ids {
					if scrape%scrapers == 0 {
						seen[id]++
					}
				}
			}
			// If the limit is too low for all sites, each of the 10 sites is the first site of about a
			// tenth of the scrapes.
			if len(seen) != 10 || slices.Min(slices.Collect(maps.Values(seen))) < 3 {
				t.Errorf("limit %d, %d scrapers: in 40 scrapes of one scraper the sites were shown %v times, want each at least 3", limit, scrapers, seen)
			}
		}
	}
}

// Under a sample limit, a site with many unread samples does not displace sites with few unread
// samples.
func TestUnreadIsFair(t *testing.T) {
	k := newStoreKit(t, newStoreFS(1))
	s := k.open()
	var flood []point
	for i := range 500 {
		flood = append(flood, point{"x", i % 10, k.clock.ms(3000) + int64(i), 1})
	}
	k.push(s, "flood", flood...)
	for i := range 9 {
		k.push(s, fmt.Sprint("small", i), point{"x", 1, k.clock.ms(1), 1}, point{"x", 2, k.clock.ms(1), 1})
	}
	r := beginScrape(t, s.Consumers, "c", &AnswerReadTracker{}, k.clock.Now())
	fams, unread, more := scraper(s, time.Hour).ServeUnreadAndNewest(r, 100, false, nil)
	ofSmall, ofFlood := 0, 0
	for _, f := range fams {
		for l := range f.Samples {
			if strings.Contains(string(l.Line), "small") {
				ofSmall++
			} else {
				ofFlood++
			}
		}
	}
	if ofSmall != 18 || ofFlood > 82 || ofFlood < 70 || unread > 100 || !more {
		t.Errorf("%d samples of small sites and %d of the large site; unread %d, more %t; want 18 and 70 to 82, more true", ofSmall, ofFlood, unread, more)
	}
}

// If the sample limit is below the number of sites, every site still gets its turn, both with
// unread samples and with newest samples that are repeated.
func TestUnreadRotates(t *testing.T) {
	k := newStoreKit(t, newStoreFS(1))
	s := k.open()
	x := scraper(s, time.Hour)
	conn := &AnswerReadTracker{}
	scrape := func(limit int, seen map[string]int) {
		fams, _, _ := x.ServeUnreadAndNewest(beginScrape(t, s.Consumers, "c", conn, k.clock.Now()), limit, false, nil)
		for _, f := range fams {
			for l := range f.Samples {
				seen[string(l.Line)]++
			}
		}
	}
	unread, repeated := map[string]int{}, map[string]int{}
	for range 40 {
		k.clock.Add(time.Second)
		for c := range 10 {
			k.push(s, fmt.Sprint("c", c), point{"x", 1, k.clock.ms(0), 1})
		}
		scrape(3, unread)
	}
	for range 2 { // read and confirm the remaining samples
		scrape(0, map[string]int{})
	}
	for range 40 {
		scrape(3, repeated)
	}
	for what, seen := range map[string]map[string]int{"unread samples": unread, "repeated newest samples": repeated} {
		if len(seen) != 10 || slices.Min(slices.Collect(maps.Values(seen))) < 5 {
			t.Errorf("%s: 40 scrapes showed the series %v times, want each of 10 at least 5 times", what, seen)
		}
	}
}

// A scrape of a large backlog serves at most 50,000 unread samples, shared among the sites. The next
// ones serve at most twice as many as the largest scrape that was confirmed in time. Nothing is left
// out: together they serve each sample once.
func TestUnreadGrows(t *testing.T) {
	k := newStoreKit(t, newStoreFS(1))
	k.cfg.LimitSeries, k.cfg.LimitSamples = 0, 0
	s := k.open()
	const sites, perSite = 10, 20_000
	for c := range sites {
		k.push(s, fmt.Sprint("c", c), k.series("x", perSite)...)
	}
	k.clock.Add(time.Minute)
	x := scraper(s, time.Second) // newest samples are too old to be repeated
	conn := &AnswerReadTracker{}
	shown := map[string]bool{}
	for i, want := range []int{50_000, 100_000, 50_000} {
		session := beginScrape(t, s.Consumers, "c", conn, k.clock.Now())
		fams, unread, more := x.ServeUnreadAndNewest(session, 500_000, false, nil)
		session.EndScrapeAndLimitNext(0, time.Second, nil)
		seen := map[byte]int{}
		for _, f := range fams {
			for l := range f.Samples {
				shown[string(l.Line)] = true
				site := bytes.Index(l.Line, []byte(`_id="c`)) + len(`_id="c`)
				seen[l.Line[site]]++
			}
		}
		if unread != want || more != (i < 2) || len(seen) != sites {
			t.Errorf("scrape %d: %d samples of %d sites, more: %t; want %d samples of all sites", i, unread, len(seen), more, want)
		}
	}
	if len(shown) != sites*perSite {
		t.Errorf("%d series were shown, want %d", len(shown), sites*perSite)
	}
}

// Newest samples that a consumer has already read are repeated only in room that unread samples
// leave. They never displace unread samples, at whichever site a scrape begins.
func TestUnreadBeforeNewest(t *testing.T) {
	k := newStoreKit(t, newStoreFS(1))
	s := k.open()
	points := func(n int) (all []point) {
		for i := range n {
			all = append(all, point{"x", i, k.clock.ms(0), 1})
		}
		return all
	}
	const limit = 100
	for i := range 4 {
		k.push(s, fmt.Sprint("had", i), points(40)...)
	}
	for start := range 10 {
		for _, unread := range []int{0, 1, 60, 99, 100, 101, 400} {
			k.clock.Add(time.Minute / 2)
			conn := &AnswerReadTracker{}
			scrape := func(start float64, limit int) (fams []Family, n int, more bool) {
				x := scraper(s, time.Hour)
				x.start = start
				return x.ServeUnreadAndNewest(beginScrape(t, s.Consumers, "c", conn, k.clock.Now()), limit, false, nil)
			}
			scrape(0, 0)
			if unread > 0 {
				k.push(s, "new0", points((unread+1)/2)...)
			}
			if unread > 1 {
				k.push(s, "new1", points(unread/2)...)
			}
			fams, n, more := scrape(float64(start)/10, limit)
			lines := 0
			for _, f := range fams {
				lines += sampleCount(f)
			}
			if n != min(unread, limit) || more != (unread > limit) || lines > limit {
				t.Errorf("start %d, %d unread: got %d unread of %d samples, more %t; the limit is %d", start, unread, n, lines, more, limit)
			}
			if unread == 0 && lines < limit/2 {
				t.Errorf("start %d, none unread: got %d newest samples, want at least %d", start, lines, limit/2)
			}
			for range 2 { // read and confirm the remaining samples
				scrape(0, 0)
			}
		}
	}
}

// fairShare returns how many samples each site may have so that all sites together have at most the
// limit. The result is 1 if even one sample for each site exceeds the limit.
func TestFairShare(t *testing.T) {
	for _, test := range []struct {
		wants       []int
		limit, want int
	}{
		{[]int{10, 10}, 10, 5},
		{[]int{1, 100, 100}, 21, 10},
		{[]int{100}, 7, 7},
		{[]int{5, 5, 5}, 2, 1},
	} {
		if got := fairShare(slices.Clone(test.wants), test.limit); got != test.want {
			t.Errorf("sites want %v, limit %d: got share %d, want %d", test.wants, test.limit, got, test.want)
		}
	}
}

// ForEachSite lets other goroutines run every 64 sites, so that the network is polled. The scheduler is
// free to go on with the goroutine that yields; under the race detector it often does.
func TestForEachSiteYields(t *testing.T) {
	k := newStoreKit(t, nil)
	k.cfg.Dir = ""
	s := k.open()
	for i := range 30 * 64 {
		k.push(s, fmt.Sprint("site-", i), point{"m", 1, k.clock.ms(0), 7})
	}
	turns := countTurns(t)
	last, yields := turns.Load(), 0
	s.ForEachSite(0, func(*Site) bool {
		if now := turns.Load(); now != last {
			last, yields = now, yields+1
		}
		return true
	})
	if yields < 3 {
		t.Errorf("other goroutines ran %d times, want 3 or more of 30", yields)
	}
}

// BenchmarkNewest measures scrapes by a scraper that gives no name, with and without the rendering
// of the answer: of 1000 sites with 230 series each, and of 10,000 sites with 23 series each.
func BenchmarkNewest(b *testing.B) {
	for _, sites := range []int{1000, 10_000} {
		k := newStoreKit(b, nil)
		k.cfg.Dir = ""
		s := k.open()
		n := 0
		for c := range sites {
			id := fmt.Sprint("site-", c)
			p, set := sitePush(id)
			set(k.clock.ms(c % 60))
			if sites > 1000 { // keep one series of each name
				for i := range 23 {
					p.Samples[i] = p.Samples[i*10]
				}
				p.Samples = p.Samples[:23]
			}
			if _, err := s.Append(context.Background(), id, p, ScrapeNames{}, false); err != nil {
				b.Fatal(err)
			}
			n += len(p.Samples)
		}
		e := NegotiateEscaping("")
		for _, part := range []string{"collect", "render"} {
			b.Run(fmt.Sprintf("%s-%d", part, sites), func(b *testing.B) {
				var g FamilyGrouper
				reader := scraper(s, 10*time.Minute).AllSitesReader
				b.ReportAllocs()
				before := processCPU(b)
				for b.Loop() {
					reader.NewestPerSeries(&g, 0, nil)
					if part == "render" {
						if written, _, err := WriteFamilies(io.Discard, e, g.Families()); err != nil || written != n {
							b.Fatal(written, err)
						}
					}
					g.Reset()
				}
				b.ReportMetric(float64(b.N*n)/(processCPU(b)-before).Seconds(), "samples/cpu-s")
			})
		}
	}
}

// BenchmarkUnread measures scrapes of 200 sites with 230 series each, by a consumer that has not
// read the newest batch of each site ("new"), has read all batches ("again"), or has an hour of
// batches to catch up on ("backlog").
func BenchmarkUnread(b *testing.B) {
	k := newStoreKit(b, nil)
	k.cfg.Dir = ""
	s := k.open()
	const sites, batches = 200, 240
	for range batches {
		k.clock.Add(15 * time.Second)
		for c := range sites {
			id := fmt.Sprint("site-", c)
			p, set := sitePush(id)
			set(k.clock.ms(0))
			if _, err := s.Append(context.Background(), id, p, ScrapeNames{}, false); err != nil {
				b.Fatal(err)
			}
		}
	}
	cursors := func(behind uint64) map[uint64]uint64 {
		at := map[uint64]uint64{}
		s.ForEachSite(0, func(site *Site) bool {
			site.View(func(held *SiteSamples) { at[site.Key] = held.Seq - behind })
			return true
		})
		return at
	}
	for _, test := range []struct {
		name   string
		behind uint64 // number of unread batches of each site
		limit  int    // sample limit of a scrape; 0: no limit
		unread int    // number of unread samples that a scrape must serve
	}{
		{"new", 1, 0, sites * 230},
		{"again", 0, 0, 0},
		{"backlog", batches - 1, 500_000, firstUnread},
	} {
		b.Run(test.name, func(b *testing.B) {
			confirm(b, s.Consumers, test.name, k.clock.Now(), cursors(test.behind))
			samples := 0
			b.ReportAllocs()
			before := processCPU(b)
			for b.Loop() {
				r := beginScrape(b, s.Consumers, test.name, &AnswerReadTracker{}, k.clock.Now())
				fams, unread, more := scraper(s, 10*time.Minute).ServeUnreadAndNewest(r, test.limit, false, nil)
				if unread != test.unread || more != (test.limit > 0) {
					b.Fatalf("%d unread samples, more %t; want %d, %t", unread, more, test.unread, test.limit > 0)
				}
				for _, f := range fams {
					samples += sampleCount(f)
				}
			}
			b.ReportMetric(float64(samples)/(processCPU(b)-before).Seconds(), "samples/cpu-s")
		})
	}
}
