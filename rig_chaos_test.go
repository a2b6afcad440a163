package main

// The rig of TestChaos. Each server runs in its own network namespace and on its own disk, a tmpfs.
// The network between servers can be cut into any parts. The sites of this file push without the
// telemeter client, as curl does, and retry failed pushes.

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

const (
	chaosSeries   = 5                // number of series of each site
	chaosDisk     = 32 << 20         // bytes of each server's disk
	chaosPatience = 90 * time.Second // limit for steps that take about ten seconds on an idle machine
)

// chaosServer is a server with its own network namespace and its own disk.
type chaosServer struct {
	name  string
	space string        // name of the server's network namespace
	addr  string        // IP address for sites and scrapers
	dir   string        // mount point of the server's disk
	p     *process      // nil while the server does not run
	full  bool          // the method fill has filled the disk
	ahead time.Duration // how far the server's clock is ahead
}

func (s *chaosServer) url(port int, path string) string {
	return fmt.Sprintf("http://%s:%d%s", s.addr, port, path)
}

// chaosRig is a ring of servers under load, with a central Prometheus that scrapes it.
type chaosRig struct {
	t        *testing.T
	name     string // name of the scenario in the output
	dir      string
	interval time.Duration // gossip interval of the servers
	seed     uint64
	rnd      *rand.Rand
	keys     Keys
	servers  []*chaosServer
	parted   bool      // the network between servers is cut
	begin    time.Time // when the scenario began

	push       context.CancelFunc // ends new pushes; a site without a client still retries its failed push
	halt       context.CancelFunc // ends all pushes, including retries
	haltCtx    context.Context
	pushing    sync.WaitGroup // waits for the goroutines that push
	pushClient *http.Client
	sites      []*chaosSite
	clientele  []*chaosClient // clients of the sites, if the scenario runs with clients
	central    *outagePrometheus
	counted    []byte // metrics of servers in text exposition, saved just before the servers ended
}

// chaosRun runs a command and fails the test if the command fails.
func chaosRun(t *testing.T, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %v: %v: %s", name, args, err, out)
	}
}

// chaosNetwork creates the network of n servers. Server i has two links. The link eth1 is for
// pushes and scrapes; its other end "m<i>" is attached to the bridge "hub", which is never cut. The
// link eth0 is for traffic between servers; its other end "c<i>" is attached to the bridge "part0".
// The method part cuts the network by attaching some of the ends "c<i>" to other "part" bridges.
// The bridges are in the network namespace of this process, which must be new and empty.
func chaosNetwork(t *testing.T, n int) {
	if links, err := net.Interfaces(); err != nil || len(links) != 1 {
		t.Fatalf("this test needs a new network namespace: run make test-chaos (links found: %v, %v)", links, err)
	}
	ip := func(args ...string) { t.Helper(); chaosRun(t, "ip", args...) }
	chaosRun(t, "mount", "-t", "tmpfs", "tmpfs", "/run") // "ip netns" keeps names of namespaces in /run
	ip("link", "set", "lo", "up")
	for part := range n {
		ip("link", "add", fmt.Sprint("part", part), "type", "bridge")
		ip("link", "set", fmt.Sprint("part", part), "up")
	}
	ip("link", "add", "hub", "type", "bridge")
	ip("address", "add", "10.98.0.254/24", "dev", "hub")
	ip("link", "set", "hub", "up")
	for i := range n {
		space := fmt.Sprint("s", i)
		ip("netns", "add", space)
		ip("-n", space, "link", "set", "lo", "up")
		for _, link := range []struct{ here, there, address, bridge string }{
			{fmt.Sprint("c", i), "eth0", fmt.Sprintf("10.99.0.%d/24", i+1), "part0"},
			{fmt.Sprint("m", i), "eth1", fmt.Sprintf("10.98.0.%d/24", i+1), "hub"},
		} {
			ip("link", "add", link.here, "type", "veth", "peer", "name", link.there, "netns", space)
			ip("-n", space, "address", "add", link.address, "dev", link.there)
			ip("-n", space, "link", "set", link.there, "up")
			ip("link", "set", link.here, "master", link.bridge, "up")
		}
	}
}

// newChaosRig returns a rig whose servers do not run yet and whose sites do not push yet.
func newChaosRig(t *testing.T, name string, servers, sites int, interval time.Duration, seed uint64) *chaosRig {
	r := &chaosRig{t: t, name: name, dir: t.TempDir(), interval: interval, seed: seed, rnd: rand.New(rand.NewPCG(seed, 0)), begin: time.Now()}
	mustTool(t, r.dir, "--mode", "keygen", "--keys", "keys")
	var err error
	if r.keys, err = readKeyFile(filepath.Join(r.dir, "keys"), TokenKeyFile); err != nil {
		t.Fatal(err)
	}
	for i := range servers {
		s := &chaosServer{name: fmt.Sprint("s", i), space: fmt.Sprint("s", i), addr: fmt.Sprintf("10.98.0.%d", i+1)}
		s.dir = filepath.Join(r.dir, s.name)
		if err := os.Mkdir(s.dir, 0o700); err != nil {
			t.Fatal(err)
		}
		chaosRun(t, "mount", "-t", "tmpfs", "-o", fmt.Sprint("size=", chaosDisk), "tmpfs", s.dir)
		t.Cleanup(func() { exec.Command("umount", "--lazy", s.dir).Run() })
		r.servers = append(r.servers, s)
	}
	for i := range sites {
		id := fmt.Sprint("site-", i)
		token, err := r.keys.Sign(Token{Kind: KindClient, ClusterID: id, ID: NewTokenID()})
		if err != nil {
			t.Fatal(err)
		}
		r.sites = append(r.sites, &chaosSite{r: r, n: i, token: token, acked: map[int64]bool{}})
	}
	r.pushClient = &http.Client{Timeout: 15 * time.Second, Transport: &http.Transport{MaxIdleConnsPerHost: 32, DialContext: (&net.Dialer{Timeout: 2 * time.Second}).DialContext}}
	r.haltCtx, r.halt = context.WithCancel(context.Background())
	t.Cleanup(func() {
		r.halt()
		r.pushing.Wait()
		r.pushClient.CloseIdleConnections()
		for _, s := range r.servers {
			r.kill(s)
		}
	})
	return r
}

// failf fails the test with a message that names the scenario and the seed.
func (r *chaosRig) failf(format string, args ...any) {
	r.t.Helper()
	r.t.Fatalf("%s (SEED=%d): %s", r.name, r.seed, fmt.Sprintf(format, args...))
}

// wait polls until ok returns true. After chaosPatience it logs the state of all servers and fails
// the test.
func (r *chaosRig) wait(what string, ok func() bool) {
	r.t.Helper()
	for deadline := time.Now().Add(chaosPatience); !ok(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(deadline) {
			for _, s := range r.servers {
				if s.p == nil {
					continue
				}
				b, err := r.get(s, 9004, "/debug/ring")
				text := s.p.text()
				r.t.Logf("server %s: ring %s (%v), end of its log:\n%s", s.name, b, err, text[max(0, len(text)-3000):])
			}
			r.failf("not within %v: %s", chaosPatience, what)
		}
	}
}

// start starts a server in its network namespace. It does not wait until the server is ready.
func (r *chaosRig) start(s *chaosServer) {
	args := []string{"--mode", "server", "--name", s.name, "--keys", "keys", "--storage-dir", filepath.Join(s.dir, "data"), "--ratelimit", "0",
		"--listen", s.addr + ":9003", "--listen-internal", s.addr + ":9004", "--internal-open", "--gossip-interval", r.interval.String(),
		"--listen-cluster", strings.Replace(s.addr, "10.98.", "10.99.", 1) + ":9006"}
	for _, other := range r.servers[:min(3, len(r.servers))] {
		if other != s {
			args = append(args, "--join", strings.Replace(other.addr, "10.98.", "10.99.", 1)+":9006")
		}
	}
	s.p = &process{t: r.t, cmd: telemeterCommand(r.t, r.dir, args...)}
	ip, err := exec.LookPath("ip")
	if err != nil {
		r.failf("%v", err)
	}
	s.p.cmd.Args = append([]string{"ip", "netns", "exec", s.space, s.p.cmd.Path}, args...)
	s.p.cmd.Path = ip
	if s.ahead != 0 {
		s.p.cmd.Env = append(s.p.cmd.Env, clockAhead+"="+s.ahead.String())
	}
	s.p.cmd.Stdout, s.p.cmd.Stderr = s.p, s.p
	if err := s.p.cmd.Start(); err != nil {
		r.failf("%v", err)
	}
}

// ready waits until a server reports that it is ready.
func (r *chaosRig) ready(s *chaosServer) {
	r.t.Helper()
	r.wait(s.name+" is ready", func() bool {
		_, err := r.get(s, 9004, "/healthz/ready")
		return err == nil
	})
}

// count saves the metrics of a server that is about to end. The method sum includes them later.
func (r *chaosRig) count(s *chaosServer) {
	b, _ := r.get(s, 9004, "/metrics") // a server that does not answer yet has counted nothing
	r.counted = append(append(r.counted, b...), '\n')
}

// kill ends a server with SIGKILL.
func (r *chaosRig) kill(s *chaosServer) {
	if s.p != nil {
		r.count(s)
		s.p.cmd.Process.Kill()
		s.p.cmd.Wait()
		s.p = nil
	}
}

// stop sends SIGTERM to a server and waits until the server has ended. Before it ends, the server
// waits a limited time for consumers to scrape the samples that they have not read.
func (r *chaosRig) stop(s *chaosServer) {
	r.t.Helper()
	r.count(s)
	s.p.cmd.Process.Signal(syscall.SIGTERM)
	ended := make(chan error, 1)
	go func() { ended <- s.p.cmd.Wait() }()
	select {
	case err := <-ended:
		if err != nil {
			r.failf("server %s ended with %v after SIGTERM:\n%s", s.name, err, s.p.text())
		}
		s.p = nil
	case <-time.After(chaosPatience):
		r.failf("server %s still runs %v after SIGTERM:\n%s", s.name, chaosPatience, s.p.text())
	}
}

// part cuts the network between servers into parts. parts[i] is the number of the part to which
// server i belongs. A server reaches only the servers of its own part.
func (r *chaosRig) part(parts []int) {
	for i, part := range parts {
		chaosRun(r.t, "ip", "link", "set", fmt.Sprint("c", i), "master", fmt.Sprint("part", part))
		r.parted = r.parted || part > 0
	}
}

// heal connects all servers to each other again.
func (r *chaosRig) heal() {
	r.part(make([]int, len(r.servers)))
	r.parted = false
}

// fill fills a server's disk to the last byte or, if full is false, frees the space again.
func (r *chaosRig) fill(s *chaosServer, full bool) {
	path := filepath.Join(s.dir, "ballast")
	s.full = full
	if !full {
		if err := os.Remove(path); err != nil {
			r.failf("%v", err)
		}
		return
	}
	f, err := os.Create(path)
	if err != nil {
		r.failf("%v", err)
	}
	defer f.Close()
	for chunk := make([]byte, 1<<20); len(chunk) >= 1; {
		if _, err = f.Write(chunk); err != nil {
			chunk = chunk[:len(chunk)/2]
		}
	}
	if !errors.Is(err, syscall.ENOSPC) {
		r.failf("filling a disk: got error %v, want %v", err, syscall.ENOSPC)
	}
}

// get returns the body of the server's answer to a GET request. A status other than 200 is an
// error.
func (r *chaosRig) get(s *chaosServer, port int, path string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.url(port, path), nil)
	if err != nil {
		return nil, err
	}
	resp, err := r.pushClient.Do(req)
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

func (r *chaosRig) running() (up []*chaosServer) {
	for _, s := range r.servers {
		if s.p != nil {
			up = append(up, s)
		}
	}
	return up
}

// settled waits until all running servers have the same ring and every running server is in it. It
// returns how long that took.
func (r *chaosRig) settled() time.Duration {
	r.t.Helper()
	begin := time.Now()
	up := r.running()
	r.wait("all servers have the same ring", func() bool {
		version := ""
		for _, s := range up {
			b, err := r.get(s, 9004, "/debug/ring")
			var d debugRing
			if err != nil || json.Unmarshal(b, &d) != nil {
				return false
			}
			if version == "" {
				version = d.Ring.Version
			}
			if len(d.slots()) != len(up) || d.Ring.Version != version {
				return false
			}
		}
		return true
	})
	return time.Since(begin)
}

// sum returns the sum of a metric over all servers, including servers that have ended.
func (r *chaosRig) sum(metric string) float64 {
	sum := metricSum(r.counted, metric)
	for _, s := range r.running() {
		b, err := r.get(s, 9004, "/metrics")
		if err != nil {
			r.failf("%v", err)
		}
		sum += metricSum(b, metric)
	}
	return sum
}

// metricSum returns the sum of all series of a metric in text exposition.
func metricSum(text []byte, metric string) (sum float64) {
	for line := range strings.Lines(string(text)) {
		if rest, ok := strings.CutPrefix(line, metric); ok && (rest[0] == ' ' || rest[0] == '{') {
			fields := strings.Fields(rest)
			v, _ := strconv.ParseFloat(fields[len(fields)-1], 64)
			sum += v
		}
	}
	return sum
}

// load starts all sites, which push without a telemeter client. The parameter every is the interval
// at which each site pushes. The pushes of the sites are spread over the interval.
func (r *chaosRig) load(every time.Duration) {
	ctx, cancel := context.WithCancel(r.haltCtx)
	r.push = cancel
	for i, site := range r.sites {
		phase := every * time.Duration(i) / time.Duration(len(r.sites))
		r.pushing.Go(func() { site.run(ctx, every, phase) })
	}
}

// acked stops new pushes and waits until all earlier pushes have ended, including their retries.
// After that, the field acked of each site no longer changes.
func (r *chaosRig) acked() {
	r.t.Helper()
	r.push()
	ended := make(chan struct{})
	go func() { r.pushing.Wait(); close(ended) }()
	r.wait("the last pushes have ended", func() bool {
		select {
		case <-ended:
			return true
		default:
			return false
		}
	})
}

// chaosSite is a site without a client. Each push has one sample of each series. After a failure
// the site retries the push at the next server, as the client does.
type chaosSite struct {
	r     *chaosRig
	n     int // number of the site, from 0; its cluster ID is "site-<n>"
	token string

	// The goroutine of run owns the fields below until it ends.
	acked   map[int64]bool // times in ms of the samples that a server answered with 200
	refused []string       // errors of refused pushes that the site does not retry
}

// run pushes until ctx ends. The parameter every is the interval between pushes, and phase is the
// time until the first push. A failed push is retried until it succeeds, a server refuses it for
// good, or the rig halts. Until then, no other push begins.
func (s *chaosSite) run(ctx context.Context, every, phase time.Duration) {
	timer := time.NewTimer(phase)
	defer timer.Stop()
	server := s.n
	next := time.Now().Add(phase)
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		}
		at := time.Now()
		for {
			again, err := s.try(server%len(s.r.servers), at.UnixMilli())
			if err == nil {
				s.acked[at.UnixMilli()] = true
				break
			}
			if !again {
				s.refused = append(s.refused, err.Error())
				break
			}
			server++
			select {
			case <-s.r.haltCtx.Done():
				return
			case <-time.After(100 * time.Millisecond):
			}
		}
		for !next.After(time.Now()) {
			next = next.Add(every)
		}
		timer.Reset(time.Until(next))
	}
}

// try makes one attempt to push the samples of time t to one server. t is in ms since the epoch.
// again reports whether a retry may succeed.
func (s *chaosSite) try(server int, t int64) (again bool, err error) {
	var body []byte
	for k := range chaosSeries {
		body = fmt.Appendf(body, "chaos_total{k=\"%d\"} %d %d\n", k, t%1000003, t)
	}
	req, err := http.NewRequestWithContext(s.r.haltCtx, http.MethodPost, s.r.servers[server].url(9003, "/upload"), bytes.NewReader(body))
	if err != nil {
		return false, err
	}
	req.Header.Set("Authorization", "Bearer "+s.token)
	req.Header.Set("Content-Type", "text/plain")
	resp, err := s.r.pushClient.Do(req)
	if err != nil {
		return true, err
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	if err != nil {
		return true, err
	}
	if resp.StatusCode != http.StatusOK {
		return resp.StatusCode >= 500 || resp.StatusCode == http.StatusTooManyRequests, fmt.Errorf("%s: %s", resp.Status, answer)
	}
	return false, nil
}
