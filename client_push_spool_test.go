package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// queueServer is a server that holds what names its scrapes until its consumers have read
// it. An event is a request: "ask", or what was pushed, by the values of the samples.
type queueServer struct {
	t           *testing.T
	ahead       time.Duration // of its clock
	limit       int           // bytes of a body's text; 0: none
	noSpools    bool          // it does not know what a spool is
	noConsumers bool          // it knows no consumer
	down        atomic.Bool
	lostAnswers int               // answers that do not arrive
	declines    func(string) bool // texts whose samples it drops
	consumers   []ConsumerAge
	unavailable int                // pushes that it refuses for now
	onRequest   func(event string) // called before each answer

	mu         sync.Mutex // guards the rest
	held, read Ranges
	names      Ranges // all that was named
	events     []string
	at         []time.Time
	headers    []http.Header
	texts      []string
}

func (q *queueServer) serve(r *http.Request) (*http.Response, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.down.Load() {
		return nil, errors.New("no route to host")
	}
	clock := fmt.Sprintf(`"server":%q,"time":%d`, r.URL.Host, time.Now().Add(q.ahead).UnixMilli())
	if r.URL.Path == "/authorize" {
		return respond(200, nil, `{"version":1,"token":"t","expiresInSeconds":600000,`+clock+`}`), nil
	}
	names, err := ParseScrapeNames(r.Header.Get(SpoolHeader))
	body, readErr := io.ReadAll(r.Body)
	if err != nil || readErr != nil {
		q.t.Errorf("%v, %v", err, readErr)
	}
	if len(body) == 0 && (len(names.Numbers) > 0 || names.SpoolID == 0 || r.Header.Get("Content-Encoding") != "") {
		q.t.Errorf("a question with %v", r.Header)
	}
	event, text := "ask", ""
	if len(body) > 0 {
		var unpack Decompressor
		b, _, err := unpack.Decompress(body, "gzip", 1<<20)
		if err != nil {
			q.t.Error(err)
		}
		text = string(b)
		var ns []string
		for line := range strings.Lines(text) {
			ns = append(ns, strings.Fields(line)[1])
		}
		event = strings.Join(ns, " ")
	}
	q.events, q.at = append(q.events, event), append(q.at, time.Now())
	q.headers, q.texts = append(q.headers, r.Header), append(q.texts, text)
	if q.limit > 0 && len(text) > q.limit {
		return respond(413, nil, "too large"), nil
	}
	if q.unavailable > 0 {
		q.unavailable--
		return respond(503, http.Header{"Retry-After": {"5"}}, "overloaded"), nil
	}
	lines := slices.Collect(strings.Lines(text))
	for _, a := range names.Numbers {
		q.names = q.names.Add(a.From, a.To)
		for n := a.From; n <= a.To; n++ {
			var line string
			if len(lines) > 0 {
				line, lines = lines[0], lines[1:] // scrapes of one sample each, if refuse looks at them
			}
			if !q.read.Has(n) && (q.declines == nil || !q.declines(line)) {
				q.held = q.held.Add(n, n)
			}
		}
	}
	if q.onRequest != nil {
		q.onRequest(event)
	}
	if q.lostAnswers > 0 {
		q.lostAnswers--
		return nil, errors.New("connection reset")
	}
	var b strings.Builder
	fmt.Fprintf(&b, `{"accepted":1,"duplicates":0,"dropped":{},%s`, clock)
	if !q.noSpools && names.SpoolID != 0 {
		fmt.Fprintf(&b, `,"held":%q`, q.held)
		if !q.noConsumers {
			fmt.Fprintf(&b, `,"read":%q,"consumers":%q`, q.read, FormatConsumers(q.consumers))
		}
	}
	return respond(200, nil, b.String()+"}"), nil
}

// consume has every consumer read all.
func (q *queueServer) consume() {
	for _, a := range q.held {
		q.read = q.read.Add(a.From, a.To)
	}
	q.held = nil
}

// expect compares the requests since the last call.
func (q *queueServer) expect(what string, want ...string) {
	q.t.Helper()
	if !slices.Equal(q.events, want) {
		q.t.Errorf("%s: requests %q, want %q", what, q.events, want)
	}
	q.events, q.at, q.headers, q.texts = nil, nil, nil, nil
}

// newQueueClient returns a client of the servers https://a.example, https://b.example, …
func newQueueClient(t *testing.T, spool SpoolConfig, servers []*queueServer, change func(*ClientConfig)) (*Client, *logBuffer) {
	t.Helper()
	c, _, log := newSpoolClient(t, "", spool, func(cfg *ClientConfig, _ *ClientReloadConfig) {
		cfg.To = nil
		hosts := map[string]*queueServer{}
		for i, q := range servers {
			host := string(rune('a'+i)) + ".example"
			q.t, hosts[host] = t, q
			cfg.To = append(cfg.To, "https://"+host)
		}
		cfg.ToClient = &http.Client{Transport: roundTrip(func(r *http.Request) (*http.Response, error) { return hosts[r.URL.Host].serve(r) })}
		if change != nil {
			change(cfg)
		}
	})
	return c, log
}

// spoolOnes spools scrapes of one sample n each, a minute apart.
func spoolOnes(t *testing.T, c *Client, ns ...int) {
	t.Helper()
	for _, n := range ns {
		spoolAll(t, c, fmt.Sprintf("n %d\n", n))
	}
}

func mustDrain(t *testing.T, c *Client) {
	t.Helper()
	if err := c.pusher.DrainSpool(t.Context()); err != nil {
		t.Error(err)
	}
}

// expectSpool compares how many scrapes are in the spool, by state.
func expectSpool(t *testing.T, what string, c *Client, undelivered, held, elsewhere int) {
	t.Helper()
	st := c.spool.Stats()
	if got, want := [...]int{st.ByState[0].Scrapes, st.ByState[1].Scrapes, st.ByState[2].Scrapes}, [...]int{undelivered, held, elsewhere}; got != want {
		t.Errorf("%s: undelivered, held, elsewhere %v, want %v", what, got, want)
	}
}

// A scrape stays until it is read, whatever is pushed meanwhile; one whose answer is lost
// is asked for, and not sent again.
func TestPusherKeepsUntilRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &queueServer{}
		c, log := newQueueClient(t, diskSpool(), []*queueServer{a}, nil)
		spoolOnes(t, c, 1, 2)
		mustDrain(t, c)
		a.expect("the first", "1 2")
		expectSpool(t, "the first", c, 0, 2, 0)
		if !strings.Contains(log.String(), "undelivered=0 unread=2") {
			t.Errorf("logged:\n%s", log)
		}
		spoolOnes(t, c, 3)
		a.lostAnswers = 1
		mustDrain(t, c)
		a.expect("a lost answer", "3", "ask")
		if !c.pusher.IsHealthy() {
			t.Error("not ready after a lost answer")
		}
		expectSpool(t, "a lost answer", c, 0, 3, 0)
		a.consume()
		spoolOnes(t, c, 4)
		mustDrain(t, c)
		a.expect("all is read but the last", "4")
		expectSpool(t, "all is read but the last", c, 0, 1, 0)
		// Without anything to push one question tells.
		a.consume()
		mustDrain(t, c)
		a.expect("nothing to push")
		time.Sleep(askInterval)
		mustDrain(t, c)
		a.expect("nothing to push for a minute", "ask")
		expectSpool(t, "nothing to push", c, 0, 0, 0)
		mustDrain(t, c)
		a.expect("an empty spool")
		if n := len(spoolFiles(c.spool.cfg.FS.(*crashFS))); n > 0 {
			t.Errorf("%d files are left", n)
		}
		text := metricsText(t, c.cfg.Metrics)
		for _, state := range []string{"undelivered", "held", "elsewhere"} {
			for _, want := range []string{"scrapes", "bytes", "oldest_age_seconds"} {
				if want = fmt.Sprintf("telemeter_spool_%s{state=%q} 0\n", want, state); !strings.Contains(text, want) {
					t.Errorf("the metrics lack %s", want)
				}
			}
		}
	})
}

// An answer that is lost before the server had the push costs a question, and the push is
// sent again.
func TestPusherAsksBeforeItSendsAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &queueServer{}
		a.down.Store(true)
		c, _ := newQueueClient(t, diskSpool(), []*queueServer{a}, nil)
		spoolOnes(t, c, 1)
		time.AfterFunc(10*time.Minute, func() { a.down.Store(false) })
		mustDrain(t, c)
		// The tokens could not be had either: nothing was in flight yet.
		a.expect("after an outage", "1")
		a.down.Store(true)
		spoolOnes(t, c, 2)
		time.AfterFunc(10*time.Minute, func() { a.down.Store(false) })
		mustDrain(t, c)
		a.expect("after another", "ask", "2")
	})
}

// A push that a server refuses for now is sent again without a question, which would cost
// a server that has too much to do another request.
func TestPusherSendsAgainWhatIsRefusedForNow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := &queueServer{}, &queueServer{}
		c, _ := newQueueClient(t, diskSpool(), []*queueServer{a, b}, nil)
		spoolOnes(t, c, 1)
		a.unavailable, b.unavailable = 2, 1
		mustDrain(t, c)
		a.expect("both busy", "1", "1")
		b.expect("both busy", "1", "1")
	})
}

// A server that lost its disk gets all that is unread again: after what is new, at one push
// a second, and what comes meanwhile goes first.
func TestPusherFillsAnEmptyServer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &queueServer{}
		c, _ := newQueueClient(t, diskSpool(), []*queueServer{a}, nil)
		spoolOnes(t, c, 1, 2, 3, 4, 5)
		mustDrain(t, c)
		a.held = nil
		a.expect("full", "1 2 3 4 5")
		c.pusher.size = pushScrapeLimit{max: 2, careful: 1 << 20} // scrapes in a push
		spoolOnes(t, c, 6)
		time.AfterFunc(1500*time.Millisecond, func() {
			at := c.moment()
			c.spool.Add(Scrape{At: at, SourceTime: at.Wall, Samples: 1, Size: 4, Gzip: Gzip([]byte("n 7\n"))})
		})
		mustDrain(t, c)
		for i := 2; i < len(a.at); i++ {
			if gap := a.at[i].Sub(a.at[i-1]); gap > time.Second {
				t.Errorf("request %d came %v after the one before", i, gap)
			}
		}
		if gap := a.at[5-1].Sub(a.at[2]); gap < time.Second {
			t.Errorf("two pushes of what is elsewhere within %v", gap)
		}
		a.expect("empty", "6", "1 2", "3 4", "7", "5")
		expectSpool(t, "empty", c, 0, 7, 0)
		// A source that gives nothing meanwhile changes nothing.
		a.held = nil
		time.Sleep(askInterval)
		mustDrain(t, c)
		a.expect("empty again", "ask", "1 2", "3 4", "5 6", "7")
		expectSpool(t, "empty again", c, 0, 7, 0)
	})
}

// 200 is the end where nobody reads, and at a server that does not know what a spool is.
func TestPusherEndsWith200(t *testing.T) {
	for name, a := range map[string]*queueServer{"no consumer": {noConsumers: true}, "an old server": {noSpools: true}} {
		synctest.Test(t, func(t *testing.T) {
			spool := diskSpool()
			c, _ := newQueueClient(t, spool, []*queueServer{a}, nil)
			spoolOnes(t, c, 1, 2)
			mustDrain(t, c)
			a.expect(name, "1 2")
			expectSpool(t, name, c, 0, 0, 0)
			spoolOnes(t, c, 3)
			c, _ = newQueueClient(t, spool, []*queueServer{a}, nil) // started again
			mustDrain(t, c)
			a.expect(name+", restart", "ask", "3")
			expectSpool(t, name+", restart", c, 0, 0, 0)
		})
	}
}

// The present server answers a question, too.
func TestPusherAsksServer(t *testing.T) {
	r := newSrvRig(t)
	spool := diskSpool()
	start := func() *Client {
		c, _, _ := newSpoolClient(t, "", spool, func(cfg *ClientConfig, st *ClientReloadConfig) {
			cfg.To, cfg.ToClient, cfg.Now = []string{r.external.URL}, http.DefaultClient, r.now
			st.Token = r.token(KindClient, "site")
		})
		return c
	}
	c := start()
	text := fmt.Sprintf("n 1 %d\n", r.now().UnixMilli())
	at := c.moment()
	if err := c.spool.Add(Scrape{At: at, SourceTime: at.Wall, Samples: 1, Size: len(text), Gzip: Gzip([]byte(text))}); err != nil {
		t.Fatal(err)
	}
	c = start()
	mustDrain(t, c)
	if held := r.held("site", ""); !strings.Contains(held, text[1:]) || c.pusher.pushes.Value("failed") != 0 {
		t.Errorf("the server holds %q", held)
	}
}

// A scrape that the server declines stays; the others do not wait for it.
func TestPusherDeclined(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &queueServer{declines: func(line string) bool { return line == "n 2\n" }}
		c, log := newQueueClient(t, diskSpool(), []*queueServer{a}, nil)
		spoolOnes(t, c, 1, 2, 3)
		if err := c.pusher.DrainSpool(t.Context()); !errors.Is(err, errDeclined) || c.pusher.IsHealthy() {
			t.Errorf("got %v", err)
		}
		a.expect("declined", "1 2 3", "2")
		expectSpool(t, "declined", c, 1, 2, 0)
		// Only after a minute, and told of once.
		c.pusher.DrainSpool(t.Context())
		time.Sleep(time.Minute)
		c.pusher.DrainSpool(t.Context())
		spoolOnes(t, c, 4)
		a.declines = nil
		mustDrain(t, c)
		if !c.pusher.IsHealthy() {
			t.Error("not ready")
		}
		if n := strings.Count(log.String(), "the server took no sample of a scrape"); n != 1 || c.dropped.Value(DropByServer) > 0 {
			t.Errorf("told %d times, log:\n%s", n, log)
		}
		a.expect("then", "2", "4", "2") // one by one for a while, and what was declined last
		expectSpool(t, "then", c, 0, 4, 0)
	})
}

// A scrape in pieces is named by the last of them only.
func TestPusherNamesLastPiece(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &queueServer{limit: 8}
		c, _ := newQueueClient(t, diskSpool(), []*queueServer{a}, nil)
		spoolAll(t, c, "n 1\nn 2\nn 3\nn 4\nn 5\n")
		mustDrain(t, c)
		var named []string
		for i, h := range a.headers {
			if h.Get(SpoolHeader) != "" {
				named = append(named, a.events[i])
			}
		}
		if want := []string{"1 2 3 4 5", "3 4 5", "4 5"}; !slices.Equal(named, want) {
			t.Errorf("named are %q, want %q", named, want)
		}
		a.expect("in pieces", "1 2 3 4 5", "1 2", "3 4 5", "3", "4 5")
		expectSpool(t, "in pieces", c, 0, 1, 0)
	})
}

// A scrape whose pieces went to two servers is held by neither: it is pushed again.
func TestPusherPiecesStayTogether(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := &queueServer{limit: 8}, &queueServer{limit: 8}
		a.onRequest = func(event string) { a.down.Store(event == "1 2") }
		c, _ := newQueueClient(t, diskSpool(), []*queueServer{a, b}, nil)
		spoolAll(t, c, "n 1\nn 2\nn 3\nn 4\n")
		mustDrain(t, c)
		a.expect("a", "1 2 3 4", "1 2")
		b.expect("b", "3 4", "ask", "1 2 3 4", "1 2", "3 4")
		expectSpool(t, "at the end", c, 0, 1, 0)
	})
}

// A server that does not answer is passed over: the next is asked before it gets anything
// that the first may have.
func TestPusherAsksNextServer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := &queueServer{}, &queueServer{}
		c, _ := newQueueClient(t, diskSpool(), []*queueServer{a, b}, nil)
		spoolOnes(t, c, 1)
		mustDrain(t, c)
		spoolOnes(t, c, 2)
		a.lostAnswers = 1
		b.held = a.names.Add(a.names[0].From+60, a.names[0].From+60) // they are of one ring
		mustDrain(t, c)
		a.expect("a", "1", "2")
		b.expect("b", "ask", "2")
		expectSpool(t, "at the end", c, 0, 2, 0)
	})
}

// Where nobody reads for half an hour the next server is tried for half an hour, and then
// the first again.
func TestPusherLeavesUnreadServer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := &queueServer{}, &queueServer{}
		c, log := newQueueClient(t, diskSpool(), []*queueServer{a, b}, nil)
		var where []string
		for n := range 80 {
			spoolOnes(t, c, n) // a minute
			before := len(a.events)
			mustDrain(t, c)
			if len(a.events) > before {
				where = append(where, "a")
			} else {
				where = append(where, "b")
				b.consume()
			}
		}
		where = slices.Compact(where)
		if want := []string{"a", "b", "a"}; !slices.Equal(where, want) {
			t.Errorf("the pushes went to %v, want %v", where, want)
		}
		if n := strings.Count(log.String(), "scrapes stay unread on a server"); n != 1 {
			t.Errorf("told %d times", n)
		}
		if len(b.read) == 0 || b.read[0].From != a.names[0].From {
			t.Errorf("b has not got what a held: %v of %v", b.read, a.names)
		}
		// One that does not answer is left at once, and not tried again for half an hour.
		b.down.Store(true)
		for n := range 75 {
			spoolOnes(t, c, n)
			mustDrain(t, c)
		}
		if n := strings.Count(log.String(), "trying the next\" to=https://b"); n > 3 {
			t.Errorf("b was tried %d times in vain", n)
		}
		expectSpool(t, "at the end", c, 0, c.spool.Stats().Scrapes, 0)
	})
}

// A spool on disk is asked for after a restart, and what servers hold is not sent again.
func TestPusherRestart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &queueServer{}
		spool := diskSpool()
		c, _ := newQueueClient(t, spool, []*queueServer{a}, nil)
		spoolOnes(t, c, 1, 2)
		mustDrain(t, c)
		spoolOnes(t, c, 3)
		a.expect("before", "1 2")
		spool.FS.(*crashFS).crash()
		c, _ = newQueueClient(t, spool, []*queueServer{a}, nil)
		expectSpool(t, "nothing is known yet", c, 3, 0, 0)
		mustDrain(t, c)
		a.expect("after", "ask", "3")
		expectSpool(t, "after", c, 0, 3, 0)
	})
}

// A spool directory that is restored from an old copy names nothing by a number that was
// used before, and sends what servers do not know.
func TestPusherRestoredSpool(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &queueServer{}
		spool := diskSpool()
		disk := spool.FS.(*crashFS)
		c, _ := newQueueClient(t, spool, []*queueServer{a}, nil)
		spoolOnes(t, c, 1, 2)
		old := disk.contents()
		spoolOnes(t, c, 3, 4)
		mustDrain(t, c)
		a.consume()
		used := slices.Clone(a.names)
		for name := range disk.contents() {
			disk.Remove(name)
		}
		for name, data := range old {
			disk.put(name, []byte(data))
		}
		id := c.spool.ID()
		c, _ = newQueueClient(t, spool, []*queueServer{a}, nil)
		if c.spool.ID() != id {
			t.Error("the old copy has another ID")
		}
		a.expect("before", "1 2 3 4")
		a.names = nil
		spoolOnes(t, c, 5)
		mustDrain(t, c)
		a.expect("restored", "ask", "5")
		if used.Has(a.names[0].From) || len(a.names) != 1 || a.names[0].From != a.names[0].To {
			t.Errorf("named %v, after %v", a.names, used)
		}
		expectSpool(t, "restored", c, 0, 1, 0)
	})
}

// The client tells every server of the consumers of any, across restarts, for a day.
func TestPusherTellsConsumers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &queueServer{consumers: []ConsumerAge{{1, 10 * time.Second}, {2, 23 * time.Hour}}}
		spool, boot := diskSpool(), testBoot()
		start := func() *Client {
			c, _ := newQueueClient(t, spool, []*queueServer{a}, func(cfg *ClientConfig) { cfg.Boot = boot })
			return c
		}
		c := start()
		told := func(want string) {
			t.Helper()
			spoolOnes(t, c, 1)
			mustDrain(t, c)
			if got := a.headers[len(a.headers)-1].Get(ConsumersHeader); got != want {
				t.Errorf("told %q, want %q", got, want)
			}
		}
		told("")
		a.consumers = nil // it lost its disk
		told("0000000000000001:70,0000000000000002:82860")
		c = start()
		time.Sleep(50 * time.Minute)
		told("0000000000000001:3130,0000000000000002:85920")
		a.consumers = []ConsumerAge{{1, 5 * time.Second}}
		time.Sleep(10 * time.Minute)
		told("0000000000000001:3790") // the other has not scraped for a day
		told("0000000000000001:65")
	})
}

// Memory only: what servers hold is no loss at the end.
func TestPusherMemoryOnly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &queueServer{}
		c, log := newQueueClient(t, SpoolConfig{}, []*queueServer{a}, nil)
		spoolOnes(t, c, 1, 2)
		mustDrain(t, c)
		spoolOnes(t, c, 3)
		if n := c.spool.Stats().InMemory; n != 1 {
			t.Errorf("%d scrapes are nowhere else", n)
		}
		if err := c.Close(); err != nil || c.dropped.Value(DropSpoolHeld) != 2 || c.dropped.Value(DropSpoolClosed) != 1 {
			t.Errorf("%v, dropped %v as held, %v as lost", err, c.dropped.Value(DropSpoolHeld), c.dropped.Value(DropSpoolClosed))
		}
		if strings.Count(log.String(), "level=ERROR") != 1 || strings.Count(log.String(), "level=INFO msg=\"scrapes that a server holds") != 1 {
			t.Errorf("log:\n%s", log)
		}
	})
}

// The times of a scrape are corrected once: whatever happens later, it is sent with the
// same ones.
func TestPusherShiftsOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		source := &counting{date: true, extra: -10 * time.Minute}
		a, b := &queueServer{}, &queueServer{ahead: 20 * time.Minute}
		a.t = t
		spool, boot := diskSpool(), testBoot()
		id := "boot-1"
		start := func(servers ...*queueServer) (c *Client) {
			c, _ = newQueueClient(t, spool, servers, func(cfg *ClientConfig) {
				cfg.FromClient.Transport = source
				cfg.Boot = func() (int64, string) { ms, _ := boot(); return ms, id }
			})
			return c
		}
		scrape := func(c *Client) {
			t.Helper()
			if err := c.scrapeAndSpool(t.Context()); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Minute)
		}
		begin := time.Now()
		c := start(a)
		scrape(c) // before any server was heard
		mustDrain(t, c)
		scrape(c)
		source.extra = -40 * time.Minute // its clock is stepped
		scrape(c)
		mustDrain(t, c)
		source.extra = -40*time.Minute - 20*time.Second // it drifts
		scrape(c)
		mustDrain(t, c)
		first := strings.Join(a.texts, "")
		for i, line := range strings.SplitAfter(strings.TrimSuffix(first, "\n"), "\n") {
			var n, ms int64
			fmt.Sscanf(line, "n %d %d", &n, &ms)
			// A Date has whole seconds, and the last shift stays.
			want := begin.Add(time.Duration(i) * time.Minute).UnixMilli()
			if i == 3 {
				want -= 20_000
			}
			if n != int64(i+1) || ms < want-2000 || ms > want+2000 {
				t.Errorf("sample %d: %q is %d ms off", i+1, line, ms-want)
			}
		}
		if got := a.headers[len(a.headers)-1].Get(ClockOffsetHeader); got < "2419000" || got > "2421000" || len(got) != 7 {
			t.Errorf("the push tells an error of %q ms", got)
		}
		if got := c.pusher.offset; got == nil || !strings.Contains(metricsText(t, c.cfg.Metrics), "telemeter_source_clock_offset_seconds 24") {
			t.Error("no metric tells the error")
		}
		// Again to the same server after a restart, to another whose clock is wrong, and
		// after a reboot.
		for _, to := range []*queueServer{a, b, b} {
			a.held, b.held, a.texts, b.texts = nil, nil, nil, nil
			c = start(to)
			mustDrain(t, c)
			if got := strings.Join(to.texts, ""); got != first {
				t.Errorf("sent again:\n%swant:\n%s", got, first)
			}
			id += "x"
		}
	})
}

// A scrape that was spooled before any server was heard is corrected before it is sent,
// durably; if the disk fails then, the corrected one is held in memory.
func TestSpoolCorrectsTimes(t *testing.T) {
	for _, fails := range []bool{false, true} {
		shift := int64(1000)
		r := newSpoolRig(t, func(c *SpoolConfig) {
			c.CorrectTimes = func(sc Scrape) Scrape {
				text := shiftTimes(gunzipped(t, sc.Gzip), shift)
				sc.Corrected, sc.Shift, sc.Size, sc.Gzip = true, shift, len(text), Gzip(text)
				return sc
			}
		})
		r.mustAdd(1, 2)
		if fails {
			r.fs.hook = failOn("write", "", 0, errFull)
		}
		first := r.nextPush(noLimits)
		if want := fmt.Sprintf("s{n=\"1\",i=\"0\"} 1 %d\n", 1001); !bytes.HasPrefix(gunzipped(t, first[0].Gzip), []byte(want)) {
			t.Errorf("got %q, want %q first", gunzipped(t, first[0].Gzip), want)
		}
		r.fs.hook = nil
		shift = 5000
		r.spool.ReleaseInFlight()
		if fails {
			r.expect("in memory", r.spool.Stats().InMemory, 2)
			r.mustAdd(3) // which writes back what is in memory
		}
		r.expect("on disk", r.spool.Stats().InMemory, 0)
		r.fs.crash()
		r.open()
		again := r.nextPush(noLimits)
		for i := range first {
			if !bytes.Equal(gunzipped(t, again[i].Gzip), gunzipped(t, first[i].Gzip)) || !again[i].Corrected {
				t.Errorf("fails %v: %q, then %q", fails, gunzipped(t, first[i].Gzip), gunzipped(t, again[i].Gzip))
			}
		}
		r.expect("the newest shift", r.spool.LastTimeShift(), map[bool]int{false: 1000, true: 5000}[fails])
	}
}

// The files beside the scrapes are not scrapes, and the spool's record is made anew if it
// is damaged, under another ID.
func TestSpoolRecord(t *testing.T) {
	r := newSpoolRig(t, nil)
	r.mustAdd(1)
	id := r.spool.ID()
	r.spool.ApplyAnswer(SpoolAnswer{KnowsSpools: true, Consumers: []ConsumerAge{{7, time.Minute}}})
	for _, name := range []string{"spool.log.tmp", "spool.log.damaged", "spool.log.damaged-2", "spool.log.refused"} {
		r.fs.put("/s/"+name, []byte("x"))
	}
	r.open()
	if r.spool.ID() != id || id == 0 || len(r.spool.Consumers()) != 1 || len(r.errs) > 0 {
		t.Errorf("ID %x after %x, consumers %v, errors %v", r.spool.ID(), id, r.spool.Consumers(), r.errs)
	}
	good := r.fs.entries["/s/"+spoolMetaName].data
	for i := range good {
		for what, data := range map[string][]byte{"cut": good[:i], "flipped": bytes.Clone(good)} {
			if what == "flipped" {
				data[i] ^= 0x40
			}
			r.fs.put("/s/"+spoolMetaName, data)
			r.errs = nil
			r.open()
			if r.spool.ID() == id || r.spool.ID() == 0 || len(r.spool.Consumers()) > 0 || len(r.errs) == 0 {
				t.Errorf("%s at %d: ID %x, errors %v", what, i, r.spool.ID(), r.errs)
			}
			again := r.spool.ID()
			if r.open(); r.spool.ID() != again {
				t.Errorf("%s at %d: the new ID does not last", what, i)
			}
		}
	}
	r.expect("the scrapes", r.drain(noLimits), [][]int{{1}})
	r.fs.Remove("/s/" + spoolMetaName)
	r.errs = nil
	if r.open(); r.spool.ID() == id || len(r.errs) > 0 {
		t.Errorf("without a record: ID %x, errors %v", r.spool.ID(), r.errs)
	}
	// A record of another cluster ID is not used.
	id, r.cfg.ClusterID = r.spool.ID(), "other"
	if r.open(); r.spool.ID() == id || len(r.errs) > 0 {
		t.Errorf("of another cluster: ID %x, errors %v", r.spool.ID(), r.errs)
	}
}

// The record is written only when it changes.
func TestSpoolRecordWrites(t *testing.T) {
	r := newSpoolRig(t, nil)
	writes := 0
	r.fs.hook = func(_ int, op, name string) fault {
		if op == "rename" && strings.Contains(name, spoolMetaName) {
			writes++
		}
		return fault{}
	}
	for _, tt := range []struct {
		later time.Duration
		told  []ConsumerAge
		want  int
	}{
		{0, nil, 0},
		{0, []ConsumerAge{{1, 0}}, 1},
		{time.Minute, []ConsumerAge{{1, 0}}, 0},
		{58 * time.Minute, []ConsumerAge{{1, 0}}, 0},
		{2 * time.Minute, []ConsumerAge{{1, 0}}, 1},
		{3 * time.Hour, nil, 0}, // it is as old as it was
		{0, []ConsumerAge{{1, 3 * time.Hour}, {2, 0}}, 1},
		{25 * time.Hour, nil, 1},
	} {
		writes = 0
		r.later(tt.later)
		r.spool.ApplyAnswer(SpoolAnswer{KnowsSpools: true, Consumers: tt.told})
		if writes != tt.want {
			t.Errorf("%+v: written %d times", tt, writes)
		}
	}
}

// Numbers follow the wall clock, and go on where that says nothing.
func TestSpoolNumbers(t *testing.T) {
	r := newSpoolRig(t, nil)
	for _, tt := range []struct {
		wall int64 // ms
		want uint64
	}{
		{1000, 1000}, {0, 1001}, {1_700_000_000, 1_700_000_000}, {1, 1_700_000_001}, {MaxScrapeNumber, 1_700_000_002}, {1_700_000_003, 1_700_000_003},
	} {
		r.now.Wall = tt.wall
		r.open()
		r.now.Wall = 0
		r.mustAdd(1)
		names := r.files()
		if got := names[len(names)-1]; got != "/s/"+scrapeFileName(tt.want) {
			t.Errorf("at %d ms: %s, want %d", tt.wall, got, tt.want)
		}
	}
}

// No number comes twice under one ID, even if the spool is empty or its directory is an older
// copy. A clock that is behind the spool's record says nothing of the numbers used.
func TestSpoolNumberOfNextProcess(t *testing.T) {
	for _, tt := range []struct {
		name   string
		later  time.Duration // until the next process
		wantID bool          // the same
	}{
		{"the same second", 5 * time.Millisecond, true},
		{"an hour", time.Hour, true},
		{"a clock that is set back", -time.Minute, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := newSpoolRig(t, nil)
			r.later(time.Hour)
			r.open()
			r.spool.ApplyAnswer(SpoolAnswer{KnowsSpools: true, Consumers: []ConsumerAge{{Key: 7, Age: time.Minute}}}) // has the record written
			r.mustAdd(1)
			first, id := r.nextPush(noLimits)[0].Number, r.spool.ID()
			r.spool.ApplyAnswer(SpoolAnswer{KnowsSpools: true, Read: Ranges{{first, first}}})
			r.now.BootID = "boot-2"
			r.now.Wall += tt.later.Milliseconds()
			r.open()
			r.mustAdd(2)
			second := r.nextPush(noLimits)[0].Number
			if same := r.spool.ID() == id; same != tt.wantID || same && second <= first {
				t.Errorf("number %d, then %d; the same ID: %v", first, second, same)
			}
			if all := r.spool.Consumers(); len(all) != 1 || all[0].Key != 7 || all[0].Age < time.Minute {
				t.Errorf("consumers %v", all)
			}
		})
	}
}

// Scrapes that a server holds are dropped before those that none holds, oldest first.
func TestSpoolDropsHeldFirst(t *testing.T) {
	r := newSpoolRig(t, func(c *SpoolConfig) { c.Limit = 4 * fileBlock })
	r.mustAdd(1, 2, 3, 4)
	r.nextPush(noLimits)
	r.spool.MarkPushFailed(false)
	r.spool.ApplyAnswer(SpoolAnswer{KnowsSpools: true, Held: Ranges{{3, 3}}})
	r.mustAdd(5)
	r.expect("dropped", r.droppedSamples, map[string]int{DropSpoolHeld: 3})
	r.mustAdd(6)
	r.expect("dropped", r.droppedSamples, map[string]int{DropSpoolHeld: 3, DropSpoolFull: 3})
	r.expect("kept", r.drain(noLimits), [][]int{{2, 4, 5, 6}})
	r.mustAdd(7)
	r.nextPush(noLimits)
	r.spool.ApplyAnswer(SpoolAnswer{KnowsSpools: true, Held: Ranges{{7, 7}}})
	r.later(3 * time.Hour)
	r.mustAdd(8)
	r.expect("dropped", r.droppedSamples, map[string]int{DropSpoolHeld: 6, DropSpoolFull: 3})
}

// A file of another version stops the opening, which says so, and stays as it is.
func TestSpoolOfAnotherVersion(t *testing.T) {
	for name, want := range map[string]string{
		scrapeFileName(1): "/s/" + scrapeFileName(1) + " has a record of version 9; this program knows version 3",
		spoolMetaName:     "/s/" + spoolMetaName + " has a record of version 9; this program knows version 1",
	} {
		r := newSpoolRig(t, nil)
		r.mustAdd(1)
		r.fs.put("/s/"+name, AppendRecord(appendLogHeader(nil, []byte("site")), 9, []byte("as nobody knows it")))
		before := r.fs.contents()
		if _, err := OpenSpool(r.cfg); err == nil || !strings.HasPrefix(err.Error(), "opening spool: "+want) {
			t.Errorf("%s: %v", name, err)
		}
		if !maps.Equal(r.fs.contents(), before) || len(r.errs) > 0 || r.dropCalls > 0 {
			t.Errorf("%s: files %q; errors %v, dropped %v", name, r.fs.names(), r.errs, r.droppedSamples)
		}
	}
}

func FuzzDecodeSpoolMeta(f *testing.F) {
	at := Moment{1_700_000_000_000, 5, "boot-1"}
	f.Add(appendSpoolMeta(nil, &spoolMeta{ID: 1, At: at}))
	f.Add(appendSpoolMeta(nil, &spoolMeta{ID: 1 << 63, At: at, Consumers: []ConsumerAge{{1, 0}, {1 << 63, consumerMaxAge}}}))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, data []byte) {
		l, err := decodeSpoolMeta(data)
		if err != nil {
			return
		}
		if l.ID == 0 || len(l.Consumers) > MaxConsumers {
			t.Fatalf("%+v", l)
		}
		if again := appendSpoolMeta(nil, &l); !bytes.Equal(again, data) {
			t.Fatalf("%q, then %q", data, again)
		}
	})
}
