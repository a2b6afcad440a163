package main

// The process's own counters, gauges and histograms, and their exposition through expfmt. A
// Prometheus accepts the output, whatever callers do: no duplicate series, no invalid UTF-8,
// counters never fall. Memory is bounded by maxSeries series per family and maxValueLen
// bytes per label value. This family must not know the meaning of any metric.

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
	maxLabels   = 4    // per family: label values are an array key, so that finding a series allocates nothing
	maxSeries   = 1000 // per family; what comes after them counts under "other", one more
	maxValueLen = 128  // bytes of a label value; longer ones are cut
)

// Stricter than Prometheus is: its naming guide asks for snake_case.
var (
	metricNamePattern      = regexp.MustCompile(`^[a-z][a-z0-9_]*$`)
	componentSuffixPattern = regexp.MustCompile(`_(bucket|count|sum|created)$`)
)

// Metrics is a registry of metric families and the http.Handler that exposes
// them. All its methods, and those of the families it hands out, may be called
// concurrently.
//
// Registering panics when a name or label is invalid or taken, or help is
// missing: the caller's mistake, found at start. So does a wrong number of label
// values later. Names follow the convention that promtool checks: counters end
// in _total, and no other family in a suffix that a component line could have;
// so unique names make unique lines.
type Metrics struct {
	mu        sync.Mutex      // guards the slices
	families  []*metricFamily // sorted by name
	onCollect []func()
}

// seriesKey is the values of a family's labels.
type seriesKey [maxLabels]string

// metricFamily is the common part of a Counter, a Gauge and a Histogram.
type metricFamily struct {
	name, help string
	kind       dto.MetricType
	labels     []string
	buckets    []float64 // upper bounds without +Inf, ascending

	mu     sync.RWMutex // guards series, but not a series' values
	series map[seriesKey]*seriesValue
}

// seriesValue is one series of a family, or one histogram.
type seriesValue struct {
	value  atomic.Uint64   // float bits: counter, gauge, or a histogram's sum
	counts []atomic.Uint64 // observations per bucket, not cumulative; the last is +Inf
}

// Counter is a total that only grows.
type Counter struct{ metricFamily }

// Gauge is a value that goes up and down.
type Gauge struct{ metricFamily }

// Histogram counts observations in buckets.
type Histogram struct{ metricFamily }

// NewMetrics returns an empty registry.
func NewMetrics() *Metrics { return &Metrics{} }

// Counter registers a counter; its name ends in _total. Without labels it is
// exposed as 0 from the start; a labelled series is, after Add(0, values...).
func (m *Metrics) Counter(name, help string, labelNames ...string) *Counter {
	c := &Counter{}
	m.register(&c.metricFamily, name, help, dto.MetricType_COUNTER, nil, labelNames)
	return c
}

// Gauge registers a gauge, exposed as Counter's series are.
func (m *Metrics) Gauge(name, help string, labelNames ...string) *Gauge {
	g := &Gauge{}
	m.register(&g.metricFamily, name, help, dto.MetricType_GAUGE, nil, labelNames)
	return g
}

// Histogram registers a histogram. Buckets are inclusive upper bounds, finite
// and ascending, in the unit that name ends in; +Inf is added.
func (m *Metrics) Histogram(name, help string, buckets []float64, labelNames ...string) *Histogram {
	for i, le := range buckets {
		if math.IsNaN(le) || math.IsInf(le, 0) || i > 0 && le <= buckets[i-1] {
			panic(fmt.Sprintf("metric %s: buckets are not finite and ascending", name))
		}
	}
	h := &Histogram{}
	m.register(&h.metricFamily, name, help, dto.MetricType_HISTOGRAM, slices.Clone(buckets), labelNames)
	return h
}

func (m *Metrics) register(f *metricFamily, name, help string, kind dto.MetricType, buckets []float64, labelNames []string) {
	f.name, f.help, f.kind, f.buckets = name, help, kind, buckets
	f.labels, f.series = slices.Clone(labelNames), map[seriesKey]*seriesValue{}
	if !metricNamePattern.MatchString(name) || help == "" {
		panic(fmt.Sprintf("metric %q: invalid name, or no help", name))
	}
	if strings.HasSuffix(name, "_total") != (kind == dto.MetricType_COUNTER) {
		panic(fmt.Sprintf("metric %s: counters, and only they, end in _total", name))
	}
	if componentSuffixPattern.MatchString(name) {
		panic(fmt.Sprintf("metric %s: the suffix is kept for component lines", name))
	}
	for i, l := range labelNames {
		if i == maxLabels || !metricNamePattern.MatchString(l) || l == "le" || slices.Contains(labelNames[:i], l) {
			panic(fmt.Sprintf("metric %s: label %q is invalid, repeated or one too many", name, l))
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

// findOrAddSeries returns the series with these label values, which it adds if there is none. The
// panic does not print the values: they would escape, and each call would allocate.
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

// addSeries adds a series, unless a concurrent call did. Beyond maxSeries it returns the one
// whose label values are all "other".
func (f *metricFamily) addSeries(key seriesKey) *seriesValue {
	for i, v := range key {
		// Cloned: a short value must not keep alive the long text it was cut from.
		key[i] = strings.Clone(strings.ToValidUTF8(v[:min(len(v), maxValueLen)], "\uFFFD"))
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.series[key] == nil && len(f.series) >= maxSeries {
		for i := range f.labels {
			key[i] = "other"
		}
	}
	// The key may be new by now: two values may have become one by cutting or folding.
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

// Add adds v to the series with these label values, which exists from then on,
// even if v is 0. A negative v, NaN or infinity is ignored: a counter that falls
// reads as a restart, and the others would stay for ever.
func (c *Counter) Add(v float64, labelValues ...string) {
	s := c.findOrAddSeries(labelValues)
	if v > 0 && !math.IsInf(v, 1) {
		s.add(v)
	}
}

// RaiseTo raises the series to v, a total that its caller counts elsewhere. A lower v, or one
// that Add would ignore, changes nothing.
func (c *Counter) RaiseTo(v float64, labelValues ...string) {
	s := c.findOrAddSeries(labelValues)
	for {
		old := s.value.Load()
		if !(v > math.Float64frombits(old)) || math.IsInf(v, 1) || s.value.CompareAndSwap(old, math.Float64bits(v)) {
			return
		}
	}
}

// Value returns the value of the series, or 0 if there is none; it adds none.
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

// ReplaceSeries replaces all series of the gauge by those that fill sets.
func (g *Gauge) ReplaceSeries(fill func(set func(v float64, labelValues ...string))) {
	next := Gauge{metricFamily{name: g.name, kind: g.kind, labels: g.labels, series: map[seriesKey]*seriesValue{}}}
	fill(next.Set)
	g.mu.Lock()
	defer g.mu.Unlock()
	g.series = next.series
}

// Add adds v, which may be negative, to the series with these label values.
func (g *Gauge) Add(v float64, labelValues ...string) { g.findOrAddSeries(labelValues).add(v) }

// Observe counts v. NaN is ignored: the sum would stay NaN for ever.
func (h *Histogram) Observe(v float64, labelValues ...string) {
	s := h.findOrAddSeries(labelValues)
	if math.IsNaN(v) {
		return
	}
	s.counts[sort.SearchFloat64s(h.buckets, v)].Add(1)
	s.add(v)
}

// OnCollect has f called before each exposition, to refresh gauges and totals.
// Expositions may overlap, so f must be safe for concurrent use; it runs without
// any lock of the registry.
func (m *Metrics) OnCollect(f func()) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.onCollect = append(m.onCollect, f)
}

// gather returns the families that have series, by name, their series by label
// values.
func (m *Metrics) gather() []*dto.MetricFamily {
	m.mu.Lock()
	onCollect, families := slices.Clone(m.onCollect), slices.Clone(m.families)
	m.mu.Unlock()
	for _, f := range onCollect {
		f()
	}
	var out []*dto.MetricFamily
	for _, f := range families {
		if mf := f.collect(); len(mf.Metric) > 0 { // expfmt refuses a family without any
			out = append(out, mf)
		}
	}
	return out
}

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
			// The count is the sum of the buckets as read, never a number of its own
			// that could disagree with them; only the sum may be a moment ahead.
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
	if c, ok := enc.(expfmt.Closer); ok { // OpenMetrics ends with a line of its own
		if err := c.Close(); err != nil {
			return fmt.Errorf("ending the metrics: %w", err)
		}
	}
	return nil
}

// ServeHTTP answers with all metrics in the format that the scraper prefers among
// delimited protobuf, OpenMetrics and text, compressed if it accepts gzip. The
// whole body is rendered first (its size is bounded), so that no error cuts short an answer of
// status 200.
func (m *Metrics) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	format := expfmt.NegotiateAccept(r.Header, expfmt.DefaultOpenMetricsAcceptedFormats()...)
	var body bytes.Buffer
	if err := m.write(&body, format); err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", string(format))
	if !AcceptsGzip(r.Header) {
		w.Write(body.Bytes()) // an error here is the scraper's hanging up
		return
	}
	w.Header().Set("Content-Encoding", "gzip")
	zw := gzip.NewWriter(w)
	zw.Write(body.Bytes())
	zw.Close()
}

// AcceptsGzip reports whether Accept-Encoding names gzip without refusing it by
// q=0 (RFC 9110, 12.5.3). "*" does not name it.
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
