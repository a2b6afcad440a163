package main

// The process's own counters, gauges and histograms, and their exposition through expfmt. A
// Prometheus accepts the output, whatever callers do: no duplicate series, no invalid UTF-8,
// counters never fall. Memory is bounded by maxChildren series per family and maxValueLen
// bytes per label value. This family must not know the meaning of any metric.

import (
	"bytes"
	"cmp"
	"compress/gzip"
	"fmt"
	"io"
	"maps"
	"math"
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
	maxLabels   = 4    // per family: label values are an array key, so that finding a child allocates nothing
	maxChildren = 1000 // per family; what comes after them counts under "other", one more
	maxValueLen = 128  // bytes of a label value; longer ones are cut
)

// Stricter than Prometheus is: its naming guide asks for snake_case.
var (
	metricName    = regexp.MustCompile(`^[a-z][a-z0-9_]*$`)
	componentName = regexp.MustCompile(`_(bucket|count|sum|created)$`)
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
	mu       sync.Mutex // guards the slices
	families []*family  // sorted by name
	hooks    []func()
}

type labelKey [maxLabels]string

// family is what the three kinds share; child is one series of it, or one
// histogram.
type family struct {
	name, help string
	kind       dto.MetricType
	labels     []string
	buckets    []float64 // upper bounds without +Inf, ascending

	mu       sync.RWMutex // guards children, not what a child holds
	children map[labelKey]*child
}

type child struct {
	value  atomic.Uint64   // float bits: counter, gauge, or a histogram's sum
	counts []atomic.Uint64 // observations per bucket, not cumulative; the last is +Inf
}

// Counter is a total that only grows.
type Counter struct{ family }

// Gauge is a value that goes up and down.
type Gauge struct{ family }

// Histogram counts observations in buckets.
type Histogram struct{ family }

// NewMetrics returns an empty registry.
func NewMetrics() *Metrics { return &Metrics{} }

// Counter registers a counter; its name ends in _total. Without labels it is
// exposed as 0 from the start; a labelled series is, after Add(0, values...).
func (m *Metrics) Counter(name, help string, labelNames ...string) *Counter {
	c := &Counter{}
	m.register(&c.family, name, help, dto.MetricType_COUNTER, nil, labelNames)
	return c
}

// Gauge registers a gauge, exposed as Counter's series are.
func (m *Metrics) Gauge(name, help string, labelNames ...string) *Gauge {
	g := &Gauge{}
	m.register(&g.family, name, help, dto.MetricType_GAUGE, nil, labelNames)
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
	m.register(&h.family, name, help, dto.MetricType_HISTOGRAM, slices.Clone(buckets), labelNames)
	return h
}

func (m *Metrics) register(f *family, name, help string, kind dto.MetricType, buckets []float64, labels []string) {
	f.name, f.help, f.kind, f.buckets = name, help, kind, buckets
	f.labels, f.children = slices.Clone(labels), map[labelKey]*child{}
	if !metricName.MatchString(name) || help == "" {
		panic(fmt.Sprintf("metric %q: invalid name, or no help", name))
	}
	if strings.HasSuffix(name, "_total") != (kind == dto.MetricType_COUNTER) {
		panic(fmt.Sprintf("metric %s: counters, and only they, end in _total", name))
	}
	if componentName.MatchString(name) {
		panic(fmt.Sprintf("metric %s: the suffix is kept for component lines", name))
	}
	for i, l := range labels {
		if i == maxLabels || !metricName.MatchString(l) || l == "le" || slices.Contains(labels[:i], l) {
			panic(fmt.Sprintf("metric %s: label %q is invalid, repeated or one too many", name, l))
		}
	}
	if len(labels) == 0 {
		f.child(nil)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	i, taken := slices.BinarySearchFunc(m.families, name, func(f *family, name string) int { return cmp.Compare(f.name, name) })
	if taken {
		panic(fmt.Sprintf("metric %s: registered twice", name))
	}
	m.families = slices.Insert(m.families, i, f)
}

// child finds or makes the series with these label values. The values are not
// printed by the panic: they would escape, and each call would allocate.
func (f *family) child(values []string) *child {
	if len(values) != len(f.labels) {
		panic(fmt.Sprintf("metric %s: %d label values for %d labels", f.name, len(values), len(f.labels)))
	}
	var key labelKey
	copy(key[:], values)
	f.mu.RLock()
	c := f.children[key]
	f.mu.RUnlock()
	if c == nil {
		c = f.create(key)
	}
	return c
}

func (f *family) create(key labelKey) *child {
	for i, v := range key {
		// Cloned: a short value must not keep alive the long text it was cut from.
		key[i] = strings.Clone(strings.ToValidUTF8(v[:min(len(v), maxValueLen)], "\uFFFD"))
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.children[key] == nil && len(f.children) >= maxChildren {
		for i := range f.labels {
			key[i] = "other"
		}
	}
	// Looked up again: two values may have become one by cutting or folding.
	c := f.children[key]
	if c == nil {
		c = &child{}
		if f.kind == dto.MetricType_HISTOGRAM {
			c.counts = make([]atomic.Uint64, len(f.buckets)+1)
		}
		f.children[key] = c
	}
	return c
}

func (c *child) load() float64 { return math.Float64frombits(c.value.Load()) }

func (c *child) add(v float64) {
	for {
		old := c.value.Load()
		if c.value.CompareAndSwap(old, math.Float64bits(math.Float64frombits(old)+v)) {
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
	child := c.child(labelValues)
	if v > 0 && !math.IsInf(v, 1) {
		child.add(v)
	}
}

// SetTotal raises the series to v, a total kept elsewhere (as in the Stats() of
// another room); a lower v, or one Add would ignore, changes nothing.
func (c *Counter) SetTotal(v float64, labelValues ...string) {
	child := c.child(labelValues)
	for {
		old := child.value.Load()
		if !(v > math.Float64frombits(old)) || math.IsInf(v, 1) || child.value.CompareAndSwap(old, math.Float64bits(v)) {
			return
		}
	}
}

// Value returns what the series stands at: 0 if there is none, and then none is
// made.
func (c *Counter) Value(labelValues ...string) float64 {
	var key labelKey
	copy(key[:], labelValues)
	c.mu.RLock()
	defer c.mu.RUnlock()
	if child := c.children[key]; child != nil {
		return child.load()
	}
	return 0
}

// Set sets the series with these label values to v.
func (g *Gauge) Set(v float64, labelValues ...string) {
	g.child(labelValues).value.Store(math.Float64bits(v))
}

// Replace replaces all series of the gauge by those that fill sets.
func (g *Gauge) Replace(fill func(set func(v float64, labelValues ...string))) {
	next := Gauge{family{name: g.name, kind: g.kind, labels: g.labels, children: map[labelKey]*child{}}}
	fill(next.Set)
	g.mu.Lock()
	defer g.mu.Unlock()
	g.children = next.children
}

// Add adds v, which may be negative, to the series with these label values.
func (g *Gauge) Add(v float64, labelValues ...string) { g.child(labelValues).add(v) }

// Observe counts v. NaN is ignored: the sum would stay NaN for ever.
func (h *Histogram) Observe(v float64, labelValues ...string) {
	child := h.child(labelValues)
	if math.IsNaN(v) {
		return
	}
	child.counts[sort.SearchFloat64s(h.buckets, v)].Add(1)
	child.add(v)
}

// OnCollect has f called before each exposition, to refresh gauges and totals.
// Expositions may overlap, so f must be safe for concurrent use; it runs without
// any lock of the registry.
func (m *Metrics) OnCollect(f func()) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.hooks = append(m.hooks, f)
}

// gather returns the families that have series, by name, their series by label
// values.
func (m *Metrics) gather() []*dto.MetricFamily {
	m.mu.Lock()
	hooks, families := slices.Clone(m.hooks), slices.Clone(m.families)
	m.mu.Unlock()
	for _, hook := range hooks {
		hook()
	}
	var out []*dto.MetricFamily
	for _, f := range families {
		if mf := f.collect(); len(mf.Metric) > 0 { // expfmt refuses a family without any
			out = append(out, mf)
		}
	}
	return out
}

func (f *family) collect() *dto.MetricFamily {
	f.mu.RLock()
	children := maps.Clone(f.children)
	f.mu.RUnlock()
	keys := slices.SortedFunc(maps.Keys(children), func(a, b labelKey) int { return slices.Compare(a[:], b[:]) })

	mf := &dto.MetricFamily{Name: &f.name, Help: &f.help, Type: &f.kind}
	for _, key := range keys {
		c, out := children[key], &dto.Metric{}
		for i := range f.labels {
			out.Label = append(out.Label, &dto.LabelPair{Name: &f.labels[i], Value: new(key[i])})
		}
		switch f.kind {
		case dto.MetricType_COUNTER:
			out.Counter = &dto.Counter{Value: new(c.load())}
		case dto.MetricType_GAUGE:
			out.Gauge = &dto.Gauge{Value: new(c.load())}
		case dto.MetricType_HISTOGRAM:
			// The count is the sum of the buckets as read, never a number of its own
			// that could disagree with them; only the sum may be a moment ahead.
			h, n := &dto.Histogram{}, uint64(0)
			for i := range f.buckets {
				n += c.counts[i].Load()
				h.Bucket = append(h.Bucket, &dto.Bucket{UpperBound: &f.buckets[i], CumulativeCount: new(n)})
			}
			n += c.counts[len(f.buckets)].Load()
			h.SampleCount, h.SampleSum = &n, new(c.load())
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

// WriteText writes all metrics in the text format 0.0.4.
func (m *Metrics) WriteText(w io.Writer) error {
	return m.write(w, expfmt.NewFormat(expfmt.TypeTextPlain))
}

// ServeHTTP answers with all metrics in the format the scraper likes best of
// delimited protobuf, OpenMetrics and text, compressed if it takes gzip. The
// whole body is rendered first (its size is bounded), so that a scrape is never
// half an answer with status 200.
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

// AcceptsGzip tells whether Accept-Encoding names gzip without refusing it by
// q=0 (RFC 9110, 12.5.3). "*" is not taken for a yes.
func AcceptsGzip(h http.Header) bool {
	for enc := range strings.SplitSeq(strings.Join(h.Values("Accept-Encoding"), ","), ",") {
		name, param, _ := strings.Cut(enc, ";")
		if strings.EqualFold(strings.TrimSpace(name), "gzip") {
			weight, ok := strings.CutPrefix(strings.ReplaceAll(strings.ToLower(param), " ", ""), "q=")
			q, err := strconv.ParseFloat(weight, 64)
			return !ok || err == nil && q > 0
		}
	}
	return false
}
