package main

// Tests of pushes that the server refuses: bodies that are unsupported, too large or malformed, an
// overloaded server, a full store, and clients that are slow or disconnect. A refused push leaves
// no sample in the store.

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// The server answers 415 to a push whose body has an unsupported content type or encoding. The
// answer lists the supported ones.
func TestUploadUnsupported(t *testing.T) {
	r := newAnswerRig(t)
	typed := func(name, contentType, body, reasons string) answerCase {
		return r.uploadCase(name, 415, map[string]string{"Content-Type": contentType}, body, reasons)
	}
	encoded := func(name, encoding, reasons string) answerCase {
		return r.uploadCase(name, 415, map[string]string{"Content-Encoding": encoding}, "x 1\n", reasons)
	}
	r.check(t, []answerCase{
		typed("JSON", "application/json", "{}", `"application/json" is not supported|text/plain (version 0.0.4 or 1.0.0)|application/openmetrics-text|application/vnd.google.protobuf`),
		typed("unknown text version", "text/plain; version=9", "", "0.0.4 or 1.0.0"),
		typed("protobuf as text", strings.Replace(protoType, "delimited", "text", 1), "", "encoding=delimited"),
		encoded("brotli", "br", `"br" is not supported|identity, gzip, snappy (framed)`),
		encoded("gzip twice", "gzip, gzip", "identity, gzip"),
	})
}

// manySeries returns an exposition of n series with one sample each.
func manySeries(n int) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, "m{i=\"%d\"} 1\n", i)
	}
	return b.String()
}

// The server answers 413 to a push whose body is too large, or that has too many samples, series or
// labels. The answer names the limit and, if a flag can raise the limit, that flag.
func TestUploadTooLarge(t *testing.T) {
	r := newAnswerRig(t)
	large := strings.Repeat("# a comment counts too\n", 200) // more than the rig's --limit-bytes of 4,096
	inGzip := map[string]string{"Content-Encoding": "gzip"}
	chunked := r.uploadCase("large body in chunks", 413, nil, large, "4096 bytes|--limit-bytes")
	chunked.q.chunked = true
	r.check(t, []answerCase{
		r.uploadCase("large Content-Length", 413, nil, large, "4096 bytes|--limit-bytes"),
		chunked,
		r.uploadCase("large compressed body", 413, inGzip, string(gzipped([]byte("x 1\n")))+string(make([]byte, 4096)), "--limit-bytes"),
		r.uploadCase("gzip bomb", 413, inGzip, string(gzipped(make([]byte, 1<<20))), "32768 bytes|--limit-bytes"),
		r.uploadCase("too many samples", 413, inGzip, string(gzipped([]byte(distinctSamples(2049)))), "2048 samples|line 2049|--limit-bytes"),
		r.uploadCase("too many labels", 413, nil, "m{"+strings.Repeat(`a="",`, 200)+"} 1\n", "128 labels|line 1"),
	})
}

// The server answers 400 to a push whose body is malformed or truncated, or uses a reserved name.
// The answer has the reason. If the fault is in one line of a text body or in one family of a
// protobuf body, the answer also names the line or the family.
func TestUploadMalformed(t *testing.T) {
	r := newAnswerRig(t)
	text := func(name, body, reasons string) answerCase { return r.uploadCase(name, 400, nil, body, reasons) }
	typed := func(name, contentType, body, reasons string) answerCase {
		return r.uploadCase(name, 400, map[string]string{"Content-Type": contentType}, body, reasons)
	}
	encoded := func(name, encoding, body, reasons string) answerCase {
		return r.uploadCase(name, 400, map[string]string{"Content-Encoding": encoding}, body, reasons)
	}
	whole := string(gzipped([]byte("up 1\n")))
	r.check(t, []answerCase{
		text("not an exposition", "x 1\n<html>\n", "line 2|<html>"),
		text("no value", "ok 1\n\nup{job=\"a\"}\n", `line 3|up{job=\"a\"}|no value`),
		text("bad timestamp", "up 1 soon\n", "line 1|soon|milliseconds"),
		text("duplicate label", "up{a=\"1\",a=\"2\"} 1\n", `line 1|up{a=|"a" occurs twice`),
		text("label __name__", "up{__name__=\"other\"} 1\n", `"__name__" is reserved`),
		text("not UTF-8", "up{a=\"\xff\"} 1\n", "not UTF-8"),
		text("truncated text", "up 1\nup{a=\"b\"} 1", "line 2|truncated"),
		typed("OpenMetrics without EOF", omType, "up 1\n", "# EOF"),
		typed("invalid protobuf", protoType, "\x04\xff\xff\xff\xff", "family 1|malformed protobuf"),
		typed("protobuf frame of 1 GiB", protoType, "\x80\x80\x80\x80\x04", "family 1|truncated"),
		encoded("text sent as gzip", "gzip", "up 1\n", "gzip"),
		encoded("truncated gzip", "gzip", whole[:20], "gzip: unexpected EOF"),
		encoded("bytes after gzip", "gzip", whole+"more", "gzip"),
		encoded("invalid snappy", "snappy", "up 1\n", "snappy"),
		text("a series of the server", "push_time_seconds 9e9\n", `line 1|"push_time_seconds" is reserved`),
		text("the prefix of the server's series", "telemeter_cluster_x 9\n", `"telemeter_cluster_x" is reserved`),
		text("a series of the server, as UTF-8 name", "{\"push.time.seconds\",a=\"b\"} 9e9\n", "reserved"),
		encoded("long line", "gzip", string(gzipped([]byte("up{a=\""+strings.Repeat("\xff", 30_000)+"\"} 1\n"))), "line 1"),
	})
}

// The server answers 400 with the reason if a push has a malformed Telemeter-Spool or
// Telemeter-Consumers header. Such a push leaves no sample, no site and no consumer. Both headers
// may list only a limited number of ranges or consumers.
func TestUploadHeaders(t *testing.T) {
	const spool = "00000000000000ab "
	ranges := func(n int) string {
		var parts []string
		for i := range n {
			parts = append(parts, strconv.Itoa(3*i+1))
		}
		return strings.Join(parts, ",")
	}
	consumers := func(n int) string { return strings.TrimSuffix(strings.Repeat("00000000000000cd:1,", n), ",") }
	for _, c := range []struct{ header, value, reason string }{
		{SpoolHeader, "", ""},
		{SpoolHeader, spool + "1-4,6,9007199254740992", ""},
		{SpoolHeader, spool + ranges(MaxPushRanges), ""},
		{SpoolHeader, spool + ranges(MaxPushRanges+1), "more than 32 ranges"},
		{SpoolHeader, spool + strings.Repeat(",", 5000), "more than 32 ranges"},
		{SpoolHeader, "ab 1", "malformed Telemeter-Spool"},
		{SpoolHeader, "0000000000000000 1", "malformed Telemeter-Spool"},
		{SpoolHeader, "00000000000000ag 1", "malformed Telemeter-Spool"},
		{SpoolHeader, "-0000000000000ab 1", "malformed Telemeter-Spool"},
		{SpoolHeader, spool + "0", `malformed range of numbers "0"`},
		{SpoolHeader, spool + "9007199254740993", "malformed range of numbers"},
		{SpoolHeader, spool + "1-9007199254740993", "malformed range of numbers"},
		{SpoolHeader, spool + "4-3", `malformed range of numbers "4-3"`},
		{SpoolHeader, spool + "3,2", `malformed range of numbers "2"`},
		{SpoolHeader, spool + "1-3,3", `malformed range of numbers "3"`},
		{SpoolHeader, spool + "1-", `malformed range of numbers "1-"`},
		{SpoolHeader, spool + "1,,2", "malformed range of numbers"},
		{SpoolHeader, spool + "1 2", "malformed range of numbers"},
		{SpoolHeader, spool + strings.Repeat("9", 8000), "malformed range of numbers"},
		{ConsumersHeader, consumers(MaxConsumers), ""},
		{ConsumersHeader, consumers(MaxConsumers + 1), "more than 64 consumers"},
		{ConsumersHeader, "cd:1", `malformed consumer "cd:1"`},
		{ConsumersHeader, "00000000000000cd", "malformed consumer"},
		{ConsumersHeader, "00000000000000cd:-1", "malformed consumer"},
		{ConsumersHeader, "00000000000000cd:1.5", "malformed consumer"},
		{ConsumersHeader, "00000000000000cd:18446744073709551615", "malformed consumer"},
		{ConsumersHeader, "00000000000000cd:1,", "malformed consumer"},
		{ConsumersHeader, "000000000000000g:1", "malformed consumer"},
	} {
		t.Run(c.header+" "+c.value[:min(len(c.value), 40)], func(t *testing.T) {
			r := newSrvRig(t)
			a := r.pushSpool("site-a", "up 1\n", SpoolHeader, spool+"1", c.header, c.value)
			if c.reason == "" {
				if n := r.accepted(a).Accepted; n != 1 {
					t.Errorf("%d samples accepted, want 1", n)
				}
				return
			}
			if a.status != 400 || !strings.Contains(a.body, c.reason) {
				t.Errorf("answered %d %s, want 400 and %q", a.status, a.body, c.reason)
			}
			if st := r.store.Stats(); len(st.Sites) > 0 || r.server.pushesTotal.Value(resultMalformed) != 1 {
				t.Errorf("the refused push left %+v, and %v are counted as malformed, want 1", st, r.server.pushesTotal.Value(resultMalformed))
			}
			if all := r.store.Consumers.LastScrapeAges(SiteKey("site-a"), r.now()); len(all) > 0 {
				t.Errorf("the refused push left %d consumers", len(all))
			}
		})
	}
}

// If a later line of a push makes the server refuse the push, the server keeps nothing of the lines
// before it: no series and no site. It then accepts the whole next push of the site.
func TestRefusedLeavesNothing(t *testing.T) {
	r := newSrvRig(t)
	for _, body := range []string{"a 1\nb{ 1\n", "a 1\nb 1", "a 1\npush_time_seconds 1\n"} {
		if got := r.push("site-a", body); got.status != 400 {
			t.Errorf("%q was answered %d, want 400", body, got.status)
		}
	}
	if st := r.store.Stats(); len(st.Sites) != 0 || st.LogBytes != 0 || r.store.totals.Samples.Load() != 0 {
		t.Errorf("the refused pushes left %+v", st)
	}
	if got := r.accepted(r.push("site-a", "a 1\nb 1\n")); got.Accepted != 2 {
		t.Errorf("answered %+v, want 2 accepted", got)
	}
}

// The server answers 503 with Retry-After to a push that it has no room for or cannot store now.
// The answer contains no path of a file, and samples accepted before stay unchanged. The server
// shows push_failure_time_seconds for the site of the push, unless the server is not ready.
func TestNoRoom(t *testing.T) {
	disk := newCrashFS(1, "/secretdir")
	for _, c := range []struct {
		name   string
		config func(*StoreConfig, *ServerConfig)
		spoil  func(*srvRig) // called before the refused push; nil: nothing is called
		reason string
	}{
		{"not ready", nil, func(r *srvRig) { r.server.SetReady(false) }, "not ready"},
		{"limit on samples", func(s *StoreConfig, _ *ServerConfig) { s.LimitSamples = 2 }, nil, "no room"},
		{"limit on sites", func(s *StoreConfig, _ *ServerConfig) { s.LimitSites = 1 }, nil, "no room"},
		{"limit on storage", func(s *StoreConfig, _ *ServerConfig) { s.LimitStorage = 160 }, nil, "no room"},
		{"disk error", func(s *StoreConfig, _ *ServerConfig) { s.FS = disk }, func(*srvRig) {
			disk.hook = func(int, string, string) fault { return fault{Err: errDisk} }
		}, "could not store"},
		{"disk full", func(s *StoreConfig, _ *ServerConfig) { s.FS = disk }, func(*srvRig) {
			disk.hook = func(int, string, string) fault { return fault{Err: errFull} }
		}, "no room"},
		{"store closed", nil, func(r *srvRig) {
			r.store.Close()
			for _, c := range r.store.sitesByID() {
				<-c.lock // Close keeps this lock; release it, because the cleanup of the rig calls Close again
			}
		}, "too busy"},
	} {
		t.Run(c.name, func(t *testing.T) {
			disk.restart()
			var change []func(*StoreConfig, *ServerConfig)
			if c.config != nil {
				change = append(change, c.config)
			}
			r := newSrvRig(t, change...)
			r.accepted(r.push("site-a", "up 1\nup2 1\n"))
			before := r.held("site-a", "")
			if c.spoil != nil {
				c.spoil(r)
			}
			r.secrets = append(r.secrets, "site-a", "input/output", "no space")
			got := r.push("site-c", "up 1\nup2 2\n")
			if after, _ := strconv.Atoi(got.header.Get("Retry-After")); got.status != 503 || after < 1 || !strings.Contains(got.body, c.reason) {
				t.Errorf("answered %d %v %s", got.status, got.header, got.body)
			}
			if after := r.held("site-a", ""); after != before {
				t.Errorf("the accepted samples have changed to:\n%s\nfrom:\n%s", after, before)
			}
			if got := r.held("site-c", ""); strings.Contains(got, PushFailureTimeName+"{") == (c.name == "not ready") || strings.Count(got, "\n") > 1 {
				t.Errorf("after the refused push its site has the series:\n%s", got)
			}
			disk.restart()
		})
	}
}

// If a client disconnects in the middle of the body of a push, the server stores no site, frees all
// slots, and no longer counts the push as in flight.
func TestVanishingClient(t *testing.T) {
	r := newSrvRig(t)
	for _, length := range []string{"Content-Length: 1000\r\n", "Transfer-Encoding: chunked\r\n"} {
		c := dialRaw(t, r.external.Listener.Addr().String())
		c.send(fmt.Sprintf("POST /upload HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\n%s\r\n5\r\nup 1\n\r\n", r.token(KindUpload, "site-a"), length))
		eventually(t, "the push is in flight", func() bool { return r.pushesInFlight() == 1 })
		c.Close()
		eventually(t, "the push has ended", func() bool { return r.pushesInFlight() == 0 })
	}
	eventually(t, "all slots are free", func() bool {
		r.server.sites.mu.Lock()
		defer r.server.sites.mu.Unlock()
		return len(r.server.uploads) == 0 && r.server.decoding.InUse() == 0 && r.server.sites.sites["site-a"].inFlight == 0
	})
	if st := r.store.Stats(); len(st.Sites) != 0 {
		t.Errorf("the unfinished pushes left %+v", st)
	}
}

// The server answers 401 at once to a client that sends Expect: 100-continue without a valid token.
// It does not ask the client for the body of the push.
func TestExpectContinueRefused(t *testing.T) {
	r := newSrvRig(t)
	c := dialRaw(t, r.external.Listener.Addr().String())
	c.send("POST /upload HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\nExpect: 100-continue\r\n\r\n")
	if line, err := c.answers.ReadString('\n'); err != nil || !strings.Contains(line, "401") {
		t.Errorf("answered %q: %v", line, err)
	}
}

// One site may have four pushes in flight. The server answers 429 to a fifth push of the site, and
// accepts pushes of other sites meanwhile.
func TestConcurrentUploads(t *testing.T) {
	r := newSrvRig(t)
	var wg sync.WaitGroup
	var bodies []*io.PipeWriter
	for i := range maxPushesPerSite {
		body, w := io.Pipe()
		bodies = append(bodies, w)
		req, err := http.NewRequest("POST", r.external.URL+"/upload", body)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Authorization", "Bearer "+r.token(KindUpload, "site-a"))
		wg.Go(func() {
			resp, err := http.DefaultTransport.RoundTrip(req)
			if err != nil || resp.StatusCode != 200 {
				t.Errorf("push %d: %v %v", i, resp, err)
				return
			}
			io.Copy(io.Discard, resp.Body)
			resp.Body.Close()
		})
	}
	eventually(t, "four pushes are in flight", func() bool { return r.pushesInFlight() == maxPushesPerSite })
	got := r.push("site-a", "up 1\n")
	if got.status != 429 || got.header.Get("Retry-After") != "1" || !strings.Contains(got.body, "4 pushes of this cluster ID") {
		t.Errorf("a fifth push was answered %d %v %s", got.status, got.header, got.body)
	}
	r.accepted(r.push("site-b", "up 1\n"))
	for i, w := range bodies {
		fmt.Fprintf(w, "up{i=\"%d\"} 1\n", i)
		w.Close()
	}
	wg.Wait()
	r.accepted(r.push("site-a", "up 1\n"))
	if n := len(r.parsed("")["up"].Metric); n != maxPushesPerSite+2 {
		t.Errorf("%d series are served, want %d", n, maxPushesPerSite+2)
	}
}

// If the server answers a request before it has read the request's whole body, it sends the answer
// at once and then closes the connection. The server keeps the connection after an accepted push,
// and after an /authorize request without a body.
func TestAnswerWithoutBody(t *testing.T) {
	r := newSrvRig(t)
	for range rateBurst {
		if _, err := r.server.sites.AcquirePush("fast", r.now()); err != nil {
			t.Fatal(err)
		}
		r.server.sites.ReleasePush("fast")
	}
	upload, client := r.token(KindUpload, "a"), r.token(KindClient, "a")
	for _, c := range []struct {
		path, token, header, body string
		status                    int
		keeps                     bool // whether the server keeps the connection after its answer
	}{
		{"/upload", "", "Content-Length: 4000", "u", 401, false},
		{"/upload?id=other", upload, "Content-Length: 4000", "u", 403, false},
		{"/upload", upload, "Content-Length: 4000\r\nContent-Type: image/png", "u", 415, false},
		{"/upload", upload, "Transfer-Encoding: chunked\r\nContent-Encoding: br", "1\r\nu\r\n", 415, false},
		{"/upload", r.token(KindUpload, "fast"), "Content-Length: 4000", "u", 429, false},
		{"/authorize", client, "Content-Length: 4000", "u", 200, false},
		{"/authorize", client, "Transfer-Encoding: chunked", "1\r\nu\r\n", 200, false},
		{"/authorize", client, "Content-Length: 0", "", 200, true},
		{"/upload", upload, "Content-Length: 5", "up 1\n", 200, true},
		{"/upload", upload, "Transfer-Encoding: chunked", "5\r\nup 1\n\r\n0\r\n\r\n", 200, true},
		{"/upload", upload, "Content-Length: 3", "up\n", 400, false},
	} {
		conn := dialRaw(t, r.external.Listener.Addr().String())
		conn.send(fmt.Sprintf("POST %s HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\n%s\r\n\r\n%s", c.path, c.token, c.header, c.body))
		resp, err := conn.readAnswer()
		if err != nil {
			t.Errorf("%s %s: no answer: %v", c.path, c.header, err)
		} else if resp.StatusCode != c.status || resp.Close == c.keeps {
			t.Errorf("%s %s was answered %s, closes %t; want %d, closes %t", c.path, c.header, resp.Status, resp.Close, c.status, !c.keeps)
		}
		conn.Close()
	}
}

// The body of a push may arrive as slowly as the listener allows. storeTimeout, the time limit on
// storing the push, begins only when the whole body has arrived.
func TestSlowBody(t *testing.T) {
	for range 8 { // several runs, because Go chooses at random between two ready cases of a select
		synctest.Test(t, func(t *testing.T) {
			r, keys := newVirtualRig(t), testKeys(t, 1)
			r.server.Reload(ReloadableServerConfig{Keys: keys, Normalizer: &ServerNormalizer{}})
			body, w := io.Pipe()
			go func() {
				time.Sleep(storeTimeout + 20*time.Second)
				io.WriteString(w, "up 1\n")
				w.Close()
			}()
			req := httptest.NewRequest("POST", "/upload", body)
			req.Header.Set("Authorization", "Bearer "+signToken(t, keys, Token{Kind: KindUpload, ClusterID: "far-away", ID: strings.Repeat("0", 32)}))
			rec := httptest.NewRecorder()
			r.server.ExternalHandler().ServeHTTP(rec, req)
			if rec.Code != 200 {
				t.Errorf("answered %d %s", rec.Code, rec.Body)
			}
		})
	}
}
