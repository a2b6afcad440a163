package main

// Recovery of logs that are cut, flipped, forged or mixed with records of other sites. Damage of a
// log costs only samples whose records it touches, never samples of another site. A log that was
// recovered once is found undamaged at the next start.

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// damageKit has the log of site a with four pushes, the records of that log, and the undamaged log
// of site b.
type damageKit struct {
	path    string // path of the log of site a
	data    []byte // content of the log of site a
	other   string // path of the log of site b
	intact  []byte // content of the log of site b
	records []damageRecord
	points  []point // the samples that were pushed for site a
}

// damageRecord is a record in the log of site a: the bytes data[from:to] of the log.
type damageRecord struct {
	from, to int
	kind     byte
	lines    []string     // lines of a series record
	samples  []heldSample // samples of a batch
}

func newDamageKit(t *testing.T) *damageKit {
	t.Helper()
	fsys := newStoreFS(1)
	k := newStoreKit(t, fsys)
	s := k.open()
	d := &damageKit{path: s.logPathOf("a"), other: s.logPathOf("b")}
	for i := range 4 {
		var points []point
		for n := range 2 + i { // each push has a new series, and so a series record
			points = append(points, point{"m", n, k.clock.ms(60 * (4 - i)), float64(10*i + n)})
		}
		if i == 2 {
			points = append(points, point{"m", 0, k.clock.ms(7000), 5}) // the batch then has two samples of series 0
		}
		k.push(s, "a", points...)
		d.points = append(d.points, points...)
	}
	k.push(s, "b", point{"m", 1, k.clock.ms(60), 1})
	d.data, _ = fsys.ReadFile(d.path)
	d.intact, _ = fsys.ReadFile(d.other)
	d.readRecords(t)
	return d
}

func (d *damageKit) readRecords(t *testing.T) {
	t.Helper()
	var lines []string
	for at := parseLogHeader(d.data).size; at < len(d.data); {
		r := damageRecord{from: at, to: at + 12 + int(binary.LittleEndian.Uint32(d.data[at:])), kind: d.data[at+12]}
		payload := d.data[at+13 : r.to]
		if r.kind == RecordSeries {
			DecodeSeries(payload, func(_ uint32, line []byte) error {
				r.lines = append(r.lines, string(line))
				return nil
			})
			lines = append(lines, r.lines...)
		} else {
			b, err := DecodeBatch(payload)
			if err != nil {
				t.Fatal(err)
			}
			for i, id := range b.IDs {
				r.samples = append(r.samples, heldSample{lines[id], b.Time(i)})
			}
		}
		d.records = append(d.records, r)
		at = r.to
	}
	if len(d.records) != 8 {
		t.Fatalf("the log has %d records, want a series record and a batch for each of 4 pushes", len(d.records))
	}
}

// without returns the samples that are left of the log when some records are lost: the records for
// which the function lost returns true. A sample is left if its batch is left, and the series
// record with its line.
func (d *damageKit) without(lost func(r damageRecord) bool) map[heldSample]float64 {
	all := pushed("a", d.points...)
	want := map[heldSample]float64{}
	known := map[string]bool{}
	for _, r := range d.records {
		if lost(r) {
			continue
		}
		for _, line := range r.lines {
			known[line] = true
		}
		for _, s := range r.samples {
			if known[s.line] {
				want[s] = all[s]
			}
		}
	}
	return want
}

// check opens a store in which the log of site a has the content data. The store must hold the
// samples of want for site a and all samples of site b. It must count wantDamaged damaged logs, and
// keep a copy of a damaged log. Then it must accept a push, and after a crash open again without
// damage.
func (d *damageKit) check(t *testing.T, name string, data []byte, want map[heldSample]float64, wantDamaged int64) {
	t.Helper()
	fsys := newCrashFS(1, "/s", filepath.Dir(d.path), filepath.Dir(d.other))
	fsys.put(d.path, data)
	fsys.put(d.other, d.intact)
	putState(t, fsys)
	k := newStoreKit(t, fsys)
	s := k.open()
	allHeld(t, s)
	wantHeld(t, name, heldOf(t, s, "a"), want)
	if n := len(heldOf(t, s, "b")); n != 1 {
		t.Errorf("%s: site b has %d samples, want 1", name, n)
	}
	if got := s.Stats().DamagedLogs; got != wantDamaged || wantDamaged > 0 != (len(k.errors) > 0) {
		t.Errorf("%s: %d logs count as damaged, want %d; reported: %v", name, got, wantDamaged, k.errors)
	}
	if wantDamaged > 0 && !d.isKept(fsys, data) {
		t.Errorf("%s: no copy of the damaged log is kept: %v", name, fsys.names())
	}
	more := point{"m", 99, k.clock.ms(1), 42}
	k.push(s, "a", more)
	maps.Copy(want, pushed("a", more))
	fsys.crash()
	again := newStoreKit(t, fsys)
	s = again.open()
	allHeld(t, s)
	wantHeld(t, name+", after a push and a crash", heldOf(t, s, "a"), want)
	if n := s.Stats().DamagedLogs; n != 0 || len(again.errors) > 0 {
		t.Errorf("%s: the next start finds %d damaged logs and reports %v", name, n, again.errors)
	}
	if t.Failed() {
		t.FailNow()
	}
}

// isKept reports whether a copy of data, the damaged log of site a, is kept beside that log. The
// copy may lack a torn tail, because recovery cuts the tail before it sets aside a log without any
// batch.
func (d *damageKit) isKept(fsys *crashFS, data []byte) bool {
	return slices.ContainsFunc(fsys.names(), func(name string) bool {
		aside, _ := fsys.ReadFile(name)
		return name != d.path && strings.HasPrefix(name, d.path) && len(aside)+12 >= len(data)-d.records[1].to && bytes.HasPrefix(data, aside)
	})
}

// A log that is cut at any byte keeps the samples of all whole batches before the cut. It counts as
// damaged only if no batch is left.
func TestSweepStoreTruncations(t *testing.T) {
	sweep(t)
	d := newDamageKit(t)
	for cut := range len(d.data) + 1 {
		want := d.without(func(r damageRecord) bool { return r.to > cut })
		damaged := int64(0)
		if len(want) == 0 {
			damaged = 1
		}
		d.check(t, fmt.Sprintf("cut at %d", cut), d.data[:cut], want, damaged)
	}
}

// A changed byte costs at most the record that contains it. If that is a series record, the samples
// of the series in it are lost too.
func TestSweepStoreFlips(t *testing.T) {
	sweep(t)
	d := newDamageKit(t)
	for at := range d.data {
		for _, mask := range []byte{0x01, 0x80, 0xff} {
			data := bytes.Clone(d.data)
			data[at] ^= mask
			want := d.without(func(r damageRecord) bool { return r.from <= at && at < r.to })
			d.check(t, fmt.Sprintf("byte %d ^ %#x", at, mask), data, want, 1)
		}
	}
}

// seriesFrames returns a framed series record that assigns the ID to line. A site cannot smuggle
// such a record into its log in a label value: the length in the record's head has a zero byte, and
// label values with a zero byte are refused. But a failing disk can put any bytes anywhere.
func seriesFrames(id uint32, line string) []byte {
	return AppendRecord(nil, RecordSeries, EncodeSeriesPayload(nil, id, func(yield func([]byte) bool) { yield([]byte(line)) }))
}

// A store shows the samples in a log only as samples of the site that the file name of the log
// stands for. After damaged bytes, records of other sites and lines that are not in normal form count
// as damage too. The first start repairs the log.
func TestStoreLogWithForeignRecords(t *testing.T) {
	clock := newStoreClock()
	victim := storePush("victim", point{"up", 1, clock.ms(5), 666})
	batch := AppendRecord(nil, RecordBatch, EncodeBatchPayload(nil, &Batch{Seq: 9, AcceptedAt: clock.ms(0), T0: clock.ms(5), IDs: []uint32{7}, V: []float64{666}}))
	foreign := seriesFrames(7, string(victim.Line(victim.Samples[0])))

	fsys := newStoreFS(1)
	k := newStoreKit(t, fsys)
	s := k.open()
	k.push(s, "evil", point{"m", 1, k.clock.ms(60), 1})
	path := s.logPathOf("evil")
	data, _ := fsys.ReadFile(path)
	header := parseLogHeader(data).size
	own := heldOf(t, s, "evil")
	badHeader := bytes.Clone(data) // the header of the log is damaged
	badHeader[3] ^= 1
	badHead := bytes.Clone(data) // the head of the first record is damaged
	badHead[header] ^= 1

	cat := func(parts ...[]byte) []byte { return bytes.Join(parts, nil) }
	garbage := []byte("garbage")
	for _, test := range []struct {
		name string
		path string
		data []byte
		want map[heldSample]float64
	}{
		{"foreign series after its own", path, cat(data, garbage, foreign, batch), own},
		{"foreign series after its own, header damaged", path, cat(badHeader, foreign, batch), own},
		{"foreign series before its own, header damaged", path, cat(badHeader[:header], foreign, data[header:]), own},
		{"foreign series before its own", path, cat(data[:header], garbage, foreign, data[header:]), own},
		{"foreign series after its own damaged head", path, cat(badHead, foreign, batch), nil},
		{"foreign series only", path, cat(data[:header], garbage, foreign, batch), nil},
		{"file has the name of another site", s.logPathOf("victim"), data, nil},
		{"file has the name of another site, header damaged", s.logPathOf("victim"), badHeader, nil},
		{"file has the name of no site", "/s/ab/x.log", data, nil},
		{"unknown kind of record", path, cat(data, AppendRecord(nil, 77, []byte("x"))), own},
		{"line that is not in normal form", path, cat(data, garbage, seriesFrames(1, `up{n="1",_id="evil"}`)), own},
		{"line without a cluster ID", path, cat(data, garbage, seriesFrames(1, `up`)), own},
		{"all records twice", path, cat(data, data[header:]), own},
	} {
		t.Run(test.name, func(t *testing.T) {
			fsys := newCrashFS(1, "/s", filepath.Dir(test.path))
			fsys.put(test.path, test.data)
			k := newStoreKit(t, fsys)
			s := k.open()
			got := allHeld(t, s)
			for key := range got {
				if !strings.Contains(key.line, `_id="evil"`) {
					t.Errorf("the foreign sample %v is held", key)
				}
			}
			wantHeld(t, "after the start", got, test.want)
			for key := range shown(s, time.Hour) {
				if _, ok := got[key]; !ok {
					t.Errorf("%v is shown but not held", key)
				}
			}
			if n := s.Stats().DamagedLogs; n != 1 {
				t.Errorf("%d logs count as damaged, want 1", n)
			}
			k.push(s, "victim", point{"up", 1, k.clock.ms(1), 7})
			again := newStoreKit(t, fsys)
			s = again.open()
			wantHeld(t, "site victim after the next start", heldOf(t, s, "victim"), pushed("victim", point{"up", 1, k.clock.ms(1), 7}))
			if n := s.Stats().DamagedLogs; n != 0 {
				t.Errorf("the next start finds %d damaged logs: %v", n, again.errors)
			}
		})
	}
}

// A site can hide a forged batch record in the values of its samples. Recovery may find the forged
// record behind damage in the site's log. If the batch number of the forged record is too high to
// be real, it does not raise the batch numbers of other sites.
func TestForgedBatchNumber(t *testing.T) {
	for _, number := range []uint64{MaxSeq, maxBlock << blockBits, 3<<blockBits + 1} {
		fsys := newStoreFS(1)
		k := newStoreKit(t, fsys)
		s := k.open()
		points := []point{{"m", 0, k.clock.ms(0), 1}}
		k.push(s, "a", points...)
		path := s.logPathOf("a")
		data, err := fsys.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		forged := &Batch{Seq: number, AcceptedAt: k.clock.ms(0), T0: k.clock.ms(1), IDs: []uint32{0}, V: []float64{2}}
		fsys.put(path, AppendRecord(append(data, bytes.Repeat([]byte{7}, 20)...), RecordBatch, EncodeBatchPayload(nil, forged)))
		k.clock.Add(time.Second)
		s = k.open()
		k.push(s, "b", points...)
		k.clock.Add(time.Second)
		k.push(s, "a", point{"m", 0, k.clock.ms(0), 3})
		if n := s.totals.NewestSeq.Load(); n > 3<<blockBits {
			t.Errorf("forged number %d: the newest batch has number %d", number, n)
		}
		want := pushed("a", points[0], point{"m", 0, k.clock.ms(0), 3})
		maps.Copy(want, pushed("b", points...))
		wantHeld(t, fmt.Sprint("forged number ", number), allHeld(t, s), want)
		wantHeld(t, fmt.Sprint("forged number ", number, ", after a restart"), allHeld(t, k.open()), want)
	}
}

// wantOnlySiteA fails the test if s knows a site other than a. It also fails the test if s shows a
// sample whose line is not in normal form or belongs to another site.
func wantOnlySiteA(t *testing.T, s *Store) {
	t.Helper()
	for id := range s.sites {
		if id != "a" {
			t.Errorf("site %q is known", id)
		}
	}
	var parser SeriesParser
	for key := range shown(s, time.Hour) {
		_, labels, err := parser.ParseCanonicalLine([]byte(key.line))
		i := slices.IndexFunc(labels, func(l Label) bool { return string(l.Name) == ClusterLabel })
		if err != nil || i < 0 || string(labels[i].Value) != "a" {
			t.Errorf("the line %q is shown: %v", key.line, err)
		}
	}
}

// A store opens with any bytes in a log. It shows only samples of the log's site, accepts a push,
// and finds no damage at the next start.
func FuzzStoreLog(f *testing.F) {
	series := func(id uint32, lines ...string) []byte {
		return EncodeSeriesPayload(nil, id, func(yield func([]byte) bool) {
			for _, l := range lines {
				yield([]byte(l))
			}
		})
	}
	now := newStoreClock().ms(0)
	batch := EncodeBatchPayload(nil, &Batch{Seq: 1, AcceptedAt: now, T0: now, IDs: []uint32{0, 1}, V: []float64{1, 2}})
	f.Add([]byte{}, true)
	f.Add(bytes.Join([][]byte{
		AppendRecord(nil, RecordSeries, series(0, `m{_id="a"}`, `n{_id="a"}`)), AppendRecord(nil, RecordBatch, batch),
	}, nil), true)
	f.Add(bytes.Join([][]byte{
		AppendRecord(nil, RecordSeries, series(1<<20, `m{_id="a"}`)), AppendRecord(nil, RecordBatch, batch),
		AppendRecord(nil, RecordSeries, series(0, `m{_id="b"}`)), []byte("garbage"), AppendRecord(nil, RecordBatch, batch),
	}, nil), false)
	f.Fuzz(func(t *testing.T, records []byte, header bool) {
		// The fuzzer cannot guess valid checksums. So the bytes are tried in two forms: unchanged,
		// and as a list of kinds, lengths and payloads. Each payload of the list becomes a record
		// in framed, with a valid checksum.
		framed := bytes.Clone(records[:0])
		for rest := records; len(rest) > 2; {
			n := min(int(rest[1]), len(rest)-2)
			framed = AppendRecord(framed, 1+rest[0]%2, rest[2:2+n])
			rest = rest[2+n:]
		}
		for _, data := range [][]byte{records, framed} {
			if header { // the damaged bytes after the header make recovery check the lines
				data = append(append(appendLogHeader(nil, []byte("a")), "garbage"...), data...)
			}
			path := (&Store{cfg: StoreConfig{Dir: "/s"}}).logPathOf("a")
			fsys := newCrashFS(1, "/s", filepath.Dir(path))
			fsys.put(path, data)
			k := newStoreKit(t, fsys)
			s := k.open()
			allHeld(t, s)
			wantOnlySiteA(t, s)
			before := heldOf(t, s, "a")
			if res, err := k.tryPush(s, "a", point{"fuzz", 1, k.clock.ms(1), 3}); err != nil || res.Accepted+res.Duplicates+res.Conflicts != 1 {
				t.Fatalf("a push after the start: %+v, %v", res, err)
			}
			after := allHeld(t, s)
			for key := range before {
				if _, ok := after[key]; !ok {
					t.Errorf("the push lost %v", key)
				}
			}
			s = k.open()
			wantOnlySiteA(t, s)
			wantHeld(t, "after the next start", allHeld(t, s), after)
			if n := s.Stats().DamagedLogs; n > 0 {
				t.Errorf("the next start finds %d damaged logs: %v", n, k.errors)
			}
		}
	})
}
