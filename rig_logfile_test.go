package main

// Helpers for tests of append-only log files: records, a sample log, and recoverLog, which checks
// the rules for the recovery of any file. The file system is the crashFS of rig_disk_test.go.

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
)

const logPath = "/d/x.log"

type logRec struct {
	kind    byte
	payload string
}

func (r logRec) String() string { return fmt.Sprintf("%d:%.20q", r.kind, r.payload) }

// logFrames returns the framed records, one after another, as they are in a log file.
func logFrames(records ...logRec) (buf []byte) {
	for _, r := range records {
		buf = AppendRecord(buf, r.kind, []byte(r.payload))
	}
	return buf
}

// writing returns a function for Log.Rewrite that writes frames, the framed records of the new log
// file.
func writing(frames []byte) func(io.Writer) error {
	return func(w io.Writer) error {
		_, err := w.Write(frames)
		return err
	}
}

// collectLog returns a function for OpenLog. For every record that OpenLog delivers, the function
// appends the record to *into.
func collectLog(into *[]logRec) func(byte, []byte) error {
	return func(kind byte, payload []byte) error {
		*into = append(*into, logRec{kind, string(payload)})
		return nil
	}
}

// sampleLog returns the content of a log file and its records. ends holds the offset of each
// record, followed by the size of the file. The records are chosen to provoke mistakes: one is
// empty, one is full of zeros, one ends in zeros, and one has a record as its payload.
func sampleLog() (data []byte, records []logRec, ends []int) {
	records = []logRec{
		{1, "first"}, {2, ""}, {3, strings.Repeat("\x00", 20)}, {255, string(logFrames(logRec{9, "inner"}))},
		{1, strings.Repeat("x", 256-1)}, {7, "tail\x00\x00\x00"},
	}
	data = appendLogHeader(nil, []byte("site-7"))
	ends = append(ends, len(data))
	for _, r := range records {
		data = append(data, logFrames(r)...)
		ends = append(ends, len(data))
	}
	return data, records, ends
}

// recoverLog opens a log file with the content data. It returns the file system, the log, the
// result of the recovery and the records that OpenLog delivered. It fails the test if the recovery
// breaks one of these rules. The recovery accounts for every byte. A damaged file is copied to
// another path, unless it ends within its header, and is not changed. A log must be rewritten if it is damaged,
// and only then. No file is left open.
func recoverLog(t *testing.T, data []byte) (*crashFS, *Log, LogRecovery, []logRec) {
	t.Helper()
	c := newCrashFS(1, "/d")
	c.put(logPath, data)
	var got []logRec
	l, r, err := OpenLog(c, logPath, collectLog(&got))
	if err != nil || r.Err != nil {
		t.Fatalf("opening the log: %v, %v", err, r.Err)
	}
	sum := r.LostBytes + r.TornBytes + int64(len(logFrames(got...)))
	if !r.HeaderDamaged {
		sum += int64(len(appendLogHeader(nil, r.Identity)))
	}
	if sum != int64(len(data)) || r.Records != len(got) {
		t.Fatalf("recovery %+v accounts for %d bytes of %d, and %d records were delivered", r, sum, len(data), len(got))
	}
	damaged := r.HeaderDamaged || r.Damaged > 0
	if l.MustBeRewritten() != damaged || (r.CopyPath != "") != (damaged && len(data) > 0) {
		t.Fatalf("recovery %+v of a log with damage %v: must be rewritten %v, copy %q", r, damaged, l.MustBeRewritten(), r.CopyPath)
	}
	if damaged && len(data) > 0 {
		if aside, _ := c.ReadFile(r.CopyPath); !bytes.Equal(aside, data) {
			t.Fatal("the copy set aside differs from the damaged file")
		}
		if now, _ := c.ReadFile(logPath); !bytes.Equal(now, data) {
			t.Fatal("the damaged file was changed")
		}
	}
	if c.open != 0 {
		t.Fatalf("%d files are still open", c.open)
	}
	return c, l, r, got
}

// newTestLog returns a log on a file system without faults. The log has one record, "a", which a
// Rewrite wrote. newTestLog also checks that Append fails before the first Rewrite.
func newTestLog(t *testing.T) (*crashFS, *Log) {
	t.Helper()
	c := newCrashFS(1)
	l := NewLog(c, logPath, []byte("me"))
	if err := l.Append(logFrames(logRec{1, "a"}), true); !errors.Is(err, ErrLogBroken) || len(c.names()) != 0 {
		t.Fatalf("appending to a log that was never written: got %v, want ErrLogBroken and no file", err)
	}
	if err := l.Rewrite(writing(logFrames(logRec{1, "a"}))); err != nil {
		t.Fatal(err)
	}
	return c, l
}

// reopenLog simulates a crash of the machine and returns the records that recovery then finds in
// the log file. It fails the test if the file is damaged.
func reopenLog(t *testing.T, c *crashFS) (got []logRec) {
	t.Helper()
	c.crash()
	l, r, err := OpenLog(c, logPath, collectLog(&got))
	if err != nil || r.Damaged > 0 || r.Err != nil || string(l.Identity()) != "me" {
		t.Fatalf("opening the log after a crash: %+v, %v", r, err)
	}
	return got
}

// ofVersion returns a copy of a log file with another version digit in its header, and with the
// header CRC that matches the digit.
func ofVersion(log []byte, digit byte) []byte {
	h := parseLogHeader(log)
	log = bytes.Clone(log)
	log[len(logMagic)] = digit
	binary.LittleEndian.PutUint32(log[h.size-4:], Checksum(log[:h.size-4]))
	return log
}
