package main

// Tests of recovery: logs that are truncated at every byte, logs with a flipped byte at every
// position, damaged regions, payloads made to deceive recovery, and copies of damaged files.

import (
	"bytes"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"slices"
	"strings"
	"testing"
	"time"
)

// A log that is cut at any byte after its header keeps all whole records, is not damaged, and can
// be appended to.
func TestLogTruncatedAnywhere(t *testing.T) {
	data, records, ends := sampleLog()
	for cut := range len(data) + 1 {
		c, l, r, got := recoverLog(t, data[:cut])
		whole, found := slices.BinarySearch(ends, cut)
		if !found {
			whole--
		}
		if r.Damaged != 0 || r.HeaderDamaged != (cut < ends[0]) {
			t.Fatalf("log cut at byte %d counts as damaged: %+v", cut, r)
		}
		if whole < 0 { // the cut is inside the header
			continue
		}
		if !slices.Equal(got, records[:whole]) || r.TornBytes != int64(cut-ends[whole]) || string(r.Identity) != "site-7" {
			t.Fatalf("log cut at byte %d: got records %v, want %v; %+v", cut, got, records[:whole], r)
		}
		if err := l.Append(logFrames(logRec{8, "next"}), true); err != nil {
			t.Fatalf("log cut at byte %d: appending to it: %v", cut, err)
		}
		c.crash()
		now, _ := c.ReadFile(logPath)
		if !bytes.Equal(now, slices.Concat(data[:ends[whole]], logFrames(logRec{8, "next"}))) || l.Size() != int64(len(now)) {
			t.Fatalf("log cut at byte %d and appended to: after a crash the file has %q", cut, now)
		}
	}
}

// A flipped byte costs at most the record that contains the byte, and a Rewrite mends the log. If
// the byte is in a record's head and the payload of this record is itself a record, recovery
// delivers the inner record in place of the outer record.
func TestSweepLogFlips(t *testing.T) {
	sweep(t)
	data, records, ends := sampleLog()
	for i := range data {
		hit, found := slices.BinarySearch(ends, i) // index of the record that has byte i
		if !found {
			hit-- // byte i is not the first byte of a record, so it is in the record before; -1 stands for the header
		}
		for _, mask := range []byte{1, 2, 4, 8, 16, 32, 64, 128, 0x55, 0xff, data[i]} { // xor with data[i] makes the byte 0
			if mask == 0 {
				continue
			}
			bad := bytes.Clone(data)
			bad[i] ^= mask
			c, l, r, got := recoverLog(t, bad)
			want := records
			if hit < 0 {
				if !r.HeaderDamaged || r.Damaged != 0 || r.Identity != nil || r.LostBytes != int64(ends[0]) {
					t.Fatalf("byte %d of the header xor %#x: %+v", i, mask, r)
				}
			} else {
				want = slices.Delete(slices.Clone(records), hit, hit+1)
				inHead := i < ends[hit]+recordHead
				if inHead && hit == 3 { // the payload of record 3 is itself a record
					want = slices.Insert(want, hit, logRec{9, "inner"})
				}
				if r.HeaderDamaged || r.Damaged != 1 || r.TornBytes != 0 {
					t.Fatalf("byte %d of record %d xor %#x: %+v", i, hit, mask, r)
				}
			}
			if !slices.Equal(got, want) {
				t.Fatalf("byte %d xor %#x: got records %v, want %v", i, mask, got, want)
			}
			if mask != 1 {
				continue
			}
			if err := l.Append(logFrames(logRec{1, ""}), true); !errors.Is(err, ErrLogBroken) {
				t.Fatalf("appending to a damaged log: got error %v, want ErrLogBroken", err)
			}
			l = NewLog(c, logPath, []byte("site-7"))
			if err := l.Rewrite(writing(logFrames(got...))); err != nil {
				t.Fatal(err)
			}
			c.crash()
			var again []logRec
			if _, r, err := OpenLog(c, logPath, collectLog(&again)); err != nil || r.Damaged != 0 || r.HeaderDamaged || !slices.Equal(again, want) {
				t.Fatalf("damaged log after a Rewrite and a crash: got records %v, want %v; %+v, %v", again, want, r, err)
			}
		}
	}
}

// Each kind of damage in the table costs only the records that are hit. Recovery counts the damaged
// regions and distinguishes damaged bytes from the torn bytes of an unfinished append.
func TestLogDamage(t *testing.T) {
	a, b, c, d := logRec{1, strings.Repeat("a", 50)}, logRec{2, strings.Repeat("b", 50)}, logRec{3, strings.Repeat("c", 50)}, logRec{4, strings.Repeat("d", 50)}
	const head, size = 8 + 4 + 4, recordHead + 1 + 50
	data := append(appendLogHeader(nil, nil), logFrames(a, b, c, d)...)
	zero := func(from, to int) func([]byte) []byte {
		return func(p []byte) []byte { clear(p[from:to]); return p }
	}
	for _, tt := range []struct {
		name    string
		change  func([]byte) []byte
		want    []logRec // the records that recovery delivers
		damaged int      // number of damaged regions
		lost    int      // number of bytes in damaged regions
		torn    int      // number of bytes of an unfinished append at the end
	}{
		{"intact", func(p []byte) []byte { return p }, []logRec{a, b, c, d}, 0, 0, 0},
		{"zeros over two heads", zero(head+size-20, head+2*size+5), []logRec{d}, 1, 3 * size, 0},
		{"zeros over one body", zero(head+size+recordHead, head+2*size), []logRec{a, c, d}, 1, size, 0},
		{"two regions", func(p []byte) []byte { p[head+20] ^= 1; p[head+2*size] ^= 1; return p }, []logRec{b, d}, 2, 2 * size, 0},
		{"two records in a row", func(p []byte) []byte { p[head+20] ^= 1; p[head+size] ^= 1; return p }, []logRec{c, d}, 1, 2 * size, 0},
		{"bytes missing", func(p []byte) []byte { return slices.Delete(p, head+size+30, head+size+40) }, []logRec{a, c, d}, 1, size - 10, 0},
		{"bytes inserted", func(p []byte) []byte { return slices.Insert(p, head+size, 1, 2, 3) }, []logRec{a, b, c, d}, 1, 3, 0},
		{"damaged and torn", func(p []byte) []byte { p[head] ^= 1; return p[:len(p)-1] }, []logRec{b, c}, 1, size, size - 1},
		{"damaged body before a torn record", func(p []byte) []byte { p[head+2*size+20] ^= 1; return p[:head+3*size+5] }, []logRec{a, b}, 1, size, 5},
		{"damaged body before zeros", func(p []byte) []byte { p[head+2*size+20] ^= 1; clear(p[head+3*size:]); return p }, []logRec{a, b}, 1, size, size},
		{"zeros at the end", func(p []byte) []byte { return append(p, make([]byte, 5000)...) }, []logRec{a, b, c, d}, 0, 0, 5000},
		{"last record never written", zero(head+3*size, len(data)), []logRec{a, b, c}, 0, 0, size},
		{"last record half written", zero(head+3*size+30, len(data)), []logRec{a, b, c}, 1, size, 0},
		{"garbage at the end", func(p []byte) []byte { return append(p, "not a record at all"...) }, []logRec{a, b, c, d}, 1, 19, 0},
		{"kind 0", func(p []byte) []byte {
			f := logFrames(logRec{1, "x"})
			f[recordHead] = 0
			binary.LittleEndian.PutUint32(f[4:], crc32.Checksum(f[recordHead:], castagnoli))
			binary.LittleEndian.PutUint32(f[8:], crc32.Checksum(f[:8], castagnoli))
			return slices.Insert(p, head, f...)
		}, []logRec{a, b, c, d}, 1, recordHead + 2, 0},
		{"a second header", func(p []byte) []byte { return append(appendLogHeader(nil, nil), p...) }, []logRec{a, b, c, d}, 1, head, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, _, r, got := recoverLog(t, tt.change(bytes.Clone(data)))
			if !slices.Equal(got, tt.want) || r.Damaged != tt.damaged || r.LostBytes != int64(tt.lost) || r.TornBytes != int64(tt.torn) {
				t.Errorf("got records %v, %+v; want %v, %d damaged regions, %d bytes lost, %d bytes torn", got, r, tt.want, tt.damaged, tt.lost, tt.torn)
			}
		})
	}
}

// A record that the caller refuses counts as damaged, and the file is copied aside.
func TestLogRefusedRecord(t *testing.T) {
	records := []logRec{{1, "a"}, {2, "b"}, {3, "c"}, {4, "d"}}
	c := newCrashFS(1, "/d")
	c.put(logPath, append(appendLogHeader(nil, nil), logFrames(records...)...))
	var got []byte
	_, r, err := OpenLog(c, logPath, func(kind byte, _ []byte) error {
		if kind == 2 {
			return errors.New("refused by the caller")
		}
		got = append(got, kind)
		return nil
	})
	refused := int64(len(logFrames(records[1])))
	if err != nil || !bytes.Equal(got, []byte{1, 3, 4}) || r.Damaged != 1 || r.Records != 3 || r.LostBytes != refused || r.CopyPath == "" {
		t.Errorf("got records of kinds %v, %+v, %v; want kinds 1, 3 and 4, and %d bytes lost", got, r, err, refused)
	}
}

// In a log without other damage, a payload that contains a forged record deceives recovery only if
// the head of the record with this payload is unreadable. Payloads come from clients, which may be
// hostile.
func TestLogForgedRecord(t *testing.T) {
	const header = 16 // bytes of the header of a log with an empty identity
	forged, after := logRec{9, "forged"}, logRec{2, "after"}
	evil := logRec{1, "xx" + string(logFrames(forged)) + "yy"}
	data := append(appendLogHeader(nil, nil), logFrames(evil, after)...)
	flip := func(i int) []byte {
		bad := bytes.Clone(data)
		bad[i] ^= 1
		return bad
	}
	torn := append(appendLogHeader(nil, nil), logFrames(evil)...)
	for _, tt := range []struct {
		name    string
		data    []byte
		want    []logRec
		damaged int
	}{
		{"the record is torn", torn[:len(torn)-1], nil, 0},
		{"the body is damaged", flip(header + recordHead + 1), []logRec{after}, 1},
		{"the head is damaged", flip(header), []logRec{forged, after}, 2},
	} {
		if _, _, r, got := recoverLog(t, tt.data); !slices.Equal(got, tt.want) || r.Damaged != tt.damaged {
			t.Errorf("%s: got records %v, %+v; want %v, %d damaged regions", tt.name, got, r, tt.want, tt.damaged)
		}
	}
}

// After a forged record, recovery does not trust the length in the next head, even if a real record
// begins at the end that this length claims. Otherwise recovery would skip the real records before
// that end.
func TestLogForgedHead(t *testing.T) {
	forged, end := logRec{9, "forged"}, logRec{4, "end"}
	span := logFrames(logRec{3, strings.Repeat("z", 100)})[:recordHead]
	evil := logRec{1, string(logFrames(forged)) + string(span)}
	between := logRec{2, strings.Repeat("t", 101-recordHead-1)} // ends at the offset at which a record with the head span would end
	header := appendLogHeader(nil, nil)
	bad := append(bytes.Clone(header), logFrames(evil, between, end)...)
	bad[len(header)] ^= 1
	if _, _, _, got := recoverLog(t, bad); !slices.Equal(got, []logRec{forged, between, end}) {
		t.Errorf("got records %v, want %v", got, []logRec{forged, between, end})
	}
}

// A payload full of forged heads, which each claim a record of about half of the payload, does not
// make recovery slow. To check every claimed record, recovery would have to read more than 500 GB.
func TestLogForgedHeadsAreFast(t *testing.T) {
	const total = 8 << 20 // bytes of the payload
	endless := logFrames(logRec{1, strings.Repeat("e", 2*total)})[:recordHead]
	for _, tt := range []struct {
		name        string
		first, unit []byte // the payload begins with first; unit precedes every forged head
	}{
		{"heads alone", nil, nil},
		{"heads after a record and a head longer than the file", append(logFrames(logRec{9, "forged"}), endless...), nil},
		{"a record before every head", nil, logFrames(logRec{1, ""})},
	} {
		p := tt.first
		for len(p) < total/2 {
			p = append(p, tt.unit...)
			h := binary.LittleEndian.AppendUint32(nil, total/2-100)
			h = append(h, make([]byte, recordHead-4)...)
			binary.LittleEndian.PutUint32(h[8:], crc32.Checksum(h[:8], castagnoli))
			p = append(p, h...)
		}
		p = append(p, make([]byte, total-len(p))...)
		file := append(appendLogHeader(nil, nil), logFrames(logRec{1, "before"})...)
		second := len(file)
		file = append(file, logFrames(logRec{2, string(p)}, logRec{3, "later"})...)
		file[second] ^= 1 // damages the head of the second record
		start := time.Now()
		_, _, r, got := recoverLog(t, file)
		if len(got) == 0 || r.Damaged == 0 || r.TornBytes != 0 {
			t.Errorf("%s: got %d records, %+v; want records, damage and no torn bytes", tt.name, len(got), r)
		}
		if d := time.Since(start); d > 10*time.Second { // recovery takes about 50 ms with the limit checksLeft, and minutes without the limit
			t.Errorf("%s: recovery took %v, want at most 10 s", tt.name, d)
		}
	}
}

// OpenLogWithGaps calls gap after it delivers the records before the damage and before it delivers
// the records after the damage, also if the header is damaged. It does not call gap for a torn end.
func TestLogGaps(t *testing.T) {
	data, records, ends := sampleLog()
	for _, tt := range []struct {
		what string
		data func([]byte) []byte
		want int // number of records delivered before the call of gap; -1 if gap must not be called
		lost int // number of records that are not delivered because of the damage
	}{
		{"intact", func(b []byte) []byte { return b }, -1, 0},
		{"torn", func(b []byte) []byte { return b[:len(b)-1] }, -1, 1},
		{"the second record damaged", func(b []byte) []byte { b[ends[2]-1] ^= 1; return b }, 1, 1},
		{"the header damaged", func(b []byte) []byte { b[0] ^= 1; return b }, 0, 0},
	} {
		c := newCrashFS(1, "/d")
		c.put(logPath, tt.data(bytes.Clone(data)))
		var got []logRec
		at := -1
		_, _, err := OpenLogWithGaps(c, logPath, collectLog(&got), func() { at = len(got) })
		if err != nil || at != tt.want || len(got) != len(records)-tt.lost || at >= 0 && got[at] != records[at+tt.lost] {
			t.Errorf("%s: gap called after %d of the records %v, %v; want after %d", tt.what, at, got, err, tt.want)
		}
	}
}

// openFlipped writes a sample log to logPath, with one bit of byte i flipped, and opens it.
func openFlipped(t *testing.T, c *crashFS, i int) LogRecovery {
	t.Helper()
	bad, _, _ := sampleLog()
	bad[i] ^= 1
	c.put(logPath, bad)
	_, r, err := OpenLog(c, logPath, collectLog(new([]logRec)))
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// OpenLog durably copies a damaged log aside. It keeps at most three copies: files with the same
// content share one copy, and a fourth different file replaces the last copy. ListLogs does not
// list the copies as logs.
func TestLogSetAside(t *testing.T) {
	c := newCrashFS(1, "/d")
	for _, tt := range []struct {
		flip int    // index of the byte that is damaged; the same index gives a file with the same content
		want string // suffix of the name of the copy
	}{
		{30, ".damaged"}, {30, ".damaged"}, {40, ".damaged-2"}, {50, ".damaged-3"}, {40, ".damaged-2"},
		{60, ".damaged-3"}, {70, ".damaged-3"}, {30, ".damaged"},
	} {
		if r := openFlipped(t, c, tt.flip); r.CopyPath != logPath+tt.want || r.Err != nil {
			t.Errorf("log with byte %d damaged: %+v; want the copy %s", tt.flip, r, logPath+tt.want)
		}
		c.crash()
		if _, err := c.ReadFile(logPath + tt.want); err != nil {
			t.Errorf("log with byte %d damaged: the copy is gone after a crash: %v", tt.flip, err)
		}
	}
	if got := c.names(); !slices.Equal(got, []string{logPath, logPath + ".damaged", logPath + ".damaged-2", logPath + ".damaged-3"}) {
		t.Errorf("files at the end: got %q, want the log and three copies", got)
	}
	logs, dirs, err := ListLogs(c, "/d")
	if !slices.Equal(logs, []string{logPath}) || dirs != nil || err != nil {
		t.Errorf("logs of the directory: got %q, subdirectories %q, %v; want only %s", logs, dirs, err, logPath)
	}
	if _, dirs, err := ListLogs(c, "/"); !slices.Equal(dirs, []string{"/d"}) || err != nil {
		t.Errorf("subdirectories of the root: got %q, %v; want /d", dirs, err)
	}
}

// If the disk is full, OpenLog still recovers a damaged log and reports in LogRecovery.Err that the
// copy could not be written.
func TestLogSetAsideDiskFull(t *testing.T) {
	c := newCrashFS(1, "/d")
	c.hook = failOn("write", "", 0, errFull)
	if r := openFlipped(t, c, 80); r.CopyPath != "" || !errors.Is(r.Err, errFull) || r.Records == 0 {
		t.Errorf("damaged log on a full disk: %+v; want records, the error %v and no copy", r, errFull)
	}
	c.hook = nil
	if got := c.names(); !slices.Equal(got, []string{logPath}) {
		t.Errorf("files at the end: got %q, want only the log", got)
	}
}

// If OpenLog cannot cut a torn tail, it delivers the records, reports the error in LogRecovery.Err, and
// returns a log that must be rewritten.
func TestLogOpenCannotCut(t *testing.T) {
	for _, op := range []string{"open", "truncate", "close"} {
		c, l := newTestLog(t)
		if err := l.Append(logFrames(logRec{2, "b"}), true); err != nil {
			t.Fatal(err)
		}
		data, _ := c.ReadFile(logPath)
		c.put(logPath, data[:len(data)-1])
		c.hook = failOn(op, "", 1, errDisk)
		var got []logRec
		l, r, err := OpenLog(c, logPath, collectLog(&got))
		if err != nil || !errors.Is(r.Err, errDisk) || !l.MustBeRewritten() || !slices.Equal(got, []logRec{{1, "a"}}) || c.open != 0 {
			t.Errorf("%s fails: got records %v, %+v, %v; want the record a, the error %v, and a log that must be rewritten", op, got, r, err, errDisk)
		}
	}
}

// If a file of several sectors ends in zeros from a sector on, its last record is torn. If the zeros
// do not begin within that record, or do not fill the last sector, the record is damaged.
func TestLogTornInZeros(t *testing.T) {
	header := appendLogHeader(nil, []byte("me"))
	first := logFrames(logRec{1, "first"})
	last := logFrames(logRec{2, strings.Repeat("x", 4*diskSector)})
	data := slices.Concat(header, first, last)
	begin := len(data) - len(last)
	for at := begin + recordHead; at < len(data); at++ {
		bad := bytes.Clone(data)
		clear(bad[at:])
		wantTorn := (at+diskSector-1)/diskSector*diskSector < len(data)
		_, _, r, got := recoverLog(t, bad)
		if (r.TornBytes == int64(len(last))) != wantTorn || (r.Damaged == 1) == wantTorn || !slices.Equal(got, []logRec{{1, "first"}}) {
			t.Fatalf("zeros from byte %d of %d on: got records %v, %+v; want torn %t", at, len(data), got, r, wantTorn)
		}
	}
	bad := append(bytes.Clone(data), make([]byte, 4*diskSector)...)
	bad[begin+20] ^= 1
	if _, _, r, _ := recoverLog(t, bad); r.Damaged != 1 || r.TornBytes != 4*diskSector {
		t.Errorf("a damaged record before zeros: %+v; want 1 damaged region, and the zeros torn", r)
	}
}

// Recovery accounts for every byte of any file. If the recovered records are rewritten and another
// record is appended, all of these records can be read back.
func FuzzOpenLog(f *testing.F) {
	data, _, ends := sampleLog()
	f.Add(data)
	f.Add(data[:len(data)-3])
	f.Add(data[ends[0]:])
	f.Add(append(bytes.Clone(data), make([]byte, 40)...))
	f.Add([]byte{})
	f.Add(append(appendLogHeader(nil, nil), "\xff\xff\xff\x03\x00\x00\x00\x00\x00\x00\x00\x00"...))
	f.Add(ofVersion(data, '7'))
	f.Fuzz(func(t *testing.T, data []byte) {
		if h := parseLogHeader(data); h.size > 0 && h.version != logVersion {
			return // OpenLog refuses a log of another version; TestLogVersion tests this
		}
		c, l, r, got := recoverLog(t, data)
		if l.MustBeRewritten() {
			l = NewLog(c, logPath, r.Identity)
			if err := l.Rewrite(writing(logFrames(got...))); err != nil {
				t.Fatal(err)
			}
		}
		if err := l.Append(logFrames(logRec{1, "more"}), true); err != nil {
			t.Fatal(err)
		}
		c.crash()
		now, err := c.ReadFile(logPath)
		if err != nil {
			t.Fatal(err)
		}
		_, l, r, again := recoverLog(t, now)
		if l.MustBeRewritten() || r.TornBytes != 0 || !slices.Equal(again, append(got, logRec{1, "more"})) {
			t.Fatalf("recovered records %v; after rewriting and appending: %v, %+v", got, again, r)
		}
	})
}
