package main

// The attacks of TestHostile: one function for each, which prepares what the attacker sends. An
// attacker has valid tokens of sites of its own, or none. It does not have the keys of the servers.

import (
	"bytes"
	"crypto/rand"
	"encoding/base64"
	"fmt"
	"math"
	"net/url"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	dto "github.com/prometheus/client_model/go"
)

// attackKind is a kind of attack. groups prepares the attack.
type attackKind struct {
	name       string
	groups     func(r *attackRig) []attackGroup
	restarts   bool // whether server b is restarted at the beginning of both phases
	authorized bool // whether the measured site is r.authorized, and not r.good
	control    bool // whether this is no attack, but the load to which attacks are compared
}

// attackKinds returns all attacks.
func attackKinds() []attackKind {
	return []attackKind{
		{name: "busy processors", groups: attackProcessors, control: true},
		{name: "equal lines", groups: attackEqualLines},
		{name: "many series and times", groups: attackManySeries},
		{name: "strangers", groups: attackStrangers},
		{name: "connections", groups: attackConnections},
		{name: "authorize", groups: attackAuthorizeFlood, authorized: true},
		{name: "internal listener", groups: attackInternal},
		{name: "gossip and members", groups: attackMembers, restarts: true},
		{name: "hostile content", groups: attackContent},
	}
}

// attackProcessors sends nothing, and keeps every processor busy. All processes of the test share
// the processors of one machine. Under most attacks each of the two servers uses one processor for
// the attack. On a machine with two processors that alone makes pushes wait for a processor.
func attackProcessors(*attackRig) []attackGroup {
	return []attackGroup{{Workers: runtime.GOMAXPROCS(0), Burn: true}}
}

// upload returns a push of the site id to a server.
func (r *attackRig) upload(s *attackServer, id string, p hostilePush) attackRequest {
	header := map[string]string{"Authorization": "Bearer " + signToken(r.t, r.keys, Token{Kind: KindClient, ClusterID: id, ID: NewTokenID()})}
	for name, value := range p.header {
		header[name] = value
	}
	return attackRequest{Method: "POST", URL: "https://" + s.external + "/upload", Header: header, Body: p.body}
}

// attackGzip returns a push whose body is compressed with gzip.
func attackGzip(contentType string, body []byte) hostilePush {
	return hostilePush{gzipped(body), map[string]string{"Content-Type": contentType, "Content-Encoding": "gzip"}}
}

// attackEqualLines: nine sites push 520,000 equal lines, four pushes of each site at a time.
func attackEqualLines(r *attackRig) (groups []attackGroup) {
	push := attackGzip("text/plain", bytes.Repeat([]byte("equal_lines 1\n"), 520_000))
	for i, id := range append(r.sites("equal-a", r.a, 5), r.sites("equal-b", r.b, 4)...) {
		groups = append(groups, attackGroup{Workers: 4, Requests: []attackRequest{r.upload(r.servers()[i%2], id, push)}})
	}
	return groups
}

// attackManyTimes returns OpenMetrics text of almost 8 MiB: 20,000 series, each with the same times.
// More times do not fit into 1 MiB of gzip.
func attackManyTimes(now time.Time) []byte {
	const series, times, digits = 20_000, 20, "abcdefghijklmnopqrstuvwxyz0123456789"
	var b bytes.Buffer
	for i := range series {
		for k := range times {
			fmt.Fprintf(&b, "lon%c%c%c 1 %d\n", digits[i/36/36], digits[i/36%36], digits[i%36], now.Unix()-int64(times-k))
		}
	}
	return b.Bytes()
}

// attackHistograms returns protobuf with a histogram of many buckets, at several times.
func attackHistograms(t *testing.T, now time.Time, buckets, times int) []byte {
	name := "long_histogram"
	f := &dto.MetricFamily{Name: &name, Type: dto.MetricType_HISTOGRAM.Enum()}
	for k := range times {
		ms, count, sum := now.UnixMilli()-int64(k), uint64(buckets), float64(buckets)
		h := &dto.Histogram{SampleCount: &count, SampleSum: &sum}
		for i := range buckets {
			bound, n := float64(i), uint64(i)
			h.Bucket = append(h.Bucket, &dto.Bucket{UpperBound: &bound, CumulativeCount: &n})
		}
		f.Metric = append(f.Metric, &dto.Metric{Histogram: h, TimestampMs: &ms})
	}
	return protoBody(t, f)
}

// attackManySeries: sites push bodies that take much memory after decompression. Some of them are
// malformed at their very end or too large after decompression, so the work is for nothing.
func attackManySeries(r *attackRig) (groups []attackGroup) {
	now := time.Now()
	times := attackManyTimes(now)
	pushes := []hostilePush{
		attackGzip(omType, append(bytes.Clone(times), "# EOF\n"...)),
		attackGzip(omType, append(bytes.Clone(times), "x{ 1\n# EOF\n"...)),
		attackGzip(protoType, attackHistograms(r.t, now, 10_000, 28)),
		attackGzip(protoType, attackHistograms(r.t, now, 300_000, 1)),
		attackGzip("text/plain", make([]byte, 64<<20)),
		attackGzip("text/plain", bytes.Repeat([]byte("too_large 1\n"), 800_000)),
	}
	for i, id := range append(r.sites("many-a", r.a, 3), r.sites("many-b", r.b, 3)...) {
		g := attackGroup{Workers: 4}
		for _, p := range pushes {
			if len(p.body) > 1<<20 {
				r.t.Fatalf("a body has %d bytes, which is over --limit-bytes", len(p.body))
			}
			g.Requests = append(g.Requests, r.upload(r.servers()[i%2], id, p))
		}
		groups = append(groups, g)
	}
	return groups
}

// attackBadTokens returns tokens that no server accepts.
func attackBadTokens(r *attackRig) []string {
	random := make([]byte, 300)
	rand.Read(random)
	text := base64.RawURLEncoding.EncodeToString(random)
	return []string{
		"", "x", text, "tm1." + text[:200] + "." + text[:43], "tm1." + strings.Repeat("A", 8000) + "." + text[:43],
		signToken(r.t, testKeys(r.t, 9), Token{Kind: KindClient, ClusterID: r.good.id, ID: NewTokenID()}),
		signToken(r.t, r.keys, Token{Kind: KindClient, ClusterID: r.good.id, ID: NewTokenID(), Issued: 1, Expires: 2}),
	}
}

// attackStrangers: peers without a valid token ask and push, and send requests that do not end.
func attackStrangers(r *attackRig) []attackGroup {
	requests := attackGroup{Workers: 64}
	var conns []attackConn
	upload := signToken(r.t, r.keys, Token{Kind: KindUpload, ClusterID: r.good.id, ID: NewTokenID()})
	for _, s := range []*attackServer{r.a, r.b} {
		for _, path := range []string{"/upload", "/authorize?id=" + r.good.id, "/nothing"} {
			for _, token := range attackBadTokens(r) {
				requests.Requests = append(requests.Requests, attackRequest{Method: "POST", URL: "https://" + s.external + path, MustRefuse: true,
					Header: map[string]string{"Authorization": "Bearer " + token}, Body: make([]byte, 1000)})
			}
		}
		requests.Requests = append(requests.Requests,
			attackRequest{Method: "POST", URL: "https://" + s.external + "/authorize", Header: map[string]string{"Authorization": "Bearer " + upload}, MustRefuse: true},
			attackRequest{Method: "POST", URL: "https://" + s.external + "/upload", Header: map[string]string{"X-Huge": strings.Repeat("x", 1<<20)}, MustRefuse: true},
			attackRequest{Method: "POST", URL: "https://" + s.external + "/upload", Zeros: 64 << 20, MustRefuse: true})
		head := "POST /upload HTTP/1.1\r\nHost: " + s.external + "\r\nAuthorization: Bearer " + attackBadTokens(r)[5] + "\r\n"
		for _, first := range []string{head + "Content-Length: 1000000\r\n\r\n", head + "Transfer-Encoding: chunked\r\n\r\n", head, head[:20], strings.Repeat("A: b\r\n", 10_000)} {
			conns = append(conns, attackConn{To: s.external, TLS: true, First: []byte(first)})
		}
	}
	return []attackGroup{requests, {Workers: 64, Conns: conns}}
}

// attackConnections: 8,000 connections from many addresses do nothing, or begin a TLS handshake or
// a request that they do not end. A connection that a server closes is opened again. Server a and
// the attacker need more open files than there are connections. Go raises the soft limit itself.
func attackConnections(r *attackRig) (groups []attackGroup) {
	var files syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &files); err != nil || files.Max < 9000 {
		r.t.Fatalf("the limit of open files is %d (%v), but this attack needs 9,000: raise it with ulimit -Hn", files.Max, err)
	}
	hello := []byte("\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 the beginning of a ClientHello of 512 bytes")
	half := []byte("POST /upload HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bea")
	for _, g := range []struct {
		to      string
		tls     bool
		first   []byte
		workers int
	}{
		{r.a.external, false, nil, 2000}, {r.a.external, false, hello, 1500}, {r.a.external, true, half, 1500}, {r.b.external, false, hello, 1000},
		{r.a.internal, false, half, 1000}, {r.b.member, false, nil, 500}, {r.b.member, false, half, 500},
	} {
		groups = append(groups, attackGroup{Workers: g.workers, Conns: []attackConn{{To: g.to, TLS: g.tls, First: g.first}}})
	}
	return groups
}

// attackAuthorizeFlood: strangers ask a server with --authorize about random tokens, for many
// cluster IDs.
func attackAuthorizeFlood(r *attackRig) []attackGroup {
	g := attackGroup{Workers: 100}
	for i := range 1000 {
		g.Requests = append(g.Requests, attackRequest{Method: "POST", URL: fmt.Sprintf("https://%s/authorize?id=stranger-%d", r.c.external, i), MustRefuse: true,
			Header: map[string]string{"Authorization": "Bearer " + rand.Text()}})
	}
	return []attackGroup{g}
}

// attackInternal: a program on the host of a server, or a web page in a browser there, uses the
// internal listener.
func attackInternal(r *attackRig) []attackGroup {
	base := "http://" + r.a.internal
	query := url.Values{}
	for i := range 214 {
		query.Add("match[]", fmt.Sprintf(`{a=~"(.{1,30}){1,33}%d"}`, i))
	}
	consumers, foreign := attackGroup{Workers: 4}, attackGroup{Workers: 4}
	for i := range 200 {
		consumers.Requests = append(consumers.Requests, attackRequest{Method: "GET", URL: fmt.Sprintf("%s/federate?consumer=invented-%d", base, i)})
	}
	for _, path := range []string{"/federate", "/federate?consumer=foreign", "/metrics", "/debug/ring", "/debug/pprof/cmdline"} {
		foreign.Requests = append(foreign.Requests,
			attackRequest{Method: "GET", URL: base + path, Host: "attacker.example", MustRefuse: true},
			attackRequest{Method: "GET", URL: base + path, Header: map[string]string{"Sec-Fetch-Site": "cross-site", "Origin": "http://attacker.example"}, MustRefuse: true})
	}
	return []attackGroup{
		{Workers: 8, Requests: []attackRequest{{Method: "GET", URL: base + "/federate?" + query.Encode()}}},
		{Workers: 8, Requests: []attackRequest{{Method: "POST", URL: base + "/debug/pprof/symbol", Zeros: 64 << 20}}},
		{Workers: 64, Conns: []attackConn{{To: r.a.internal, First: []byte("GET /federate HTTP/1.1\r\nHost: " + r.a.internal + "\r\n\r\n"), Unread: true}}},
		consumers, foreign,
	}
}

// attackMembers: a peer that has read the packets and connections between the servers sends them
// again, and sends garbage, to the ports for other members.
func attackMembers(r *attackRig) []attackGroup {
	asked, answered, streams := r.relay.captured()
	if len(asked) == 0 || len(answered) == 0 || len(streams) == 0 {
		r.t.Fatalf("the relay captured %d packets, %d answers and %d connections, want some of each", len(asked), len(answered), len(streams))
	}
	garbage := make([]byte, MaxPacket)
	rand.Read(garbage)
	packets := attackGroup{Workers: 1}
	for i := range 500 {
		damaged := bytes.Clone(asked[i%len(asked)])
		damaged[len(damaged)-1]++
		packets.Packets = append(packets.Packets,
			attackPacket{r.b.member, asked[i%len(asked)]}, attackPacket{r.a.member, answered[i%len(answered)]}, attackPacket{r.a.member, asked[i%len(asked)]},
			attackPacket{r.b.member, damaged}, attackPacket{r.b.member, garbage}, attackPacket{r.a.member, garbage[:40]}, attackPacket{r.b.member, nil})
	}
	var conns []attackConn
	for _, s := range streams {
		conns = append(conns, attackConn{To: r.b.member, First: s}, attackConn{To: r.a.member, First: s})
	}
	conns = append(conns, attackConn{To: r.b.member, First: garbage}, attackConn{To: r.b.member, First: []byte("POST /forward HTTP/1.1\r\nHost: b\r\nContent-Length: 67108864\r\n\r\n")})
	forged := map[string]string{envelopeHeader: base64.RawURLEncoding.EncodeToString(bytes.Repeat(garbage, 11)[:maxEnvelope])}
	return []attackGroup{
		packets, {Workers: 16, Conns: conns},
		{Workers: 8, Requests: []attackRequest{
			{Method: "POST", URL: "http://" + r.b.member + forwardPath, Header: forged, Zeros: 64 << 20, MustRefuse: true},
			{Method: "POST", URL: "http://" + r.b.member + forwardPath, Header: forged, Body: garbage, MustRefuse: true},
		}},
	}
}

// attackContent: sites with valid tokens push the hostile pushes of TestHostileSite.
func attackContent(r *attackRig) (groups []attackGroup) {
	var pushes []hostilePush
	for _, group := range hostileGroups(r.t, time.Now().UnixMilli()) {
		pushes = append(pushes, group.pushes...)
	}
	pushes = append(pushes, hostileProto(protoBody(r.t, gaugeFamily("up", math.NaN(), nil))))
	for i, id := range append(r.sites("content-a", r.a, 3), r.sites("content-b", r.b, 3)...) {
		g := attackGroup{Workers: 4}
		for _, p := range pushes {
			g.Requests = append(g.Requests, r.upload(r.servers()[i%2], id, p))
		}
		groups = append(groups, g)
	}
	return groups
}
