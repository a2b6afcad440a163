package main

// Tests of appending to logs, rewriting and removing logs: the format on disk, and failures of each
// file operation. Further tests are in log_recovery_test.go and log_crash_test.go.

import (
	"encoding/hex"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
)

// The format of a log does not change between releases that use the same log version.
func TestLogFormat(t *testing.T) {
	got := append(appendLogHeader(nil, []byte("id")), logFrames(logRec{5, "123456789"})...)
	const want = "746d6c6f672d320a" + "02000000" + "6964" + "63f101a7" +
		"0a000000" + "69040553" + "baba6a8a" + "05" + "313233343536373839"
	if hex.EncodeToString(got) != want {
		t.Errorf("header and record on disk:\n got %x\nwant %s", got, want)
	}
}

// AppendRecord panics if the kind is 0 or if the payload is too long.
func TestAppendRecordPanics(t *testing.T) {
	for name, f := range map[string]func(){
		"kind 0":           func() { AppendRecord(nil, 0, []byte("x")) },
		"payload too long": func() { AppendRecord(nil, 1, make([]byte, MaxRecord)) },
	} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("%s: AppendRecord did not panic", name)
				}
			}()
			f()
		}()
	}
}

// If a file operation of Append fails, the record is not found later, provided that a log that must
// be rewritten is rewritten first. The log stays usable if the failed write could be undone.
// Otherwise the log must be rewritten before it can be appended to again.
func TestLogAppendFails(t *testing.T) {
	a, b, d := logRec{1, "a"}, logRec{2, "b"}, logRec{4, "d"}
	for _, tt := range []struct {
		name   string
		hook   func(int, string, string) fault
		err    error // the error that Append returns
		broken bool  // the log must be rewritten afterwards
	}{
		{"open", failOn("open", "", 1, syscall.EMFILE), syscall.EMFILE, false},
		{"file vanished", failOn("open", "", 1, fs.ErrNotExist), fs.ErrNotExist, true},
		{"short write", failOn("write", "", 1, errFull), errFull, false},
		{"fsync", failOn("sync", "", 1, errDisk), errDisk, true},
		{"short write, then truncate", func(_ int, op, _ string) fault {
			switch op {
			case "write":
				return fault{Err: errFull}
			case "truncate":
				return fault{Err: errDisk}
			}
			return fault{}
		}, errFull, true},
		{"short write, then fsync", func(_ int, op, _ string) fault {
			switch op {
			case "write":
				return fault{Err: errFull}
			case "sync":
				return fault{Err: errDisk}
			}
			return fault{}
		}, errDisk, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c, l := newTestLog(t)
			size := l.Size()
			c.hook = tt.hook
			if err := l.Append(logFrames(b), true); !errors.Is(err, tt.err) || l.MustBeRewritten() != tt.broken || l.Size() != size {
				t.Fatalf("failing append: got error %v, must be rewritten %v, size %d; want %v, %v, %d",
					err, l.MustBeRewritten(), l.Size(), tt.err, tt.broken, size)
			}
			c.hook = nil
			if tt.broken {
				if err := l.Append(logFrames(d), true); !errors.Is(err, ErrLogBroken) {
					t.Fatalf("appending to a broken log: got error %v, want ErrLogBroken", err)
				}
				if err := l.Rewrite(writing(logFrames(a))); err != nil || l.MustBeRewritten() {
					t.Fatalf("rewriting a broken log: %v, must be rewritten %v", err, l.MustBeRewritten())
				}
			}
			if err := l.Append(logFrames(d), true); err != nil || c.open != 0 {
				t.Fatalf("appending after the failure: %v, %d files open", err, c.open)
			}
			if got := reopenLog(t, c); !slices.Equal(got, []logRec{a, d}) {
				t.Errorf("records after a crash: got %v, want %v", got, []logRec{a, d})
			}
		})
	}
}

// A Create is tried with each of its file operations failing in turn. It then leaves no file, unless the
// file cannot be removed either, and can be tried again.
func TestLogCreateFails(t *testing.T) {
	a, b := logRec{1, "a"}, logRec{2, "b"}
	for _, sync := range []bool{true, false} {
		for i := 0; ; i++ {
			c := newCrashFS(1)
			l := NewLog(c, logPath, []byte("me"))
			var failed string
			c.hook = func(at int, op, name string) fault {
				if at != i {
					return fault{}
				}
				failed = op + " " + name
				return fault{Err: errFull}
			}
			err := l.Create(logFrames(a), sync)
			c.hook = nil
			if failed == "" || sync && strings.HasPrefix(failed, "close") { // the error of Close does not count after a sync
				if err != nil || l.MustBeRewritten() {
					t.Fatalf("Create with sync %t: %v, must be rewritten %v", sync, err, l.MustBeRewritten())
				}
				if failed == "" {
					break
				}
				continue
			}
			if !errors.Is(err, errFull) || !l.MustBeRewritten() || l.Size() != 0 || len(c.names()) != 0 || c.open != 0 {
				t.Fatalf("%s failed, sync %t: got error %v, must be rewritten %v, files %q, %d open", failed, sync, err, l.MustBeRewritten(), c.names(), c.open)
			}
			if err := errors.Join(l.Create(logFrames(a), sync), l.Append(logFrames(b), true)); err != nil {
				t.Fatalf("%s failed, sync %t: Create and Append afterwards: %v", failed, sync, err)
			}
			if got := reopenLog(t, c); !slices.Equal(got, []logRec{a, b}) {
				t.Fatalf("%s failed, sync %t: records after a crash: got %v", failed, sync, got)
			}
		}
	}
	if err := NewLog(newCrashFS(1, "/d"), logPath, make([]byte, MaxIdentity+1)).Create(nil, true); err == nil {
		t.Errorf("creating a log with an identity of %d bytes succeeded", MaxIdentity+1)
	}
}

// Without sync, an Append fails if the file cannot be closed, and the log must be rewritten. Sync makes
// everything durable that was not synced. It does no I/O if there is nothing to sync, and fails on a log
// that must be rewritten.
func TestLogSync(t *testing.T) {
	a, b := logRec{1, "a"}, logRec{2, "b"}
	c, l := newTestLog(t)
	if err := errors.Join(l.Append(logFrames(b), false), l.Sync()); err != nil {
		t.Fatal(err)
	}
	if got := reopenLog(t, c); !slices.Equal(got, []logRec{a, b}) {
		t.Errorf("records after Sync and a crash: got %v", got)
	}
	c.hook = failOn("open", "", 0, errDisk)
	if err := l.Sync(); err != nil {
		t.Errorf("Sync without anything to sync: %v", err)
	}
	c.hook = failOn("close", "", 1, errFull)
	if err := l.Append(logFrames(b), false); !errors.Is(err, errFull) || !l.MustBeRewritten() {
		t.Errorf("an Append that cannot close the file: %v, must be rewritten %v", err, l.MustBeRewritten())
	}
	if err := l.Sync(); !errors.Is(err, ErrLogBroken) {
		t.Errorf("Sync of a log that must be rewritten: got error %v, want %v", err, ErrLogBroken)
	}
	for op, want := range map[string]error{"open": fs.ErrNotExist, "sync": errDisk} {
		c, l := newTestLog(t)
		if err := l.Append(logFrames(b), false); err != nil {
			t.Fatal(err)
		}
		c.hook = failOn(op, "", 1, want)
		if err := l.Sync(); !errors.Is(err, want) || !l.MustBeRewritten() || c.open != 0 {
			t.Errorf("%s fails in Sync: got error %v, must be rewritten %v, %d files open", op, err, l.MustBeRewritten(), c.open)
		}
	}
}

// A Rewrite is tried with each of its file operations failing in turn. The old log then stays
// usable. The exception is a failed sync of a directory, after which the log must be rewritten
// again.
func TestLogRewriteFails(t *testing.T) {
	a, b, n := logRec{1, "a"}, logRec{2, "b"}, logRec{3, strings.Repeat("new", 50000)}
	for i := 0; ; i++ {
		c, l := newTestLog(t)
		var failed string
		c.hook = func(at int, op, name string) fault {
			if at == i {
				failed = op + " " + name
				return fault{Err: errFull}
			}
			return fault{}
		}
		err := l.Rewrite(writing(logFrames(n)))
		if failed == "" {
			if i < 8 || err != nil {
				t.Fatalf("Rewrite has only %d operations, or fails without a fault: %v", i, err)
			}
			return
		}
		c.hook = nil
		want := []logRec{a, b}
		if strings.HasPrefix(failed, "syncdir") {
			if !l.MustBeRewritten() {
				t.Fatalf("%s failed: the log need not be rewritten", failed)
			}
			if err := l.Rewrite(writing(logFrames(n))); err != nil {
				t.Fatal(err)
			}
			want[0] = n
		}
		if !errors.Is(err, errFull) || l.MustBeRewritten() || !slices.Equal(c.names(), []string{logPath}) {
			t.Fatalf("%s failed: Rewrite returned %v, must be rewritten %v, files %q", failed, err, l.MustBeRewritten(), c.names())
		}
		if err := l.Append(logFrames(b), true); err != nil || c.open != 0 {
			t.Fatalf("%s failed: appending afterwards: %v, %d files open", failed, err, c.open)
		}
		if got := reopenLog(t, c); !slices.Equal(got, want) {
			t.Fatalf("%s failed: records after a crash: got %v, want %v", failed, got, want)
		}
	}
}

// A Rewrite whose fill function fails, or whose identity is too long, leaves the old log unchanged.
func TestLogRewriteKeepsOldLog(t *testing.T) {
	c, l := newTestLog(t)
	oops := errors.New("oops")
	err := l.Rewrite(func(w io.Writer) error {
		if _, err := w.Write(make([]byte, 1<<20)); err != nil {
			return err
		}
		return oops
	})
	if !errors.Is(err, oops) || l.MustBeRewritten() || !slices.Equal(c.names(), []string{logPath}) {
		t.Errorf("the fill function fails: Rewrite returned %v, must be rewritten %v, files %q", err, l.MustBeRewritten(), c.names())
	}
	if err := NewLog(c, logPath, make([]byte, MaxIdentity+1)).Rewrite(writing(nil)); err == nil {
		t.Errorf("rewriting a log with an identity of %d bytes succeeded", MaxIdentity+1)
	}
	if got := reopenLog(t, c); !slices.Equal(got, []logRec{{1, "a"}}) {
		t.Errorf("records after a crash: got %v, want the old one", got)
	}
}

// Rewrite creates a missing directory of the log, but no further parents. If the process has no
// permission to sync the parent directory, this is an error only if the directory is new.
func TestLogRewriteDirectories(t *testing.T) {
	c, l := newTestLog(t)
	c.hook = failOn("syncdir", "/", 1, fs.ErrPermission)
	if err := l.Rewrite(writing(nil)); err != nil {
		t.Errorf("existing directory whose parent cannot be synced: %v", err)
	}
	if err := NewLog(c, "/e/x.log", nil).Rewrite(writing(nil)); err != nil {
		t.Errorf("missing directory: %v", err)
	}
	c.hook = failOn("syncdir", "/", 1, fs.ErrPermission)
	if err := NewLog(c, "/f/x.log", nil).Rewrite(writing(nil)); !errors.Is(err, fs.ErrPermission) {
		t.Errorf("new directory whose parent cannot be synced: got error %v, want %v", err, fs.ErrPermission)
	}
	if err := NewLog(c, "/no/where/x.log", nil).Rewrite(writing(nil)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("two missing directories: got error %v, want %v", err, fs.ErrNotExist)
	}
}

// Remove deletes the file durably, and a second Remove returns no error. Afterwards the log must be
// rewritten before it can be appended to.
func TestLogRemove(t *testing.T) {
	c, l := newTestLog(t)
	for range 2 {
		if err := l.Remove(); err != nil || l.Size() != 0 {
			t.Errorf("removing the log: %v, size %d", err, l.Size())
		}
		c.crash()
		if len(c.names()) != 0 {
			t.Errorf("files after a crash: got %q, want none", c.names())
		}
	}
	if err := l.Append(logFrames(logRec{1, "a"}), true); !errors.Is(err, ErrLogBroken) {
		t.Errorf("appending to a removed log: got error %v, want ErrLogBroken", err)
	}
	if err := NewLog(c, "/no/x.log", nil).Remove(); err != nil {
		t.Errorf("removing a log that was never written: %v", err)
	}
	if _, _, err := OpenLog(c, logPath, nil); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("opening a removed log: got error %v, want %v", err, fs.ErrNotExist)
	}
}

// A Remove that cannot delete the file leaves the log usable. If the file is deleted but the
// directory cannot be synced, the log must be rewritten, and Remove can be tried again.
func TestLogRemoveFails(t *testing.T) {
	c, l := newTestLog(t)
	c.hook = failOn("remove", "", 1, errDisk)
	if err := l.Remove(); !errors.Is(err, errDisk) || l.MustBeRewritten() {
		t.Errorf("deleting the file fails: got error %v, must be rewritten %v", err, l.MustBeRewritten())
	}
	c.hook = failOn("syncdir", "/d", 1, errDisk)
	if err := l.Remove(); !errors.Is(err, errDisk) || !l.MustBeRewritten() {
		t.Errorf("syncing the directory fails: got error %v, must be rewritten %v", err, l.MustBeRewritten())
	}
	if err := l.Remove(); err != nil || l.Size() != 0 {
		t.Errorf("removing the log again: %v, size %d", err, l.Size())
	}
}

// diskLog returns a log with the records a and b on the real file system, in a directory that
// Rewrite creates.
func diskLog(t *testing.T) (l *Log, path string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "3f", "x.log")
	if _, _, err := OpenLog(DiskFS{}, path, nil); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("opening a log that does not exist: got error %v, want %v", err, fs.ErrNotExist)
	}
	l = NewLog(DiskFS{}, path, []byte("me"))
	if err := l.Rewrite(writing(logFrames(logRec{1, "a"}))); err != nil {
		t.Fatal(err)
	}
	if err := l.Append(logFrames(logRec{2, "b"}), true); err != nil {
		t.Fatal(err)
	}
	return l, path
}

// On the real file system, a torn log is recovered, appended to and removed as on the file system
// in memory.
func TestLogOnDisk(t *testing.T) {
	_, path := diskLog(t)
	record := logFrames(logRec{3, "c"})
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.Write(record[:len(record)-1]); err != nil {
		t.Fatal(err)
	}
	f.Close()
	var got []logRec
	l, r, err := OpenLog(DiskFS{}, path, collectLog(&got))
	if err != nil || r.TornBytes != int64(len(record)-1) || r.Err != nil || !slices.Equal(got, []logRec{{1, "a"}, {2, "b"}}) {
		t.Fatalf("opening a torn log: got records %v, %+v, %v", got, r, err)
	}
	if err := l.Append(record, true); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(path); err != nil || info.Size() != l.Size() || info.Mode().Perm() != 0o600 {
		t.Errorf("log file: got %v, %v; want %d bytes, mode 0600", info, err, l.Size())
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := l.Append(record, true); !errors.Is(err, fs.ErrNotExist) || !l.MustBeRewritten() {
		t.Errorf("appending to a file that has vanished: got error %v, must be rewritten %v", err, l.MustBeRewritten())
	}
	if err := l.Remove(); err != nil {
		t.Errorf("removing a log whose file has vanished: %v", err)
	}
}

// ListLogs returns the logs and the subdirectories of a directory. It fails if the directory
// contains a special file, because a Rewrite could replace the special file by a regular file.
func TestListLogs(t *testing.T) {
	_, path := diskLog(t)
	dir := filepath.Dir(path)
	if _, dirs, err := ListLogs(DiskFS{}, filepath.Dir(dir)); err != nil || !slices.Equal(dirs, []string{dir}) {
		t.Fatalf("subdirectories: got %q, %v; want %q", dirs, err, dir)
	}
	if logs, _, err := ListLogs(DiskFS{}, dir); err != nil || !slices.Equal(logs, []string{path}) {
		t.Fatalf("logs: got %q, %v; want %q", logs, err, path)
	}
	for name, create := range map[string]func(path string) error{
		"link.log": func(p string) error { return os.Symlink(path, p) },
		"loop.log": func(p string) error { return os.Symlink(p, p) },
		"dir.log":  func(p string) error { return os.Mkdir(p, 0o700) },
		"pipe.log": func(p string) error { return syscall.Mkfifo(p, 0o600) },
		"ab":       func(p string) error { return os.Symlink(dir, p) },
	} {
		special := filepath.Join(dir, name)
		if err := create(special); err != nil {
			t.Fatal(err)
		}
		if _, _, err := ListLogs(DiskFS{}, dir); err == nil || !strings.Contains(err.Error(), special+" is not a regular file") {
			t.Errorf("directory with special file %s: got error %v", name, err)
		}
		if err := os.Remove(special); err != nil {
			t.Fatal(err)
		}
	}
}

// A symbolic link in the place of a log or of its temporary file is never followed. Append and
// OpenLog then fail. Rewrite replaces the link. The target of the link stays unchanged.
func TestLogFollowsNoLinks(t *testing.T) {
	for _, tt := range []struct {
		name, link string // the link is at the path of the log plus this suffix
		use        func(l *Log, path string) error
		want       error
	}{
		{"Append", "", func(l *Log, _ string) error { return l.Append(logFrames(logRec{3, "c"}), true) }, syscall.ELOOP},
		{"OpenLog", "", func(_ *Log, path string) error {
			_, _, err := OpenLog(DiskFS{}, path, func(byte, []byte) error { return nil })
			return err
		}, syscall.ELOOP},
		{"Sync", "", func(l *Log, _ string) error { l.unsynced = true; return l.Sync() }, syscall.ELOOP},
		{"cutting a torn end", "", func(l *Log, _ string) error { return l.cutTornEnd(1) }, syscall.ELOOP},
		{"Rewrite", "", func(l *Log, _ string) error { return l.RewriteWith(nil) }, nil},
		{"Rewrite", logTempSuffix, func(l *Log, _ string) error { return l.RewriteWith(nil) }, nil},
	} {
		synctest.Test(t, func(t *testing.T) { // the retries of OpenLog take no real time
			name := tt.name + " with a link at the log's path" + tt.link
			l, path := diskLog(t)
			target := filepath.Join(t.TempDir(), "target")
			content, err := os.ReadFile(path)
			if err == nil {
				err = os.WriteFile(target, content, 0o600)
			}
			if err == nil && tt.link == "" {
				err = os.Remove(path)
			}
			if err == nil {
				err = os.Symlink(target, path+tt.link)
			}
			if err != nil {
				t.Fatal(err)
			}
			if err := tt.use(l, path); !errors.Is(err, tt.want) {
				t.Errorf("%s: got error %v, want %v", name, err, tt.want)
			}
			if now, err := os.ReadFile(target); err != nil || !slices.Equal(now, content) {
				t.Errorf("%s: the target of the link changed to %q, %v", name, now, err)
			}
			if tt.want == nil {
				var got []logRec
				if _, _, err := OpenLog(DiskFS{}, path, collectLog(&got)); err != nil || len(got) > 0 {
					t.Errorf("%s: opening the rewritten log: got records %v, error %v; want an empty log", name, got, err)
				}
			}
		})
	}
}

// Rewrite removes a temporary file that a crash left, and creates the file anew. If a file appears
// there in the meantime, Rewrite fails, and leaves that file and the log unchanged.
func TestLogRewriteTempFileExists(t *testing.T) {
	const temp = logPath + logTempSuffix
	a, n := logRec{1, "a"}, logRec{2, "new"}
	c, l := newTestLog(t)
	leftOver := &crashNode{data: []byte("left by a crash")}
	c.entries[temp] = leftOver
	if err := l.Rewrite(writing(logFrames(n))); err != nil || c.entries[logPath] == leftOver {
		t.Errorf("with a temporary file of a crash: got error %v; the log is the same file: %v", err, c.entries[logPath] == leftOver)
	}
	if got := reopenLog(t, c); !slices.Equal(got, []logRec{n}) || !slices.Equal(c.names(), []string{logPath}) {
		t.Errorf("records after a crash: got %v in the files %q, want %v", got, c.names(), n)
	}

	c, l = newTestLog(t)
	c.hook = func(_ int, op, name string) fault {
		if op == "open" && name == temp {
			c.entries[temp] = &crashNode{data: []byte("of another process")}
		}
		return fault{}
	}
	if err := l.Rewrite(writing(logFrames(n))); !errors.Is(err, fs.ErrExist) || l.MustBeRewritten() {
		t.Errorf("with a file that appears: got error %v, must be rewritten %v; want %v", err, l.MustBeRewritten(), fs.ErrExist)
	}
	if got := c.contents()[temp]; got != "of another process" {
		t.Errorf("the file that appeared has now the content %q", got)
	}
	if got := reopenLog(t, c); !slices.Equal(got, []logRec{a}) {
		t.Errorf("records after a crash: got %v, want %v", got, a)
	}
}

// With any payloads, all records that were written are read back, and a file whose end is cut off
// is torn but not damaged. After a flipped bit, at most one written record is missing, although
// recovery may deliver records that payloads forge.
func FuzzAppendRecord(f *testing.F) {
	f.Add(byte(1), []byte("a"), []byte("b"), uint(3), uint(200))
	f.Add(byte(0), []byte{}, logFrames(logRec{1, "x"}), uint(0), uint(0))
	f.Fuzz(func(t *testing.T, kind byte, p, q []byte, cut, flip uint) {
		want := []logRec{{max(kind, 1), string(p)}, {2, string(q)}, {3, "end"}}
		data := append(appendLogHeader(nil, p[:min(len(p), MaxIdentity)]), logFrames(want...)...)
		if _, _, r, got := recoverLog(t, data); r.Damaged != 0 || r.HeaderDamaged || !slices.Equal(got, want) {
			t.Fatalf("intact log: got records %v, want %v; %+v", got, want, r)
		}
		body := len(logFrames(want...))
		at := len(data) - int(cut%uint(body+1))
		_, _, r, got := recoverLog(t, data[:at])
		if r.Damaged != 0 || r.HeaderDamaged || len(got) > 3 || !slices.Equal(got, want[:len(got)]) {
			t.Fatalf("log cut at byte %d: got records %v of %v; %+v", at, got, want, r)
		}
		bit := int(flip % uint(8*len(data)))
		data[bit/8] ^= 1 << (bit % 8)
		_, l, r, got := recoverLog(t, data)
		if !l.MustBeRewritten() || r.TornBytes != 0 {
			t.Fatalf("log with bit %d flipped: must be rewritten %v, %+v", bit, l.MustBeRewritten(), r)
		}
		missing := 0
		for _, w := range want {
			if !slices.Contains(got, w) {
				missing++
			}
		}
		if missing > 1 {
			t.Fatalf("log with bit %d flipped: %d records are missing in %v", bit, missing, got)
		}
	})
}
