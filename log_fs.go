package main

// The seam to the disk: the part of a file system that logs need, directories that are synced
// and locked, and files that are replaced as a whole.

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
)

// IsDiskFull reports whether an operation failed because the disk, or a quota, is full.
func IsDiskFull(err error) bool {
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

// SyncDir takes EINVAL for success, because file systems that cannot sync a directory return
// it (PostgreSQL's fsync_fname does the same).
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
	if err := mkdirAllSynced(dir); err != nil {
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

// mkdirAllSynced is os.MkdirAll that syncs each parent whose entry it made.
func mkdirAllSynced(dir string) error {
	err := os.Mkdir(dir, 0o700)
	if errors.Is(err, fs.ErrNotExist) && filepath.Dir(dir) != dir {
		if err := mkdirAllSynced(filepath.Dir(dir)); err != nil {
			return err
		}
		err = os.Mkdir(dir, 0o700)
	}
	if err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return syncParent(DiskFS{}, dir, err == nil)
}

// syncParent makes dir's own entry durable. The entry of a directory that was there already may
// not be durable yet, because another process may have been killed before it synced it. Unless
// denialIsError, a missing permission for the parent is none: dir was made by another user.
func syncParent(fsys FS, dir string, denialIsError bool) error {
	err := fsys.SyncDir(filepath.Dir(dir))
	if !denialIsError && errors.Is(err, fs.ErrPermission) {
		return nil
	}
	return err
}

// readFileRetrying is FS.ReadFile under RetryRead.
func readFileRetrying(fsys FS, name string) ([]byte, error) {
	return RetryRead(func() ([]byte, error) { return fsys.ReadFile(name) })
}

// maxAside is how many files of one path are kept aside for one reason.
const maxAside = 3

// SetAside renames the file at path, durably, to <path>.<reason>, or with -2 or -3 behind it
// if another file has that name. It replaces a file of the same bytes, and if all names are
// taken the last, so that the first files and the newest are kept. It returns the new name without
// its directory, which is "" if the file was not renamed; with a name, an error is that of syncing
// the directory.
func SetAside(fsys FS, path, reason string) (asideName string, err error) {
	data, err := readFileRetrying(fsys, path)
	if err != nil {
		return "", fmt.Errorf("setting aside: %w", err)
	}
	aside, _, err := asidePath(fsys, path, reason, data)
	if err == nil {
		err = fsys.Rename(path, aside)
	}
	if err != nil {
		return "", fmt.Errorf("setting %s aside: %w", path, err)
	}
	if err := fsys.SyncDir(filepath.Dir(path)); err != nil {
		return filepath.Base(aside), fmt.Errorf("setting %s aside: %w", path, err)
	}
	return filepath.Base(aside), nil
}

// asidePath chooses the path of a file set aside. sameThere reports that the same bytes lie there
// already, as after a crash between the copy of a damaged log and its Rewrite.
func asidePath(fsys FS, path, reason string, data []byte) (aside string, sameThere bool, err error) {
	for n := 1; n <= maxAside; n++ {
		aside = path + "." + reason
		if n > 1 {
			aside += fmt.Sprintf("-%d", n)
		}
		old, err := readFileRetrying(fsys, aside)
		if errors.Is(err, fs.ErrNotExist) {
			return aside, false, nil
		}
		if err != nil || bytes.Equal(old, data) {
			return aside, err == nil, err
		}
	}
	return aside, false, nil
}

// replaceFile writes by fill to a temporary file and renames it to path, durably. It makes the
// directory if that is missing, and returns the size of the file. If renamed, an error is that
// of syncing directories.
func replaceFile(fsys FS, path string, fill func(io.Writer) error) (size int64, renamed bool, err error) {
	dir, temp := filepath.Dir(path), path+logTempSuffix
	f, madeDir, err := createFile(fsys, temp)
	if err != nil {
		return 0, false, err
	}
	if size, err = writeSyncClose(f, fill); err == nil {
		err = fsys.Rename(temp, path)
	}
	if err != nil {
		fsys.Remove(temp) // if that fails too, the next rewrite overwrites it
		return 0, false, err
	}
	if err = fsys.SyncDir(dir); err == nil {
		err = syncParent(fsys, dir, madeDir)
	}
	return size, true, err
}

// createFile opens an empty file at path, and makes its directory if that is missing.
func createFile(fsys FS, path string) (f File, madeDir bool, err error) {
	const flags = os.O_WRONLY | os.O_CREATE | os.O_TRUNC
	if f, err = fsys.OpenFile(path, flags, 0o600); !errors.Is(err, fs.ErrNotExist) {
		return f, false, err
	}
	err = fsys.Mkdir(filepath.Dir(path), 0o700)
	if madeDir = err == nil; !madeDir && !errors.Is(err, fs.ErrExist) {
		return nil, false, err
	}
	f, err = fsys.OpenFile(path, flags, 0o600)
	return f, madeDir, err
}

// writeSyncClose writes by fill to f, syncs and closes it, and returns its size.
func writeSyncClose(f File, fill func(io.Writer) error) (size int64, err error) {
	out := &countingWriter{w: f}
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
	return out.n, err
}

type countingWriter struct {
	w io.Writer
	n int64
}

func (c *countingWriter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += int64(n)
	return n, err
}
