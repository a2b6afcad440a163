package main

// The consumers that decide which batches count as read: consumers that scraped this server,
// and consumers that a site's client reported.

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"
)

// A batch counts as read when every consumer that counts has read it. A consumer counts if it
// scraped this server within consumerIdle, or if the site's client reported that it scraped a
// server within that time. A consumer that has not scraped for the retention time does not count
// while another consumer has.
func TestSeqReadByAll(t *testing.T) {
	const site, other = 1, 2
	key := func(name string) uint64 { return ConsumerKey(name, "::1", "") }
	type report struct {
		site      uint64
		consumers []ConsumerAge
	}
	type (
		cursors = map[string]uint64
		ages    = map[string]time.Duration
	)
	for _, test := range []struct {
		name         string
		cursors      cursors // cursors of the consumers that scraped this server
		ages         ages    // ages of the consumers' last scrapes; a consumer that is not listed has scraped just now
		reports      []report
		seq          uint64
		hasConsumers bool
	}{
		{"no consumer", nil, nil, nil, MaxSeq, false},
		{"one consumer", cursors{"a": 5}, nil, nil, 5, true},
		{"the slower of two", cursors{"a": 5, "b": 3}, nil, nil, 3, true},
		{"a new consumer", cursors{"a": 5, "b": 0}, nil, nil, 0, true},
		{"b has not scraped for retention", cursors{"a": 5, "b": 3}, ages{"b": time.Hour + time.Second}, nil, 5, true},
		{"b scraped within retention", cursors{"a": 5, "b": 3}, ages{"b": time.Hour}, nil, 3, true},
		{"none has scraped for retention", cursors{"a": 5, "b": 3}, ages{"a": time.Hour + time.Second, "b": 2 * time.Hour}, nil, 3, true},
		{"none has scraped for a day", cursors{"a": 5}, ages{"a": 25 * time.Hour}, nil, MaxSeq, false},
		{"the site reports another", cursors{"a": 5}, nil, []report{{site, []ConsumerAge{{key("c"), 0}}}}, 0, true},
		{"the site reports the only one", nil, nil, []report{{site, []ConsumerAge{{key("c"), 0}}}}, 0, true},
		{"another site reports another", cursors{"a": 5}, nil, []report{{other, []ConsumerAge{{key("c"), 0}}}}, 5, true},
		{"the site reports one of a day ago", cursors{"a": 5}, nil, []report{{site, []ConsumerAge{{key("c"), 24 * time.Hour}}}}, 5, true},
		{"the site reports one beyond retention", cursors{"a": 5}, nil, []report{{site, []ConsumerAge{{key("c"), 2 * time.Hour}}}}, 5, true},
		{"a later report has an older scrape", cursors{"a": 5}, nil, []report{{site, []ConsumerAge{{key("c"), 0}}}, {site, []ConsumerAge{{key("c"), 2 * time.Hour}}}}, 0, true},
		{"b scraped another server", cursors{"a": 5, "b": 3}, ages{"b": 2 * time.Hour}, []report{{site, []ConsumerAge{{key("b"), time.Minute}}}}, 3, true},
	} {
		cs := openConsumers(t, newStoreFS(1), consumersNow, false)
		for name, seq := range test.cursors {
			confirm(t, cs, name, consumersNow.Add(-test.ages[name]), map[uint64]uint64{site: seq})
		}
		for _, r := range test.reports {
			cs.AddClientReportedConsumers(r.site, r.consumers, consumersNow)
		}
		if seq, has := cs.SeqReadByAll(site, consumersNow); seq != test.seq || has != test.hasConsumers {
			t.Errorf("%s: got %d, has consumers %t; want %d, %t", test.name, seq, has, test.seq, test.hasConsumers)
		}
	}
}

// The number of consumers that clients can report for one site is bounded, and so is the number of
// sites with reports. Reports outlive the site's samples, and are forgotten after a day.
func TestReportedConsumersAreBounded(t *testing.T) {
	cs := openConsumers(t, newStoreFS(1), consumersNow, false)
	for i := range uint64(3 * MaxConsumers) {
		cs.AddClientReportedConsumers(7, []ConsumerAge{{i + 1, time.Duration(i) * time.Second}}, consumersNow)
	}
	if n := len(cs.LastScrapeAges(7, consumersNow)); n != MaxConsumers {
		t.Errorf("%d consumers are known for site 7, want %d", n, MaxConsumers)
	}
	for i := range uint64(maxReportingSites + 10) {
		cs.AddClientReportedConsumers(i, []ConsumerAge{{1, 0}}, consumersNow)
	}
	if n := len(cs.reported); n != maxReportingSites {
		t.Errorf("the reports of %d sites are known, want %d", n, maxReportingSites)
	}
	cs.DropSiteCursors(7) // as the store does when it drops a site whose first push failed
	if len(cs.LastScrapeAges(7, consumersNow)) == 0 {
		t.Error("the reports of site 7 are lost with its cursors")
	}
	cs.DropIdle(consumersNow.Add(consumerIdle + time.Hour))
	if n := len(cs.reported); n != 0 {
		t.Errorf("the reports of %d sites are known after more than a day, want 0", n)
	}
}

// The reported age of a consumer's last scrape keeps growing if the consumer no longer scrapes,
// although client and server report the consumer to each other again and again.
func TestReportedConsumerAges(t *testing.T) {
	cs := openConsumers(t, newStoreFS(1), consumersNow, false)
	cs.AddClientReportedConsumers(1, []ConsumerAge{{9, 0}}, consumersNow)
	now := consumersNow
	for range 4000 { // 4000 rounds take more than an hour
		now = now.Add(999 * time.Millisecond)
		all, err := ParseConsumers(FormatConsumers(cs.LastScrapeAges(1, now)))
		if err != nil {
			t.Fatal(err)
		}
		cs.AddClientReportedConsumers(1, all, now)
	}
	if age := cs.LastScrapeAges(1, now)[0].Age; age < now.Sub(consumersNow) {
		t.Errorf("the consumer's last scrape counts as %v old, and is %v old", age, now.Sub(consumersNow))
	}
}

// In memory-only mode, Save drops the changes of cursors, because there is no file. Consumers keeps
// no cursors and no positions of sites that left the store, and a bounded number of sessions for
// each consumer.
func TestConsumersMemoryOnly(t *testing.T) {
	cs, err := OpenConsumers(nil, "", &StoreMeta{}, time.Hour, consumersNow)
	if err != nil {
		t.Fatal(err)
	}
	for site := range uint64(100) {
		confirm(t, cs, "c", consumersNow, map[uint64]uint64{site: 1})
		cs.DropSiteCursors(site)
		saveConsumers(t, cs)
	}
	for _, c := range cs.byKey {
		n := len(c.unsaved) + len(c.cursors)
		for _, r := range c.sessions {
			n += len(r.confirmed) + len(r.served)
		}
		if n > 0 {
			t.Errorf("%d cursors and positions of sites that left the store are kept", n)
		}
		if len(c.sessions) > maxSessions {
			t.Errorf("%d sessions are kept; the limit is %d", len(c.sessions), maxSessions)
		}
	}
}

// When MaxConsumers are known, a new consumer displaces the longest unused consumer that never
// confirmed a scrape, if there is one. A consumer that was restored with a cursor has confirmed a
// scrape; a consumer that was restored without a cursor has not.
func TestNewConsumerDisplacesUnconfirmed(t *testing.T) {
	fsys := newStoreFS(1)
	cs := openConsumers(t, fsys, consumersNow, false)
	at := consumersNow
	scrapeOnce := func(name string) error {
		at = at.Add(time.Second)
		_, _, err := cs.BeginScrape(ConsumerKey(name, "::1", ""), name, "::1", &AnswerReadTracker{}, at)
		return err
	}
	for i := range MaxConsumers - 2 {
		at = at.Add(time.Second)
		confirm(t, cs, fmt.Sprint("confirmed", i), at, map[uint64]uint64{1: 5})
	}
	for _, step := range []struct {
		scrape string
		gone   string // consumer that is forgotten
		reopen bool   // first restart
	}{
		{"a", "", false}, {"b", "", false}, {"c", "a", false}, {"a", "b", false}, {"c", "", false}, {"d", "a", false}, {"e", "c", true}, {"f", "d", false}, {"e", "", false}, {"g", "f", false},
	} {
		if step.reopen {
			saveConsumers(t, cs)
			cs = openConsumers(t, fsys, at, false)
		}
		before := cursorsOf(cs)
		if err := scrapeOnce(step.scrape); err != nil {
			t.Fatalf("%s: %v", step.scrape, err)
		}
		after := cursorsOf(cs)
		for name := range before {
			if _, stays := after[name]; stays == (name == step.gone) {
				t.Errorf("after a scrape of %s: %s is known: %t", step.scrape, name, stays)
			}
		}
	}
	for _, name := range []string{"e", "g"} {
		confirm(t, cs, name, at, map[uint64]uint64{1: 5})
	}
	if err := scrapeOnce("h"); !errors.Is(err, ErrConsumers) {
		t.Errorf("a new consumer while all known consumers have confirmed: %v, want ErrConsumers", err)
	}
	saveConsumers(t, cs)
	if names := cursorsOf(openConsumers(t, fsys, at, false)); len(names) != MaxConsumers || names["g"] == nil || names["d"] != nil {
		t.Errorf("after a restart %d consumers are known, g %t, d %t", len(names), names["g"] != nil, names["d"] != nil)
	}
}

// A store that is opened with a list of allowed consumers forgets all others, in memory and on disk,
// and warns of them. A consumer whose name is lost stays.
func TestOpenStoreForgetsOtherConsumers(t *testing.T) {
	k := newStoreKit(t, newStoreFS(1))
	s := k.open()
	for _, name := range []string{"central", "invented", "invented2"} {
		confirm(t, s.Consumers, name, k.clock.Now(), nil)
	}
	s.Consumers.findOrAddConsumer(KnownConsumer{Key: 7}, k.clock.Now())
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	var warnings []string
	k.cfg.OnWarning = func(err error) { warnings = append(warnings, err.Error()) }
	for _, allowed := range [][]string{{"central"}, nil} {
		k.cfg.Consumers = allowed
		s = k.open()
		if names := slices.Sorted(maps.Keys(cursorsOf(s.Consumers))); !slices.Equal(names, []string{"#7", "central"}) {
			t.Errorf("allowed %q: the consumers %q are known", allowed, names)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if len(warnings) != 1 || !strings.Contains(warnings[0], `the consumers ["invented" "invented2"] are forgotten`) {
		t.Errorf("the warnings are %q", warnings)
	}
}
