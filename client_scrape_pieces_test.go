package main

// Tests of the pieces of a scrape, and of the memory that a scrape needs.

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"runtime"
	"strings"
	"testing"
)

// The pieces of a scrape have all its samples in their order, with shifted times, and each piece is
// within the limits of a push. Only a sample that alone exceeds the limits is dropped.
func TestPieceWriter(t *testing.T) {
	for seed := range testSeeds(t, 25) {
		rng := rand.New(rand.NewPCG(seed, 0))
		limit := int64(60) << rng.IntN(11)
		piece := Scrape{At: Moment{1, 2, "boot-1"}, SourceTime: 3, Shift: rng.Int64N(100_000), Corrected: true}
		w := newPieceWriter(piece, limit)
		var want []byte
		tooLarge := 0
		for i := range rng.IntN(int(min(2000, 20+limit/20))) {
			value := make([]byte, rng.IntN(1+rng.IntN(300)))
			if rng.IntN(2) > 0 { // a value that cannot be compressed well
				for k := range value {
					value[k] = 'A' + byte(rng.IntN(58))
				}
				value = bytes.ReplaceAll(value, []byte(`\`), []byte("x"))
			} else {
				value = bytes.Repeat([]byte("x"), len(value))
			}
			line := fmt.Appendf(nil, "m%d{l=\"%s\"}", i, value)
			sample := AppendSample(nil, line, int64(i)+piece.Shift, 1.5)
			w.add(line, int64(i), 1.5)
			if int64(len(sample))+50 > limit && int64(len(Gzip(sample))) > limit || int64(len(sample)) > MaxDecodedFactor*limit {
				tooLarge++
			} else {
				want = append(want, sample...)
			}
		}
		var got []byte
		pieces, err := w.finish()
		if err != nil || len(pieces) == 0 {
			t.Fatalf("seed %d: got %d pieces and the error %v, want at least one piece", seed, len(pieces), err)
		}
		for _, sc := range pieces {
			text := gunzipped(t, sc.Gzip)
			got = append(got, text...)
			if int64(len(sc.Gzip)) > limit || int64(len(text)) > MaxDecodedFactor*limit {
				t.Errorf("seed %d: a piece has %d bytes, %d as text, limit %d", seed, len(sc.Gzip), len(text), limit)
			}
			if len(text) != sc.Size || bytes.Count(text, []byte("\n")) != sc.Samples || sc.Samples == 0 && len(want) > 0 {
				t.Errorf("seed %d: a piece states %d samples in %d bytes, but has %d in %d", seed, sc.Samples, sc.Size, bytes.Count(text, []byte("\n")), len(text))
			}
			if sc.At != piece.At || sc.SourceTime != 3 || sc.Shift != piece.Shift || !sc.Corrected {
				t.Errorf("seed %d: the piece %+v does not have the clocks of the scrape", seed, sc)
			}
		}
		if !bytes.Equal(got, want) || w.tooLarge != tooLarge {
			t.Fatalf("seed %d, limit %d: the pieces have %d bytes of text and %d samples were dropped, want %d bytes and %d dropped", seed, limit, len(got), w.tooLarge, len(want), tooLarge)
		}
	}
}

// A scrape has few pieces: none is small because of the limits, except the last one.
func TestPieceWriterFillsPieces(t *testing.T) {
	for name, random := range map[string]bool{"compressible": false, "random": true} {
		rng := rand.New(rand.NewPCG(1, 1))
		const limit = 256 << 10
		w := newPieceWriter(Scrape{}, limit)
		for i := range 100_000 {
			value := i % 100
			if random {
				value = rng.Int()
			}
			w.add(fmt.Appendf(nil, "metric_with_a_name{label=\"%d\",instance=\"host:9100\"}", value), 1_700_000_000_000, 1)
		}
		pieces, err := w.finish()
		if err != nil {
			t.Fatal(err)
		}
		for _, sc := range pieces[:len(pieces)-1] {
			if sc.Size < MaxDecodedFactor*limit*9/10 && len(sc.Gzip) < limit*8/10 {
				t.Errorf("%s: a piece has %d bytes, %d as text, want nearly the limit", name, len(sc.Gzip), sc.Size)
			}
		}
	}
}

// A scrape without samples, or whose samples are all too large, has one empty piece, so that the servers
// see that the site is there.
func TestPieceWriterWithoutSamples(t *testing.T) {
	for tooLarge := range 3 {
		w := newPieceWriter(Scrape{}, 60)
		for range tooLarge {
			w.add(fmt.Appendf(nil, "m{l=%q}", strings.Repeat("x", 1000)), 1, 1)
		}
		pieces, err := w.finish()
		if err != nil || len(pieces) != 1 || pieces[0].Samples != 0 || len(gunzipped(t, pieces[0].Gzip)) != 0 || w.tooLarge != tooLarge {
			t.Errorf("%d samples that are too large: got %+v and the error %v, want one empty piece", tooLarge, pieces, err)
		}
	}
}

// A piece that cannot be halved or read again fails the scrape, because its samples would be missing.
func TestPieceWriterDamagedPiece(t *testing.T) {
	for samples, want := range map[int]string{1: "reading a piece", 2: "halving a piece"} {
		w := newPieceWriter(Scrape{}, 10)
		w.keep(Scrape{Samples: samples, Size: 1000, Gzip: []byte("not gzip, and too large")})
		if _, err := w.finish(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%d samples: got the error %v, want %q", samples, err, want)
		}
	}
}

// sourceFamily returns a family of 100 series of about 250 bytes each, as text or as delimited
// protobuf.
func sourceFamily(i int, f Format) []byte {
	name := fmt.Sprintf("site_component_requests_%d_total", i)
	var text []byte
	metrics := [][]byte{pbBytes(1, []byte(name)), pbVarint(3, 3)}
	for k := range 100 {
		app := []string{"api", "web", "db", "queue", "cache"}[k%5]
		labels := []string{"container", app + "-container", "endpoint", "https-metrics", "instance", fmt.Sprintf("10.128.0.%d:8443", k), "job", app + "-metrics-service",
			"namespace", "openshift-" + app + "-operators", "pod", fmt.Sprintf("%s-deployment-%x", app, ClusterIDHash(fmt.Sprint(app, k)))[:35], "service", app + "-metrics-svc"}
		v, at := float64(i*k)*1.25, int64(1_700_000_000_000)
		text = append(append(text, name...), '{')
		var metric [][]byte
		for l := 0; l < len(labels); l += 2 {
			text = fmt.Appendf(text, "%s=%q,", labels[l], labels[l+1])
			metric = append(metric, pbLabel(labels[l], labels[l+1]))
		}
		text = fmt.Appendf(text, "} %v %d\n", v, at)
		metrics = append(metrics, pbBytes(4, append(metric, pbBytes(5, pbFloat(1, v)), pbVarint(6, uint64(at)))...))
	}
	if f == FormatProto {
		return pbFrame(metrics...)
	}
	return text
}

// familySource is a source that makes its answer while it is read.
type familySource struct {
	format         Format
	families, made int
	rest           []byte                 // made, but not read yet
	size           int                    // bytes read
	onFamily       func(familiesMade int) // called before each family is made; may be nil
}

func (s *familySource) Read(p []byte) (int, error) {
	if len(s.rest) == 0 {
		if s.made == s.families {
			return 0, io.EOF
		}
		if s.onFamily != nil {
			s.onFamily(s.made)
		}
		s.rest = sourceFamily(s.made, s.format)
		s.made++
	}
	n := copy(p, s.rest)
	s.rest, s.size = s.rest[n:], s.size+n
	return n, nil
}

// contentTypes are the content types of sources by format.
var contentTypes = [...]string{FormatText: "text/plain; version=0.0.4", FormatOpenMetrics: omType, FormatProto: protoType}

// newFamilyClient returns a client whose source answers with the body that next returns.
func newFamilyClient(t testing.TB, format Format, next func() io.Reader, change func(*ClientReloadConfig)) *Client {
	c, _, _ := newTestClient(t, "", func(cfg *ClientConfig, st *ClientReloadConfig) {
		cfg.FromClient.Transport = roundTrip(func(*http.Request) (*http.Response, error) {
			resp := respond(200, http.Header{"Content-Type": {contentTypes[format]}}, "")
			resp.Body = io.NopCloser(next())
			return resp, nil
		})
		if change != nil {
			change(st)
		}
	})
	return c
}

// The memory that a scrape needs does not grow with its size, but only with its compressed size. Memory
// is measured after a garbage collection at each tenth of the answer.
func TestClientScrapeMemory(t *testing.T) {
	const families, mostMemory = 500, 4 << 20
	for _, format := range []Format{FormatText, FormatProto} {
		heap := func() uint64 {
			var m runtime.MemStats
			runtime.GC()
			runtime.ReadMemStats(&m)
			return m.HeapAlloc
		}
		source := &familySource{format: format, families: families}
		c := newFamilyClient(t, format, func() io.Reader { return source }, nil)
		before, most := heap(), uint64(0)
		source.onFamily = func(made int) {
			if made%(families/10) == 0 {
				most = max(most, heap())
			}
		}
		got, err := c.Scrape(t.Context())
		if err != nil || got.Samples != families*100 {
			t.Fatalf("format %d: got the error %v, want a scrape of %d samples", format, err, families*100)
		}
		compressed := 0
		for _, sc := range got.Pieces {
			compressed += len(sc.Gzip)
		}
		if source.size < 10<<20 || compressed > 2<<20 {
			t.Fatalf("format %d: the scrape has %d bytes, compressed %d; want more than 10 MiB and less than 2 MiB", format, source.size, compressed)
		}
		t.Logf("format %d: a scrape of %d bytes needs %d bytes of memory", format, source.size, int64(most)-int64(before))
		if used := int64(most) - int64(before); used > mostMemory {
			t.Errorf("format %d: a scrape of %d bytes needs %d bytes of memory, want at most %d", format, source.size, used, mostMemory)
		}
	}
}

// A scrape whose answer ends early fails as a whole, also if pieces of it are complete.
func TestClientTruncatedLargeScrape(t *testing.T) {
	for _, format := range []Format{FormatText, FormatProto} {
		var body bytes.Buffer
		io.Copy(&body, &familySource{format: format, families: 60})
		body.Truncate(body.Len() - 5)
		c := newFamilyClient(t, format, func() io.Reader { return bytes.NewReader(body.Bytes()) }, nil)
		c.cfg.LimitBytes = 16 << 10
		if err := c.scrapeAndSpool(t.Context()); err == nil || !strings.Contains(err.Error(), "truncated") {
			t.Errorf("format %d: got the error %v, want truncated", format, err)
		}
		if st := c.spool.Stats(); st.Scrapes > 0 {
			t.Errorf("format %d: the spool has %d pieces of a scrape that failed", format, st.Scrapes)
		}
	}
}

// BenchmarkClientScrape decodes, cleans, renders and compresses a scrape of 10,000 series.
func BenchmarkClientScrape(b *testing.B) {
	for _, bb := range []struct {
		name   string
		format Format
		change func(*ClientReloadConfig)
	}{
		{"text", FormatText, nil},
		{"protobuf", FormatProto, nil},
		{"anonymized", FormatText, func(st *ClientReloadConfig) {
			st.NewCleaner = func() *ClientCleaner {
				c := &ClientCleaner{Anonymize: []string{"instance", "pod", "namespace"}}
				c.SetSalt(bytes.Repeat([]byte("s"), 32))
				return c
			}
		}},
	} {
		b.Run(bb.name, func(b *testing.B) {
			var body bytes.Buffer
			io.Copy(&body, &familySource{format: bb.format, families: 100})
			c := newFamilyClient(b, bb.format, func() io.Reader { return bytes.NewReader(body.Bytes()) }, bb.change)
			b.SetBytes(int64(body.Len()))
			b.ReportAllocs()
			compressed := 0
			for b.Loop() {
				got, err := c.Scrape(b.Context())
				if err != nil || got.Samples != 10_000 {
					b.Fatalf("got the error %v, want 10,000 samples", err)
				}
				compressed = 0
				for _, sc := range got.Pieces {
					compressed += len(sc.Gzip)
				}
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/10_000, "ns/series")
			b.ReportMetric(float64(compressed), "gzip-bytes")
		})
	}
}
