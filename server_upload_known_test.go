package main

// Tests of known series: a push has the same result, whether its series are known or decoded.

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"
)

// knownRig has two servers that get the same pushes. The known series of the server named warm are
// used. The server named cold decodes every push.
type knownRig struct {
	t          *testing.T
	warm, cold *srvRig
	now        time.Time
	ops        []byte // the choices that are left; see next
	labels     map[string]string
	push       []formSample // samples of the last push
	hits       int          // pushes that began with known series and kept them
}

// formSample is a sample in one of several forms.
type formSample struct {
	series, form, value byte
	age                 int64 // ms before the present; noAge if the sample has no timestamp
}

const noAge = math.MaxInt64

func newKnownRig(t *testing.T, ops []byte) *knownRig {
	k := &knownRig{t: t, now: testNow, ops: ops}
	open := func() *srvRig {
		r := &srvRig{t: t, log: &logBuffer{}}
		now := func() time.Time { return k.now }
		var err error
		r.store, err = OpenStore(StoreConfig{
			Retention: 2 * time.Hour, MaxSampleAge: time.Hour, LimitSeries: 9, Now: now, OnError: func(err error) { t.Error(err) },
		})
		if err != nil {
			t.Fatal(err)
		}
		r.server = NewServer(ServerConfig{
			Name: "s", Store: r.store, Metrics: NewMetrics(), Log: slog.New(slog.NewTextHandler(r.log, nil)), Now: now,
			MaxSampleAge: time.Hour, LimitBytes: 2 << 10, LimitScrape: 1000,
		})
		r.server.SetReady(true)
		return r
	}
	k.warm, k.cold = open(), open()
	return k
}

// next returns the next choice, which is below n. After the last choice it returns 0.
func (k *knownRig) next(n int) int {
	if len(k.ops) == 0 {
		return 0
	}
	op := k.ops[0]
	k.ops = k.ops[1:]
	return int(op) % n
}

// run does what the choices say, until none is left.
func (k *knownRig) run() {
	for len(k.ops) > 0 {
		switch op := k.next(16); op {
		default: // the push before, later
		case 1, 2: // the push before in another order, or a part of it
			if n := len(k.push); n > 0 {
				i := k.next(n)
				k.push = append(slices.Clone(k.push[i:]), k.push[:min(i, k.next(n+1))]...)
			}
		case 3, 4: // the push before, with other samples
			for range k.next(4) {
				at := k.next(len(k.push) + 1)
				k.push = slices.Insert(slices.Clone(k.push), at, k.sample())
			}
			k.push = k.push[:min(len(k.push), 20)]
		case 5: // another push
			k.push = nil
			for range k.next(10) {
				k.push = append(k.push, k.sample())
			}
		case 6: // several scrapes in one push
			for i := range min(len(k.push), 9) {
				later := k.push[i]
				later.age -= 1 + int64(k.next(3))
				k.push = append(k.push, later)
			}
		case 7:
			k.now = k.now.Add([]time.Duration{time.Minute, 11 * time.Minute, 30 * time.Minute, 3 * time.Hour}[k.next(4)])
			continue
		case 8:
			k.reload(k.next(5))
			continue
		case 9:
			k.labels = []map[string]string{nil, {"team": "x"}, {"team": "y"}}[k.next(3)]
			continue
		case 10:
			k.warm.store.expireAndCompact(context.Background(), true)
			k.cold.store.expireAndCompact(context.Background(), true)
			continue
		}
		k.pushBoth()
	}
	k.checkEnd()
}

// sample returns a sample that the next choices determine.
func (k *knownRig) sample() formSample {
	s := formSample{series: byte(k.next(14)), form: byte(k.next(256)), value: byte(k.next(8))}
	s.age = []int64{0, 0, 0, 1, 2, noAge, 3 * 3600_000, -120_000}[k.next(8)]
	return s
}

// reload gives both servers one of five sets of rules.
func (k *knownRig) reload(set int) {
	allow, err := ParseSelectors([][]string{nil, nil, nil, {"a", `{x="1"}`, "nothing"}, {"a", "b"}}[set])
	if err != nil {
		k.t.Fatal(err)
	}
	rules := &ServerNormalizer{Allow: allow}
	switch set {
	case 1, 3:
		rules.Elide = []string{"replica", "absent"}
	case 2:
		rules.Required = []Label{{Name: []byte("x")}}
	case 4:
		rules.Labels = []Label{{[]byte("dc"), []byte("d")}}
	}
	for _, r := range []*srvRig{k.warm, k.cold} {
		r.server.Reload(ReloadableServerConfig{Normalizer: rules})
	}
}

// formSeries are the series that the rig pushes. Some of them become equal under a set of rules.
var formSeries = [...]struct {
	name   string
	labels [][2]string
}{
	{"a", nil}, {"b", nil}, {"a", [][2]string{{"x", "1"}}}, {"a", [][2]string{{"x", "2"}, {"y", "}"}}},
	{"a", [][2]string{{"replica", "p"}, {"x", "1"}}}, {"a", [][2]string{{"replica", "q"}, {"x", "1"}}},
	{"b", [][2]string{{"x", "1"}, {"y", ""}}}, {"c", [][2]string{{"x", "\x00"}}}, {"c.d", [][2]string{{"e.f", "\\\n"}}},
	{"c", [][2]string{{"__type__", "gauge"}, {"x", "1"}}}, {"c", [][2]string{{"team", "z"}}}, {"c", [][2]string{{"y", "1"}, {"x", "3"}}},
	{"push_time_seconds", nil}, {"b", [][2]string{{"x", "1"}, {"x", "2"}}},
}

func (k *knownRig) value(s formSample) float64 {
	return [...]float64{0, 1, 2, 1e-9, math.Inf(-1), math.NaN(), math.Float64frombits(0x7ff0000000000002), 1e300}[s.value]
}

// labels returns the labels of s in the order of its form.
func (s formSample) labels() [][2]string {
	labels := slices.Clone(formSeries[s.series].labels)
	if s.form&1 != 0 {
		slices.Reverse(labels)
	}
	return labels
}

// text returns the samples of the push as text exposition, or as OpenMetrics.
func (k *knownRig) text(openMetrics bool) []byte {
	var b []byte
	for _, s := range k.push {
		var labels []Label
		for _, l := range s.labels() {
			labels = append(labels, Label{[]byte(l[0]), []byte(l[1])})
		}
		b = appendLine(b, []byte(formSeries[s.series].name), labels)
		b = append(b, [...]string{" ", " ", "  ", "\t"}[s.form>>1&3]...)
		b = fmt.Appendf(b, "%v", k.value(s))
		switch ms := k.now.UnixMilli() - s.age; {
		case s.age == noAge:
		case openMetrics:
			b = fmt.Appendf(b, " %d.%03d", ms/1000, ms%1000)
		default:
			b = fmt.Appendf(b, "%s%d", [...]string{" ", " ", "  ", " +"}[s.form>>3&3], ms)
		}
		b = append(b, '\n')
	}
	if openMetrics {
		b = append(b, "# EOF\n"...)
	}
	return b
}

// proto returns the samples of the push as protobuf.
func (k *knownRig) proto() []byte {
	var b []byte
	for _, s := range k.push {
		var metric []byte
		for _, l := range s.labels() {
			metric = append(metric, pbLabel(l[0], l[1])...)
		}
		kind, v := uint64(s.form>>1&3), k.value(s)
		switch kind {
		case protoCounter:
			parts := pbFloat(1, v)
			if s.form&0x30 == 0 {
				parts = append(parts, pbBytes(2)...) // an exemplar
			}
			metric = append(metric, pbBytes(3, parts)...)
		case protoGauge:
			metric = append(metric, pbBytes(2, pbFloat(1, v))...)
		case protoUntyped:
			metric = append(metric, pbBytes(5, pbFloat(1, v))...)
		case protoSummary:
			metric = append(metric, pbBytes(4, pbVarint(1, 3), pbFloat(2, v))...)
		}
		if s.age != noAge {
			metric = append(metric, pbVarint(6, uint64(k.now.UnixMilli()-s.age))...)
		}
		if s.form&0xc0 == 0xc0 {
			metric = append(metric, pbLabel("y", "late")...) // a label after the value
		}
		b = append(b, pbOne(formSeries[s.series].name, kind, metric)...)
	}
	return b
}

// knownSiteSeries returns what a server knows of the series of the site.
func (k *knownRig) knownSiteSeries(r *srvRig) *knownSiteSeries {
	r.server.sites.mu.Lock()
	defer r.server.sites.mu.Unlock()
	return &r.server.sites.track("site", k.now).decodeLock.series
}

// pushBoth pushes k.push to both servers. It compares their answers and the logs that they would
// write.
func (k *knownRig) pushBoth() {
	k.now = k.now.Add(time.Second)
	push := pushRequest{ClusterID: "site", Labels: k.labels, Arrival: k.now.UnixMilli()}
	var body []byte
	switch form := k.next(8); form {
	case 0:
		push.Type = omType
		body = k.text(true)
	case 1, 2, 3:
		body = k.text(false)
	default:
		push.Type = protoType
		body = k.proto()
	}
	switch k.next(16) {
	case 0:
		body = body[:len(body)/2]
	case 1, 2:
		push.Spool = fmt.Sprintf("00000000000000ab %d", 1+k.next(5))
	case 3:
		push.Spool = "00000000000000ab"
	}
	answer := func(r *srvRig) string {
		mine := push
		resp, err := r.server.acquireAndStorePush(context.Background(), &mine, body)
		if err != nil {
			resp = refusalResponse(err)
		}
		return fmt.Sprintf("%d %t %s", resp.Status, resp.AllUntimely, resp.Body)
	}
	k.knownSiteSeries(k.cold).pause = 1
	known := &k.knownSiteSeries(k.warm).known
	before := known.Len()
	got, want := answer(k.warm), answer(k.cold)
	if before > 0 && known.Len() >= before {
		k.hits++
	}
	if got != want {
		k.t.Fatalf("push %q\nwas answered %s\nwith all series decoded: %s", body, got, want)
	}
	if got, want := k.records(k.warm), k.records(k.cold); got != want {
		k.t.Fatalf("after push %q\nthe log would be %q\nwith all series decoded: %q", body, got, want)
	}
}

// records returns the records that a log of the site would have.
func (k *knownRig) records(r *srvRig) (all string) {
	allHeld(k.t, r.store)
	r.store.ViewSite("site", func(data *SiteSamples) {
		for frames := range data.Records {
			all += string(frames)
		}
	})
	return all
}

// checkEnd compares the metrics and the logs of the servers.
func (k *knownRig) checkEnd() {
	state := func(r *srvRig) string {
		lines := strings.Split(r.logged(), "\n")
		for line := range strings.Lines(metricsText(k.t, r.server.cfg.Metrics)) {
			if !strings.HasPrefix(line, "telemeter_store_fsync_duration_seconds") {
				lines = append(lines, strings.TrimSuffix(line, "\n"))
			}
		}
		slices.Sort(lines)
		return strings.Join(lines, "\n")
	}
	if got, want := state(k.warm), state(k.cold); got != want {
		k.t.Errorf("logs and metrics:\n%s\nwith all series decoded:\n%s", got, want)
	}
}

// A server gives the same answers, writes the same log and counts the same, whether it uses the
// known series of a site or decodes every series: over random pushes in three formats and several forms,
// with repeated, late and refused samples, other rules and labels, expiry and compaction.
func TestKnownSeriesChangeNothing(t *testing.T) {
	hits := 0
	for seed := range testSeeds(t, 300) {
		rng := rand.New(rand.NewPCG(seed, 1))
		ops := make([]byte, 400)
		for i := range ops {
			ops[i] = byte(rng.Uint32())
		}
		k := newKnownRig(t, ops)
		k.run()
		if hits += k.hits; t.Failed() {
			return
		}
	}
	if hits < 1000 {
		t.Errorf("only %d pushes began with known series and kept them", hits)
	}
}

func FuzzKnownSeries(f *testing.F) {
	f.Add([]byte{5, 3, 0, 2, 1, 0, 1, 4, 1, 0, 2, 6, 1, 0, 4, 9, 0, 4, 9, 7, 3, 10, 0, 4, 9})
	f.Fuzz(func(t *testing.T, ops []byte) {
		if len(ops) < 2000 {
			newKnownRig(t, ops).run()
		}
	})
}

// newKnownCaseRig returns a server without a rate limit, for pushKnown.
func newKnownCaseRig(t *testing.T) *srvRig {
	return newSrvRig(t, func(s *StoreConfig, c *ServerConfig) {
		s.LimitSeries, c.LimitBytes, c.RateInterval = 5000, 2<<10, 0
	})
}

// pushKnown pushes text for a site, one second after the push before. It returns the answer.
func (r *srvRig) pushKnown(clusterID string, labels map[string]string, text string) *pushResponse {
	r.t.Helper()
	r.clock.Add(int64(time.Second))
	push := &pushRequest{ClusterID: clusterID, Labels: labels, Arrival: r.now().UnixMilli(), Encoding: "gzip"}
	resp, err := r.server.acquireAndStorePush(context.Background(), push, gzipped([]byte(text)))
	if err != nil {
		resp = refusalResponse(err)
	}
	return resp
}

// known returns the known series of a site that has pushed.
func (r *srvRig) known(clusterID string) *knownSiteSeries {
	r.server.sites.mu.Lock()
	defer r.server.sites.mu.Unlock()
	return &r.server.sites.sites[clusterID].decodeLock.series
}

// A push that is too large for the list of samples is answered the same, whether its series are
// known or not, unless only its rendered lines are too large: known series have none.
func TestKnownSeriesAtLimits(t *testing.T) {
	const letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_:"
	lines := func(from, to int) (text string) { // names of two letters, so that gzip makes a line shorter than two bytes
		for i := from; i < to; i++ {
			text += fmt.Sprintf("%c%c 1\n", letters[i/64], letters[i%64])
		}
		return text
	}
	const maxSamples = MaxDecodedFactor * 2 << 10 / 16
	longLabel := map[string]string{"team": strings.Repeat("x", 3000)} // 30 lines are too large
	for _, c := range []struct {
		name         string
		labels       map[string]string
		before       [2]string
		push         string
		warm, cold   int // the status if the series are known, and if not
		wantAccepted int
	}{
		{"as many samples as fit", nil, [2]string{lines(0, 512), lines(512, maxSamples)}, lines(0, maxSamples), 200, 200, maxSamples},
		{"one that repeats a known one in another form", nil, [2]string{lines(0, 512), lines(512, maxSamples)}, lines(0, maxSamples) + "aa  1\n", 200, 200, maxSamples},
		{"a new one too many", nil, [2]string{lines(0, 512), lines(512, maxSamples)}, lines(0, maxSamples+1), 413, 413, 0},
		{"a known one too many", nil, [2]string{lines(0, 512), lines(512, maxSamples+1)}, lines(0, maxSamples+1), 413, 413, 0},
		{"lines that fit", longLabel, [2]string{lines(0, 10), lines(10, 20)}, lines(0, 20), 200, 200, 20},
		{"lines too large", longLabel, [2]string{lines(0, 15), lines(15, 30)}, lines(0, 30), 200, 413, 30},
	} {
		r := newKnownCaseRig(t)
		for _, text := range c.before {
			if got := r.pushKnown("warm", c.labels, text); got.Status != 200 {
				t.Fatalf("%s: a part was answered %d %s", c.name, got.Status, got.Body)
			}
		}
		for site, want := range map[string]int{"warm": c.warm, "cold": c.cold} {
			got := r.pushKnown(site, c.labels, c.push)
			accepted := fmt.Sprintf(`"accepted":%d,`, c.wantAccepted)
			if want == 413 {
				accepted = "raise the server's --limit-bytes to accept more"
			}
			if got.Status != want || !strings.Contains(string(got.Body), accepted) {
				t.Errorf("%s: the %s site was answered %d %s, want %d and %s", c.name, site, got.Status, got.Body, want, accepted)
			}
		}
	}
}

// A push that is decoded twice because of known series counts once towards the rate limit.
func TestDecodedAgainIsChargedOnce(t *testing.T) {
	r := newKnownCaseRig(t)
	r.server.sites = NewSitePushLimiter(time.Minute, 2<<10)
	r.pushKnown("s", nil, "a 1\n")
	before := r.server.sites.sites["s"].tat
	now := r.now().UnixMilli()
	text := fmt.Sprintf("a 1 %d\na 1 %d\n", now, now-1) + strings.Repeat("#"+strings.Repeat(" ", 1022)+"\n", 4)
	if got := r.pushKnown("s", nil, text); got.Status != 200 || !r.known("s").isRetry {
		t.Fatalf("the push was decoded again: %t, and answered %d %s", r.known("s").isRetry, got.Status, got.Body)
	}
	if got, want := r.server.sites.sites["s"].tat.Sub(before), 3*time.Minute; got != want {
		t.Errorf("a push of a little more than 4 KiB counts as %v of the rate limit, want %v", got, want)
	}
}

// After the series table has changed, one push is decoded again, and makes its series known.
func TestStaleSeriesIDsDoNotPause(t *testing.T) {
	r := newKnownCaseRig(t)
	for range 2 {
		r.pushKnown("s", nil, "a 1\nb 1\n")
	}
	k := r.known("s")
	k.generation++ // as if the IDs came from another table
	for i, want := range []bool{true, false, false} {
		if got := r.pushKnown("s", nil, "a 1\nb 1\n"); got.Status != 200 {
			t.Fatalf("push %d: answered %d %s", i, got.Status, got.Body)
		}
		if k.isRetry != want || k.known.Len() != 2 || k.pause != 0 {
			t.Errorf("push %d: decoded again %t, want %t; %d series are known, want 2; %d pushes will be without", i, k.isRetry, want, k.known.Len(), k.pause)
		}
	}
}

// A site whose pushes always repeat series with earlier times is rarely decoded twice. Once it sends
// other pushes, its known series are used again.
func TestKnownSeriesPause(t *testing.T) {
	r := newKnownCaseRig(t)
	again := 0
	for i := range 100 {
		now := r.now().UnixMilli()
		if got := r.pushKnown("s", nil, fmt.Sprintf("a 1 %d\na 1 %d\n", now, now-1)); got.Status != 200 {
			t.Fatalf("push %d: answered %d %s", i, got.Status, got.Body)
		}
		if r.known("s").isRetry {
			again++
		}
	}
	if most := 100/(maxKnownPause+1) + 6; again == 0 || again > most {
		t.Errorf("%d of 100 pushes were decoded twice, want 1 to %d", again, most)
	}
	for range maxKnownPause + 3 {
		r.pushKnown("s", nil, "a 1\n")
	}
	if k := r.known("s"); k.known.Len() != 1 || k.pause != 0 || k.nextPause != 0 {
		t.Errorf("%d series are known, want 1; pause %d, next pause %d", k.known.Len(), k.pause, k.nextPause)
	}
}

// A series that cannot become known, because its samples are too old, does not make a push copy the
// list of known series.
func TestUnlearnableSeriesKeepTheList(t *testing.T) {
	r := newKnownCaseRig(t)
	var before *knownEntry
	for i := range 3 {
		text := fmt.Sprintf("a 1\nold 1 %d\nb 1\n", r.now().Add(-3*time.Hour).UnixMilli())
		if got := r.pushKnown("s", nil, text); !strings.Contains(string(got.Body), `"accepted":2,`) {
			t.Fatalf("push %d: answered %d %s", i, got.Status, got.Body)
		}
		known := r.known("s").known.series
		if len(known) != 2 || i > 0 && &known[0] != before {
			t.Fatalf("push %d: %d series are known, want 2; the list is another one: %t", i, len(known), i > 0 && &known[0] != before)
		}
		before = &known[0]
	}
}

// The known series of a site without requests are freed, unless a push of the site is in flight.
func TestIdleSitesFreeKnownSeries(t *testing.T) {
	r := newKnownCaseRig(t)
	for _, site := range []string{"idle", "busy", "s"} {
		r.pushKnown(site, nil, "a 1\n")
	}
	if _, err := r.server.sites.AcquirePush("busy", r.now()); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		after time.Duration
		want  map[string]int // known series by site
	}{
		{knownIdle / 2, map[string]int{"idle": 1, "busy": 1, "s": 1}},
		{knownIdle * 3 / 4, map[string]int{"idle": 0, "busy": 1, "s": 1}},
	} {
		r.clock.Add(int64(c.after))
		r.pushKnown("s", nil, "a 1\n")
		for site, want := range c.want {
			if got := r.known(site).known.Len(); got != want {
				t.Errorf("%v later: %d series of site %s are known, want %d", c.after, got, site, want)
			}
		}
	}
	if got := r.pushKnown("idle", nil, "a 1\n"); got.Status != 200 || r.known("idle").known.Len() != 1 {
		t.Errorf("a push after the pause was answered %d %s, and %d series are known", got.Status, got.Body, r.known("idle").known.Len())
	}
}

// A push that cannot be written makes no series known: the store gives the IDs of its new series to
// others.
func TestFailedPushMakesNothingKnown(t *testing.T) {
	fsys := newCrashFS(1, "/secretdir")
	r := newSrvRig(t, func(s *StoreConfig, c *ServerConfig) { s.FS, c.RateInterval = fsys, 0 })
	r.pushKnown("s", nil, "a 1\n")
	fsys.hook = failOn("write", "", 0, errors.New("the disk fails"))
	if got := r.pushKnown("s", nil, "a 2\nb 2\n"); got.Status == 200 {
		t.Fatalf("a push that cannot be written was answered %d %s", got.Status, got.Body)
	}
	fsys.hook = nil
	if got := r.known("s").known.Len(); got != 1 {
		t.Errorf("after the push that failed, %d series are known, want 1", got)
	}
	for _, text := range []string{"c 3\n", "b 4\n", "c 5\n"} {
		if got := r.pushKnown("s", nil, text); got.Status != 200 {
			t.Fatalf("push %q: answered %d %s", text, got.Status, got.Body)
		}
	}
	held := r.held("s", "")
	for series, value := range map[string]string{"a": "1", "b": "4", "c": "5"} {
		if !strings.Contains(held, fmt.Sprintf("%s{_id=\"s\",instance=\"\",job=\"\"} %s ", series, value)) {
			t.Errorf("series %s has not the value %s in %s", series, value, held)
		}
	}
}

// discardFS is an FS that discards all writes, for benchmarks without a disk.
type discardFS struct{}

func (discardFS) OpenFile(string, int, fs.FileMode) (File, error) { return discardFile{}, nil }
func (discardFS) ReadFile(string) ([]byte, error)                 { return nil, fs.ErrNotExist }
func (discardFS) ReadDir(string) ([]fs.DirEntry, error)           { return nil, nil }
func (discardFS) Mkdir(string, fs.FileMode) error                 { return nil }
func (discardFS) Rename(string, string) error                     { return nil }
func (discardFS) Remove(string) error                             { return nil }
func (discardFS) SyncDir(string) error                            { return nil }

type discardFile struct{}

func (discardFile) Write(b []byte) (int, error) { return len(b), nil }
func (discardFile) Sync() error                 { return nil }
func (discardFile) Truncate(int64) error        { return nil }
func (discardFile) Close() error                { return nil }

// componentBody returns a push of 225 series of 25 families, with seven labels each, at the time ms.
func componentBody(f Format, ms int64) []byte {
	var out []byte
	for i := range 25 {
		name := fmt.Sprintf("site_component_requests_%02d_total", i)
		parts := [][]byte{pbBytes(1, []byte(name)), pbVarint(3, 0)}
		for j := range 9 {
			part := [...]string{"api", "web", "db", "queue", "cache", "auth", "dns", "log", "mail"}[j]
			labels := [][2]string{
				{"namespace", "openshift-" + part + "-operators"}, {"pod", fmt.Sprintf("%s-deployment-%08x-%05x", part, i*9+j+1<<30, i*j+1<<16)},
				{"container", part + "-container"}, {"endpoint", "https-metrics"}, {"instance", fmt.Sprintf("10.128.0.%d:8443", j)},
				{"job", part + "-metrics-service"}, {"service", part + "-metrics-svc"},
			}
			v := float64(i*1000+j) + float64(ms%100_000)/4
			if f == FormatProto {
				var metric []byte
				for _, l := range labels {
					metric = append(metric, pbLabel(l[0], l[1])...)
				}
				parts = append(parts, pbBytes(4, metric, pbBytes(3, pbFloat(1, v)), pbVarint(6, uint64(ms))))
				continue
			}
			sep := byte('{')
			out = append(out, name...)
			for _, l := range labels {
				out = fmt.Appendf(append(out, sep), "%s=%q", l[0], l[1])
				sep = ','
			}
			out = fmt.Appendf(out, "} %v %d\n", v, ms)
		}
		if f == FormatProto {
			out = append(out, pbFrame(parts...)...)
		}
	}
	return out
}

// BenchmarkKnownSeries measures what the server does for a push whose series are known, from the
// body to the record in the log, for 300 sites that take turns. The log discards its records.
func BenchmarkKnownSeries(b *testing.B) {
	const sites, series = 300, 225
	for _, c := range []struct {
		name   string
		format Format
		typ    string
	}{{"proto", FormatProto, protoType}, {"text", FormatText, ""}} {
		b.Run(c.name, func(b *testing.B) {
			r := newSrvRig(b, func(s *StoreConfig, c *ServerConfig) {
				s.FS, s.Dir, s.LimitSeries, s.LimitSamples, s.LimitSites = discardFS{}, "/d", 20_000, 500_000_000, 1000
				s.Retention = 10 * 24 * time.Hour
				c.LimitBytes, c.RateInterval = 1<<20, 0
			})
			var body []byte
			n := 0
			push := func() {
				if n%sites == 0 {
					r.clock.Add(int64(15 * time.Second))
					body = componentBody(c.format, r.now().UnixMilli())
				}
				push := &pushRequest{ClusterID: fmt.Sprint("site-", n%sites), Arrival: r.now().UnixMilli(), Type: c.typ}
				resp, err := r.server.acquireAndStorePush(context.Background(), push, body)
				if err != nil || !bytes.Contains(resp.Body, []byte(`"accepted":225`)) {
					b.Fatalf("push %d: %s, %v", n, resp.Body, err)
				}
				n++
			}
			for range 3 * sites {
				push()
			}
			b.ReportAllocs()
			b.SetBytes(int64(len(body)))
			before, first := processCPU(b).Seconds(), n
			for b.Loop() {
				push()
			}
			b.ReportMetric(float64(n-first)*series/(processCPU(b).Seconds()-before), "samples/cpu-s")
		})
	}
}
