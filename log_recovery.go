package main

// This file reads logs at start, also after a crash or damage. Recovery delivers the valid records
// that it finds before and after damaged bytes, counts the damage and keeps a copy of the damaged
// file. Recovery takes time linear in the size of the file, even for hostile content.

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
)

// diskSector is the size in bytes of a sector. A disk writes whole sectors.
const diskSector = 512

// LogRecovery is the result of recovering one log. The sizes of the header (if it is intact), of
// the accepted records, LostBytes and TornBytes add up to the size of the file.
type LogRecovery struct {
	Identity      []byte // nil if HeaderDamaged
	HeaderDamaged bool
	Records       int    // records that were delivered and that the caller accepted
	Damaged       int    // damaged regions after the header, plus records that the caller refused
	LostBytes     int64  // bytes of a damaged header, of damaged regions and of refused records
	TornBytes     int64  // bytes of an unfinished append at the end
	CopyPath      string // path of the copy of a damaged file; empty if there is no copy
	Err           error  // error while copying a damaged file, or while cutting the torn end off an intact file
}

// IsDamaged reports whether the header or any bytes after the header are damaged, or the caller
// refused a record. A torn end does not count as damage.
func (r *LogRecovery) IsDamaged() bool { return r.HeaderDamaged || r.Damaged > 0 }

// KeptCopyNote returns text to append to a log message about damage. The text names the copy of the
// damaged file. It is empty if there is no copy.
func (r *LogRecovery) KeptCopyNote() string {
	if r.CopyPath == "" {
		return ""
	}
	return fmt.Sprintf("; the damaged file is kept as %q", filepath.Base(r.CopyPath))
}

// OpenLog reads a whole log into memory and calls the function each for every valid record that it
// finds, in order. The payload is part of that memory, so each must neither keep nor change the
// payload. If each returns an error, the record counts as damaged.
//
// Torn: a crash of the machine may leave a torn tail, which is not synced yet. A tail is torn if the
// file ends before the last record is complete. A tail is also torn if it is all zeros, or if the
// file is all zeros from a sector within the record to the end, because the file's new size was
// written and its data was not. A torn tail is not damage. OpenLog cuts it off, unless other bytes of
// the file are damaged.
//
// Damaged: all other bytes that are not a valid record are damage. This includes any other complete
// last record with a wrong CRC. A crash can leave such a record if sectors are written out of order,
// but a flipped bit looks the same, and an unnecessary copy does no harm. OpenLog copies a damaged
// file aside and does not change the file. The log then needs a Rewrite with the records that the
// caller recovered. If HeaderDamaged, the log has no identity. The caller must then find the identity
// by other means, such as the records or the file's name, and rewrite a NewLog at the same path.
//
// Forged records: after an unreadable head, recovery searches for a record at every byte. If bytes
// inside a payload look like a record, recovery then delivers them as a record. Therefore the
// caller must check the records of a damaged log as strictly as foreign input.
//
// Durability: OpenLog syncs nothing. The delivered records are durable after the next Sync, or the
// next Append that syncs. ListLogs makes the directory entry of the file durable.
//
// Errors: OpenLog returns an error if the log has another version, or if the log or a copy that was
// set aside earlier cannot be read after several attempts. The error wraps fs.ErrNotExist if the
// log does not exist. In all these cases OpenLog changed nothing, and the log may be intact. Later
// failures are returned in LogRecovery.Err, and the log then needs a Rewrite.
func OpenLog(fsys FS, path string, each func(kind byte, payload []byte) error) (*Log, LogRecovery, error) {
	return OpenLogWithGaps(fsys, path, each, func() {})
}

// OpenLogWithGaps does the same as OpenLog. It also calls gap once for each region of damaged bytes,
// a damaged header included. It delivers the records before the region, then calls gap, and then
// delivers the records after the region. No record before the first gap is forged.
func OpenLogWithGaps(fsys FS, path string, each func(kind byte, payload []byte) error, gap func()) (*Log, LogRecovery, error) {
	data, err := readFileRetrying(fsys, path)
	if err != nil {
		return nil, LogRecovery{}, fmt.Errorf("reading log: %w", err)
	}
	header := parseLogHeader(data)
	if header.size > 0 && header.version != logVersion {
		return nil, LogRecovery{}, fmt.Errorf("%s is a log of version %d; this program knows version %d", path, header.version, logVersion)
	}
	scan := logScan{data: data, each: each, gap: gap, checksLeft: 2 * len(data)}
	scan.found = LogRecovery{Identity: header.identity, HeaderDamaged: header.size == 0}
	scan.zerosFrom = (len(bytes.TrimRight(data, "\x00")) + diskSector - 1) / diskSector * diskSector
	scan.run(header.size)
	rec := scan.found
	l := &Log{fsys: fsys, path: path, identity: header.identity, size: int64(len(data)), unsynced: true}
	if !rec.IsDamaged() {
		if err := l.cutTornEnd(rec.TornBytes); err != nil {
			l.needsRewrite = true
			rec.Err = fmt.Errorf("cutting the torn end of a log: %w", err)
		}
		return l, rec, nil
	}
	l.needsRewrite = true
	if len(data) == 0 {
		return l, rec, nil // an empty file needs no copy
	}
	aside, there, err := asidePath(fsys, path, "damaged", data)
	if err != nil {
		return nil, LogRecovery{}, fmt.Errorf("reading a copy of a damaged log: %w", err)
	}
	if rec.CopyPath, err = copyAside(fsys, aside, there, data); err != nil {
		rec.Err = fmt.Errorf("setting damaged log aside: %w", err)
	}
	return l, rec, nil
}

// cutTornEnd cuts tornBytes from the end of the file.
func (l *Log) cutTornEnd(tornBytes int64) error {
	if tornBytes == 0 {
		return nil
	}
	f, err := l.fsys.OpenFile(l.path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	l.size -= tornBytes
	return errors.Join(f.Truncate(l.size), f.Close())
}

// copyAside durably writes the copy of a damaged log to the path aside. If sameThere is true, the
// copy exists already and only its directory is synced. copyAside returns the path of the copy, or
// "" if the copy could not be written.
func copyAside(fsys FS, aside string, sameThere bool, data []byte) (copyPath string, err error) {
	if sameThere {
		return aside, fsys.SyncDir(filepath.Dir(aside))
	}
	_, renamed, err := replaceFile(fsys, aside, func(w io.Writer) error {
		_, err := w.Write(data)
		return err
	})
	if !renamed {
		aside = ""
	}
	return aside, err
}

// logScan delivers the records of a file and counts the bytes that are not records.
type logScan struct {
	data  []byte
	each  func(kind byte, payload []byte) error
	gap   func()
	found LogRecovery
	// zerosFrom is the offset of the sector from which the file is all zeros. It is at least the size
	// of the file if the last sector has another byte.
	zerosFrom int
	// checksLeft is the number of bytes that searches may still read to compute CRCs that turn out
	// wrong. -1 means that the limit was reached and the search gave up. The limit prevents crafted
	// payloads from making recovery quadratic. Damage alone does not reach it, because the bodies
	// of real records do not overlap.
	checksLeft int
}

// run scans the file from offset headerEnd. headerEnd is 0 if the header is damaged.
func (s *logScan) run(headerEnd int) {
	// aligned means that every record so far began at the end of the previous record. Then no
	// record can be forged inside a payload, and the length in a readable head can be trusted.
	aligned := headerEnd > 0
	if !aligned {
		s.gap()
	}
	for at := headerEnd; at < len(s.data); {
		rest := s.data[at:]
		size, headOK := parseRecordHead(rest)
		complete := headOK && size <= len(rest)
		if complete && isBodyIntact(rest[:size]) {
			s.deliverRecord(rest[:size:size])
			at += size
			continue
		}
		next := len(s.data)    // end of the damaged or torn region that begins here
		end := at + recordHead // end of the record that begins here
		if headOK {
			end = at + size
		}
		torn := at > 0 && (end > len(s.data) || end > s.zerosFrom && s.zerosFrom < len(s.data) || isAllZero(rest))
		switch {
		case torn && aligned: // the torn region ends with the file, because an unfinished append is the last thing in a file
		case complete && aligned && mayFollowRecord(rest[size:]):
			next = at + size
		default:
			aligned = false
			if next = s.findRecord(at); next < len(s.data) {
				torn = false
			}
		}
		if torn && s.checksLeft >= 0 {
			s.found.TornBytes += int64(next - at)
			return
		}
		s.found.LostBytes += int64(next - at)
		if at > 0 { // at offset 0 the lost bytes begin with the header, whose damage HeaderDamaged reports
			s.found.Damaged++
			s.gap()
		}
		at = next
	}
}

func (s *logScan) deliverRecord(frame []byte) {
	if err := s.each(frame[recordHead], frame[recordHead+1:]); err != nil {
		s.found.Damaged++
		s.found.LostBytes += int64(len(frame))
		return
	}
	s.found.Records++
}

// findRecord returns the offset of the first valid record that begins at offset from or later. It
// returns the size of the file if there is none or if checksLeft is used up.
func (s *logScan) findRecord(from int) (offset int) {
	for ; from < len(s.data); from++ {
		size, ok := parseRecordHead(s.data[from:])
		if !ok || size > len(s.data)-from {
			continue
		}
		if isBodyIntact(s.data[from : from+size]) {
			return from
		}
		if s.checksLeft -= size; s.checksLeft < 0 {
			s.checksLeft = -1
			break
		}
	}
	return len(s.data)
}

// parseRecordHead parses the head of the record with which b begins. It returns the size of the
// whole record, head and body, which may exceed len(b). ok is false if b does not begin with a
// valid head.
func parseRecordHead(b []byte) (frameSize int, ok bool) {
	r := NewWireReader(b)
	n := r.Uint32()
	r.Uint32() // CRC of the body
	sum := r.Uint32()
	if r.Err() != nil || n == 0 || n > MaxRecord || sum != Checksum(b[:8]) {
		return 0, false
	}
	return recordHead + int(n), true
}

// isBodyIntact reports whether frame, a complete record, has a valid kind and a body that matches
// the CRC in its head.
func isBodyIntact(frame []byte) bool {
	return frame[recordHead] != 0 && Checksum(frame[recordHead:]) == binary.LittleEndian.Uint32(frame[4:])
}

// mayFollowRecord reports whether b can be the rest of the file after a record: another record's
// head and more, a torn tail, or nothing. run calls it with the bytes after a record with a damaged
// body, to confirm the length in that record's head.
func mayFollowRecord(b []byte) bool {
	_, ok := parseRecordHead(b)
	return ok || len(b) < recordHead || isAllZero(b)
}

func isAllZero(b []byte) bool {
	return len(bytes.TrimLeft(b, "\x00")) == 0
}
