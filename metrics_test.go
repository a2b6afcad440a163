package main

// Tests of the registry of metrics: the exposition in each format, bounds on series and label
// values, invalid registrations, and use by many goroutines.

import (
	"bytes"
	"fmt"
	"io"
	"math"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
)

// WriteText writes all metrics as text exposition 0.0.4.
func (m *Metrics) WriteText(w io.Writer) error {
	return m.write(w, expfmt.NewFormat(expfmt.TypeTextPlain))
}

func metricsText(t *testing.T, m *Metrics) string {
	t.Helper()
	var b strings.Builder
	if err := m.WriteText(&b); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// metricsParsed writes the metrics of m as text exposition and parses the text with expfmt's
// parser. It returns the parsed families by name.
func metricsParsed(t *testing.T, m *Metrics) map[string]*dto.MetricFamily {
	t.Helper()
	parser := expfmt.NewTextParser(model.LegacyValidation)
	families, err := parser.TextToMetricFamilies(strings.NewReader(metricsText(t, m)))
	if err != nil {
		t.Fatalf("expfmt cannot parse the exposition: %v", err)
	}
	return families
}

// The text exposition has families sorted by name and series sorted by label values. A family with
// labels is left out until it has a series. A family without labels is exposed from the start.
func TestMetricsText(t *testing.T) {
	m := NewMetrics()
	pushes := m.Counter("pushes_total", "Pushes.", "code", "reason")
	m.Counter("idle_total", "Never counted.")
	m.Counter("absent_total", "Without series.", "code")
	held := m.Gauge("held_samples", "Samples \\ held.\nNow.")
	took := m.Histogram("push_seconds", "Time.", []float64{0.5, 1}, "to")
	pushes.Inc("200", "")
	pushes.Add(2.5, "200", "")
	pushes.Add(0, "400", "a \"b\"\n\\")
	pushes.Inc("200", "\xff")
	m.OnCollect(func() { held.Set(-3) })
	for _, v := range []float64{0.5, 0.6, 1, 7, math.NaN()} {
		took.Observe(v, "x")
	}
	want := `# HELP held_samples Samples \\ held.\nNow.
# TYPE held_samples gauge
held_samples -3
# HELP idle_total Never counted.
# TYPE idle_total counter
idle_total 0
# HELP push_seconds Time.
# TYPE push_seconds histogram
push_seconds_bucket{to="x",le="0.5"} 1
push_seconds_bucket{to="x",le="1"} 3
push_seconds_bucket{to="x",le="+Inf"} 4
push_seconds_sum{to="x"} 9.1
push_seconds_count{to="x"} 4
# HELP pushes_total Pushes.
# TYPE pushes_total counter
pushes_total{code="200",reason=""} 3.5
pushes_total{code="200",reason="` + "\uFFFD" + `"} 1
pushes_total{code="400",reason="a \"b\"\n\\"} 0
`
	if got := metricsText(t, m); got != want {
		t.Errorf("exposition: got\n%s\nwant\n%s", got, want)
	}
	if n := len(metricsParsed(t, m)); n != 4 {
		t.Errorf("expfmt reads %d families, want 4", n)
	}
}

// Add and RaiseTo ignore negative values, NaN and infinity. RaiseTo also ignores a value below the
// counter's value. Value adds no series.
func TestCounterValues(t *testing.T) {
	m := NewMetrics()
	c := m.Counter("c_total", "C.", "l")
	if v := c.Value("never"); v != 0 || strings.Contains(metricsText(t, m), "never") {
		t.Errorf("Value of a series that does not exist: got %v, want 0 and no new series", v)
	}
	for _, bad := range []float64{-1, math.NaN(), math.Inf(1), math.Inf(-1)} {
		c.Add(bad, "a")
		c.RaiseTo(bad, "a")
	}
	if v := c.Value("a"); v != 0 {
		t.Errorf("counter after values that it must ignore: got %v, want 0", v)
	}
	for _, step := range []struct{ total, want float64 }{{5, 5}, {3, 5}, {5, 5}, {9, 9}} {
		if c.RaiseTo(step.total, "a"); c.Value("a") != step.want {
			t.Errorf("counter after RaiseTo(%v): got %v, want %v", step.total, c.Value("a"), step.want)
		}
	}
}

// A gauge can be set, and Add can decrease it below zero.
func TestGaugeValues(t *testing.T) {
	m := NewMetrics()
	g := m.Gauge("g", "G.")
	g.Set(2)
	g.Add(-5)
	if v := metricsParsed(t, m)["g"].Metric[0].Gauge.GetValue(); v != -3 {
		t.Errorf("gauge: got %v, want -3", v)
	}
}

// After ReplaceSeries a gauge has only the new series. Their number is at most maxSeries, and one
// more for "other".
func TestGaugeReplaceSeries(t *testing.T) {
	m := NewMetrics()
	g := m.Gauge("g", "G.", "a")
	g.Set(1, "gone")
	for _, n := range []int{2, 1, 0, maxSeries + 5} {
		g.ReplaceSeries(func(set func(v float64, labelValues ...string)) {
			for i := range n {
				set(float64(i), fmt.Sprint(i))
			}
		})
		text := metricsText(t, m)
		if got, want := strings.Count(text, "\ng{"), min(n, maxSeries+1); got != want || strings.Contains(text, "gone") {
			t.Errorf("after replacing by %d series: got %d series, want %d and no old one:\n%.300s", n, got, want, text)
		}
	}
}

// Label values from untrusted input cost a bounded amount of memory: long values are cut, and
// series beyond maxSeries are counted together in one series "other". No count is lost, and the
// exposition can be parsed.
func TestMetricsSeriesBounded(t *testing.T) {
	m := NewMetrics()
	c := m.Counter("c_total", "C.", "site", "code")
	long := strings.Repeat("x", 10*maxValueLen)
	for i := range 3 * maxSeries {
		c.Inc(fmt.Sprintf("site-%d\xff", i), "200")
		c.Inc(fmt.Sprintf("%s%d", long, i), "200")
	}
	series, sum := metricsParsed(t, m)["c_total"].Metric, 0.0
	for _, s := range series {
		sum += s.Counter.GetValue()
		for _, l := range s.Label {
			if len(l.GetValue()) > maxValueLen {
				t.Errorf("a label value has %d bytes, want at most %d", len(l.GetValue()), maxValueLen)
			}
		}
	}
	if len(series) != maxSeries+1 || sum != 6*maxSeries {
		t.Errorf("got %d series with the sum %v, want %d with the sum %d", len(series), sum, maxSeries+1, 6*maxSeries)
	}
	if v := c.Value("other", "other"); v < maxSeries {
		t.Errorf("series other: got %v, want at least %d", v, maxSeries)
	}
}

// Registering a family with an invalid name, label, help text or bucket panics. So does using a
// family with a wrong number of label values.
func TestMetricsRegistrationPanics(t *testing.T) {
	for name, register := range map[string]func(*Metrics){
		"duplicate":             func(m *Metrics) { m.Gauge("a", "A."); m.Histogram("a", "A.", nil) },
		"empty name":            func(m *Metrics) { m.Gauge("", "A.") },
		"dash":                  func(m *Metrics) { m.Gauge("a-b", "A.") },
		"upper case":            func(m *Metrics) { m.Gauge("aB", "A.") },
		"no help":               func(m *Metrics) { m.Gauge("a", "") },
		"counter without total": func(m *Metrics) { m.Counter("a", "A.") },
		"gauge with total":      func(m *Metrics) { m.Gauge("a_total", "A.") },
		"component suffix":      func(m *Metrics) { m.Gauge("a_bucket", "A.") },
		"reserved label":        func(m *Metrics) { m.Gauge("a", "A.", "__x") },
		"label le":              func(m *Metrics) { m.Histogram("a", "A.", nil, "le") },
		"repeated label":        func(m *Metrics) { m.Gauge("a", "A.", "x", "x") },
		"too many labels":       func(m *Metrics) { m.Gauge("a", "A.", "v", "w", "x", "y", "z") },
		"buckets descend":       func(m *Metrics) { m.Histogram("a", "A.", []float64{2, 1}) },
		"infinite bucket":       func(m *Metrics) { m.Histogram("a", "A.", []float64{1, math.Inf(1)}) },
		"missing label value":   func(m *Metrics) { m.Gauge("a", "A.", "x").Set(1) },
		"extra label value":     func(m *Metrics) { m.Gauge("a", "A.").Set(1, "x") },
	} {
		t.Run(name, func(t *testing.T) {
			defer func() {
				if recover() == nil {
					t.Error("registering or using the metric did not panic")
				}
			}()
			register(NewMetrics())
		})
	}
}

// Each kind of scraper gets all families in the format that it prefers. The body is compressed only
// if the scraper accepts gzip.
func TestMetricsServeHTTP(t *testing.T) {
	m := NewMetrics()
	m.Counter("a_total", "A.").Inc()
	m.Histogram("b_seconds", "B.", []float64{1, 2}).Observe(1.5)
	const prometheus = "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=delimited"
	for _, c := range []struct {
		accept, encoding string
		format           expfmt.FormatType
		gzipped          bool
	}{
		{"", "", expfmt.TypeTextPlain, false},
		{"*/*", "identity", expfmt.TypeTextPlain, false},
		{"text/plain;version=0.0.4", "gzip;q=0", expfmt.TypeTextPlain, false},
		{"text/plain;version=0.0.4", "br, GZIP ; q=0.5", expfmt.TypeTextPlain, true},
		{"application/openmetrics-text;version=1.0.0", "gzip", expfmt.TypeOpenMetrics, true},
		{prometheus, "gzip", expfmt.TypeProtoDelim, true},
		{prometheus + ";q=0.4,text/plain;version=0.0.4;q=0.5", "", expfmt.TypeTextPlain, false},
		{"image/png", "", expfmt.TypeTextPlain, false},
	} {
		t.Run(c.accept+"|"+c.encoding, func(t *testing.T) {
			r := httptest.NewRequest("GET", "/metrics", nil)
			r.Header.Set("Accept", c.accept)
			r.Header.Set("Accept-Encoding", c.encoding)
			w := httptest.NewRecorder()
			m.ServeHTTP(w, r)
			raw := w.Body.Bytes()
			if got := w.Header().Get("Content-Encoding") == "gzip"; got != c.gzipped {
				t.Fatalf("gzip is %v, want %v", got, c.gzipped)
			} else if got {
				raw = gunzipped(t, raw)
			}
			format := expfmt.ResponseFormat(http.Header{"Content-Type": w.Header()["Content-Type"]})
			if c.format == expfmt.TypeOpenMetrics { // expfmt can write OpenMetrics but cannot read it, so compare the text
				if !strings.HasPrefix(w.Header().Get("Content-Type"), expfmt.OpenMetricsType) ||
					!bytes.Contains(raw, []byte("# TYPE a counter\na_total 1.0\n")) || !bytes.HasSuffix(raw, []byte("# EOF\n")) {
					t.Errorf("body of type %s is not OpenMetrics:\n%s", w.Header().Get("Content-Type"), raw)
				}
				return
			}
			if format.FormatType() != c.format {
				t.Fatalf("content type: got %s, want format %v", w.Header().Get("Content-Type"), c.format)
			}
			var names []string
			for dec := expfmt.NewDecoder(bytes.NewReader(raw), format); ; {
				var mf dto.MetricFamily
				if err := dec.Decode(&mf); err == io.EOF {
					break
				} else if err != nil {
					t.Fatal(err)
				}
				names = append(names, mf.GetName())
			}
			slices.Sort(names) // expfmt's text decoder returns families in random order
			if !slices.Equal(names, []string{"a_total", "b_seconds"}) {
				t.Errorf("families: got %v, want a_total and b_seconds", names)
			}
		})
	}
}

// Concurrent updates lose no count. If a histogram is scraped while it is updated, its buckets are
// still cumulative, and the bucket +Inf equals the count.
func TestMetricsConcurrent(t *testing.T) {
	const workers, rounds = 8, 300
	m := NewMetrics()
	c, g := m.Counter("c_total", "C.", "l"), m.Gauge("g", "G.", "l")
	h := m.Histogram("h_seconds", "H.", []float64{10, 20, 30})
	m.OnCollect(func() { g.Set(1, "hook") })
	scrape := func() {
		var below uint64
		hist := metricsParsed(t, m)["h_seconds"].Metric[0].Histogram
		for _, b := range hist.Bucket {
			if b.GetCumulativeCount() < below {
				t.Errorf("buckets are not cumulative: %d after %d", b.GetCumulativeCount(), below)
			}
			below = b.GetCumulativeCount()
		}
		if below != hist.GetSampleCount() {
			t.Errorf("histogram: the last bucket is %d, but the count is %d", below, hist.GetSampleCount())
		}
	}
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			for i := range rounds {
				l := fmt.Sprint(i % 7)
				c.Inc(l)
				c.RaiseTo(1, l)
				g.Add(1, l)
				h.Observe(float64(i % 40))
				if w == 0 && i%10 == 0 {
					m.Gauge(fmt.Sprintf("late_%d", i), "Registered meanwhile.")
					scrape()
				}
			}
		})
	}
	wg.Wait()
	scrape()
	sum := 0.0
	for i := range 7 {
		sum += c.Value(fmt.Sprint(i))
	}
	if sum != workers*rounds { // every goroutine calls Inc before RaiseTo(1), so that RaiseTo adds nothing
		t.Errorf("sum of the counters: got %v, want %d", sum, workers*rounds)
	}
	if n := metricsParsed(t, m)["h_seconds"].Metric[0].Histogram.GetSampleCount(); n != workers*rounds {
		t.Errorf("count of the histogram: got %d, want %d", n, workers*rounds)
	}
}

// Incrementing a counter and observing a value in a histogram allocate no memory if the series
// exists already. Every push does both.
func TestMetricsCountingAllocatesNothing(t *testing.T) {
	m := NewMetrics()
	c := m.Counter("c_total", "C.", "a", "b", "c")
	h := m.Histogram("h_seconds", "H.", []float64{1, 2}, "a")
	if n := testing.AllocsPerRun(100, func() { c.Inc("x", "y", "z"); h.Observe(1.5, "x") }); n != 0 {
		t.Errorf("incrementing a counter and observing a histogram: %v allocations, want 0", n)
	}
}

// BenchmarkMetricsInc increments one counter from many goroutines.
func BenchmarkMetricsInc(b *testing.B) {
	c := NewMetrics().Counter("c_total", "C.", "a", "b", "c")
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			c.Inc("upload", "200", "accepted")
		}
	})
}
