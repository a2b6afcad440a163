package main

// Append-only files of framed, checksummed records: append, sync, rewrite. Records that Append
// acknowledged survive any crash. One writer per log is the caller's duty. This family must
// not know the meaning of a record.

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// A file is a header (magic, digit of the version, line feed, uint32 length of the identity,
// identity, CRC) and records; integers are little endian, every CRC is CRC32C (Castagnoli):
//
//	uint32 n      length of kind and payload, 1 to MaxRecord
//	uint32 body   CRC of kind and payload
//	uint32 head   CRC of the eight bytes before it
//	kind, payload kind is never 0
//
// The head has a CRC of its own, so that its length can be trusted. A trusted length
// distinguishes a torn record (the file is shorter than it says) from a damaged one, even at
// the end of the file. It also lets recovery skip a damaged body whatever its bytes are, and
// makes the search for the next record cheap. It costs 4 bytes beside an fsync.
//
// The name of a log ends in LogSuffix. Beside it may be <name>.tmp, a Rewrite that a crash cut
// short and that the next overwrites, and files that SetAside or recovery named.
const (
	LogSuffix   = ".log"   // every name given to NewLog ends so, and no name of another file
	MaxRecord   = 64 << 20 // bytes of kind and payload of one record
	MaxIdentity = 1024     // bytes

	logMagic      = "tmlog-"
	logVersion    = 2 // one digit; another kind of record, or another form of one, is another version
	recordHead    = 12
	logTempSuffix = ".tmp"
)

// ErrLogBroken is returned by Append while the file must not be appended to: it
// was never written, or is damaged, or its content on disk is unknown. A Rewrite that
// succeeds ends that.
var ErrLogBroken = errors.New("log must be rewritten before it is appended to")

// ListLogs returns the paths of the logs in dir and of its subdirectories. It
// syncs dir first: a file that a killed process renamed into place, but did not
// see synced, is durable from here on, so that an Append to it is durable.
// A symbolic link, a pipe or the like is an error, and so is a directory with a
// log's name, because a Rewrite would put a file in its place.
func ListLogs(fsys FS, dir string) (logs, subdirs []string, err error) {
	if err := fsys.SyncDir(dir); err != nil {
		return nil, nil, fmt.Errorf("syncing directory of logs: %w", err)
	}
	entries, err := RetryRead(func() ([]fs.DirEntry, error) { return fsys.ReadDir(dir) })
	if err != nil {
		return nil, nil, fmt.Errorf("listing logs: %w", err)
	}
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		log := strings.HasSuffix(path, LogSuffix)
		switch {
		case !e.Type().IsRegular() && (log || !e.IsDir()):
			return nil, nil, fmt.Errorf("listing logs: %s is not a regular file: move it away, or put what it stands for in its place", path)
		case e.IsDir():
			subdirs = append(subdirs, path)
		case log:
			logs = append(logs, path)
		}
	}
	return logs, subdirs, nil
}

// AppendRecord appends one framed record to buf. It panics at kind 0 and at more than
// MaxRecord-1 bytes of payload, because recovery would take either for damage.
func AppendRecord(buf []byte, kind byte, payload []byte) []byte {
	if kind == 0 || len(payload) >= MaxRecord {
		panic(fmt.Sprintf("log record of kind %d with %d bytes", kind, len(payload)))
	}
	at := len(buf)
	buf = binary.LittleEndian.AppendUint32(buf, uint32(1+len(payload)))
	buf = append(buf, make([]byte, recordHead-4)...)
	buf = append(append(buf, kind), payload...)
	head := buf[at:]
	binary.LittleEndian.PutUint32(head[4:], Checksum(head[recordHead:]))
	binary.LittleEndian.PutUint32(head[8:], Checksum(head[:8]))
	return buf
}

// Log is one file. It is not safe for concurrent use: one writer per log is the
// caller's duty. It holds no file open between calls, so that thousands of logs
// cost no descriptors.
type Log struct {
	fsys         FS
	path         string
	identity     []byte
	size         int64
	needsRewrite bool
}

// NewLog returns a log that is not on disk, and cannot be appended to, until its first
// Rewrite, which replaces any file at path. The identity says whose log it is; it may be
// empty. NewLog does no I/O.
func NewLog(fsys FS, path string, identity []byte) *Log {
	return &Log{fsys: fsys, path: path, identity: bytes.Clone(identity), needsRewrite: true}
}

func appendLogHeader(buf, identity []byte) []byte {
	start := len(buf)
	buf = fmt.Appendf(buf, "%s%d\n", logMagic, logVersion)
	buf = binary.LittleEndian.AppendUint32(buf, uint32(len(identity)))
	buf = append(buf, identity...)
	return binary.LittleEndian.AppendUint32(buf, Checksum(buf[start:]))
}

// logHeader is the header of a file; its size in bytes is 0 if it is damaged.
type logHeader struct {
	version  int
	identity []byte
	size     int
}

func parseLogHeader(data []byte) logHeader {
	r := NewWireReader(data)
	r.Require(string(r.Bytes(len(logMagic))) == logMagic)
	version := int(r.Byte()) - '0'
	r.Require(r.Byte() == '\n')
	n := r.Uint32()
	r.Require(n <= MaxIdentity)
	identity := bytes.Clone(r.Bytes(int(n)))
	end := len(data) - r.Len()
	if sum := r.Uint32(); r.Err() != nil || sum != Checksum(data[:end]) {
		return logHeader{}
	}
	return logHeader{version, identity, len(data) - r.Len()}
}

// Append writes frames, whole records made by AppendRecord, and syncs them: if
// it returns nil they are durable. A failed write, for a full disk say, is undone
// and the log stays usable. If it cannot be undone, or the file has vanished,
// the log needs a Rewrite. So it does after a failed fsync: the kernel may then
// have dropped the data and call it clean, so that a second fsync would prove
// nothing (Rebello et al., "Can Applications Recover from fsync Failures?",
// 2020). If the log needs a Rewrite after an error, the records of that Append may
// or may not be found after a crash.
func (l *Log) Append(frames []byte) error {
	if l.needsRewrite {
		return fmt.Errorf("appending to %s: %w", l.path, ErrLogBroken)
	}
	f, err := l.fsys.OpenFile(l.path, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		l.needsRewrite = errors.Is(err, fs.ErrNotExist)
		return fmt.Errorf("appending to log: %w", err)
	}
	defer f.Close() // its error says nothing about data already synced
	n, err := f.Write(frames)
	if err == nil && n < len(frames) {
		err = io.ErrShortWrite
	}
	if err != nil {
		undo := f.Truncate(l.size)
		if undo == nil {
			undo = f.Sync()
		}
		l.needsRewrite = undo != nil
		return fmt.Errorf("appending to log: %w", errors.Join(err, undo))
	}
	if err := f.Sync(); err != nil {
		l.needsRewrite = true
		return fmt.Errorf("syncing log: %w", err)
	}
	l.size += int64(n)
	return nil
}

// Rewrite replaces the file by a header and the whole records, made by AppendRecord, that
// fill writes. It makes the parent directory if that is missing. If it returns nil the new
// file is durable and can be appended to. If it fails the old file is untouched and the log is
// as usable as before, unless only the directory could not be synced: then either file may
// be found after a crash, and the log needs another Rewrite.
func (l *Log) Rewrite(fill func(w io.Writer) error) error {
	if len(l.identity) > MaxIdentity {
		return fmt.Errorf("rewriting %s: identity of %d bytes, limit %d", l.path, len(l.identity), MaxIdentity)
	}
	size, renamed, err := replaceFile(l.fsys, l.path, func(w io.Writer) error {
		if _, err := w.Write(appendLogHeader(nil, l.identity)); err != nil {
			return err
		}
		return fill(w)
	})
	if renamed {
		l.size, l.needsRewrite = size, err != nil
	}
	if err != nil {
		return fmt.Errorf("rewriting log: %w", err)
	}
	return nil
}

// RewriteWith is Rewrite by frames, whole records made by AppendRecord.
func (l *Log) RewriteWith(frames []byte) error {
	return l.Rewrite(func(w io.Writer) error {
		_, err := w.Write(frames)
		return err
	})
}

// Size returns the bytes of the file; 0 if it was never written or is removed.
func (l *Log) Size() int64 { return l.size }

// Identity returns the identity in the header; the caller must not change it.
func (l *Log) Identity() []byte { return l.identity }

// MustBeRewritten reports whether Append would return ErrLogBroken.
func (l *Log) MustBeRewritten() bool { return l.needsRewrite }

// Remove deletes the file durably; it is no error if there is none. Copies set aside stay. The
// log is then as NewLog made it. If only the directory could not be synced, the file is gone
// but a crash may bring it back.
func (l *Log) Remove() error {
	err := l.fsys.Remove(l.path)
	if err == nil || errors.Is(err, fs.ErrNotExist) {
		l.size, l.needsRewrite = 0, true
		err = l.fsys.SyncDir(filepath.Dir(l.path))
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("removing log: %w", err)
	}
	return nil
}
