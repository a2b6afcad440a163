package main

// log.go: append-only files of framed, checksummed records: append, sync,
// recover, rewrite. It owns two promises: what Append acknowledged survives any
// crash, and what a damaged file still holds on either side of the damage is
// delivered, with the damage counted and a copy kept. It must not know what a
// record means; it uses no other room.

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// A file is a header (magic, uint32 length of the identity, identity, CRC) and
// records; integers are little endian, every CRC is CRC32C (Castagnoli):
//
//	uint32 n      length of kind and payload, 1 to MaxRecord
//	uint32 body   CRC of kind and payload
//	uint32 head   CRC of the eight bytes before it
//	kind, payload kind is never 0
//
// The head has a CRC of its own because a length that can be trusted is what
// tells a torn record (the file is shorter than the length says) from a damaged
// one, even at the end of the file; because it lets recovery step over a damaged
// body without believing anything inside it; and because a search for the next
// record is then cheap. It costs 4 bytes beside an fsync.
//
// Names: a log ends in LogSuffix; beside it may lie <name>.tmp (a rewrite that
// a crash cut short, overwritten by the next) and <name>.damaged, .damaged-2,
// .damaged-3 (copies set aside).
const (
	LogSuffix   = ".log"   // every name given to NewLog ends so; nothing else this room writes does
	MaxRecord   = 64 << 20 // bytes of kind and payload of one record
	MaxIdentity = 1024     // bytes

	logMagic         = "tmlog-1\n"
	recordHead       = 12
	logTempSuffix    = ".tmp"
	logDamagedSuffix = ".damaged"
	maxLogsAside     = 3 // copies of damaged files kept per log

	firstReadPause = 50 * time.Millisecond // between tries to read; it doubles
	lastReadPause  = 800 * time.Millisecond
)

// ErrBroken is returned by Append while the file must not be appended to: it
// was never written, or damaged, or what the kernel holds of it is unknown. A
// Rewrite that succeeds mends it.
var ErrBroken = errors.New("log must be rewritten before it is appended to")

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// DiskFull reports that an error is for want of room, which may come back.
func DiskFull(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)
}

// FS is the part of a file system that a log needs. Names are as for package
// os; SyncDir makes the entries of a directory durable.
type FS interface {
	OpenFile(name string, flag int, perm fs.FileMode) (File, error)
	ReadFile(name string) ([]byte, error)
	ReadDir(name string) ([]fs.DirEntry, error)
	Mkdir(name string, perm fs.FileMode) error
	Rename(old, new string) error
	Remove(name string) error
	SyncDir(name string) error
}

// File is an open file of an FS.
type File interface {
	io.Writer
	Sync() error
	Truncate(size int64) error
	Close() error
}

// DiskFS is the operating system's file system.
type DiskFS struct{}

func (DiskFS) OpenFile(name string, flag int, perm fs.FileMode) (File, error) {
	f, err := os.OpenFile(name, flag, perm)
	if err != nil {
		return nil, err // not f: a nil *os.File is not a nil File
	}
	return f, nil
}

func (DiskFS) ReadFile(name string) ([]byte, error)       { return os.ReadFile(name) }
func (DiskFS) ReadDir(name string) ([]fs.DirEntry, error) { return os.ReadDir(name) }
func (DiskFS) Mkdir(name string, perm fs.FileMode) error  { return os.Mkdir(name, perm) }
func (DiskFS) Rename(old, new string) error               { return os.Rename(old, new) }
func (DiskFS) Remove(name string) error                   { return os.Remove(name) }

// SyncDir takes EINVAL for success: it is how a file system says that it has
// no such thing as syncing a directory (PostgreSQL's fsync_fname does the same).
func (DiskFS) SyncDir(name string) error {
	d, err := os.Open(name)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := d.Sync(); err != nil && !errors.Is(err, syscall.EINVAL) {
		return err
	}
	return nil
}

// LockDir creates dir if need be, durably, and takes an exclusive lock on the
// file "lock" in it, so that no two processes write the same logs. The lock
// lasts until release, which must be kept reachable, or the end of the process.
// The file stays behind: removing it would let two processes lock two files.
func LockDir(dir string) (release func() error, err error) {
	if err := mkdirAll(dir); err != nil {
		return nil, fmt.Errorf("creating directory: %w", err)
	}
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("opening lock file: %w", err)
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, syscall.EWOULDBLOCK) {
			return nil, fmt.Errorf("directory %s is in use by another process", dir)
		}
		return nil, fmt.Errorf("locking %s: %w", f.Name(), err)
	}
	return f.Close, nil
}

// mkdirAll is os.MkdirAll that syncs each parent whose entry it made.
func mkdirAll(dir string) error {
	err := os.Mkdir(dir, 0o700)
	if errors.Is(err, fs.ErrNotExist) && filepath.Dir(dir) != dir {
		if err := mkdirAll(filepath.Dir(dir)); err != nil {
			return err
		}
		err = os.Mkdir(dir, 0o700)
	}
	if err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return syncParent(DiskFS{}, dir, err == nil)
}

// syncParent makes dir's own entry durable. A directory found existing is no
// proof that it is durable (who made it may not have synced yet, or was
// killed), so it is synced too; but one whose parent is closed to us was made
// by somebody else long ago.
func syncParent(fsys FS, dir string, made bool) error {
	err := fsys.SyncDir(filepath.Dir(dir))
	if !made && errors.Is(err, fs.ErrPermission) {
		return nil
	}
	return err
}

// ReadAgain calls read until it returns no error, with pauses of about 1.5 s in all. A read
// error may pass, and says nothing about the content of a file. fs.ErrNotExist is returned
// at once.
func ReadAgain[T any](read func() (T, error)) (T, error) {
	for pause := firstReadPause; ; pause *= 2 {
		got, err := read()
		if err == nil || errors.Is(err, fs.ErrNotExist) || pause > lastReadPause {
			return got, err
		}
		time.Sleep(pause)
	}
}

func readFile(fsys FS, name string) ([]byte, error) {
	return ReadAgain(func() ([]byte, error) { return fsys.ReadFile(name) })
}

// ListLogs returns the paths of the logs in dir and of its subdirectories. It
// syncs dir first: a file that a killed process renamed into place but did not
// see synced is durable from here on, so that an Append to it can be believed.
// A symbolic link, a pipe or the like is an error, and so is a directory with a
// log's name: no log lies there, and a Rewrite would put one in its place.
func ListLogs(fsys FS, dir string) (logs, dirs []string, err error) {
	if err := fsys.SyncDir(dir); err != nil {
		return nil, nil, fmt.Errorf("syncing directory of logs: %w", err)
	}
	entries, err := ReadAgain(func() ([]fs.DirEntry, error) { return fsys.ReadDir(dir) })
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
			dirs = append(dirs, path)
		case log:
			logs = append(logs, path)
		}
	}
	return logs, dirs, nil
}

// AppendRecord appends one framed record to buf and returns it. Kind 0 and more
// than MaxRecord-1 bytes of payload are the caller's mistake: it panics, since
// recovery would take either for damage.
func AppendRecord(buf []byte, kind byte, payload []byte) []byte {
	if kind == 0 || len(payload) >= MaxRecord {
		panic(fmt.Sprintf("log record of kind %d with %d bytes", kind, len(payload)))
	}
	at := len(buf)
	buf = binary.LittleEndian.AppendUint32(buf, uint32(1+len(payload)))
	buf = append(buf, make([]byte, recordHead-4)...)
	buf = append(append(buf, kind), payload...)
	head := buf[at:]
	binary.LittleEndian.PutUint32(head[4:], crc32.Checksum(head[recordHead:], castagnoli))
	binary.LittleEndian.PutUint32(head[8:], crc32.Checksum(head[:8], castagnoli))
	return buf
}

// Log is one file. It is not safe for concurrent use: one writer per log is the
// caller's duty. It holds no file open between calls, so that thousands of logs
// cost no descriptors.
type Log struct {
	fsys     FS
	path     string
	identity []byte
	size     int64
	broken   bool
}

// NewLog returns a log that is not on disk, and broken, until its first Rewrite,
// which replaces what lies at path. The identity says whose log it is; it may be
// empty. NewLog does no I/O.
func NewLog(fsys FS, path string, identity []byte) *Log {
	return &Log{fsys: fsys, path: path, identity: bytes.Clone(identity), broken: true}
}

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
// The error is that of reading the file (fs.ErrNotExist if there is none), or the
// copies of it set aside before, and stays after several tries; nothing was
// changed then, and the file may be good. A later failure is in Recovery.Err and leaves
// the log Broken.
func OpenLog(fsys FS, path string, each func(kind byte, payload []byte) error) (*Log, Recovery, error) {
	data, err := readFile(fsys, path)
	if err != nil {
		return nil, Recovery{}, fmt.Errorf("reading log: %w", err)
	}
	identity, start := parseLogHeader(data)
	rec := Recovery{Identity: identity, HeaderDamaged: start == 0}
	rec.scan(data, start, each)
	l := &Log{fsys: fsys, path: path, identity: identity, size: int64(len(data))}
	if rec.HeaderDamaged || rec.Damaged > 0 {
		l.broken = true
		if len(data) == 0 {
			return l, rec, nil // nothing to keep
		}
		name, there, err := asideName(fsys, path, data)
		if err != nil {
			return nil, Recovery{}, fmt.Errorf("reading a copy of a damaged log: %w", err)
		}
		if rec.SetAside, err = setAside(fsys, name, there, data); err != nil {
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
	if n == 0 || n > MaxRecord || crc32.Checksum(b[:8], castagnoli) != binary.LittleEndian.Uint32(b[8:]) {
		return 0, false
	}
	return recordHead + int(n), true
}

// bodyOK checks the body of a complete frame.
func bodyOK(frame []byte) bool {
	return frame[recordHead] != 0 && crc32.Checksum(frame[recordHead:], castagnoli) == binary.LittleEndian.Uint32(frame[4:])
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

func appendLogHeader(buf, identity []byte) []byte {
	buf = append(buf, logMagic...)
	buf = binary.LittleEndian.AppendUint32(buf, uint32(len(identity)))
	buf = append(buf, identity...)
	return binary.LittleEndian.AppendUint32(buf, crc32.Checksum(buf, castagnoli))
}

// parseLogHeader returns the identity and the header's size, or 0 if it is damaged.
func parseLogHeader(data []byte) (identity []byte, size int) {
	const fixed = len(logMagic) + 4
	if len(data) < fixed || string(data[:len(logMagic)]) != logMagic {
		return nil, 0
	}
	n := binary.LittleEndian.Uint32(data[len(logMagic):])
	if n > MaxIdentity || len(data) < fixed+int(n)+4 {
		return nil, 0
	}
	end := fixed + int(n)
	if crc32.Checksum(data[:end], castagnoli) != binary.LittleEndian.Uint32(data[end:]) {
		return nil, 0
	}
	return bytes.Clone(data[fixed:end]), end + 4
}

// asideName chooses the name of the copy of a damaged file. One that is there
// already, as after a crash before the Rewrite, is not made twice; when all names
// are taken the last is overwritten, so that the first damage and the newest are
// kept.
func asideName(fsys FS, path string, data []byte) (name string, there bool, err error) {
	name = path + logDamagedSuffix
	for n := 2; ; n++ {
		old, err := readFile(fsys, name)
		if errors.Is(err, fs.ErrNotExist) {
			return name, false, nil
		}
		if there = err == nil && bytes.Equal(old, data); there || err != nil || n > maxLogsAside {
			return name, there, err
		}
		name = path + logDamagedSuffix + "-" + strconv.Itoa(n)
	}
}

// setAside keeps a copy of a damaged file, and returns its name if it is there.
func setAside(fsys FS, name string, there bool, data []byte) (string, error) {
	if there {
		return name, fsys.SyncDir(filepath.Dir(name))
	}
	_, renamed, err := replaceFile(fsys, name, func(w io.Writer) error {
		_, err := w.Write(data)
		return err
	})
	if !renamed {
		name = ""
	}
	return name, err
}

// Append writes frames, whole records made by AppendRecord, and syncs them: if
// it returns nil they are durable. A failed write, a full disk say, is undone
// and the log stays usable. If it cannot be undone, or the file has vanished,
// the log is Broken, and so it is after a failed fsync: the kernel may then
// have dropped the data and call it clean, so a second fsync would prove
// nothing (Rebello et al., "Can Applications Recover from fsync Failures?",
// 2020). After an error of Append that leaves the log Broken its records may
// or may not be found after a crash.
func (l *Log) Append(frames []byte) error {
	if l.broken {
		return fmt.Errorf("appending to %s: %w", l.path, ErrBroken)
	}
	f, err := l.fsys.OpenFile(l.path, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		l.broken = errors.Is(err, fs.ErrNotExist)
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
		l.broken = undo != nil
		return fmt.Errorf("appending to log: %w", errors.Join(err, undo))
	}
	if err := f.Sync(); err != nil {
		l.broken = true
		return fmt.Errorf("syncing log: %w", err)
	}
	l.size += int64(n)
	return nil
}

// Rewrite replaces the file by a header and what fill writes (whole records
// made by AppendRecord): creation, compaction and mending. It makes the parent
// directory if that is missing. If it returns nil the new file is durable and
// the log is not Broken. If it fails the old file is untouched and the log is as
// usable as before, unless only the directory could not be synced: then either
// file may be found after a crash, and the log is Broken.
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
		l.size, l.broken = size, err != nil
	}
	if err != nil {
		return fmt.Errorf("rewriting log: %w", err)
	}
	return nil
}

// replaceFile puts what fill writes durably in the place of path, making its
// directory if need be. If renamed, an error is that of syncing directories.
func replaceFile(fsys FS, path string, fill func(io.Writer) error) (size int64, renamed bool, err error) {
	const flags = os.O_WRONLY | os.O_CREATE | os.O_TRUNC
	dir, temp := filepath.Dir(path), path+logTempSuffix
	f, err := fsys.OpenFile(temp, flags, 0o600)
	made := false
	if errors.Is(err, fs.ErrNotExist) {
		err = fsys.Mkdir(dir, 0o700)
		if made = err == nil; !made && !errors.Is(err, fs.ErrExist) {
			return 0, false, err
		}
		f, err = fsys.OpenFile(temp, flags, 0o600)
	}
	if err != nil {
		return 0, false, err
	}
	out := &logWriter{w: f}
	buf := bufio.NewWriterSize(out, 64<<10)
	if err = fill(buf); err == nil {
		err = buf.Flush()
	}
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = fsys.Rename(temp, path)
	}
	if err != nil {
		fsys.Remove(temp) // if that fails too, the next rewrite overwrites it
		return 0, false, err
	}
	if err = fsys.SyncDir(dir); err == nil {
		err = syncParent(fsys, dir, made)
	}
	return out.n, true, err
}

type logWriter struct {
	w io.Writer
	n int64
}

func (c *logWriter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += int64(n)
	return n, err
}

// Size returns the bytes of the file; 0 if it was never written or is removed.
func (l *Log) Size() int64 { return l.size }

// Identity returns what the header says; the caller must not change it.
func (l *Log) Identity() []byte { return l.identity }

// Broken tells whether Append would return ErrBroken.
func (l *Log) Broken() bool { return l.broken }

// Path returns the file's name as it was given.
func (l *Log) Path() string { return l.path }

// Remove deletes the file durably; one that is not there is no error. Copies
// set aside stay. The log is then as NewLog made it. If the file is gone but
// the directory could not be synced, a crash may bring it back.
func (l *Log) Remove() error {
	err := l.fsys.Remove(l.path)
	if err == nil || errors.Is(err, fs.ErrNotExist) {
		l.size, l.broken = 0, true
		err = l.fsys.SyncDir(filepath.Dir(l.path))
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("removing log: %w", err)
	}
	return nil
}
