package main

// Tests of a server that stops: how long it keeps serving scrapes, in virtual time; what it logs
// about samples that consumers have not read; and how real server processes react to SIGTERM and
// SIGINT.

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// WaitUntilRead returns when no push is in flight and every consumer that scraped in the three
// minutes before the call, or later, has read all samples. It also returns after drainTimeout, and
// when its context ends.
func TestDrain(t *testing.T) {
	// scraped serves a new sample to the consumer x. The sample counts as unread until x scrapes
	// again on this connection.
	scraped := func(r *srvRig, x *AnswerReadTracker) {
		r.hold("a", "up 1\n")
		r.scrapeOn(x, "consumer=x")
	}
	for _, c := range []struct {
		name   string
		before func(r *srvRig, x *AnswerReadTracker) // runs before WaitUntilRead; nil: nothing runs
		during func(r *srvRig, x *AnswerReadTracker) // runs concurrently with WaitUntilRead; nil: nothing runs
		cancel time.Duration                         // how long after the start the context of WaitUntilRead ends; 0: never
		want   time.Duration
	}{
		{name: "no samples"},
		{name: "no consumer", before: func(r *srvRig, _ *AnswerReadTracker) { r.hold("a", "up 1\n") }},
		{name: "all samples are read", before: func(r *srvRig, x *AnswerReadTracker) {
			scraped(r, x)
			r.scrapeOn(x, "consumer=x")
		}},
		{name: "the consumer does not come back", before: scraped, want: drainTimeout},
		{name: "the context ends", before: scraped, cancel: 3 * time.Second, want: 3 * time.Second},
		{name: "the consumer scraped more than three minutes ago", before: func(r *srvRig, x *AnswerReadTracker) {
			scraped(r, x)
			time.Sleep(drainConsumerIdle + time.Second)
		}},
		{name: "the consumer scraped three minutes ago", before: func(r *srvRig, x *AnswerReadTracker) {
			scraped(r, x)
			time.Sleep(drainConsumerIdle)
		}, want: drainTimeout},
		{name: "the next scrape confirms", before: scraped, during: func(r *srvRig, x *AnswerReadTracker) {
			time.Sleep(10*time.Second - time.Millisecond)
			r.scrapeOn(x, "consumer=x")
		}, want: 10 * time.Second},
		{name: "a scrape on another connection does not confirm", before: scraped, during: func(r *srvRig, _ *AnswerReadTracker) {
			time.Sleep(10 * time.Second)
			r.scrapeOn(&AnswerReadTracker{}, "consumer=x")
		}, want: drainTimeout},
		{name: "one of two consumers has read all", before: func(r *srvRig, x *AnswerReadTracker) {
			r.hold("a", "up 1\n")
			r.hold("b", "up 1\n")
			r.scrapeOn(x, "consumer=x")
			r.scrapeOn(x, "consumer=x")
			r.scrapeOn(x, "consumer=y")
		}, during: func(r *srvRig, x *AnswerReadTracker) {
			time.Sleep(20*time.Second - time.Millisecond)
			r.scrapeOn(x, "consumer=y")
		}, want: 20 * time.Second},
		{name: "a push is in flight", before: func(r *srvRig, _ *AnswerReadTracker) { r.server.uploads.TryAcquire() }, during: func(r *srvRig, _ *AnswerReadTracker) {
			time.Sleep(5*time.Second - time.Millisecond)
			r.server.uploads.Release()
		}, want: 5 * time.Second},
		{name: "a push ends and is then read", before: func(r *srvRig, x *AnswerReadTracker) {
			r.scrapeOn(x, "consumer=x")
			r.server.uploads.TryAcquire()
		}, during: func(r *srvRig, x *AnswerReadTracker) {
			time.Sleep(5*time.Second - time.Millisecond)
			r.hold("a", "up 1\n")
			r.server.uploads.Release()
			time.Sleep(5 * time.Second)
			r.scrapeOn(x, "consumer=x")
			time.Sleep(5 * time.Second)
			r.scrapeOn(x, "consumer=x")
		}, want: 15 * time.Second},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r, x := newVirtualRig(t), &AnswerReadTracker{}
				if c.before != nil {
					c.before(r, x)
				}
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				if c.cancel > 0 {
					time.AfterFunc(c.cancel, cancel)
				}
				if c.during != nil {
					go c.during(r, x)
				}
				begin := time.Now()
				r.server.WaitUntilRead(ctx)
				if took := time.Since(begin); took < c.want || took > c.want+drainPoll {
					t.Errorf("WaitUntilRead took %v, want %v", took, c.want)
				}
				cancel()
			})
		})
	}
}

// LogUnreadSamples logs one line for each consumer with unread samples. If there is no such
// consumer, it logs one line: either that no sample is unread, or that no consumer is known.
func TestLogUnread(t *testing.T) {
	const unread = `msg="samples are unread; without a storage directory they are lost, except samples that a client still has in its spool" `
	for _, c := range []struct {
		name string
		do   func(r *srvRig, x *AnswerReadTracker)
		want []string
	}{
		{"no samples", func(*srvRig, *AnswerReadTracker) {}, []string{`msg="no sample is unread"`}},
		{"no consumer", func(r *srvRig, _ *AnswerReadTracker) { r.hold("a", "up 1\nn 1\n") }, []string{`msg="no consumer is known, so no sample has been read" samples=2`}},
		{"all samples are read", func(r *srvRig, x *AnswerReadTracker) {
			r.hold("a", "up 1\n")
			r.scrapeOn(x, "consumer=x")
			r.scrapeOn(x, "consumer=x")
		}, []string{`msg="no sample is unread"`}},
		{"two idle consumers", func(r *srvRig, x *AnswerReadTracker) {
			r.hold("a", "up 1\nn 1\n")
			r.scrapeOn(x, "consumer=y")
			r.scrapeOn(x, "consumer=x")
			r.scrapeOn(x, "consumer=x")
			r.hold("b", "up 1\n")
			// x and y are idle now: WaitUntilRead would no longer wait for them, but their unread
			// samples are still logged.
			time.Sleep(drainConsumerIdle + time.Second)
		}, []string{unread + "consumer=x address=192.0.2.1 samples=1 sites=1", unread + "consumer=y address=192.0.2.1 samples=3 sites=2"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newVirtualRig(t)
				c.do(r, &AnswerReadTracker{})
				before := r.log.String()
				r.server.LogUnreadSamples()
				log := strings.TrimPrefix(r.log.String(), before)
				for _, want := range c.want {
					if !strings.Contains(log, want) {
						t.Errorf("the log does not have %s:\n%s", want, log)
					}
				}
				if n := strings.Count(log, "\n"); n != len(c.want) {
					t.Errorf("the log has %d lines, want %d:\n%s", n, len(c.want), log)
				}
			})
		})
	}
}

// still reports whether the process is still running.
func (p *process) still() bool {
	p.t.Helper()
	return p.cmd.Process.Signal(syscall.Signal(0)) == nil
}

// ended waits until the process exits by itself, and returns its exit status. The signal 0 has no
// effect on the process.
func (p *process) ended() int {
	p.t.Helper()
	return p.end(syscall.Signal(0))
}

// uploadStatus pushes text to the member's /upload on a new connection. It returns the status code
// of the answer, or 0 if the request fails, as it does when the member no longer listens.
func (m *memberProcess) uploadStatus(token, text string) int {
	m.t.Helper()
	http.DefaultClient.CloseIdleConnections()
	req, err := http.NewRequest("POST", m.external+"/upload", strings.NewReader(text))
	if err != nil {
		m.t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+strings.TrimSpace(token))
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0
	}
	resp.Body.Close()
	return resp.StatusCode
}

// scrape sends one scrape of the consumer "central" to the member. It returns the values of the
// series up in the answer, each followed by a space.
func (m *memberProcess) scrape(scraper *http.Client) string {
	m.t.Helper()
	resp, err := scraper.Get(m.internal + "/federate?consumer=central")
	if err != nil {
		m.t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		m.t.Fatalf("/federate was answered %s: %v", resp.Status, err)
	}
	return upsOf(string(b))
}

const drainingMessage = "waiting until consumers have read their samples, before stopping; a second signal ends the wait"

// checkDraining waits until the member logs that it is draining. It then checks that the member
// refuses pushes, is still listed in its own /sd, and is still running.
func (m *memberProcess) checkDraining(t *testing.T, token string) {
	t.Helper()
	m.await(drainingMessage)
	eventually(t, "the member refuses pushes", func() bool {
		status := m.uploadStatus(token, "up 2\n")
		return status == 0 || status == http.StatusServiceUnavailable
	})
	if sd := get(t, m.internal+"/sd"); !strings.Contains(sd, "127.0.0.1:") {
		t.Errorf("/sd does not list the draining server: %s", sd)
	}
	if !m.still() {
		t.Fatal("the process ended before its samples were read")
	}
}

// On SIGTERM a server stops accepting pushes, but it serves its consumers until they have read all
// samples, for at most drainTimeout. SIGINT, or a second signal, ends the server at once. In each
// case the server exits with 0 and logs whether samples are unread. It serves unread samples after
// a restart.
func TestServerLeaves(t *testing.T) {
	dir := t.TempDir()
	mustTool(t, dir, "--mode", "keygen", "--keys", "keys")
	token := mustTool(t, dir, "--mode", "token", "--keys", "keys", "--id", "site-7", "--ttl", "1h")
	const (
		unread = `samples are unread; they will be served when this server starts again" consumer=central address=127.0.0.1 samples=1 sites=1`
		read   = `msg="no sample is unread"`
	)
	for _, c := range []struct {
		name    string
		scrapes int              // scrapes of the consumer before the first signal
		signals []syscall.Signal // signals sent to the server, one or two
		reads   bool             // the consumer scrapes once more while the server drains
		want    string           // text that the server's log must contain at the end
	}{
		{"no consumer", 0, []syscall.Signal{syscall.SIGTERM}, false, `msg="no consumer is known, so no sample has been read" samples=1`},
		{"all read", 2, []syscall.Signal{syscall.SIGTERM}, false, read},
		{"read while draining", 1, []syscall.Signal{syscall.SIGTERM}, true, read},
		{"SIGTERM twice", 1, []syscall.Signal{syscall.SIGTERM, syscall.SIGTERM}, false, unread},
		{"SIGTERM, SIGINT", 1, []syscall.Signal{syscall.SIGTERM, syscall.SIGINT}, false, unread},
		{"SIGINT", 1, []syscall.Signal{syscall.SIGINT}, false, unread},
	} {
		t.Run(c.name, func(t *testing.T) {
			storage := strings.ReplaceAll(c.name, " ", "-")
			m := startMember(t, dir, "a", "--storage-dir", storage)
			agree(t, 1, m)
			if code := m.uploadStatus(token, "up 1\n"); code != http.StatusOK {
				t.Fatalf("a push was answered %d, want 200", code)
			}
			scraper := scraperOf(t)
			for range c.scrapes {
				if got := m.scrape(scraper); got != "1 " {
					t.Errorf("before the signal a scrape gets %q, want 1", got)
				}
			}
			m.cmd.Process.Signal(c.signals[0])
			if c.reads || len(c.signals) > 1 {
				m.checkDraining(t, token)
			}
			if c.reads {
				m.scrape(scraper)
			}
			if len(c.signals) > 1 {
				m.cmd.Process.Signal(c.signals[1])
			}
			if code := m.ended(); code != exitOK {
				t.Errorf("exit status %d, want %d", code, exitOK)
			}
			if log := m.text(); !strings.Contains(log, c.want) || strings.Contains(log, read) != (c.want == read) {
				t.Errorf("the log does not have %s, or wrongly has %s", c.want, read)
			}
			if c.want == unread {
				again := startMember(t, dir, "a", "--storage-dir", storage)
				if got := again.scrape(scraperOf(t)); got != "1 " {
					t.Errorf("after a restart a scrape gets %q, want 1", got)
				}
				again.end(syscall.SIGINT)
			}
		})
	}
}

// tokenOfSiteOf returns a client token of a site whose owner in the ring is the given member. It
// tries one new site after the other: it pushes a sample of the site to this member, and looks
// which member shows the sample, because only the owner of a site does. The parameter members has
// all members of the ring.
func tokenOfSiteOf(t *testing.T, dir string, owner *memberProcess, members ...*memberProcess) string {
	t.Helper()
	for i := 0; ; i++ {
		id := fmt.Sprint("site", i)
		token := mustTool(t, dir, "--mode", "token", "--keys", "keys", "--id", id)
		if code := owner.push(token, "m 1\n"); code != http.StatusOK {
			t.Fatalf("a push was answered %d, want 200", code)
		}
		if _, got := shows(t, id, members...); got == owner {
			return token
		}
	}
}

// A member that leaves the ring first hands its sites to the other members. Until its consumers
// have read its samples, but for at most drainTimeout, the leaving member stays in /sd of all
// members and serves scrapes. Then it exits, and the other members show its state as "left".
func TestMemberLeaves(t *testing.T) {
	dir := t.TempDir()
	mustTool(t, dir, "--mode", "keygen", "--keys", "keys")
	a := startMember(t, dir, "a")
	b := startMember(t, dir, "b", "--join", a.ringAddr)
	agree(t, 2, a, b)
	token := tokenOfSiteOf(t, dir, b, a, b)
	scraper := scraperOf(t)
	b.scrape(scraper)
	b.cmd.Process.Signal(syscall.SIGTERM)
	b.await(drainingMessage)
	eventually(t, "a owns all sites", func() bool {
		shares := map[string]float64{}
		for _, m := range a.debug().Members {
			shares[m.Name] = m.Share
		}
		return shares["a"] == 1 && shares["b"] == 0
	})
	for range 3 {
		if code := a.push(token, "m 2\n"); code != http.StatusOK {
			t.Errorf("a push to the other member was answered %d, want 200", code)
		}
	}
	for _, m := range []*memberProcess{a, b} {
		if sd := get(t, m.internal+"/sd"); strings.Count(sd, "127.0.0.1:") != 2 {
			t.Errorf("/sd of %s does not list both members: %s", m.name, sd)
		}
	}
	if !strings.Contains(get(t, a.internal+"/metrics"), `telemeter_forwards_sent_total{result="kept"} 0`) {
		t.Error("a tried to forward a push to the member that leaves")
	}
	if !b.still() {
		t.Fatal("b ended before its samples were read")
	}
	b.scrape(scraper)
	if code := b.ended(); code != exitOK || !strings.Contains(b.text(), `msg="no sample is unread"`) {
		t.Errorf("exit status %d, want %d and a log that no sample is unread", code, exitOK)
	}
	eventually(t, "a knows that b has left", func() bool {
		for _, m := range a.debug().Members {
			if m.Name == "b" {
				return m.State == "left"
			}
		}
		return false
	})
}
