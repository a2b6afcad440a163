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

// Recovery is what OpenLog found. Header, delivered records, LostBytes and
// TornBytes together make up the file.
type Recovery struct {
	Identity      []byte // nil if HeaderDamaged
	HeaderDamaged bool
	Records       int    // delivered, and taken by the caller
	Damaged       int    // regions behind the header skipped, and records the caller refused
	LostBytes     int64  // in the header if damaged, and in damaged regions and refused records
	TornBytes     int64  // of an unfinished append at the end
	SetAside      string // path of the copy of a damaged file
	Err           error  // why that copy was not written, or the file not made ready to append to
}

// KeptAs says for a message under which name the damaged file is kept.
func (r *Recovery) KeptAs() string {
	if r.SetAside == "" {
		return ""
	}
	return fmt.Sprintf("; the damaged file is kept as %q", filepath.Base(r.SetAside))
}

// OpenLog reads a whole log into memory and calls each for every valid record
// in order. The payload is part of that memory: it must be neither kept nor
// changed. If each returns an error the record counts as damaged. Kind 0, without
// payload, stands for bytes that were skipped; its error is ignored.
//
// A torn tail, as a crash during Append leaves it, is not damage: it is cut.
// A tail is torn if the file ends before its record does, or if it is all zeros
// (its length was written, its data was not). Anything else that is not a valid
// record is damage, a complete last record with a wrong CRC included: a crash
// can leave one, when sectors are written out of order, but so can a flipped
// byte, and a needless copy harms nobody.
//
// A damaged file is copied aside and is left as it was; the log is Broken, and
// the caller mends it by a Rewrite of what it recovered. If HeaderDamaged, the
// log has no identity: the caller, having learned it from the records or the
// name, mends by NewLog at the same path and Rewrite.
//
// After a head that cannot be read records are searched for at every following
// byte, and bytes in a payload that look like a record are then taken for one.
// So if the log is Broken the caller must check what it was given as strictly
// as what comes from outside.
//
// Unless the log is Broken, what was delivered is durable: it is synced even if
// nothing was cut, because the process that wrote it may have been killed before
// its fsync. That the file's directory entry is durable is ListLogs's part.
//
// A log of another version is an error. So is a file that cannot be read after several tries
// (fs.ErrNotExist if there is none), or a copy of it that was set aside before. Nothing was
// changed then, and the file may be good. A later failure is in Recovery.Err and leaves the
// log Broken.
func OpenLog(fsys FS, path string, each func(kind byte, payload []byte) error) (*Log, Recovery, error) {
	data, err := readFile(fsys, path)
	if err != nil {
		return nil, Recovery{}, fmt.Errorf("reading log: %w", err)
	}
	header := parseLogHeader(data)
	if header.size > 0 && header.version != logVersion {
		return nil, Recovery{}, fmt.Errorf("%s is a log of version %d; this program knows version %d", path, header.version, logVersion)
	}
	rec := Recovery{Identity: header.identity, HeaderDamaged: header.size == 0}
	rec.scan(data, header.size, each)
	l := &Log{fsys: fsys, path: path, identity: header.identity, size: int64(len(data))}
	if rec.HeaderDamaged || rec.Damaged > 0 {
		l.broken = true
		if len(data) == 0 {
			return l, rec, nil // nothing to keep
		}
		aside, there, err := asidePath(fsys, path, "damaged", data)
		if err != nil {
			return nil, Recovery{}, fmt.Errorf("reading a copy of a damaged log: %w", err)
		}
		if rec.SetAside, err = copyAside(fsys, aside, there, data); err != nil {
			rec.Err = fmt.Errorf("setting damaged log aside: %w", err)
		}
		return l, rec, nil
	}
	if err := l.settle(rec.TornBytes); err != nil {
		l.broken = true
		rec.Err = fmt.Errorf("syncing recovered log: %w", err)
	}
	return l, rec, nil
}

// settle cuts torn bytes and makes the rest durable.
func (l *Log) settle(torn int64) error {
	f, err := l.fsys.OpenFile(l.path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if torn > 0 {
		l.size -= torn
		if err := f.Truncate(l.size); err != nil {
			return err
		}
	}
	return f.Sync()
}

// scan delivers the records of data from start on; start 0 says that the header
// is damaged.
func (r *Recovery) scan(data []byte, start int, each func(byte, []byte) error) {
	// anchored: every head so far was found where the one before it said, so
	// none can be a forgery in a payload, and a head's length can be trusted.
	anchored := start > 0
	// Bytes of bodies that a search may check in vain. The bodies of true
	// records do not overlap, so damage alone never uses it up; only crafted
	// payloads do, and must not make recovery quadratic.
	budget := 2 * len(data)
	for p := start; p < len(data); {
		rest := data[p:]
		size, headOK := parseRecordHead(rest)
		complete := headOK && size <= len(rest)
		if complete && bodyOK(rest[:size]) {
			if err := each(rest[recordHead], rest[recordHead+1:size:size]); err != nil {
				r.Damaged++
				r.LostBytes += int64(size)
			} else {
				r.Records++
			}
			p += size
			continue
		}
		lost := len(rest)
		torn := p > 0 && (len(rest) < recordHead || headOK && !complete || allZero(rest))
		switch {
		case torn && anchored: // nothing can follow an unfinished append
		case complete && anchored && mayBegin(rest[size:]):
			lost = size
		default:
			anchored = false
			if next := findRecord(data, p, &budget); next < len(data) {
				lost, torn = next-p, false
			}
		}
		if torn && budget >= 0 {
			r.TornBytes += int64(lost)
			return
		}
		r.LostBytes += int64(lost)
		if p > 0 { // else it is the header's region
			r.Damaged++
			each(0, nil)
		}
		p += lost
	}
}

// findRecord returns the first offset from p on where a valid record lies, or
// len(data). It lowers budget by every body checked in vain, and to -1 when it
// gives up.
func findRecord(data []byte, p int, budget *int) int {
	for ; p < len(data); p++ {
		size, ok := parseRecordHead(data[p:])
		if !ok || size > len(data)-p {
			continue
		}
		if bodyOK(data[p : p+size]) {
			return p
		}
		if *budget -= size; *budget < 0 {
			*budget = -1
			break
		}
	}
	return len(data)
}

// parseRecordHead returns the size of the frame that b begins with, which may be more
// than there is of it.
func parseRecordHead(b []byte) (size int, ok bool) {
	if len(b) < recordHead {
		return 0, false
	}
	n := binary.LittleEndian.Uint32(b)
	if n == 0 || n > MaxRecord || Checksum(b[:8]) != binary.LittleEndian.Uint32(b[8:]) {
		return 0, false
	}
	return recordHead + int(n), true
}

// bodyOK checks the body of a complete frame.
func bodyOK(frame []byte) bool {
	return frame[recordHead] != 0 && Checksum(frame[recordHead:]) == binary.LittleEndian.Uint32(frame[4:])
}

// mayBegin tells whether b, found where a damaged record says it ends, confirms
// that it ends there.
func mayBegin(b []byte) bool {
	_, ok := parseRecordHead(b)
	return ok || len(b) < recordHead || allZero(b)
}

func allZero(b []byte) bool {
	return len(bytes.TrimLeft(b, "\x00")) == 0
}

// copyAside writes the copy of a damaged log to the path aside, durably, unless it is there
// already. It returns that path, or "" if there is no copy.
func copyAside(fsys FS, aside string, there bool, data []byte) (string, error) {
	if there {
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
