package main

// Pushes that name their scrapes: which scrape numbers the answer lists as held and as read, and
// which consumers the server knows from clients.

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

// The answer to a push with a spool lists the scrape numbers that the server holds, the numbers
// that every consumer has read, and the consumers that the server knows.
func TestSpoolAnswers(t *testing.T) {
	const (
		spool = "00000000000000ab"
		other = "00000000000000cd"
		old   = "old 1 5\n" // a sample that is too old
	)
	r := newSrvRig(t)
	conn := &AnswerReadTracker{}
	sample := func(name string, n int) string {
		return fmt.Sprintf("%s %d %d\n", name, n, testNow.UnixMilli()+int64(n))
	}
	consumer := func(age int) string { return fmt.Sprintf("%016x:%d", ConsumerKey("x", "192.0.2.1", ""), age) }
	for i, c := range []struct {
		do                   string // "push", "scrape" by a consumer on one connection, or "wait" 10 s
		site, spool, text    string
		accepted, duplicates int
		lists, consumers     string // wanted in the answer to a push; see srvCounts.lists
	}{
		// Without a known consumer the answer has no list of read scrapes.
		{"push", "site-a", spool + " 1", sample("m", 1), 1, 0, "1|-", ""},
		{"push", "site-a", spool + " 2-3", sample("m", 2) + sample("m", 3), 2, 0, "1-3|-", ""},
		{"push", "site-a", spool, "", 0, 0, "1-3|-", ""},
		{"push", "site-a", other, "", 0, 0, "|-", ""},
		// A push without a spool gets no lists.
		{"push", "site-a", "", sample("m", 4), 1, 0, "-|-", ""},
		// A repeated push counts as held.
		{"push", "site-a", spool + " 1,3", sample("m", 1) + sample("m", 3), 0, 2, "1-3|-", ""},
		// A scrape counts as read when the consumer's next scrape confirms it.
		{"scrape", "", "", "", 0, 0, "", ""},
		{"push", "site-a", spool, "", 0, 0, "1-3|", consumer(0)},
		{"push", "site-a", "", "", 0, 0, "-|-", ""},
		{"wait", "", "", "", 0, 0, "", ""},
		{"scrape", "", "", "", 0, 0, "", ""},
		{"push", "site-a", spool, "", 0, 0, "|1-3", consumer(0)},
		{"wait", "", "", "", 0, 0, "", ""},
		{"push", "site-a", spool + " 2", sample("m", 2), 0, 1, "|1-3", consumer(10)},
		// A scrape that only repeats samples counts as read when these samples are read.
		{"push", "site-a", spool + " 4", sample("m", 4), 0, 1, "4|1-3", consumer(10)},
		{"scrape", "", "", "", 0, 0, "", ""},
		{"push", "site-a", spool, "", 0, 0, "4|1-3", consumer(0)},
		{"scrape", "", "", "", 0, 0, "", ""},
		{"push", "site-a", spool, "", 0, 0, "|1-4", consumer(0)},
		// If all samples of a push are untimely, its scrapes are not held, because the server's clock
		// may be wrong. They are not held either if some samples are untimely and the push names
		// several scrapes, because the samples cannot be assigned to their scrapes.
		{"push", "site-a", spool + " 5", old, 0, 0, "|1-4", consumer(0)},
		{"push", "site-a", spool + " 5-6", old + old, 0, 0, "|1-4", consumer(0)},
		{"push", "site-a", spool + " 7-8", sample("m", 7) + old, 1, 0, "|1-4", consumer(0)},
		{"push", "site-a", spool + " 7,9", sample("m", 7) + old, 0, 1, "|1-4", consumer(0)},
		{"push", "site-a", spool + " 9", sample("m", 9) + old, 1, 0, "9|1-4", consumer(0)},
		// A dropped sample that is invalid does not keep its scrapes from being held.
		{"push", "site-a", spool + " 10-11", sample("m", 10) + "bad{a=\"\x00\"} 1\n", 1, 0, "9-11|1-4", consumer(0)},
		// A scrape without samples is held, and read like any other.
		{"push", "site-a", spool + " 12", "", 0, 0, "9-12|1-4", consumer(0)},
		{"scrape", "", "", "", 0, 0, "", ""},
		{"scrape", "", "", "", 0, 0, "", ""},
		{"push", "site-a", spool, "", 0, 0, "|1-4,9-12", consumer(0)},
		// Each site has its own numbers, even for the same spool ID.
		{"push", "site-b", spool, "", 0, 0, "|", consumer(0)},
		{"push", "site-b", spool + " 1", sample("m", 1), 1, 0, "1|", consumer(0)},
	} {
		switch c.do {
		case "scrape":
			r.scrapeOn(conn, "consumer=x")
		case "wait":
			r.clock.Add(int64(10 * time.Second))
		case "push":
			var headers []string
			if c.spool != "" {
				headers = []string{SpoolHeader, c.spool}
			}
			a := r.pushSpool(c.site, c.text, headers...)
			got := r.accepted(a)
			if got.Accepted != c.accepted || got.Duplicates != c.duplicates || got.lists() != c.lists || got.Consumers != c.consumers {
				t.Errorf("step %d, %q: answered %s, want %d accepted, %d duplicates, the lists %s and the consumers %s", i, c.spool, a.body, c.accepted, c.duplicates, c.lists, c.consumers)
			}
			if got.Server != "s1" || got.Time != r.now().UnixMilli() {
				t.Errorf("step %d: answered server %q and time %d", i, got.Server, got.Time)
			}
			if c.spool == "" && (strings.Contains(a.body, `"held"`) || strings.Contains(a.body, `"read"`) || strings.Contains(a.body, `"consumers"`)) {
				t.Errorf("step %d: a push without a spool is answered %s", i, a.body)
			}
		}
	}
}

// A push that names a spool but has neither numbers nor samples only asks for the lists: the server
// stores nothing, and it does not count as the site's last push. A push that names a scrape without
// samples does count.
func TestSpoolQuestion(t *testing.T) {
	const spool = "00000000000000ab"
	r := newSrvRig(t)
	r.scrapeOn(&AnswerReadTracker{}, "consumer=x")
	if got := r.accepted(r.pushSpool("new", "", SpoolHeader, spool)); got.lists() != "|" {
		t.Errorf("answered %+v, want empty lists", got)
	}
	if n := len(r.store.sites); n != 0 {
		t.Errorf("the server knows %d sites after a question, want 0", n)
	}
	r.accepted(r.pushSpool("site-a", "up 1\n", SpoolHeader, spool+" 1"))
	before, bytes := r.held("site-a", ""), r.store.Stats().LogBytes
	r.clock.Add(int64(time.Minute))
	for range 3 {
		if got := r.accepted(r.pushSpool("site-a", "", SpoolHeader, spool)); got.lists() != "1|" {
			t.Errorf("answered %+v, want the lists 1|", got)
		}
	}
	if got := r.held("site-a", ""); got != before || r.store.Stats().LogBytes != bytes {
		t.Errorf("after questions the log has %d bytes, and served is\n%s\nbefore, %d bytes and\n%s", r.store.Stats().LogBytes, got, bytes, before)
	}
	r.accepted(r.pushSpool("site-a", "", SpoolHeader, spool+" 2"))
	if got := r.held("site-a", ""); got == before {
		t.Error("a scrape without samples does not count as a push")
	}
}

// A consumer that a site's client reports must have read the site's scrapes before they count as
// read. It does not matter for other sites. A consumer that has not scraped for a day is ignored.
func TestSpoolReportedConsumers(t *testing.T) {
	const spool = "00000000000000ab"
	r := newSrvRig(t)
	conn := &AnswerReadTracker{}
	var reported string // consumers that the client of site-a reports
	push := func(id, numbers, text, want string) {
		t.Helper()
		a := r.pushSpool(id, text, SpoolHeader, strings.TrimSpace(spool+" "+numbers), ConsumersHeader, map[string]string{"site-a": reported}[id])
		if got := r.accepted(a).lists(); got != want {
			t.Errorf("%s was answered %s, want the lists %s", id, a.body, want)
		}
	}
	scrapeTwice := func() { // the second scrape confirms the first
		r.scrapeOn(conn, "consumer=x")
		r.scrapeOn(conn, "consumer=x")
	}
	reported = "0000000000000001:86400" // a day ago
	push("site-a", "1", "up 1\n", "1|-")
	reported = "0000000000000001:86399"
	push("site-a", "", "", "1|")
	push("site-b", "1", "up 1\n", "1|-")
	reported = ""
	scrapeTwice()
	push("site-b", "", "", "|1")
	push("site-a", "", "", "|1") // the reported consumer has not scraped for --retention

	reported = "0000000000000001:10"
	r.clock.Add(int64(time.Minute))
	push("site-a", "2", "up 2\n", "2|1")
	push("site-b", "2", "up 2\n", "2|1")
	scrapeTwice()
	reported = "" // the server remembers the report
	push("site-a", "", "", "2|1")
	push("site-b", "", "", "|1-2")
	want := "0000000000000001:10," + fmt.Sprintf("%016x:0", ConsumerKey("x", "192.0.2.1", ""))
	if got := r.accepted(r.pushSpool("site-a", "", SpoolHeader, spool)).Consumers; got != want {
		t.Errorf("consumers of site-a: %s, want %s", got, want)
	}
	if got := r.accepted(r.pushSpool("site-b", "", SpoolHeader, spool)).Consumers; strings.Contains(got, "0000000000000001") {
		t.Errorf("consumers of site-b: %s, want only the consumer x", got)
	}
	// When the reported consumer scrapes this server, its cursor counts.
	seq, _ := r.store.Consumers.SeqReadByAll(SiteKey("site-b"), r.now())
	for range 2 {
		session, _, err := r.store.Consumers.BeginScrape(1, "y", "192.0.2.2", conn, r.now())
		if err != nil {
			t.Fatal(err)
		}
		session.MarkServed(SiteKey("site-a"), ReadPosition{Seq: seq}, 1)
		session.MarkServed(SiteKey("site-b"), ReadPosition{Seq: seq}, 1)
	}
	push("site-a", "", "", "|1-2")
}
