package main

// Tests of pushes that name their scrapes in the header Telemeter-Spool: which scrape numbers the
// server's answer lists as held and as read, and which consumers the server knows from the reports
// of clients.

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

// The answer to a push that names a spool lists the scrape numbers of this spool that the server
// holds, and the consumers that the server knows. Once the server knows a consumer, the answer also
// lists the scrape numbers that every consumer has read. These are no longer listed as held.
func TestSpoolAnswers(t *testing.T) {
	const (
		spool = "00000000000000ab"
		other = "00000000000000cd"
		old   = "old 1 5\n" // a line whose sample is too old for the server, and so untimely
	)
	r := newSrvRig(t)
	conn := &AnswerReadTracker{}
	sample := func(name string, n int) string {
		return fmt.Sprintf("%s %d %d\n", name, n, testNow.UnixMilli()+int64(n))
	}
	consumer := func(age int) string { return fmt.Sprintf("%016x:%d", ConsumerKey("x", "192.0.2.1", ""), age) }
	for i, c := range []struct {
		// do is the kind of step: "push"; "wait", which waits 10 s; or "scrape", a scrape of the
		// consumer x. All scrapes use the same connection.
		do                   string
		site, spool, text    string
		accepted, duplicates int
		// lists has the held and read scrape numbers that the answer to a push must list, in the
		// format of srvCounts.lists. consumers has the consumers that the answer must list.
		lists, consumers string
	}{
		// Before the server knows a consumer, its answer has no list of read scrapes.
		{"push", "site-a", spool + " 1", sample("m", 1), 1, 0, "1|-", ""},
		{"push", "site-a", spool + " 2-3", sample("m", 2) + sample("m", 3), 2, 0, "1-3|-", ""},
		{"push", "site-a", spool, "", 0, 0, "1-3|-", ""},
		{"push", "site-a", other, "", 0, 0, "|-", ""},
		// The answer to a push that names no spool has neither a list of held scrapes nor a list of
		// read scrapes.
		{"push", "site-a", "", sample("m", 4), 1, 0, "-|-", ""},
		// The scrapes of a push whose samples are all duplicates are listed as held.
		{"push", "site-a", spool + " 1,3", sample("m", 1) + sample("m", 3), 0, 2, "1-3|-", ""},
		// A pushed scrape is listed as read when the consumer has got its samples and then confirms
		// them with its next request to /federate.
		{"scrape", "", "", "", 0, 0, "", ""},
		{"push", "site-a", spool, "", 0, 0, "1-3|", consumer(0)},
		{"push", "site-a", "", "", 0, 0, "-|-", ""},
		{"wait", "", "", "", 0, 0, "", ""},
		{"scrape", "", "", "", 0, 0, "", ""},
		{"push", "site-a", spool, "", 0, 0, "|1-3", consumer(0)},
		{"wait", "", "", "", 0, 0, "", ""},
		{"push", "site-a", spool + " 2", sample("m", 2), 0, 1, "|1-3", consumer(10)},
		// A push of a new scrape adds a batch, even if all its samples are duplicates. So the
		// scrape is listed as read only when the consumer has read this batch, even if the consumer
		// has read the samples before.
		{"push", "site-a", spool + " 4", sample("m", 4), 0, 1, "4|1-3", consumer(10)},
		{"scrape", "", "", "", 0, 0, "", ""},
		{"push", "site-a", spool, "", 0, 0, "4|1-3", consumer(0)},
		{"scrape", "", "", "", 0, 0, "", ""},
		{"push", "site-a", spool, "", 0, 0, "|1-4", consumer(0)},
		// If all samples of a push are untimely, the server does not list its scrapes as held,
		// because the server's clock may be wrong. It does not list them either if some samples are
		// untimely and the push names several scrapes, because it cannot tell which samples belong
		// to which scrape.
		{"push", "site-a", spool + " 5", old, 0, 0, "|1-4", consumer(0)},
		{"push", "site-a", spool + " 5-6", old + old, 0, 1, "|1-4", consumer(0)},
		{"push", "site-a", spool + " 7-8", sample("m", 7) + old, 1, 0, "|1-4", consumer(0)},
		{"push", "site-a", spool + " 7,9", sample("m", 7) + old, 0, 1, "|1-4", consumer(0)},
		{"push", "site-a", spool + " 9", sample("m", 9) + old, 1, 0, "9|1-4", consumer(0)},
		// A sample that is dropped as invalid does not keep the scrapes of its push from being
		// listed as held.
		{"push", "site-a", spool + " 10-11", sample("m", 10) + "bad{a=\"\x00\"} 1\n", 1, 0, "9-11|1-4", consumer(0)},
		// A scrape without samples is listed as held, and later as read, like any other scrape.
		{"push", "site-a", spool + " 12", "", 0, 0, "9-12|1-4", consumer(0)},
		{"scrape", "", "", "", 0, 0, "", ""},
		{"scrape", "", "", "", 0, 0, "", ""},
		{"push", "site-a", spool, "", 0, 0, "|1-4,9-12", consumer(0)},
		// The server keeps the scrape numbers of each site apart, even if two sites use the same
		// spool ID.
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

// The answer to a push that names a spool states when the site last pushed from another spool, as
// long as the server holds the samples of such a push.
func TestOtherSpoolTime(t *testing.T) {
	const first, second = "00000000000000ab", "00000000000000cd"
	r := newSrvRig(t)
	push := func(site, spool string) int64 {
		t.Helper()
		r.clock.Add(int64(time.Minute))
		return r.accepted(r.pushSpool(site, fmt.Sprintf("m 1 %d\n", r.now().UnixMilli()), SpoolHeader, spool)).OtherSpoolTime
	}
	if got := push("a", first+" 1"); got != 0 {
		t.Errorf("the first push of a site is answered with a push from another spool at %d", got)
	}
	firstAt := r.now().UnixMilli()
	if got := push("a", second+" 1"); got != firstAt {
		t.Errorf("a push from a second spool: got %d, want the time %d of the push from the first spool", got, firstAt)
	}
	if got := push("a", second+" 2"); got != firstAt {
		t.Errorf("another push from the second spool: got %d, want %d", got, firstAt)
	}
	secondAt := r.now().UnixMilli()
	if got := push("a", first+" 2"); got != secondAt {
		t.Errorf("a push from the first spool: got %d, want the time %d of the newest push from the second", got, secondAt)
	}
	if got := push("b", first+" 1"); got != 0 {
		t.Errorf("a push of another site: got %d, want 0", got)
	}
}

// A push that names a spool but has neither scrape numbers nor samples only asks for the lists of
// held and read scrapes. The server adds no site and writes nothing to the site's log, and
// push_time_seconds of the site does not change. A push that names a scrape without samples does
// change push_time_seconds.
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

// The client of a site can report a consumer that it knows from another server. The scrapes that
// clients of this site push count as read only when the reported consumer has read them too. The
// scrapes of other sites' clients do not wait for this consumer. The server ignores a reported
// consumer that has sent no request to /federate for a day. It also ignores one that has sent none
// for --retention, if another consumer has.
func TestSpoolReportedConsumers(t *testing.T) {
	const spool = "00000000000000ab"
	r := newSrvRig(t)
	conn := &AnswerReadTracker{}
	var reported string // value of the Telemeter-Consumers header in pushes of site-a
	push := func(id, numbers, text, want string) {
		t.Helper()
		a := r.pushSpool(id, text, SpoolHeader, strings.TrimSpace(spool+" "+numbers), ConsumersHeader, map[string]string{"site-a": reported}[id])
		if got := r.accepted(a).lists(); got != want {
			t.Errorf("%s was answered %s, want the lists %s", id, a.body, want)
		}
	}
	scrapeTwice := func() { // the consumer's second scrape confirms the first
		r.scrapeOn(conn, "consumer=x")
		r.scrapeOn(conn, "consumer=x")
	}
	reported = "0000000000000001:86400" // the consumer with key 1 scraped another server a day ago, so it is ignored
	push("site-a", "1", "up 1\n", "1|-")
	reported = "0000000000000001:86399"
	push("site-a", "", "", "1|")
	push("site-b", "1", "up 1\n", "1|-")
	reported = ""
	scrapeTwice()
	push("site-b", "", "", "|1")
	// Scrape 1 counts as read although the reported consumer has not read it: this consumer has not
	// scraped for --retention (2 h), and the consumer x has.
	push("site-a", "", "", "|1")

	reported = "0000000000000001:10"
	r.clock.Add(int64(time.Minute))
	push("site-a", "2", "up 2\n", "2|1")
	push("site-b", "2", "up 2\n", "2|1")
	scrapeTwice()
	reported = "" // pushes report no consumer now, but the server remembers the earlier report
	push("site-a", "", "", "2|1")
	push("site-b", "", "", "|1-2")
	want := "0000000000000001:10," + fmt.Sprintf("%016x:0", ConsumerKey("x", "192.0.2.1", ""))
	if got := r.accepted(r.pushSpool("site-a", "", SpoolHeader, spool)).Consumers; got != want {
		t.Errorf("consumers of site-a: %s, want %s", got, want)
	}
	if got := r.accepted(r.pushSpool("site-b", "", SpoolHeader, spool)).Consumers; strings.Contains(got, "0000000000000001") {
		t.Errorf("consumers of site-b: %s, want only the consumer x", got)
	}
	// When the reported consumer scrapes this server itself, its cursors on this server decide what
	// it has read.
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

// A push that its sender keeps is answered with the list of read scrapes, even if the last consumer
// was forgotten after the push was written. Without the list the client would remove the scrapes. The
// time to write such a push does not count as the time of an fsync.
func TestKeptPushIsAnsweredWithRead(t *testing.T) {
	r := newSrvRig(t)
	params := pushParams{scrapes: names1(1)}
	for i, kept := range []bool{true, false} {
		res := AppendResult{WriteTime: time.Second, KeptBySender: kept}
		resp := r.server.countAndAnswerAccepted(&pushRequest{ClusterID: "site-a"}, params, &SampleList{}, pushDropCounts{}, res)
		if has := strings.Contains(string(resp.Body), `"read":""`); has != kept {
			t.Errorf("kept by the sender %t: answered %s", kept, resp.Body)
		}
		if text, want := metricsText(t, r.server.cfg.Metrics), fmt.Sprintf("telemeter_store_fsync_duration_seconds_count %d\n", i); !strings.Contains(text, want) {
			t.Errorf("kept by the sender %t: the metrics lack %s", kept, want)
		}
	}
}

// The server syncs a push with the header Telemeter-Sync before it answers, although the push names a
// scrape and a consumer is known. An owner does so too for a forwarded push.
func TestSyncHeader(t *testing.T) {
	ring := newRingServers(t, 2)
	a, b := ring[0], ring[1]
	b.scrapeOn(&AnswerReadTracker{}, "consumer=x")
	syncs := 0
	b.store.cfg.FS.(*crashFS).hook = func(_ int, op, _ string) fault {
		if op == "sync" {
			syncs++
		}
		return fault{}
	}
	id := ownedBy(t, a.node.Forwarder, "b")
	for n, headers := range [][]string{nil, {SyncHeader, "1"}, nil} {
		for i, to := range ring {
			before := syncs
			text := fmt.Sprintf("m 1 %d\n", b.now().UnixMilli()-int64(10*n+i))
			to.accepted(to.pushSpool(id, text, append([]string{SpoolHeader, fmt.Sprintf("00000000000000ab %d", 10*n+i+1)}, headers...)...))
			if got, want := syncs > before, headers != nil; got != want {
				t.Errorf("push %d to server %s: synced %t, want %t", n, to.server.cfg.Name, got, want)
			}
		}
	}
}
