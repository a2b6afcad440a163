package main

// This file holds the process's own counters, gauges and histograms and writes them with
// Prometheus's package expfmt. Prometheus accepts the output whatever values and label values
// callers pass: there are no duplicate series and no invalid UTF-8 in label values, and counters
// never decrease. Memory is bounded, because the number of series per family and the length of
// label values are limited. The metrics family must not know the meaning of any metric.

import (
	"bytes"
	"cmp"
	"compress/gzip"
	"fmt"
	"io"
	"maps"
	"math"
	"mime"
	"net/http"
	"regexp"
	"slices"
	"sort"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
)

const (
	maxLabels   = 4    // labels per family; seriesKey is an array of this size, so that finding a series allocates no memory
	maxSeries   = 1000 // series per family; updates of further series go to one more series, whose label values are all "other"
	maxValueLen = 128  // bytes of a label value; longer values are cut to this length before each run of invalid UTF-8 is replaced by U+FFFD (3 bytes)
)

// Names of metrics and labels must match metricNamePattern: snake_case, as Prometheus's naming
// guide recommends. Prometheus itself accepts more names. The suffixes in componentSuffixPattern
// are reserved for the lines of histograms and summaries.
var (
	metricNamePattern      = regexp.MustCompile(`^[a-z][a-z0-9_]*$`)
	componentSuffixPattern = regexp.MustCompile(`_(bucket|count|sum|created)$`)
)

// Metrics is a registry of metric families and the http.Handler that exposes them. All its methods
// and all methods of its families are safe for concurrent use.
//
// Registering a family panics if a name or label is invalid or already used, or if the help text is
// missing. These are programming errors, which show when the program starts. Using a family with a
// wrong number of label values also panics. Names follow the conventions that promtool checks: the
// name of every counter ends in _total, and no other name does. No name may end in a suffix that a
// line of a histogram or summary can have, such as _sum. Therefore two families never produce the
// same line.
type Metrics struct {
	mu        sync.Mutex      // guards families and onCollect
	families  []*metricFamily // sorted by name
	onCollect []func()
}

// seriesKey identifies a series of a family by the values of its labels.
type seriesKey [maxLabels]string

// metricFamily is the common part of Counter, Gauge and Histogram.
type metricFamily struct {
	name, help string
	kind       dto.MetricType
	labels     []string
	buckets    []float64 // upper bounds of a histogram's buckets without +Inf, ascending

	mu     sync.RWMutex // guards the map series; the values in the map are atomic
	series map[seriesKey]*seriesValue
}

// seriesValue is the current state of one series: a counter, a gauge or a histogram.
type seriesValue struct {
	value  atomic.Uint64   // bits of a float64: the value of the counter or gauge, or the sum of the histogram
	counts []atomic.Uint64 // number of observations in each bucket of a histogram, not cumulative; the last bucket is +Inf
}

// Counter is a metric family of counters: values that never decrease.
type Counter struct{ metricFamily }

// Gauge is a metric family of gauges: values that can increase and decrease.
type Gauge struct{ metricFamily }

// Histogram is a metric family of histograms, which count observations in buckets.
type Histogram struct{ metricFamily }

// NewMetrics returns a registry without metric families.
func NewMetrics() *Metrics { return &Metrics{} }

// Counter registers a family of counters. Its name must end in _total. A counter without labels is
// exposed with the value 0 from the start. A series with labels is exposed after its first update
// by Inc, Add or RaiseTo; Add(0, values...) exposes it with the value 0.
func (m *Metrics) Counter(name, help string, labelNames ...string) *Counter {
	c := &Counter{}
	m.register(&c.metricFamily, name, help, dto.MetricType_COUNTER, nil, labelNames)
	return c
}

// Gauge registers a family of gauges. A gauge without labels is exposed with the value 0 from the
// start. A series with labels is exposed after its first update by Set or Add, until ReplaceSeries
// removes it.
func (m *Metrics) Gauge(name, help string, labelNames ...string) *Gauge {
	g := &Gauge{}
	m.register(&g.metricFamily, name, help, dto.MetricType_GAUGE, nil, labelNames)
	return g
}

// Histogram registers a family of histograms. buckets are the inclusive upper bounds of the
// buckets, finite and ascending, in the unit with which the name ends (such as seconds). Histogram
// adds the bucket +Inf.
func (m *Metrics) Histogram(name, help string, buckets []float64, labelNames ...string) *Histogram {
	for i, le := range buckets {
		if math.IsNaN(le) || math.IsInf(le, 0) || i > 0 && le <= buckets[i-1] {
			panic(fmt.Sprintf("metric %s: bucket bounds must be finite and ascending", name))
		}
	}
	h := &Histogram{}
	m.register(&h.metricFamily, name, help, dto.MetricType_HISTOGRAM, slices.Clone(buckets), labelNames)
	return h
}

// register initializes f and adds it to m. It panics if an argument is invalid; see Metrics.
func (m *Metrics) register(f *metricFamily, name, help string, kind dto.MetricType, buckets []float64, labelNames []string) {
	f.name, f.help, f.kind, f.buckets = name, help, kind, buckets
	f.labels, f.series = slices.Clone(labelNames), map[seriesKey]*seriesValue{}
	if !metricNamePattern.MatchString(name) || help == "" {
		panic(fmt.Sprintf("metric %q: the name is invalid, or the help text is missing", name))
	}
	if strings.HasSuffix(name, "_total") != (kind == dto.MetricType_COUNTER) {
		panic(fmt.Sprintf("metric %s: names of counters, and no other names, must end in _total", name))
	}
	if componentSuffixPattern.MatchString(name) {
		panic(fmt.Sprintf("metric %s: the suffix is reserved for the lines of histograms and summaries", name))
	}
	for i, l := range labelNames {
		if i == maxLabels || !metricNamePattern.MatchString(l) || l == "le" || slices.Contains(labelNames[:i], l) {
			panic(fmt.Sprintf("metric %s: label %q is invalid or repeated, or there are more than %d labels", name, l, maxLabels))
		}
	}
	if len(labelNames) == 0 {
		f.findOrAddSeries(nil)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	i, taken := slices.BinarySearchFunc(m.families, name, func(f *metricFamily, name string) int { return cmp.Compare(f.name, name) })
	if taken {
		panic(fmt.Sprintf("metric %s: registered twice", name))
	}
	m.families = slices.Insert(m.families, i, f)
}

// findOrAddSeries returns the series with these label values. It adds the series if it does not
// exist. The message of the panic leaves out the label values: otherwise they would escape to the
// heap, and every call would allocate memory.
func (f *metricFamily) findOrAddSeries(labelValues []string) *seriesValue {
	if len(labelValues) != len(f.labels) {
		panic(fmt.Sprintf("metric %s: %d label values for %d labels", f.name, len(labelValues), len(f.labels)))
	}
	var key seriesKey
	copy(key[:], labelValues)
	f.mu.RLock()
	s := f.series[key]
	f.mu.RUnlock()
	if s == nil {
		s = f.addSeries(key)
	}
	return s
}

// addSeries adds a series and returns it. If another goroutine has added the same series meanwhile,
// addSeries returns that series. If the family has maxSeries series, addSeries returns the series
// whose label values are all "other".
func (f *metricFamily) addSeries(key seriesKey) *seriesValue {
	for i, v := range key {
		// Clone the value, because it may be a part of a long text, which the series would keep in
		// memory.
		key[i] = strings.Clone(strings.ToValidUTF8(v[:min(len(v), maxValueLen)], "\uFFFD"))
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.series[key] == nil && len(f.series) >= maxSeries {
		for i := range f.labels {
			key[i] = "other"
		}
	}
	// Look up the key again, because the series may exist already: another goroutine may have added
	// it meanwhile, or the key may have changed above.
	s := f.series[key]
	if s == nil {
		s = &seriesValue{}
		if f.kind == dto.MetricType_HISTOGRAM {
			s.counts = make([]atomic.Uint64, len(f.buckets)+1)
		}
		f.series[key] = s
	}
	return s
}

func (s *seriesValue) load() float64 { return math.Float64frombits(s.value.Load()) }

func (s *seriesValue) add(v float64) {
	for {
		old := s.value.Load()
		if s.value.CompareAndSwap(old, math.Float64bits(math.Float64frombits(old)+v)) {
			return
		}
	}
}

// Inc adds 1 to the series with these label values.
func (c *Counter) Inc(labelValues ...string) { c.Add(1, labelValues...) }

// Add adds v to the series with these label values. The series exists from then on, even if v is 0.
// A negative v is ignored, because Prometheus interprets a decreasing counter as a restart. NaN and
// infinity are ignored, because the counter would keep that value for ever.
func (c *Counter) Add(v float64, labelValues ...string) {
	s := c.findOrAddSeries(labelValues)
	if v > 0 && !math.IsInf(v, 1) {
		s.add(v)
	}
}

// RaiseTo sets the counter with these label values to v if v is higher than its value. It is for
// totals that are counted elsewhere, for example by the kernel. NaN and infinity are ignored.
func (c *Counter) RaiseTo(v float64, labelValues ...string) {
	s := c.findOrAddSeries(labelValues)
	for {
		old := s.value.Load()
		if !(v > math.Float64frombits(old)) || math.IsInf(v, 1) || s.value.CompareAndSwap(old, math.Float64bits(v)) {
			return
		}
	}
}

// Value returns the value of the counter with these label values. If the series does not exist,
// Value returns 0 and does not add it.
func (c *Counter) Value(labelValues ...string) float64 {
	var key seriesKey
	copy(key[:], labelValues)
	c.mu.RLock()
	defer c.mu.RUnlock()
	if s := c.series[key]; s != nil {
		return s.load()
	}
	return 0
}

// Set sets the series with these label values to v.
func (g *Gauge) Set(v float64, labelValues ...string) {
	g.findOrAddSeries(labelValues).value.Store(math.Float64bits(v))
}

// ReplaceSeries replaces all series of the gauge at once. It calls fill, and fill calls set for
// each new series. A concurrent scrape sees all old series or all new series.
func (g *Gauge) ReplaceSeries(fill func(set func(v float64, labelValues ...string))) {
	next := Gauge{metricFamily{name: g.name, kind: g.kind, labels: g.labels, series: map[seriesKey]*seriesValue{}}}
	fill(next.Set)
	g.mu.Lock()
	defer g.mu.Unlock()
	g.series = next.series
}

// Add adds v to the series with these label values. v may be negative.
func (g *Gauge) Add(v float64, labelValues ...string) { g.findOrAddSeries(labelValues).add(v) }

// Observe adds the observation v to the histogram with these label values. NaN is ignored, because
// it would make the sum NaN for ever.
func (h *Histogram) Observe(v float64, labelValues ...string) {
	s := h.findOrAddSeries(labelValues)
	if math.IsNaN(v) {
		return
	}
	s.counts[sort.SearchFloat64s(h.buckets, v)].Add(1)
	s.add(v)
}

// OnCollect registers f to be called before each exposition of the metrics, so that f can update
// gauges and totals. f must be safe for concurrent use, because several expositions can run at the
// same time. The registry holds no lock while it calls f.
func (m *Metrics) OnCollect(f func()) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.onCollect = append(m.onCollect, f)
}

// gather calls the functions registered with OnCollect and returns the families that have series.
// The families are sorted by name, and their series by label values.
func (m *Metrics) gather() []*dto.MetricFamily {
	m.mu.Lock()
	onCollect, families := slices.Clone(m.onCollect), slices.Clone(m.families)
	m.mu.Unlock()
	for _, f := range onCollect {
		f()
	}
	var out []*dto.MetricFamily
	for _, f := range families {
		if mf := f.collect(); len(mf.Metric) > 0 { // leave out a family without series, because expfmt refuses it
			out = append(out, mf)
		}
	}
	return out
}

// collect returns the current state of the family f in the form that expfmt writes.
func (f *metricFamily) collect() *dto.MetricFamily {
	f.mu.RLock()
	series := maps.Clone(f.series)
	f.mu.RUnlock()
	keys := slices.SortedFunc(maps.Keys(series), func(a, b seriesKey) int { return slices.Compare(a[:], b[:]) })

	mf := &dto.MetricFamily{Name: &f.name, Help: &f.help, Type: &f.kind}
	for _, key := range keys {
		s, out := series[key], &dto.Metric{}
		for i := range f.labels {
			out.Label = append(out.Label, &dto.LabelPair{Name: &f.labels[i], Value: new(key[i])})
		}
		switch f.kind {
		case dto.MetricType_COUNTER:
			out.Counter = &dto.Counter{Value: new(s.load())}
		case dto.MetricType_GAUGE:
			out.Gauge = &dto.Gauge{Value: new(s.load())}
		case dto.MetricType_HISTOGRAM:
			// Compute the total count from the bucket counts that were just read, so that they
			// agree. The sum is read later and may differ from the bucket counts by observations
			// that are made meanwhile.
			h, n := &dto.Histogram{}, uint64(0)
			for i := range f.buckets {
				n += s.counts[i].Load()
				h.Bucket = append(h.Bucket, &dto.Bucket{UpperBound: &f.buckets[i], CumulativeCount: new(n)})
			}
			n += s.counts[len(f.buckets)].Load()
			h.SampleCount, h.SampleSum = &n, new(s.load())
			out.Histogram = h
		}
		mf.Metric = append(mf.Metric, out)
	}
	return mf
}

func (m *Metrics) write(w io.Writer, format expfmt.Format) error {
	enc := expfmt.NewEncoder(w, format)
	for _, mf := range m.gather() {
		if err := enc.Encode(mf); err != nil {
			return fmt.Errorf("writing metric %s: %w", mf.GetName(), err)
		}
	}
	if c, ok := enc.(expfmt.Closer); ok { // Close writes the "# EOF" of OpenMetrics
		if err := c.Close(); err != nil {
			return fmt.Errorf("writing the end of the metrics: %w", err)
		}
	}
	return nil
}

// ServeHTTP answers with all metrics. The format is the one that the scraper prefers among
// delimited protobuf, OpenMetrics and text. The body is compressed if the scraper accepts gzip.
// ServeHTTP renders the whole body, whose size is bounded, before it sends the status. So an error
// during rendering leads to status 500, never to an incomplete body with status 200.
func (m *Metrics) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	format := expfmt.NegotiateAccept(r.Header, expfmt.DefaultOpenMetricsAcceptedFormats()...)
	var body bytes.Buffer
	if err := m.write(&body, format); err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", string(format))
	if !AcceptsGzip(r.Header) {
		w.Write(body.Bytes()) // the error is ignored, because no answer can reach the scraper then
		return
	}
	w.Header().Set("Content-Encoding", "gzip")
	zw := gzip.NewWriter(w)
	zw.Write(body.Bytes())
	zw.Close()
}

// AcceptsGzip reports whether the header Accept-Encoding contains gzip without q=0, which means
// that gzip is not acceptable (RFC 9110, 12.5.3). "*" does not count as gzip.
func AcceptsGzip(h http.Header) bool {
	for part := range strings.SplitSeq(strings.Join(h.Values("Accept-Encoding"), ","), ",") {
		coding, params, err := mime.ParseMediaType(part)
		if err == nil && coding == "gzip" {
			q, err := strconv.ParseFloat(cmp.Or(params["q"], "1"), 64)
			return err == nil && q > 0
		}
	}
	return false
}
