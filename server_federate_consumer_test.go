package main

// Tests of /federate with a consumer's name in the query: which scrapes the server refuses, which
// requests confirm the consumer's previous scrape, what the server logs about scrapes that no
// request confirms, and what it serves to scrapers that need one sample of each series per scrape.

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"
)

// A consumer's scrape is confirmed only by the next GET request of the same consumer on the same
// connection. A consumer is identified by its name, its IP address and its match[] selectors. HEAD
// requests, refused requests and requests on other connections confirm nothing.
func TestFederateConfirms(t *testing.T) {
	r := newConsumerRig(t)
	a, b := scraperOf(t), scraperOf(t)
	r.pushUps(1, 2)
	for i, step := range []struct {
		client *http.Client
		query  string
		want   string
	}{
		{a, "consumer=x", "1 2 "},
		{b, "consumer=x", "1 2 "},            // does not confirm the first step, because it is on another connection
		{a, "consumer=y", "1 2 "},            // does not confirm the first step, because it is of another consumer
		{b, "consumer=x&match[]=up", "1 2 "}, // confirms no earlier step, because another match[] makes another consumer
		{a, "", "2 "},
		{a, "consumer=x", "2 "}, // confirms the first step, so only the newest sample is served again
	} {
		if got := r.ups(step.client, step.query, ""); got != step.want {
			t.Errorf("step %d, %s: got %q, want %q", i, step.query, got, step.want)
		}
	}
	r.pushUps(3, 4)
	if got := r.ups(a, "consumer=x", ""); got != "3 4 " {
		t.Errorf("new samples: got %q, want 3 and 4", got)
	}
	for _, query := range []string{"consumer=x", "consumer=new"} {
		if got := r.get(a, "HEAD", query, ""); got.status != 200 || got.body != "" {
			t.Errorf("HEAD %s was answered %d %s", query, got.status, got.body)
		}
	}
	for _, query := range []string{"consumer=x&match[]=up{", "consumer=x&match[]=%zz"} {
		if got := r.get(a, "GET", query, ""); got.status != 400 {
			t.Errorf("%s was answered %d %s, want 400", query, got.status, got.body)
		}
	}
	if got := r.ups(scraperOf(t), "consumer=x", ""); got != "3 4 " {
		t.Errorf("on a new connection: got %q, want 3 and 4 again", got)
	}
	if got := r.ups(a, "consumer=x", ""); got != "4 " {
		t.Errorf("on the connection of the scrape: got %q, want only the newest sample", got)
	}
	if n := len(cursorsOf(r.store.Consumers)); n != 2 {
		t.Errorf("%d names of consumers are known, want 2", n)
	}
}

// Over TLS, the next scrape on the same connection confirms a scrape, too. A scrape whose connection
// ends in the middle of the answer is not confirmed, so its samples are served again.
func TestFederateConfirmsOverTLS(t *testing.T) {
	r := newConsumerRig(t)
	server, config := selfSignedTLS(t)
	r.url = "https://" + r.listen(server)
	newClient := func() *http.Client {
		c := scraperOf(t)
		c.Transport.(*http.Transport).TLSClientConfig = config
		return c
	}
	client := newClient()
	r.pushUps(1, 2)
	for i, want := range []string{"1 2 ", "2 "} {
		if got := r.ups(client, "consumer=x", ""); got != want {
			t.Errorf("scrape %d: got %q, want %q", i+1, got, want)
		}
	}
	r.pushUps(3, 4)
	ctx, cut := context.WithCancel(t.Context())
	r.during = func(req *http.Request) {
		cut() // the client closes the connection
		<-req.Context().Done()
	}
	req, err := http.NewRequestWithContext(ctx, "GET", r.url+"/federate?consumer=x", nil)
	if err != nil {
		t.Fatal(err)
	}
	if resp, err := client.Do(req); err == nil {
		resp.Body.Close()
		t.Error("the answer was not cut off")
	}
	r.during = nil
	for i, want := range []string{"3 4 ", "4 "} {
		if got := r.ups(client, "consumer=x", ""); got != want {
			t.Errorf("scrape %d after the broken one: got %q, want %q", i+1, got, want)
		}
	}
}

// A consumer's request does not confirm the previous scrape if the server had read a part of the
// request before it had written the last byte of the previous answer. A later request that begins
// after a complete answer confirms that answer.
func TestFederatePipelined(t *testing.T) {
	const get = "GET /federate?consumer=x HTTP/1.1\r\nHost: x\r\n\r\n"
	for _, test := range []struct {
		name   string
		first  string // text that the consumer sends at the beginning
		during string // text that the consumer sends before the server writes the end of the first answer
		then   string // text that the consumer sends after it has read the first answer
		want   string // values of the series up in the second answer
	}{
		{"after the answer", get, "", get, "3 "},
		{"both at once", get + get, "", "", "1 2 3 "},
		{"during the answer", get, get, "", "1 2 3 "},
		{"half at once", get + get[:30], "", get[30:], "1 2 3 "},
		{"a byte during the answer", get, "G", get[1:], "1 2 3 "},
	} {
		t.Run(test.name, func(t *testing.T) {
			r := newConsumerRig(t)
			conn := dialRaw(t, strings.TrimPrefix(r.url, "http://"))
			ups := func() string {
				t.Helper()
				resp, err := conn.readAnswer()
				if err != nil {
					t.Fatal(err)
				}
				body, err := io.ReadAll(resp.Body)
				if err != nil {
					t.Fatal(err)
				}
				return upsOf(string(body))
			}
			first, finish := make(chan *http.Request, 1), make(chan struct{})
			r.during = func(req *http.Request) {
				select {
				case first <- req:
					<-finish
				default:
				}
			}
			r.pushUps(1, 2)
			conn.send(test.first)
			eventually(t, "the first request is being answered", func() bool { return len(first) == 1 })
			r.pushUps(3)
			conn.send(test.during)
			c := (<-first).Context().Value(connTrackerKey{}).(*AnswerReadTracker)
			// The channel first is now full again, so that r.during does not stop later requests.
			first <- nil
			eventually(t, "the server has read what was sent during the answer", func() bool {
				c.mu.Lock()
				defer c.mu.Unlock()
				return test.during == "" || c.seen.complete > 1 || c.seen.partial
			})
			close(finish)
			if got := ups(); got != "1 2 " {
				t.Fatalf("first answer: %q, want 1 and 2", got)
			}
			conn.send(test.then)
			if got := ups(); got != test.want {
				t.Errorf("second answer: %q, want %q", got, test.want)
			}
			conn.send(get)
			if got := ups(); got != "3 " {
				t.Errorf("third answer: %q, want only the newest sample", got)
			}
		})
	}
}

// If the headers of a scrape show that it came through a proxy, the scrape does not confirm the
// consumer's previous scrape, and no later request confirms this scrape, because a proxy can read
// an answer without passing it on. The server logs one warning an hour for each such consumer.
func TestFederateProxied(t *testing.T) {
	for _, header := range [][]string{{"Via", "1.1 proxy"}, {"Forwarded", "for=10.0.0.1"}, {"X-Forwarded-For", "10.0.0.1"}, {"x-forwarded-for", ""}} {
		r := newConsumerRig(t)
		client := scraperOf(t)
		r.pushUps(1, 2)
		for i, step := range []struct {
			headers []string
			want    string
		}{
			{header, "1 2 "}, {header, "1 2 "}, {nil, "1 2 "}, {header, "1 2 "}, {nil, "2 "},
		} {
			if got := r.ups(client, "consumer=x", "", step.headers...); got != step.want {
				t.Errorf("%v, step %d: got %q, want %q", header, i, got, step.want)
			}
		}
		r.clock.Add(int64(LimitedLogEvery)) // messages of all consumers together are logged by rate
		r.ups(client, "consumer=y", "", header...)
		if n := strings.Count(r.log.String(), "make the consumer scrape this server directly"); n != 2 {
			t.Errorf("%d warnings about proxies, want one for each of 2 consumers:\n%s", n, r.log)
		}
	}
}

// checkUnconfirmed checks the values of the gauge telemeter_consumer_unconfirmed_scrapes. Each
// element of want is the name of a consumer in quotes, a space, and the value for this consumer.
func (r *consumerRig) checkUnconfirmed(t *testing.T, want ...string) {
	t.Helper()
	var got []string
	for line := range strings.Lines(metricsText(t, r.server.cfg.Metrics)) {
		if rest, ok := strings.CutPrefix(line, "telemeter_consumer_unconfirmed_scrapes{consumer="); ok {
			got = append(got, strings.TrimSpace(strings.Replace(rest, `,address="127.0.0.1"}`, "", 1)))
		}
	}
	if !slices.Equal(got, want) {
		t.Errorf("unconfirmed scrapes: %q, want %q", got, want)
	}
}

// checkWarnings checks that the process log contains exactly want warnings so far.
func (r *consumerRig) checkWarnings(want int) {
	r.t.Helper()
	if n := strings.Count(r.log.String(), "level=WARN"); n != want {
		r.t.Errorf("%d warnings so far, want %d", n, want)
	}
}

// The server logs a warning when three consecutive scrapes that served a consumer unread samples
// were not confirmed. It then logs at most one warning an hour, as long as no scrape of the
// consumer is confirmed. After a confirmed scrape, three more unconfirmed scrapes lead to a new
// warning at once.
func TestUnconfirmedWarnings(t *testing.T) {
	r := newConsumerRig(t)
	r.pushUps(1)
	for range 4 {
		r.checkWarnings(0)
		r.ups(scraperOf(t), "consumer=x", "")
	}
	r.checkWarnings(1)
	for range 7 {
		r.clock.Add(int64(10 * time.Minute))
		r.pushUps(2)
		r.ups(scraperOf(t), "consumer=x", "")
	}
	r.checkWarnings(2)
	client := scraperOf(t)
	r.ups(client, "consumer=x", "")
	r.ups(client, "consumer=x", "") // confirms the previous scrape on this connection
	for range 5 {
		r.pushUps(1)
		r.ups(scraperOf(t), "consumer=x", "")
	}
	r.checkWarnings(3)
}

// The gauge telemeter_consumer_unconfirmed_scrapes counts, for each consumer, the consecutive
// scrapes that served it unread samples and were not confirmed. A confirmed scrape resets the count
// to 0. Consumers that differ only in match[] share one series, which shows the highest of their
// counts. The series disappears when the server forgets the consumer.
func TestUnconfirmedGauge(t *testing.T) {
	r := newConsumerRig(t)
	r.checkUnconfirmed(t)
	r.pushUps(1)
	for range 4 {
		r.ups(scraperOf(t), "consumer=x", "")
	}
	r.checkUnconfirmed(t, `"x" 3`)
	r.ups(scraperOf(t), "consumer=x&match[]=up", "")
	r.ups(scraperOf(t), "consumer=y", "")
	r.ups(scraperOf(t), "consumer=y", "")
	r.checkUnconfirmed(t, `"x" 3`, `"y" 1`)
	client := scraperOf(t)
	r.ups(client, "consumer=x", "")
	r.checkUnconfirmed(t, `"x" 4`, `"y" 1`)
	r.ups(client, "consumer=x", "") // confirms the previous scrape on this connection
	r.checkUnconfirmed(t, `"x" 0`, `"y" 1`)
	r.clock.Add(int64(consumerIdle + time.Minute))
	r.store.Consumers.DropIdle(r.now())
	r.checkUnconfirmed(t)
}

// The server answers 400 to a scrape with an invalid consumer's name or an invalid match[], and
// does not add the consumer to the known consumers.
func TestFederateBadConsumer(t *testing.T) {
	r := newConsumerRig(t)
	client := scraperOf(t)
	for query, reason := range map[string]string{
		"consumer=": "1 to 64 bytes", "consumer=" + strings.Repeat("x", maxConsumerName+1): "1 to 64 bytes",
		"consumer=%ff": "of text", "consumer=a%00b": "of text",
		"consumer=x&match[]=up{": "match[]", "consumer=x&match[]={}": "empty string", "consumer=x&match[]=": "match[]",
	} {
		if got := r.get(client, "GET", query, ""); got.status != 400 || !strings.Contains(got.body, reason) {
			t.Errorf("%.40s was answered %d %s, want 400 and %q", query, got.status, got.body, reason)
		}
	}
	if n := len(r.store.Consumers.byKey); n != 0 {
		t.Errorf("%d refused consumers are known, want 0", n)
	}
}

// When MaxConsumers consumers are known that confirmed a scrape, the server answers 503 with
// Retry-After to a new consumer, but still serves the known consumers. The server forgets a consumer
// that has not scraped for a day, and a new consumer can then take its place.
func TestFederateTooManyConsumers(t *testing.T) {
	r := newConsumerRig(t)
	r.pushUps(1)
	client := scraperOf(t)
	for i := range 2 * MaxConsumers {
		if got := r.get(client, "GET", fmt.Sprint("consumer=", i/2), ""); got.status != 200 {
			t.Fatalf("consumer %d was answered %d %s", i/2, got.status, got.body)
		}
	}
	for _, query := range []string{"consumer=more", "consumer=0&match[]=up"} {
		got := r.get(client, "GET", query, "")
		if got.status != 503 || got.header.Get("Retry-After") != "60" || !strings.Contains(got.body, "too many consumers") {
			t.Errorf("%s was answered %d %v %s", query, got.status, got.header, got.body)
		}
	}
	if got := r.get(client, "GET", "consumer=0", ""); got.status != 200 {
		t.Errorf("a known consumer was answered %d, want 200", got.status)
	}
	r.clock.Add(int64(consumerIdle + time.Second))
	r.store.Consumers.DropIdle(r.now())
	if got := r.get(client, "GET", "consumer=more", ""); got.status != 200 {
		t.Errorf("a new consumer a day later was answered %d, want 200", got.status)
	}
}

// Invented consumers that scrape once do not keep out a new consumer, and do not displace a consumer
// that confirmed a scrape.
func TestInventedConsumers(t *testing.T) {
	r := newConsumerRig(t)
	r.pushUps(1, 2)
	old, inventor := scraperOf(t), scraperOf(t)
	for i, want := range []string{"1 2 ", "2 "} {
		if got := r.ups(old, "consumer=old", ""); got != want {
			t.Fatalf("scrape %d of the old consumer: got %q, want %q", i, got, want)
		}
	}
	for i := range 3 * MaxConsumers {
		r.clock.Add(int64(time.Millisecond))
		if got := r.get(inventor, "GET", fmt.Sprint("consumer=invented", i), ""); got.status != 200 {
			t.Fatalf("invented consumer %d was answered %d %s", i, got.status, got.body)
		}
	}
	if n := len(r.store.Consumers.byKey); n != MaxConsumers {
		t.Errorf("%d consumers are known, want %d", n, MaxConsumers)
	}
	added := scraperOf(t)
	for i, want := range []string{"1 2 ", "2 "} {
		if got := r.ups(added, "consumer=added", ""); got != want {
			t.Errorf("scrape %d of the new consumer: got %q, want %q", i, got, want)
		}
	}
	if got := r.ups(old, "consumer=old", ""); got != "2 " {
		t.Errorf("the old consumer gets %q, want only the newest sample", got)
	}
}

// With --consumer, only the listed names may scrape as consumers. Another name is answered 403 and
// is not added. Scrapes without a name are served.
func TestFederateAllowedConsumers(t *testing.T) {
	r := newConsumerRig(t, func(s *StoreConfig, _ *ServerConfig) { s.Consumers = []string{"central", "b"} })
	client := scraperOf(t)
	for query, want := range map[string]int{"consumer=central": 200, "consumer=b&match[]=up": 200, "": 200, "consumer=": 400, "consumer=other": 403, "consumer=Central": 403} {
		got := r.get(client, "GET", query, "")
		if got.status != want || strings.Contains(got.body, "--consumer lists") != (want == 403) {
			t.Errorf("%q was answered %d %s, want %d", query, got.status, got.body, want)
		}
	}
	if n := len(r.store.Consumers.byKey); n != 2 {
		t.Errorf("%d consumers are known, want 2", n)
	}
}

// Some versions of Prometheus keep only the first of several samples of a series in one scrape.
// Scrapers of VictoriaMetrics mark a series as stale if one scrape has two samples of it and the
// next scrape has one. The server therefore serves both kinds of scrapers at most one sample of
// each series in a scrape. They get the other samples in later scrapes.
func TestFederateOldScrapers(t *testing.T) {
	for agent, single := range map[string]bool{
		"Prometheus/2.42.0": false, "Prometheus/2.51.2": false,
		"Prometheus/2.52.0": true, "Prometheus/2.52.1+ds1-1": true, "Prometheus/2.53.0": true, "Prometheus/2.53.2": true,
		"Prometheus/2.53.3": false, "Prometheus/2.53.10": false, "Prometheus/2.54.0": true, "Prometheus/2.54.0-rc.1": true,
		"vm_promscrape": true, "vm_promscrape/v1.93.0": true, "vm_promscraper": false, "x vm_promscrape": false,
		"Prometheus/2.54.1": false, "Prometheus/2.540.0": false, "Prometheus/3.10.0": false, "Prometheus/3.2.52.0": false, "": false, "x Prometheus/2.52.0": false,
	} {
		r := newConsumerRig(t)
		client := scraperOf(t)
		r.pushUps(1, 2, 3)
		want := []string{"1 2 3 ", "3 ", "3 "}
		if single {
			want = []string{"1 ", "2 ", "3 ", "3 "}
		}
		for i, want := range want {
			if got := r.ups(client, "consumer=x", agent); got != want {
				t.Errorf("%s, scrape %d: got %q, want %q", agent, i, got, want)
			}
		}
	}
}

// A consumer that confirms its scrapes gets each unread sample that its match[] selects once and in
// order, even if match[] selects only a few samples. --limit-scrape counts the samples before
// match[] selects, so some answers may contain no samples.
func TestFederateSelective(t *testing.T) {
	r := newConsumerRig(t, func(_ *StoreConfig, c *ServerConfig) { c.LimitScrape = 7 })
	client := scraperOf(t)
	want := ""
	for i := range 20 {
		var text strings.Builder
		for k := range 10 {
			fmt.Fprintf(&text, "other{k=\"%d\"} %d\n", k, i)
		}
		fmt.Fprintf(&text, "up %d\n", i)
		r.accepted(r.push("site-a", text.String()))
		r.clock.Add(int64(time.Second))
		want += fmt.Sprint(i, " ")
	}
	got := ""
	for n := 0; !strings.HasSuffix(got, " 19 "); n++ {
		if n > 40 {
			t.Fatalf("after %d scrapes only %q were served", n, got)
		}
		got += r.ups(client, "consumer=x&match[]=up", "")
	}
	if got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}
