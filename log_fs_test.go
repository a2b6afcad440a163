package main

// Tests of the interface to the disk: locking a directory, and setting files aside durably, under a
// free name, and with each file operation failing.

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
)

// LockDir creates the directory. A second lock fails until the first is released.
func TestLockDir(t *testing.T) {
	root := filepath.Join(t.TempDir(), "a", "b")
	release, err := LockDir(root)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := LockDir(root); err == nil || !strings.Contains(err.Error(), root+" is in use by another process") {
		t.Errorf("locking a locked directory: got error %v", err)
	}
	if err := release(); err != nil {
		t.Errorf("releasing the lock: %v", err)
	}
	if release, err = LockDir(root); err != nil {
		t.Fatalf("locking a released directory: %v", err)
	}
	if err := release(); err != nil {
		t.Errorf("releasing the second lock: %v", err)
	}
	file := filepath.Join(root, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := LockDir(file); err == nil {
		t.Error("locking a path that is a regular file succeeded")
	}
	if _, err := LockDir(filepath.Join(root, "lock")); err == nil {
		t.Error("locking the lock file itself as a directory succeeded")
	}
}

// LockDir refuses a directory that every user can write to, with an error that names the directory,
// its mode and the remedy. It then creates no file in the directory. It accepts a directory that
// only the group can write to.
func TestLockDirMode(t *testing.T) {
	for mode, want := range map[os.FileMode]string{
		0o700: "", 0o755: "", 0o770: "", 0o775: "", 0o777: "(mode 0777)", os.ModeSticky | 0o777: "(mode 0777)", 0o702: "(mode 0702)",
	} {
		dir := t.TempDir()
		if err := os.Chmod(dir, mode); err != nil {
			t.Fatal(err)
		}
		release, err := LockDir(dir)
		if want == "" {
			if err != nil {
				t.Errorf("%v: %v", mode, err)
			} else if err := release(); err != nil {
				t.Error(err)
			}
			continue
		}
		if text := fmt.Sprint(err); !strings.Contains(text, dir+" "+want) || !strings.Contains(text, "chmod -R o-w "+dir) {
			t.Errorf("%v: got error %v, want %q and the remedy", mode, err, dir+" "+want)
		}
		if files, err := os.ReadDir(dir); err != nil || len(files) > 0 {
			t.Errorf("%v: LockDir left the files %v, %v", mode, files, err)
		}
	}
}

// LockDir refuses a lock file that is a symbolic link or another special file, with an error that
// names the file and the remedy. It does not create or change the target of a link.
func TestLockDirSpecialLockFile(t *testing.T) {
	for name, create := range map[string]func(lock, target string) error{
		"link to a file": func(lock, target string) error {
			return errors.Join(os.WriteFile(target, []byte("x"), 0o600), os.Symlink(target, lock))
		},
		"dangling link": func(lock, target string) error { return os.Symlink(target, lock) },
		"directory":     func(lock, _ string) error { return os.Mkdir(lock, 0o700) },
		"pipe":          func(lock, _ string) error { return syscall.Mkfifo(lock, 0o600) },
	} {
		dir, target := t.TempDir(), filepath.Join(t.TempDir(), "target")
		lock := filepath.Join(dir, "lock")
		if err := create(lock, target); err != nil {
			t.Fatal(err)
		}
		before, beforeErr := os.ReadFile(target)
		if _, err := LockDir(dir); err == nil || !strings.Contains(err.Error(), lock+" is not a regular file: move it away") {
			t.Errorf("%s: got error %v, want that %s is not a regular file", name, err, lock)
		}
		if now, err := os.ReadFile(target); !slices.Equal(now, before) || errors.Is(err, fs.ErrNotExist) != errors.Is(beforeErr, fs.ErrNotExist) {
			t.Errorf("%s: its target is now %q, %v", name, now, err)
		}
	}
}

// SetAside appends the reason to the name of a file, and -2 or -3 if a file with other content has
// that name. Files with the same content are kept once. When all three names are taken, the last
// name is reused. Every renamed file survives a crash.
func TestSetAside(t *testing.T) {
	const path = "/d/x.log"
	c := newCrashFS(1, "/d")
	for _, tt := range []struct{ data, reason, want string }{
		{"one", "refused", "x.log.refused"},
		{"one", "damaged", "x.log.damaged"},
		{"two", "refused", "x.log.refused-2"},
		{"one", "refused", "x.log.refused"}, // x.log.refused has the same content, so it is replaced
		{"three", "refused", "x.log.refused-3"},
		{"four", "refused", "x.log.refused-3"},
		{"two", "refused", "x.log.refused-2"},
	} {
		c.put(path, []byte(tt.data))
		if name, err := SetAside(c, path, tt.reason); name != tt.want || err != nil {
			t.Errorf("setting aside %q, reason %s: got name %q, %v; want %q", tt.data, tt.reason, name, err, tt.want)
		}
		c.crash()
		if data, err := c.ReadFile("/d/" + tt.want); string(data) != tt.data || err != nil {
			t.Errorf("setting aside %q, reason %s: after a crash the file has %q, %v", tt.data, tt.reason, data, err)
		}
	}
	want := map[string]string{path + ".refused": "one", path + ".refused-2": "two", path + ".refused-3": "four", path + ".damaged": "one"}
	if got := c.contents(); !maps.Equal(got, want) {
		t.Errorf("files at the end: got %q, want %q", got, want)
	}
}

// A SetAside that fails before the rename changes no file. If the rename succeeds but the directory
// cannot be synced, SetAside returns both the new name and an error.
func TestSetAsideFails(t *testing.T) {
	const path = "/d/x.log"
	for _, tt := range []struct{ op, file, want string }{
		{"read", path, ""},
		{"read", path + ".refused", ""},
		{"rename", path, ""},
		{"syncdir", "/d", "x.log.refused-2"}, // renamed, but a crash may undo the rename
	} {
		synctest.Test(t, func(t *testing.T) {
			c := newCrashFS(1, "/d")
			c.put(path, []byte("new"))
			c.put(path+".refused", []byte("old"))
			before := c.contents()
			c.hook = failOn(tt.op, tt.file, 0, errDisk)
			if name, err := SetAside(c, path, "refused"); name != tt.want || !errors.Is(err, errDisk) {
				t.Errorf("%s of %s fails: got name %q, error %v; want name %q", tt.op, tt.file, name, err, tt.want)
			}
			if tt.want == "" && !maps.Equal(c.contents(), before) {
				t.Errorf("%s of %s fails: files are now %q, want %q", tt.op, tt.file, c.contents(), before)
			}
		})
	}
}
