package main

// This file is the interface to the disk. It defines the file system operations that logs need,
// which tests replace by fakes. It also creates, syncs and locks directories, sets files aside and
// replaces whole files durably.

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

// IsDiskFull reports whether err says that the disk, or a quota, is full.
func IsDiskFull(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)
}

// FS is the part of a file system that logs need. The methods but SyncDir behave like the functions
// of package os with the same names, with one exception: OpenFile and ReadFile fail if the file is a
// symbolic link. SyncDir makes the entries of a directory durable, if the file system can sync
// directories.
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
	f, err := os.OpenFile(name, flag|syscall.O_NOFOLLOW, perm)
	if err != nil {
		return nil, err // do not return f, because a File that holds a nil *os.File is not equal to nil
	}
	return f, nil
}

func (DiskFS) ReadFile(name string) ([]byte, error) {
	f, err := os.OpenFile(name, os.O_RDONLY|syscall.O_NOFOLLOW, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	b := bytes.NewBuffer(make([]byte, 0, info.Size()+bytes.MinRead)) // no reallocation, because logs can be large
	_, err = b.ReadFrom(f)
	return b.Bytes(), err
}

func (DiskFS) ReadDir(name string) ([]fs.DirEntry, error) { return os.ReadDir(name) }
func (DiskFS) Mkdir(name string, perm fs.FileMode) error  { return os.Mkdir(name, perm) }
func (DiskFS) Rename(old, new string) error               { return os.Rename(old, new) }
func (DiskFS) Remove(name string) error                   { return os.Remove(name) }

// SyncDir syncs a directory. It treats EINVAL as success, because file systems that cannot sync a
// directory return it (PostgreSQL's fsync_fname does the same).
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

// LockDir locks dir, so that no two processes write the same logs. It creates dir durably if
// necessary, creates the file "lock" in it and takes an exclusive lock on this file.
//
// LockDir fails if another process holds the lock, or if the file "lock" is a symbolic link or
// another special file. It also fails if every user can write to dir, because such a user could
// replace logs by forged ones. It does not check the subdirectories of dir: FS creates them with
// mode 0700, so others can write to them only after a chmod of dir's owner, and the remedy in the
// error reaches them too.
//
// The lock is held until release is called or the process ends. The caller must keep a reference to
// release. Otherwise garbage collection would close the lock file and so release the lock. The lock
// file is never removed, because after a removal two processes could lock two different files.
func LockDir(dir string) (release func() error, err error) {
	if err := mkdirAllSynced(dir); err != nil {
		return nil, fmt.Errorf("creating directory: %w", err)
	}
	if err := CheckLockDir(dir); err != nil {
		return nil, err
	}
	path := filepath.Join(dir, "lock")
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("opening lock file: %w", err)
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, syscall.EWOULDBLOCK) {
			return nil, fmt.Errorf("directory %s is in use by another process: stop that process, or use another directory", dir)
		}
		return nil, fmt.Errorf("locking %s: %w", f.Name(), err)
	}
	return f.Close, nil
}

// CheckLockDir returns an error if LockDir would refuse dir, which exists, for its mode or for its
// lock file. It does not try the lock.
func CheckLockDir(dir string) error {
	info, err := os.Stat(dir)
	if err != nil {
		return fmt.Errorf("checking directory: %w", err)
	}
	if mode := info.Mode().Perm(); mode&0o002 != 0 {
		return fmt.Errorf("every user can write to the directory %s (mode %04o): run chmod -R o-w %s, or name a subdirectory of it, which is then created with mode 0700", dir, mode, dir)
	}
	path := filepath.Join(dir, "lock")
	if info, err := os.Lstat(path); err == nil && !info.Mode().IsRegular() {
		return fmt.Errorf("lock file %s is not a regular file: move it away", path)
	}
	return nil
}

// mkdirAllSynced creates dir and missing parents, as os.MkdirAll does. It also makes their entries
// durable.
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

// syncParent makes the entry of dir in its parent directory durable. This is also necessary if dir
// existed before, because the process that created dir may have been killed before it synced the
// parent. If the parent cannot be opened for lack of permission, this is an error only if
// denialIsError is true. Another user may have created dir, and the parent is then that user's.
func syncParent(fsys FS, dir string, denialIsError bool) error {
	err := fsys.SyncDir(filepath.Dir(dir))
	if !denialIsError && errors.Is(err, fs.ErrPermission) {
		return nil
	}
	return err
}

func readFileRetrying(fsys FS, name string) ([]byte, error) {
	return RetryRead(func() ([]byte, error) { return fsys.ReadFile(name) })
}

// maxAside is the maximum number of files that SetAside keeps for one path and one reason.
const maxAside = 3

// SetAside durably renames the file at path. The new path is <path>.<reason>, or this path with the
// suffix -2 or -3 if another file has the name already. If one of these files has the same content,
// it is replaced. If all three names are taken by other content, the last file is replaced, so that
// the two oldest files and the newest file are kept.
//
// SetAside returns the new name without its directory. The name is empty if the file was not
// renamed. If both a name and an error are returned, the file was renamed, but its directory could
// not be synced.
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

// asidePath chooses the path for setting aside a file with content data, by the rules of SetAside.
// sameThere reports that a file with the same content already exists at this path. This happens if
// a process crashed after it copied a damaged log and before it rewrote the log.
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

// replaceFile calls fill to write a temporary file, syncs that file and renames it to path. Then it
// syncs the directory of path and the parent of that directory. It creates the directory of path if
// it is missing. It returns the size of the new file in bytes. If renamed is true, an error means
// that a directory could not be synced.
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
		fsys.Remove(temp) // an error can be ignored, because the next replaceFile removes the temporary file
		return 0, false, err
	}
	return size, true, syncDirs(fsys, dir, madeDir)
}

// syncDirs makes the entry of a new file in dir durable, and the entry of dir in its parent. madeDir
// says that dir was created for the file.
func syncDirs(fsys FS, dir string, madeDir bool) error {
	if err := fsys.SyncDir(dir); err != nil {
		return err
	}
	return syncParent(fsys, dir, madeDir)
}

// createFile creates an empty file at path and opens it for writing. It first removes a file that
// was left there. If a file appears there again in the meantime, createFile returns an error and
// does not open that file, because another process would then write or read it too. createFile
// creates the directory of path if it is missing, but no further parents. madeDir reports that it
// created the directory.
func createFile(fsys FS, path string) (f File, madeDir bool, err error) {
	const flags = os.O_WRONLY | os.O_CREATE | os.O_EXCL
	if err := fsys.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, false, err
	}
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

// writeSyncClose calls fill to write to f, then syncs and closes f. It returns the number of bytes
// written.
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
