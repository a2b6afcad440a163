package main

// The rig of TestHostile: a ring of two servers, a third server with --authorize, a central
// Prometheus, a real client, and well-behaved sites whose pushes are timed. A relay between the
// servers captures what they send to each other, so that an attacker can replay it.

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httptrace"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

const (
	attackSeries   = 200              // series of a well-behaved site
	attackScrape   = 3 * time.Second  // interval and timeout of the scrapes of the central Prometheus; long enough that a scrape on a busy machine ends in time
	attackRate     = 50               // --ratelimit of the servers, in ms; the pause of a well-behaved site is at least as long
	attackPatience = 40 * time.Second // how long a client of telemeter waits for the answer to its push
)

// attackServer is a server. It has several processes, one after another, if it is restarted.
type attackServer struct {
	name, external, internal, member string // name and addresses; member is "" for a server without a ring
	args                             []string
	p                                *process
	earlier                          int   // lines in the logs of earlier processes
	peak                             int64 // highest peak memory of earlier processes since resetPeak, in bytes
}

// attackRig is a ring of the servers a and b, and the server c, which asks the authorization service
// of the rig about tokens.
type attackRig struct {
	t          *testing.T
	dir        string
	keys       Keys
	a, b, c    *attackServer
	relay      *attackRelay // between a and b, for everything that a sends to b
	owner      *Ring
	prometheus *outagePrometheus
	source     *outageSource // scraped by the client
	clientID   string
	good       *attackSite // pushes to a; b owns the site
	authorized *attackSite // pushes to c, and gets a new upload token for each push
	stop       context.CancelFunc
	running    sync.WaitGroup
}

// newAttackRig starts everything but the pushes of authorized.
func newAttackRig(t *testing.T) *attackRig {
	r := &attackRig{t: t, dir: t.TempDir()}
	mustTool(t, r.dir, "--mode", "keygen", "--keys", "keys", "--host", "localhost")
	var err error
	if r.keys, err = readKeyFile(filepath.Join(r.dir, "keys"), TokenKeyFile); err != nil {
		t.Fatal(err)
	}
	service := httptest.NewServer(http.HandlerFunc(attackAuthorize))
	t.Cleanup(service.Close)
	r.a, r.b, r.c = &attackServer{name: "a", member: freeAddr(t)}, &attackServer{name: "b", member: freeAddr(t)}, &attackServer{name: "c"}
	r.relay = newAttackRelay(t, r.b.member)
	r.a.args = []string{"--listen-cluster", r.a.member, "--join", r.relay.addr()}
	r.b.args = []string{"--listen-cluster", r.b.member, "--join", r.a.member, "--advertise", r.relay.addr()}
	r.c.args = []string{"--authorize", service.URL}
	for _, s := range r.servers() {
		s.external, s.internal = freeAddr(t), freeAddr(t)
		r.start(s)
	}
	for _, s := range r.servers() {
		s.p.await("msg=serving")
	}
	// Prometheus begins to scrape about five seconds after its start, so it starts before the ring
	// is whole.
	r.prometheus = newOutagePrometheus(t, strings.Join([]string{r.a.internal, r.b.internal, r.c.internal}, "', '"), "central", outageWindow, attackScrape)
	r.prometheus.start()
	r.whole()
	r.findOwners()
	r.startSites()
	return r
}

func (r *attackRig) servers() []*attackServer { return []*attackServer{r.a, r.b, r.c} }

// start starts a server. It does not wait until the server is ready.
func (r *attackRig) start(s *attackServer) {
	s.p = start(r.t, r.dir, append([]string{"--mode", "server", "--keys", "keys", "--name", s.name, "--listen", s.external, "--listen-internal", s.internal,
		"--storage-dir", "data-" + s.name, "--ratelimit", fmt.Sprint(attackRate, "ms")}, s.args...)...)
}

// restart ends a server with SIGTERM and starts it again.
func (r *attackRig) restart(s *attackServer) {
	s.peak = max(s.peak, attackPeak(s.p))
	if code := s.p.end(syscall.SIGTERM); code != exitOK {
		r.t.Errorf("server %s exited with %d after SIGTERM", s.name, code)
	}
	s.earlier += strings.Count(s.p.text(), "\n")
	r.checkLog(s)
	r.start(s)
}

// whole waits until a and b are ready and agree that both are in the ring, and c is ready.
func (r *attackRig) whole() {
	r.t.Helper()
	eventuallyWithin(r.t, time.Minute, 50*time.Millisecond, "all servers are ready and the ring is whole", func() bool {
		versions := map[string]bool{}
		for _, s := range r.servers() {
			if _, err := attackGet(s, "/healthz/ready"); err != nil {
				return false
			}
			if s.member == "" {
				continue
			}
			d, err := attackRing(s)
			if err != nil || len(d.slots()) != 2 {
				return false
			}
			versions[d.Ring.Version] = true
		}
		return len(versions) == 1
	})
}

// findOwners computes the owners of sites, which depend on the slots of the servers.
func (r *attackRig) findOwners() {
	d, err := attackRing(r.a)
	if err != nil {
		r.t.Fatal(err)
	}
	var claims []Claim
	for name, slot := range d.slots() {
		claims = append(claims, Claim{Slot: slot, Lamport: 1, Name: name})
	}
	r.owner = NewRing(claims, 0)
}

// sites returns n cluster IDs that begin with prefix and that the server s owns.
func (r *attackRig) sites(prefix string, s *attackServer, n int) (ids []string) {
	for i := 0; len(ids) < n; i++ {
		id := fmt.Sprint(prefix, "-", i)
		if owner, _ := r.owner.Owner(SiteKey(id)); owner == s.name {
			ids = append(ids, id)
		}
	}
	return ids
}

// startSites starts the client and the well-behaved site good, and waits until Prometheus has
// samples of both.
func (r *attackRig) startSites() {
	t := r.t
	t.Helper()
	r.source = newOutageSource(t, 20)
	r.clientID = r.sites("client", r.a, 1)[0]
	writeIn(t, r.dir, "client.token", mustTool(t, r.dir, "--mode", "token", "--keys", "keys", "--id", r.clientID, "--to", "https://"+r.b.external, "--to", "https://"+r.a.external))
	start(t, r.dir, "--mode", "client", "--from", "http://"+r.source.addr+"/metrics", "--token-file", "client.token",
		"--scrape-interval", "1s", "--interval", "2s", "--spool-dir", "spool", "--listen", "")

	id := r.sites("good", r.b, 1)[0]
	r.good = newAttackSite(id, "https://"+r.a.external, signToken(t, r.keys, Token{Kind: KindClient, ClusterID: id, ID: NewTokenID()}))
	r.authorized = newAttackSite("authorized", "https://"+r.c.external, attackGoodToken)
	r.authorized.authorize = true
	ctx, cancel := context.WithCancel(context.Background())
	r.stop = func() { cancel(); r.running.Wait() }
	t.Cleanup(r.stop)
	r.running.Go(func() { r.good.run(ctx) })
	eventually(t, "the first samples are in Prometheus", func() bool {
		for _, id := range []string{r.good.id, r.clientID} {
			if got, _, err := r.prometheus.query(fmt.Sprintf(`{__name__=~"hostile_total|outage_total",_id="%s"}`, id), "k"); err != nil || len(got) == 0 {
				return false
			}
		}
		return true
	})
}

// checkLog reports an error if a server has panicked or has ended.
func (r *attackRig) checkLog(s *attackServer) {
	r.t.Helper()
	text := s.p.text()
	for _, bad := range []string{"panic", "fatal error", "goroutine ", "SIGSEGV"} {
		if i := strings.Index(text, bad); i >= 0 {
			r.t.Errorf("the log of server %s has %q:\n%s", s.name, bad, text[max(0, i-500):min(len(text), i+3000)])
		}
	}
}

// lines returns the number of lines that a server has logged so far.
func (s *attackServer) lines() int { return s.earlier + strings.Count(s.p.text(), "\n") }

// resetPeak makes the peak memory of a server's process its present memory, and returns it.
func (r *attackRig) resetPeak(s *attackServer) int64 {
	r.t.Helper()
	s.peak = 0
	if err := os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", s.p.cmd.Process.Pid), []byte("5"), 0); err != nil {
		r.t.Fatal(err)
	}
	return attackPeak(s.p)
}

// attackPeak returns the peak of the resident memory of a process in bytes, or 0 if the process has
// ended.
func attackPeak(p *process) int64 {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	if err != nil {
		return 0
	}
	return parsePeak(string(b))
}

// parsePeak returns the value of VmHWM in the text of /proc/PID/status, in bytes. It returns 0 if
// the text has none, as that of a process that has ended.
func parsePeak(status string) int64 {
	for line := range strings.Lines(status) {
		if rest, ok := strings.CutPrefix(line, "VmHWM:"); ok {
			kb, _ := strconv.ParseInt(strings.Fields(rest)[0], 10, 64)
			return kb << 10
		}
	}
	return 0
}

// attackGet returns the body of a GET request to the internal listener of a server. A status other
// than 200 is an error.
func attackGet(s *attackServer, path string) ([]byte, error) {
	client := http.Client{Timeout: 10 * time.Second}
	resp, err := client.Get("http://" + s.internal + path)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s", resp.Status, b)
	}
	return b, err
}

func attackRing(s *attackServer) (d debugRing, err error) {
	b, err := attackGet(s, "/debug/ring")
	if err != nil {
		return d, err
	}
	return d, json.Unmarshal(b, &d)
}

const attackGoodToken = "token-of-the-authorized-site" // the only token that the authorization service of the rig accepts

// attackAuthorize is the authorization service. It answers after 50 ms. It gets the token and the
// cluster ID either as JSON, or as /authorize of telemeter does.
func attackAuthorize(w http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(io.LimitReader(r.Body, 64<<10)) // a body that cannot be read has no good token
	var asked struct {
		Token string `json:"authorization_token"`
	}
	if json.Unmarshal(body, &asked) != nil {
		asked.Token, _ = ParseBearer(r.Header.Get("Authorization"))
	}
	select {
	case <-time.After(50 * time.Millisecond):
	case <-r.Context().Done():
	}
	if asked.Token != attackGoodToken {
		http.Error(w, "unknown token", http.StatusUnauthorized)
		return
	}
	WriteJSON(w, map[string]any{"api_version": "v1", "status": "ok", "account_id": "1", "labels": map[string]string{}})
}

// attackPush is one push of a well-behaved site.
type attackPush struct {
	at      time.Time // when the push began
	took    time.Duration
	refused string // status of the answer, if the push was refused
	err     error  // set if the push got no answer
}

// attackSite is a well-behaved site. It pushes one sample of each of attackSeries series every 50
// to 100 ms, in turn over a connection that it keeps and over a new connection. It begins a push
// only after the answer to the push before it, and does not repeat a push that failed. If authorize
// is true, each push first gets an upload token from /authorize.
type attackSite struct {
	id, url, token string
	authorize      bool
	clients        [2]*http.Client

	mu     sync.Mutex     // guards the fields below
	n      int            // number of pushes that have begun
	said   []outageScrape // the samples that the server may hold, which are whole unless maybe is set
	pushes []attackPush
	opened int // number of connections that were opened to be kept
}

func newAttackSite(id, url, token string) *attackSite {
	s := &attackSite{id: id, url: url, token: token}
	for i := range s.clients {
		s.clients[i] = &http.Client{Timeout: attackPatience, Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, DisableKeepAlives: i == 1}}
	}
	return s
}

// run pushes until ctx ends.
func (s *attackSite) run(ctx context.Context) {
	for next := time.Now(); ; {
		select {
		case <-ctx.Done():
			return
		case <-time.After(time.Until(next)):
		}
		next = time.Now().Add((attackRate + rand.N(time.Duration(51))) * time.Millisecond)
		s.push()
	}
}

// push makes one push and records it.
func (s *attackSite) push() {
	s.mu.Lock()
	push := attackPush{at: time.Now()}
	client, scrape := s.clients[s.n%2], outageScrape{t: push.at.UnixMilli(), v: float64(s.n)}
	s.n++
	s.mu.Unlock()
	var body []byte
	for k := range attackSeries {
		body = fmt.Appendf(body, "hostile_total{k=\"%d\"} %v %d\n", k, scrape.v, scrape.t)
	}
	begin := time.Now()
	status, err := s.send(client, body)
	push.took = time.Since(begin)
	s.mu.Lock()
	defer s.mu.Unlock()
	if push.err = err; err == nil && status != "200" {
		push.refused = status
	}
	s.pushes = append(s.pushes, push)
	// A server may hold the samples of a push that got no answer, or an answer of the kind 5xx.
	if scrape.maybe = err != nil || status[0] == '5'; scrape.maybe || status == "200" {
		s.said = append(s.said, scrape)
	}
}

// send sends a push. It returns the status of the answer. If the answer has the status 200 but
// counts fewer samples than the push has, it returns another text.
func (s *attackSite) send(client *http.Client, body []byte) (status string, err error) {
	token := s.token
	if s.authorize {
		answer, status, err := s.post(client, "/authorize?id="+url.QueryEscape(s.id), token, nil)
		if err != nil || status != "200" {
			return "authorize " + status, err
		}
		var upload struct{ Token string }
		if err := json.Unmarshal(answer, &upload); err != nil {
			return "", err
		}
		token = upload.Token
	}
	answer, status, err := s.post(client, "/upload", token, body)
	if err != nil || status != "200" {
		return status, err
	}
	var counts struct{ Accepted int }
	if err := json.Unmarshal(answer, &counts); err != nil {
		return "", err
	}
	if counts.Accepted != attackSeries {
		return fmt.Sprintf("only %d samples accepted", counts.Accepted), nil
	}
	return status, nil
}

func (s *attackSite) post(client *http.Client, path, token string, body []byte) (answer []byte, status string, err error) {
	trace := &httptrace.ClientTrace{GotConn: func(c httptrace.GotConnInfo) {
		s.mu.Lock()
		defer s.mu.Unlock()
		if client == s.clients[0] && !c.Reused {
			s.opened++
		}
	}}
	req, err := http.NewRequestWithContext(httptrace.WithClientTrace(context.Background(), trace), http.MethodPost, s.url+path, bytes.NewReader(body))
	if err != nil {
		return nil, "", err
	}
	req.Header.Set("Authorization", "Bearer "+token)
	req.Header.Set("Content-Type", "text/plain")
	resp, err := client.Do(req)
	if err != nil {
		return nil, "", err
	}
	defer resp.Body.Close()
	answer, err = io.ReadAll(resp.Body)
	return answer, strconv.Itoa(resp.StatusCode), err
}

// awaitBegun waits until all pushes that have begun have ended.
func (s *attackSite) awaitBegun(t *testing.T) {
	t.Helper()
	s.mu.Lock()
	begun := s.n
	s.mu.Unlock()
	eventually(t, "the push that was in flight at the end of an attack has ended", func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		return len(s.pushes) >= begun
	})
}

// between returns the pushes of a site that began in a period, which excludes its end.
func (s *attackSite) between(from, to time.Time) (pushes []attackPush) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, p := range s.pushes {
		if !p.at.Before(from) && p.at.Before(to) {
			pushes = append(pushes, p)
		}
	}
	return pushes
}

// connections returns how often the site has opened the connection that it keeps.
func (s *attackSite) connections() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.opened
}

// all returns the scrapes that a server may hold.
func (s *attackSite) all() []outageScrape {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.said)
}

// attackRelay passes TCP connections and UDP packets to an address, and the answers back. It keeps
// the first packets of each direction, and the first bytes of the first connections.
type attackRelay struct {
	tcp net.Listener
	udp *net.UDPConn
	to  string

	mu       sync.Mutex // guards the fields below
	asked    [][]byte   // packets to the address
	answered [][]byte   // packets that the address sent back
	streams  [][]byte   // beginnings of connections to the address
}

const (
	attackPackets = 1000     // packets of each direction that a relay keeps
	attackStreams = 50       // connections of which a relay keeps the beginning
	attackStream  = 32 << 10 // bytes of a connection that a relay keeps, at least
)

// newAttackRelay starts a relay, which ends with the test.
func newAttackRelay(t *testing.T, to string) *attackRelay {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	udp, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1), Port: ln.Addr().(*net.TCPAddr).Port})
	if err != nil {
		t.Fatal(err)
	}
	r := &attackRelay{tcp: ln, udp: udp, to: to}
	t.Cleanup(func() { ln.Close(); udp.Close() })
	go r.relayPackets()
	go serveConns(ln, r.relayStream)
	return r
}

func (r *attackRelay) addr() string { return r.tcp.Addr().String() }

// keep appends a copy of p to *all, if *all has room for it.
func (r *attackRelay) keep(all *[][]byte, p []byte, room int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(*all) < room {
		*all = append(*all, bytes.Clone(p))
	}
}

// captured returns what the relay has kept.
func (r *attackRelay) captured() (asked, answered, streams [][]byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.asked), slices.Clone(r.answered), slices.Clone(r.streams)
}

// relayPackets passes packets until the relay ends. It has one socket for each sender, so that the
// answers to a sender can be recognized.
func (r *attackRelay) relayPackets() {
	sockets := map[netip.AddrPort]net.Conn{}
	defer func() {
		for _, s := range sockets {
			s.Close()
		}
	}()
	buf := make([]byte, 64<<10)
	for {
		n, from, err := r.udp.ReadFromUDPAddrPort(buf)
		if err != nil {
			return
		}
		r.keep(&r.asked, buf[:n], attackPackets)
		s := sockets[from]
		if s == nil {
			if s, err = net.Dial("udp", r.to); err != nil {
				continue
			}
			sockets[from] = s
			go func() {
				buf := make([]byte, 64<<10)
				for {
					n, err := s.Read(buf)
					switch {
					case err == nil:
						r.keep(&r.answered, buf[:n], attackPackets)
						r.udp.WriteToUDPAddrPort(buf[:n], from)
					case !strings.Contains(err.Error(), "refused"): // nobody listens while the server is down, which is not the end
						return
					}
				}
			}()
		}
		s.Write(buf[:n])
	}
}

// relayStream passes one connection and keeps its beginning.
func (r *attackRelay) relayStream(c net.Conn) {
	defer c.Close()
	d, err := net.Dial("tcp", r.to)
	if err != nil {
		return
	}
	defer d.Close()
	go func() {
		io.Copy(c, d)
		c.Close()
	}()
	var begin []byte
	buf := make([]byte, 64<<10)
	for kept := false; ; {
		n, err := c.Read(buf)
		if begin = append(begin, buf[:n]...); !kept && len(begin) >= attackStream {
			kept = true
			r.keep(&r.streams, begin, attackStreams)
		}
		if kept {
			begin = nil
		}
		if err != nil {
			return
		}
		if _, err := d.Write(buf[:n]); err != nil {
			return
		}
	}
}

// The authorization service of the rig accepts only the good token, whether it is asked with JSON or
// as /authorize of telemeter is.
func TestHostileAuthorize(t *testing.T) {
	for _, token := range []string{attackGoodToken, "other", ""} {
		want := http.StatusUnauthorized
		if token == attackGoodToken {
			want = http.StatusOK
		}
		body, err := json.Marshal(map[string]string{"api_version": "v1", "authorization_token": token, "cluster_id": "x"})
		if err != nil {
			t.Fatal(err)
		}
		asJSON := httptest.NewRequest(http.MethodPost, "/", bytes.NewReader(body))
		asHeader := httptest.NewRequest(http.MethodPost, "/?id=x", nil)
		asHeader.Header.Set("Authorization", "Bearer "+token)
		for name, r := range map[string]*http.Request{"JSON": asJSON, "header": asHeader} {
			w := httptest.NewRecorder()
			if attackAuthorize(w, r); w.Code != want {
				t.Errorf("token %q as %s: got status %d, want %d", token, name, w.Code, want)
			}
		}
	}
}
