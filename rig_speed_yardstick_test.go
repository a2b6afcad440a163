package main

// The yardsticks of TestSpeed: small servers. They do less than a server must: they check nothing and
// ignore times. Their figures are bounds that no server reaches. Each is a process of its own,
// so that its CPU time can be read. An upload yardstick reads a push, scans it with a seeded hash of
// each series, and appends one record with a checksum to the site's file. The scrape yardstick
// writes a stored answer, with all numbers formatted anew.

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/maphash"
	"io"
	"math"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// asYardstick is an environment variable. If it is set, the test binary runs runYardstick instead of
// the tests.
const asYardstick = "TELEMETER_TEST_AS_YARDSTICK"

// Kinds of yardsticks.
const (
	yardstickWrite = "write" // appends a record without a sync
	yardstickSync  = "sync"  // syncs the file after each record
	yardstickServe = "serve" // writes a stored answer of /federate

	loopScraper = "scraper" // no yardstick: scrapes a server back to back when it is asked to
)

// runYardstick serves the yardstick that args name until stdin ends: its kind, and then the
// directory of the sites' files or the file with the stored answer. It prints its address like a
// server, so that both can be started in the same way. GET /metrics answers with its CPU time.
func runYardstick(args []string, stdin io.Reader, stdout io.Writer) int {
	go func() {
		io.Copy(io.Discard, stdin)
		os.Exit(exitOK)
	}()
	mux := http.NewServeMux()
	mux.HandleFunc("GET /metrics", func(w http.ResponseWriter, _ *http.Request) {
		var u syscall.Rusage
		syscall.Getrusage(syscall.RUSAGE_SELF, &u)
		fmt.Fprintf(w, "process_cpu_seconds_total %f\n", time.Duration(u.Utime.Nano()+u.Stime.Nano()).Seconds())
	})
	switch kind := args[0]; kind {
	case loopScraper:
		mux.HandleFunc("POST /scrape", handleLoop)
	case yardstickServe:
		answer, err := os.ReadFile(args[1])
		if err != nil {
			fmt.Fprintln(stdout, err)
			return exitFailure
		}
		mux.Handle("GET /federate", newStoredAnswer(string(answer)))
	default:
		mux.Handle("POST /upload", &uploadYardstick{dir: args[1], sync: kind == yardstickSync, seed: maphash.MakeSeed(), sites: map[string]*yardstickSite{}})
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		fmt.Fprintln(stdout, err)
		return exitFailure
	}
	fmt.Fprintf(stdout, "msg=serving external=%s internal=%[1]s\n", ln.Addr())
	fmt.Fprintln(stdout, http.Serve(ln, mux))
	return exitFailure
}

// handleLoop scrapes the URL in the parameter url back to back for the time in the parameter for. It
// answers with the number of scrapes, or with an error if one fails. The scraper is a process of its own,
// because a program that reads all the time delays the other goroutines of its process.
func handleLoop(w http.ResponseWriter, r *http.Request) {
	lasts, err := time.ParseDuration(r.FormValue("for"))
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	client := &http.Client{Transport: &http.Transport{DisableCompression: true}}
	defer client.CloseIdleConnections()
	n := 0
	for begin := time.Now(); time.Since(begin) < lasts; n++ {
		if !readsAnswer(client, r.FormValue("url")) {
			http.Error(w, "a scrape failed", http.StatusInternalServerError)
			return
		}
	}
	fmt.Fprintln(w, n)
}

// uploadYardstick handles pushes. It knows a site by the header Authorization.
type uploadYardstick struct {
	dir  string
	sync bool
	seed maphash.Seed
	pool sync.Pool // of *yardstickPush

	mu    sync.RWMutex // guards sites
	sites map[string]*yardstickSite
}

// yardstickSite has the series of a site in the order of the last push, and its file.
type yardstickSite struct {
	mu    sync.Mutex // guards the fields below
	file  *os.File
	ids   map[uint64]uint32 // hash of a series → its ID
	order []uint64          // hashes by ID
}

// yardstickPush has the memory of one push.
type yardstickPush struct {
	body, record []byte
	hashes       []uint64
	values       []float64
	decompressor Decompressor
}

func (y *uploadYardstick) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	p, _ := y.pool.Get().(*yardstickPush)
	if p == nil {
		p = &yardstickPush{}
	}
	defer y.pool.Put(p)
	var err error
	if p.body, err = ReadAllInto(p.body, r.Body); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	plain, _, err := p.decompressor.Decompress(p.body, r.Header.Get("Content-Encoding"), 64<<20)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	p.hashes, p.values = p.hashes[:0], p.values[:0]
	if strings.HasPrefix(r.Header.Get("Content-Type"), "text/") {
		p.scanText(y.seed, plain)
	} else {
		p.scanProto(y.seed, plain)
	}
	if err := y.site(r.Header.Get("Authorization")).append(p, y.sync); err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	fmt.Fprintf(w, `{"accepted":%d}`, len(p.values))
}

// site returns the site with the given name, and creates its file if it is new.
func (y *uploadYardstick) site(name string) *yardstickSite {
	y.mu.RLock()
	s := y.sites[name]
	y.mu.RUnlock()
	if s != nil {
		return s
	}
	y.mu.Lock()
	defer y.mu.Unlock()
	if s = y.sites[name]; s == nil {
		s = &yardstickSite{ids: map[uint64]uint32{}}
		y.sites[strings.Clone(name)] = s
		s.file, _ = os.OpenFile(filepath.Join(y.dir, strconv.Itoa(len(y.sites))), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600) // append reports the failure
	}
	return s
}

// scanText scans lines of text: the series up to the last brace, a value and a time.
func (p *yardstickPush) scanText(seed maphash.Seed, text []byte) {
	for len(text) > 0 {
		line, rest, _ := bytes.Cut(text, []byte("\n"))
		end := bytes.LastIndexByte(line, '}') + 1
		value, _, _ := bytes.Cut(bytes.TrimLeft(line[end:], " "), []byte(" "))
		v, _ := strconv.ParseFloat(string(value), 64)
		p.hashes = append(p.hashes, maphash.Bytes(seed, line[:end]))
		p.values = append(p.values, v)
		text = rest
	}
}

// scanProto scans delimited MetricFamily messages. A series is the bytes of the family's name and of
// the metric's labels.
func (p *yardstickPush) scanProto(seed maphash.Seed, messages []byte) {
	for r := NewWireReader(messages); r.Len() > 0 && r.Err() == nil; {
		family := NewWireReader(r.Bytes(int(r.Uvarint(math.MaxInt32))))
		var name uint64
		for family.Len() > 0 && family.Err() == nil {
			switch tag := family.Byte(); {
			case tag&7 != 2:
				family.Uvarint(math.MaxUint64)
			case tag>>3 == 1:
				name = maphash.Bytes(seed, family.Bytes(int(family.Uvarint(math.MaxInt32))))
			case tag>>3 == 4:
				p.scanMetric(seed, name, family.Bytes(int(family.Uvarint(math.MaxInt32))))
			default:
				family.Bytes(int(family.Uvarint(math.MaxInt32)))
			}
		}
	}
}

// scanMetric scans one Metric message as the load generator writes it: the labels come first, and every
// size is below 128. name is the hash of its family's name.
func (p *yardstickPush) scanMetric(seed maphash.Seed, name uint64, metric []byte) {
	labels, value := 0, 0.0
	for i := 0; i+1 < len(metric); {
		tag, size := metric[i], int(metric[i+1])
		i += 2
		switch {
		case tag&7 == 0:
			for i--; i < len(metric) && metric[i] >= 0x80; {
				i++
			}
			i++
			continue
		case tag == 1<<3|2:
			labels = i + size
		case size >= 9 && i+9 <= len(metric):
			value = math.Float64frombits(binary.LittleEndian.Uint64(metric[i+1:]))
		}
		i += size
	}
	p.hashes = append(p.hashes, maphash.Bytes(seed, metric[:labels])^name*0x9e3779b97f4a7c15)
	p.values = append(p.values, value)
}

// append finds the series of p and appends a record with its values to the site's file.
func (s *yardstickSite) append(p *yardstickPush, flush bool) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, h := range p.hashes {
		if i < len(s.order) && s.order[i] == h {
			continue
		}
		if _, known := s.ids[h]; !known {
			s.ids[h] = uint32(len(s.order))
			s.order = append(s.order, h)
		}
	}
	p.record = append(p.record[:0], 0, 0, 0, 0, 0, 0, 0, 0)
	for _, v := range p.values {
		p.record = binary.LittleEndian.AppendUint64(p.record, math.Float64bits(v))
	}
	binary.LittleEndian.PutUint32(p.record, uint32(len(p.record)))
	binary.LittleEndian.PutUint32(p.record[4:], Checksum(p.record[8:]))
	_, err := s.file.Write(p.record)
	if err == nil && flush {
		err = s.file.Sync()
	}
	return err
}

// storedAnswer serves an answer of /federate from memory.
type storedAnswer struct {
	text    string
	samples []storedSample
	tail    int // text[tail:] has the lines after the last sample
}

// storedSample is a line with a value and a time. text[begin:end] has its series, and before it the
// lines that are no such samples: comments and samples without a time.
type storedSample struct {
	begin, end int
	value      float64
	ms         int64
}

// newStoredAnswer parses the lines of text.
func newStoredAnswer(text string) *storedAnswer {
	a := &storedAnswer{text: text}
	at := 0
	for line := range strings.Lines(text) {
		end := strings.LastIndexByte(line, '}') + 1
		begin := at
		at += len(line)
		if fields := strings.Fields(line[end:]); line[0] != '#' && end > 0 && len(fields) == 2 {
			v, _ := strconv.ParseFloat(fields[0], 64)
			ms, _ := strconv.ParseInt(fields[1], 10, 64)
			a.samples = append(a.samples, storedSample{a.tail, begin + end, v, ms})
			a.tail = at
		}
	}
	return a
}

func (a *storedAnswer) ServeHTTP(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "text/plain; version=0.0.4")
	b := make([]byte, 0, 65<<10)
	for _, s := range a.samples {
		b = append(append(b, a.text[s.begin:s.end]...), ' ')
		if i := int64(s.value); float64(i) == s.value && i > -1e15 && i < 1e15 {
			b = strconv.AppendInt(b, i, 10)
		} else {
			b = strconv.AppendFloat(b, s.value, 'g', -1, 64)
		}
		b = append(strconv.AppendInt(append(b, ' '), s.ms, 10), '\n')
		if len(b) > 63<<10 {
			if _, err := w.Write(b); err != nil {
				return
			}
			b = b[:0]
		}
	}
	w.Write(append(b, a.text[a.tail:]...))
}
