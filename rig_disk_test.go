package main

// A file system in memory. A crash may lose everything that was not synced. A hook of the test
// makes chosen operations fail, or kills the process in them.

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
)

var (
	errKilled = errors.New("the process is killed")
	errDisk   = error(syscall.EIO)
	errFull   = error(syscall.ENOSPC)
)

// fault is what the hook of a crashFS does to one operation. The zero value does nothing. With Err
// the operation fails: a write may first write a part, and a failed sync makes later syncs of the
// file useless, as on Linux. With Kill the process dies in the operation, which may take effect
// wholly, partly or not at all. After a Kill all operations fail until crash or restart is called.
type fault struct {
	Err  error
	Kill bool
}

// crashFS is an FS in memory that tracks what is durable. The bytes of a file are durable from its
// Sync on, and the entries of a directory from its SyncDir on. It is safe for concurrent use.
type crashFS struct {
	mu      sync.Mutex // guards the other fields and all crashNodes
	rng     *rand.Rand
	inOrder bool                               // the bytes of a file that were not synced reach the disk in the order of the file; set before use
	hook    func(n int, op, name string) fault // called before operation n, counted from 0, with mu held; must not use the FS; nil: no faults
	ops     int                                // number of operations so far that called hook
	killed  bool                               // the process was killed; all operations fail until crash or restart
	open    int                                // number of open file handles
	entries map[string]*crashNode              // path → file or directory, as running processes see it
	durable map[string]*crashNode              // path → file or directory whose entry in its parent is durable
}

// crashNode is a file or a directory.
type crashNode struct {
	dir          bool
	data, synced []byte // content as processes see it, and the durable content
	lost         bool   // a Sync has failed; until a crash, later Syncs report success and make nothing durable
}

// newCrashFS returns an FS that has the directories dirs, all of them durable. The parent of each
// directory must be in dirs too, or be "/".
func newCrashFS(seed uint64, dirs ...string) *crashFS {
	c := &crashFS{rng: rand.New(rand.NewPCG(seed, 0)), entries: map[string]*crashNode{"/": {dir: true}}}
	for _, d := range dirs {
		c.entries[d] = &crashNode{dir: true}
	}
	c.durable = maps.Clone(c.entries)
	return c
}

// put creates or replaces a file. The new content and the entry are durable at once.
func (c *crashFS) put(name string, data []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := &crashNode{data: bytes.Clone(data), synced: bytes.Clone(data)}
	c.entries[name], c.durable[name] = n, n
}

// names returns the paths of all files, sorted.
func (c *crashFS) names() (names []string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, name := range slices.Sorted(maps.Keys(c.entries)) {
		if !c.entries[name].dir {
			names = append(names, name)
		}
	}
	return names
}

// contents returns the contents of all files by path, as running processes see them.
func (c *crashFS) contents() map[string]string {
	all := map[string]string{}
	c.mu.Lock()
	defer c.mu.Unlock()
	for name, n := range c.entries {
		if !n.dir {
			all[name] = string(n.data)
		}
	}
	return all
}

// restart makes operations succeed again after a Kill, as for a new process on the same machine,
// and removes the hook. No content is lost.
func (c *crashFS) restart() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.killed, c.hook = false, nil
}

// crash cuts the power and restores it. Each directory entry that was not synced survives in its
// old or its new state, unless its directory is lost. A file that was not synced keeps its old
// content, or gets all or a part of the new content, possibly with zeros in place of some of the
// new bytes. With inOrder, the zeros are whole sectors at the end of the file.
func (c *crashFS) crash() {
	c.restart()
	c.mu.Lock()
	defer c.mu.Unlock()
	all := maps.Clone(c.durable)
	maps.Copy(all, c.entries)
	left := map[string]*crashNode{}
	for _, name := range slices.Sorted(maps.Keys(all)) { // a directory sorts before its entries
		n := c.durable[name]
		if c.rng.IntN(2) == 0 {
			n = c.entries[name]
		}
		if n != nil && (name == "/" || left[filepath.Dir(name)] != nil) {
			left[name] = n
		}
	}
	for _, n := range left {
		if !n.dir && !bytes.Equal(n.data, n.synced) {
			n.data = c.survivor(n.synced, n.data)
		}
		n.synced, n.lost = bytes.Clone(n.data), false
	}
	c.entries, c.durable = left, maps.Clone(left)
}

// survivor returns a random content that a file may have after a crash. data is the content before
// the crash, and synced is the durable content.
func (c *crashFS) survivor(synced, data []byte) []byte {
	same := 0
	for same < min(len(synced), len(data)) && synced[same] == data[same] {
		same++
	}
	cut := same + c.rng.IntN(len(data)-same+1)
	out := bytes.Clone(data)
	switch n := c.rng.IntN(4); {
	case n == 0:
		return bytes.Clone(synced)
	case n == 1:
		return out[:cut]
	case c.inOrder:
		clear(out[min(len(out), (cut+diskSector-1)/diskSector*diskSector):])
	case n == 2:
		clear(out[cut:]) // the new file size reached the disk, but the last bytes did not
	case n == 3:
		clear(out[same:cut]) // later sectors of the file reached the disk, but earlier sectors did not
	}
	return out
}

// begin counts an operation and calls the hook. do reports whether the operation takes effect, and
// err is the error that the operation returns. The caller must hold c.mu.
func (c *crashFS) begin(op, name string) (do bool, err error) {
	if c.killed {
		return false, errKilled
	}
	if c.hook == nil {
		return true, nil
	}
	f := c.hook(c.ops, op, name)
	c.ops++
	if f.Kill {
		c.killed = true
		return c.rng.IntN(2) == 0, errKilled
	}
	return f.Err == nil, f.Err
}

// parent returns an error if the parent of the path is not an existing directory.
func (c *crashFS) parent(op, name string) error {
	if p := c.entries[filepath.Dir(name)]; p == nil || !p.dir {
		return &fs.PathError{Op: op, Path: name, Err: fs.ErrNotExist}
	}
	return nil
}

func (c *crashFS) OpenFile(name string, flag int, _ fs.FileMode) (File, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	do, err := c.begin("open", name)
	if do {
		n := c.entries[name]
		if n == nil {
			if flag&os.O_CREATE == 0 {
				return nil, &fs.PathError{Op: "open", Path: name, Err: fs.ErrNotExist}
			}
			if err := c.parent("open", name); err != nil {
				return nil, err
			}
			n = &crashNode{}
			c.entries[name] = n
		} else if flag&os.O_EXCL != 0 {
			return nil, &fs.PathError{Op: "open", Path: name, Err: fs.ErrExist}
		}
		if err == nil {
			c.open++
			return &crashFile{fs: c, n: n, name: name}, nil
		}
	}
	return nil, err
}

func (c *crashFS) ReadFile(name string) ([]byte, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, err := c.begin("read", name); err != nil {
		return nil, &fs.PathError{Op: "read", Path: name, Err: err}
	}
	n := c.entries[name]
	if n == nil || n.dir {
		return nil, &fs.PathError{Op: "read", Path: name, Err: fs.ErrNotExist}
	}
	return bytes.Clone(n.data), nil
}

func (c *crashFS) ReadDir(name string) (list []fs.DirEntry, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, err := c.begin("readdir", name); err != nil {
		return nil, &fs.PathError{Op: "readdir", Path: name, Err: err}
	}
	if n := c.entries[name]; n == nil || !n.dir {
		return nil, &fs.PathError{Op: "readdir", Path: name, Err: fs.ErrNotExist}
	}
	for _, path := range slices.Sorted(maps.Keys(c.entries)) {
		if path != "/" && filepath.Dir(path) == name {
			list = append(list, crashEntry{filepath.Base(path), c.entries[path].dir})
		}
	}
	return list, nil
}

func (c *crashFS) Mkdir(name string, _ fs.FileMode) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	do, err := c.begin("mkdir", name)
	if do {
		if c.entries[name] != nil {
			return &fs.PathError{Op: "mkdir", Path: name, Err: fs.ErrExist}
		}
		if err := c.parent("mkdir", name); err != nil {
			return err
		}
		c.entries[name] = &crashNode{dir: true}
	}
	return err
}

func (c *crashFS) Rename(old, new string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	do, err := c.begin("rename", old)
	if do {
		if c.entries[old] == nil {
			return &fs.PathError{Op: "rename", Path: old, Err: fs.ErrNotExist}
		}
		c.entries[new] = c.entries[old]
		delete(c.entries, old)
	}
	return err
}

func (c *crashFS) Remove(name string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	do, err := c.begin("remove", name)
	if do {
		if c.entries[name] == nil {
			return &fs.PathError{Op: "remove", Path: name, Err: fs.ErrNotExist}
		}
		delete(c.entries, name)
	}
	return err
}

func (c *crashFS) SyncDir(name string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	do, err := c.begin("syncdir", name)
	if do {
		if n := c.entries[name]; n == nil || !n.dir {
			return &fs.PathError{Op: "syncdir", Path: name, Err: fs.ErrNotExist}
		}
		in := func(path string, _ *crashNode) bool { return path != "/" && filepath.Dir(path) == name }
		maps.DeleteFunc(c.durable, in)
		for path, n := range c.entries {
			if in(path, n) {
				c.durable[path] = n
			}
		}
	}
	return err
}

// crashEntry is the fs.DirEntry of a crashFS. Its Info always fails.
type crashEntry struct {
	name string
	dir  bool
}

func (e crashEntry) Name() string               { return e.name }
func (e crashEntry) IsDir() bool                { return e.dir }
func (e crashEntry) Info() (fs.FileInfo, error) { return nil, fs.ErrInvalid }
func (e crashEntry) Type() fs.FileMode {
	if e.dir {
		return fs.ModeDir
	}
	return 0
}

// crashFile is an open file. Write always appends, as the writes of logs do.
type crashFile struct {
	fs   *crashFS
	n    *crashNode
	name string
}

func (f *crashFile) Write(p []byte) (int, error) {
	f.fs.mu.Lock()
	defer f.fs.mu.Unlock()
	dead := f.fs.killed
	do, err := f.fs.begin("write", f.name)
	if !do && !dead {
		p = p[:f.fs.rng.IntN(len(p)+1)]
		do = true
	}
	if !do {
		return 0, err
	}
	f.n.data = append(f.n.data[:len(f.n.data):len(f.n.data)], p...)
	return len(p), err
}

func (f *crashFile) Sync() error {
	f.fs.mu.Lock()
	defer f.fs.mu.Unlock()
	do, err := f.fs.begin("sync", f.name)
	if err != nil && !do && !f.fs.killed {
		f.n.lost = true
	}
	if do && !f.n.lost {
		f.n.synced = bytes.Clone(f.n.data)
	}
	return err
}

func (f *crashFile) Truncate(size int64) error {
	f.fs.mu.Lock()
	defer f.fs.mu.Unlock()
	do, err := f.fs.begin("truncate", f.name)
	if do {
		f.n.data = bytes.Clone(f.n.data[:size])
	}
	return err
}

func (f *crashFile) Close() error {
	f.fs.mu.Lock()
	defer f.fs.mu.Unlock()
	f.fs.open--
	_, err := f.fs.begin("close", f.name)
	return err
}

// failOn returns a hook that makes operations named op fail with err if their path ends with
// suffix. If n is 0, every such operation fails. Otherwise only the n-th fails, counted from 1.
func failOn(op, suffix string, n int, err error) func(int, string, string) fault {
	seen := 0
	return func(_ int, o, name string) fault {
		if o != op || !strings.HasSuffix(name, suffix) {
			return fault{}
		}
		if seen++; n == 0 || seen == n {
			return fault{Err: err}
		}
		return fault{}
	}
}

// readFault says how reads fail: the first n reads fail with err, or all reads if n is 0.
type readFault struct {
	n   int
	err error
}

// times returns the number of failed reads, in words for a test name.
func (f readFault) times() string {
	if f.n == 0 {
		return "always"
	}
	return fmt.Sprintf("%d times", f.n)
}

var readFaults = []readFault{{1, syscall.EIO}, {2, syscall.EIO}, {2, syscall.EMFILE}, {0, syscall.EIO}, {0, syscall.EMFILE}}

// hook returns a hook that makes operations named op fail with f.err if their path ends with
// suffix. The first f.n such operations fail, or all of them if f.n is 0.
func (f readFault) hook(op, suffix string) func(int, string, string) fault {
	seen := 0
	return func(_ int, o, name string) fault {
		if o != op || !strings.HasSuffix(name, suffix) || f.n > 0 && seen == f.n {
			return fault{}
		}
		seen++
		return fault{Err: f.err}
	}
}
