package main

// This file implements logs: append-only files of framed, checksummed records. What Create and Append
// have written survives a crash of the process. It survives a crash of the machine once it is
// synced, by the same call or by a later one. The caller must ensure that each log has only one
// writer. This family must not know the meaning of a record.

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

// A log consists of a header and records. The header is the magic, one digit for the version, a
// line feed, the length of the identity as a uint32, the identity, and a CRC. Integers are little
// endian. Every CRC is a CRC32C (Castagnoli). A record is:
//
//	uint32 n      length of kind and payload together, 1 to MaxRecord
//	uint32 body   CRC of kind and payload
//	uint32 head   CRC of the eight bytes before it
//	kind, payload kind is one byte and never 0
//
// The first 12 bytes are the record's head, the rest is its body. The head has a CRC of its own so
// that recovery can trust the length. With a trusted length, recovery can distinguish a torn
// record, which is longer than the rest of the file, from a damaged record at the end of the file.
// It can also skip a damaged body without looking at its bytes, and it finds the next record
// faster. The price is 4 bytes for each record, which is little compared to an fsync.
//
// The name of a log ends in LogSuffix. In the same directory there may be a file <name>.tmp, left
// by a Rewrite that a crash interrupted. The next Rewrite removes it. There may also be files
// that SetAside or recovery created.
const (
	LogSuffix   = ".log"   // suffix of the path of every log, and of no other file
	MaxRecord   = 64 << 20 // most bytes of kind and payload of one record
	MaxIdentity = 1024     // most bytes of an identity

	logMagic      = "tmlog-"
	logVersion    = 2  // one digit; must change when a new kind of record is added or the format of a kind changes
	recordHead    = 12 // bytes of a record's head
	logTempSuffix = ".tmp"
)

// ErrLogBroken is returned by Append and Sync while the log file must not be appended to. This is the
// case if the file was never written, is damaged, has vanished or was removed, or if its content on
// disk is unknown. A successful Rewrite or Create ends this state.
var ErrLogBroken = errors.New("log must be rewritten before it is appended to")

// ListLogs returns the paths of the logs in dir and the paths of dir's subdirectories.
//
// ListLogs syncs dir first. A process may have been killed after it created a log or renamed a log
// into place, and before it synced dir. Syncing makes the entry of the log durable. Otherwise records
// that a later Append syncs could be lost with the entry.
//
// ListLogs fails if dir contains a symbolic link, a pipe or another special file, because a Rewrite
// could replace it by a regular file. It also fails if a directory has the name of a log.
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
			return nil, nil, fmt.Errorf("listing logs: %s is not a regular file: move it away, or replace a link by its target", path)
		case e.IsDir():
			subdirs = append(subdirs, path)
		case log:
			logs = append(logs, path)
		}
	}
	return logs, subdirs, nil
}

// AppendRecord appends one framed record to buf. It panics if kind is 0 or if payload has more
// than MaxRecord-1 bytes, because recovery would treat such a record as damage.
func AppendRecord(buf []byte, kind byte, payload []byte) []byte {
	if kind == 0 || len(payload) >= MaxRecord {
		panic(fmt.Sprintf("invalid log record: kind %d, payload of %d bytes", kind, len(payload)))
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

// Log is one log file. It is not safe for concurrent use, and the caller must ensure that only one
// Log writes to a path. A Log keeps no file open between calls, so thousands of logs need no file
// descriptors.
type Log struct {
	fsys         FS
	path         string
	identity     []byte
	size         int64 // bytes of the file
	needsRewrite bool  // Append returns ErrLogBroken until a Rewrite or Create succeeds
	unsynced     bool  // the file may have bytes that are not synced
	newEntry     bool  // the entry of the file in its directory may not be synced
}

// NewLog returns a log that does not exist on disk yet. The first Create or Rewrite creates its file
// and replaces any existing file at path. Until then, Append fails. The identity names the owner of
// the log, for example a site's cluster ID, and may be empty. NewLog does no I/O.
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

type logHeader struct {
	version  int
	identity []byte
	size     int // bytes; 0 means that the header is damaged
}

// parseLogHeader parses the header with which a log begins. It returns a zero logHeader if the
// header is damaged. It accepts every version. The caller must check the version.
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

// header returns the header of the file.
func (l *Log) header() ([]byte, error) {
	if len(l.identity) > MaxIdentity {
		return nil, fmt.Errorf("identity of %d bytes, limit %d", len(l.identity), MaxIdentity)
	}
	return appendLogHeader(nil, l.identity), nil
}

// Create creates the file with a header and frames, in place of any file at the path. frames must
// consist of whole records made by AppendRecord. If sync is true, Create also syncs the file and the
// directories that changed. Otherwise the file may be missing, empty or torn after a crash of the
// machine. Create creates the parent directory if necessary.
//
// Unlike Rewrite, Create writes the file at its path, so that it costs little. The path must
// therefore have no file whose records are still needed. If Create fails, it removes the file, and
// the log is as before. If the removal fails, recovery may find the records.
func (l *Log) Create(frames []byte, sync bool) error {
	header, err := l.header()
	if err != nil {
		return fmt.Errorf("creating %s: %w", l.path, err)
	}
	f, _, err := createFile(l.fsys, l.path)
	if err != nil {
		return fmt.Errorf("creating log: %w", err)
	}
	l.unsynced, l.newEntry = true, true
	data := append(header, frames...)
	if err := writeWhole(f, data); err != nil {
		err = errors.Join(err, f.Close(), l.fsys.Remove(l.path))
		return fmt.Errorf("creating log: %w", err)
	}
	if err := l.finishWrite(f, sync); err != nil {
		return errors.Join(err, l.fsys.Remove(l.path))
	}
	l.size, l.needsRewrite = int64(len(data)), false
	return nil
}

func writeWhole(f File, data []byte) error {
	n, err := f.Write(data)
	if err == nil && n < len(data) {
		err = io.ErrShortWrite
	}
	return err
}

// Append writes frames to the end of the file. frames must consist of whole records made by
// AppendRecord. If sync is true, Append also syncs the file, together with everything that was
// written before. Otherwise a crash of the machine may take the records: the file then ends early or
// in zeros.
//
// If a write fails, for example because the disk is full, Append cuts the file to its old size and
// the log stays usable. The log needs a Rewrite if the cut fails, if the file has vanished, or if
// the fsync or the close fails. After a failed fsync the kernel may have dropped the data and marked
// it as clean, so a second fsync would prove nothing (Rebello et al., "Can Applications Recover from
// fsync Failures?", 2020). If the log needs a Rewrite after an error, recovery after a crash may or
// may not find the records of this Append.
func (l *Log) Append(frames []byte, sync bool) error {
	if l.needsRewrite {
		return fmt.Errorf("appending to %s: %w", l.path, ErrLogBroken)
	}
	f, err := l.fsys.OpenFile(l.path, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		l.needsRewrite = errors.Is(err, fs.ErrNotExist)
		return fmt.Errorf("appending to log: %w", err)
	}
	if err := writeWhole(f, frames); err != nil {
		undo := f.Truncate(l.size)
		if undo == nil {
			undo = f.Sync()
		}
		l.needsRewrite = undo != nil
		return fmt.Errorf("appending to log: %w", errors.Join(err, undo, f.Close()))
	}
	l.unsynced = true
	if err := l.finishWrite(f, sync); err != nil {
		return err
	}
	l.size += int64(len(frames))
	return nil
}

// Sync makes everything durable that Create, Append and an earlier process have written. It does no
// I/O if there is nothing to sync. If the fsync fails or the file has vanished, the log needs a
// Rewrite.
func (l *Log) Sync() error {
	if l.needsRewrite {
		return fmt.Errorf("syncing %s: %w", l.path, ErrLogBroken)
	}
	if !l.unsynced {
		return nil
	}
	f, err := l.fsys.OpenFile(l.path, os.O_WRONLY, 0)
	if err != nil {
		l.needsRewrite = errors.Is(err, fs.ErrNotExist)
		return fmt.Errorf("syncing log: %w", err)
	}
	return l.finishWrite(f, true)
}

// finishWrite closes f, to which records were written. If sync is true, it first syncs f, and then
// the directories of the file if its entry is new. After an error the log needs a Rewrite. The error
// of Close counts only without sync, because a file system may report there that it could not write.
func (l *Log) finishWrite(f File, sync bool) (err error) {
	if sync {
		err = f.Sync()
	}
	if cerr := f.Close(); !sync {
		err = cerr
	}
	if err == nil && sync && l.newEntry {
		err = syncDirs(l.fsys, filepath.Dir(l.path), true)
	}
	switch {
	case err != nil:
		l.needsRewrite = true
		return fmt.Errorf("syncing log: %w", err)
	case sync:
		l.unsynced, l.newEntry = false, false
	}
	return nil
}

// Rewrite replaces the file by a new file with a header and the records that fill writes. fill must
// write whole records made by AppendRecord. Rewrite creates the parent directory if necessary.
//
// If Rewrite returns nil, the new file is durable and can be appended to. If Rewrite fails before
// it renames the new file into place, the old file is unchanged and the log is as usable as before.
// If Rewrite fails later, while syncing directories, either file may be found after a crash, and
// the log needs another Rewrite.
func (l *Log) Rewrite(fill func(w io.Writer) error) error {
	header, err := l.header()
	if err != nil {
		return fmt.Errorf("rewriting %s: %w", l.path, err)
	}
	size, renamed, err := replaceFile(l.fsys, l.path, func(w io.Writer) error {
		if _, err := w.Write(header); err != nil {
			return err
		}
		return fill(w)
	})
	if renamed {
		l.size, l.needsRewrite, l.unsynced, l.newEntry = size, err != nil, false, false
	}
	if err != nil {
		return fmt.Errorf("rewriting log: %w", err)
	}
	return nil
}

// RewriteWith is a Rewrite for a caller that has all records in memory. frames must consist of
// whole records made by AppendRecord.
func (l *Log) RewriteWith(frames []byte) error {
	return l.Rewrite(func(w io.Writer) error {
		_, err := w.Write(frames)
		return err
	})
}

// Size returns the size of the file in bytes. It returns 0 if the log was never written or was
// removed.
func (l *Log) Size() int64 { return l.size }

// Identity returns the identity in the header. The caller must not change it.
func (l *Log) Identity() []byte { return l.identity }

// MustBeRewritten reports whether Append would return ErrLogBroken.
func (l *Log) MustBeRewritten() bool { return l.needsRewrite }

// Remove deletes the file durably. A missing file is not an error. Copies of the file that recovery
// set aside are not deleted. Afterwards the log is in the same state as after NewLog. If Remove
// fails while syncing the directory, the file is deleted, but a crash may restore it.
func (l *Log) Remove() error {
	err := l.fsys.Remove(l.path)
	if err == nil || errors.Is(err, fs.ErrNotExist) {
		*l = *NewLog(l.fsys, l.path, l.identity)
		err = l.fsys.SyncDir(filepath.Dir(l.path))
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("removing log: %w", err)
	}
	return nil
}
