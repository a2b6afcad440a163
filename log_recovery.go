package main

// Reading a log after a crash or damage. Records on either side of the damage are delivered,
// the damage is counted, and a copy of the file is kept. Work is linear in the file's size,
// whatever bytes it holds.

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"path/filepath"
)

// LogRecovery is what OpenLog found. Header, delivered records, LostBytes and
// TornBytes together make up the file.
type LogRecovery struct {
	Identity      []byte // nil if HeaderDamaged
	HeaderDamaged bool
	Records       int    // delivered, and accepted by the caller
	Damaged       int    // regions behind the header that were skipped, and records the caller refused
	LostBytes     int64  // of a damaged header, damaged regions and refused records
	TornBytes     int64  // of an unfinished append at the end
	CopyPath      string // path of the copy of a damaged file
	Err           error  // why that copy was not written, or the file not made ready to append to
}

// IsDamaged reports damage of the header or behind it. A torn end is not damage.
func (r *LogRecovery) IsDamaged() bool { return r.HeaderDamaged || r.Damaged > 0 }

// KeptCopyNote returns the end of a message about damage: the name of the copy, or "" without one.
func (r *LogRecovery) KeptCopyNote() string {
	if r.CopyPath == "" {
		return ""
	}
	return fmt.Sprintf("; the damaged file is kept as %q", filepath.Base(r.CopyPath))
}

// OpenLog reads a whole log into memory and calls each for every valid record
// in order. The payload is part of that memory: it must be neither kept nor
// changed. If each returns an error the record counts as damaged.
//
// A torn tail, as a crash during Append leaves it, is not damage: it is cut.
// A tail is torn if the file ends before its record does, or if it is all zeros
// (its length was written, its data was not). Anything else that is not a valid
// record is damage, a complete last record with a wrong CRC included: a crash
// can leave one, when sectors are written out of order, but so can a flipped
// byte, and a needless copy harms nobody.
//
// A damaged file is copied aside and left as it was. The log then needs a Rewrite, with
// what the caller recovered. If HeaderDamaged, the log has no identity: the caller learns it
// from the records or the name, and rewrites a NewLog at the same path.
//
// After a head that cannot be read records are searched for at every following
// byte, and bytes in a payload that look like a record are then taken for one.
// So the caller must check the records of a damaged log as strictly as foreign input.
//
// Unless the log needs a Rewrite, the delivered records are durable: the file is synced even
// if nothing was cut, because the process that wrote it may have been killed before
// its fsync. ListLogs makes the file's directory entry durable.
//
// A log of another version is an error. So is a file that cannot be read after several tries
// (fs.ErrNotExist if there is none), or a copy of it that was set aside before. Nothing was
// changed then, and the file may be good. After a later failure, which is in LogRecovery.Err, the
// log needs a Rewrite.
func OpenLog(fsys FS, path string, each func(kind byte, payload []byte) error) (*Log, LogRecovery, error) {
	return OpenLogWithGaps(fsys, path, each, func() {})
}

// OpenLogWithGaps is OpenLog, and calls gap at each place behind the header where damaged bytes
// are skipped, between the records before and after it.
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
	scan.run(header.size)
	rec := scan.found
	l := &Log{fsys: fsys, path: path, identity: header.identity, size: int64(len(data))}
	if !rec.IsDamaged() {
		if err := l.truncateAndSync(rec.TornBytes); err != nil {
			l.needsRewrite = true
			rec.Err = fmt.Errorf("syncing recovered log: %w", err)
		}
		return l, rec, nil
	}
	l.needsRewrite = true
	if len(data) == 0 {
		return l, rec, nil // there is nothing to keep
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

// truncateAndSync cuts torn bytes from the end of the file and makes the rest durable.
func (l *Log) truncateAndSync(tornBytes int64) error {
	f, err := l.fsys.OpenFile(l.path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if tornBytes > 0 {
		l.size -= tornBytes
		if err := f.Truncate(l.size); err != nil {
			return err
		}
	}
	return f.Sync()
}

// copyAside writes the copy of a damaged log to the path aside, durably, unless sameThere.
// It returns that path, or "" if there is no copy.
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

// logScan delivers the records of a file, and counts the rest.
type logScan struct {
	data  []byte
	each  func(kind byte, payload []byte) error
	gap   func()
	found LogRecovery
	// checksLeft is how many bytes of bodies a search may still check in vain; -1 says that
	// it gave up. The bodies of true records do not overlap, so damage alone never uses it
	// up. Crafted payloads do, and must not make recovery quadratic.
	checksLeft int
}

// run scans from offset headerEnd on; 0 says that the header is damaged.
func (s *logScan) run(headerEnd int) {
	// aligned: every record so far began where the one before it ends. So none can be a
	// forgery in a payload, and a readable head's length can be trusted.
	aligned := headerEnd > 0
	for at := headerEnd; at < len(s.data); {
		rest := s.data[at:]
		size, headOK := parseRecordHead(rest)
		complete := headOK && size <= len(rest)
		if complete && isBodyIntact(rest[:size]) {
			s.deliverRecord(rest[:size:size])
			at += size
			continue
		}
		next := len(s.data) // where the damage ends
		torn := at > 0 && (len(rest) < recordHead || headOK && !complete || isAllZero(rest))
		switch {
		case torn && aligned: // nothing follows an unfinished append
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
		if at > 0 { // else they are the header's
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

// findRecord returns the first offset from from on where a valid record lies, or the end of the
// file.
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

// parseRecordHead returns the size of the frame that b begins with, which may be longer than
// b. ok is false if b does not begin with a valid head.
func parseRecordHead(b []byte) (frameSize int, ok bool) {
	r := NewWireReader(b)
	n := r.Uint32()
	r.Uint32() // of the body
	sum := r.Uint32()
	if r.Err() != nil || n == 0 || n > MaxRecord || sum != Checksum(b[:8]) {
		return 0, false
	}
	return recordHead + int(n), true
}

// isBodyIntact checks the body of a complete frame.
func isBodyIntact(frame []byte) bool {
	return frame[recordHead] != 0 && Checksum(frame[recordHead:]) == binary.LittleEndian.Uint32(frame[4:])
}

// mayFollowRecord reports whether b, which lies where a damaged record's head says that it ends,
// confirms that: another record, or a torn one, begins there.
func mayFollowRecord(b []byte) bool {
	_, ok := parseRecordHead(b)
	return ok || len(b) < recordHead || isAllZero(b)
}

func isAllZero(b []byte) bool {
	return len(bytes.TrimLeft(b, "\x00")) == 0
}
