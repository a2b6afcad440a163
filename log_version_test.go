package main

// Tests of the version in the header of logs: the program refuses files of another version and does
// not change them.

import (
	"bytes"
	"maps"
	"strings"
	"testing"
	"time"
)

// OpenLog refuses a log of another version with an error that names both versions, and changes no
// file. A flipped bit in the version digit is damage instead, because the CRC of the header is then
// wrong.
func TestLogVersion(t *testing.T) {
	data, _, _ := sampleLog()
	c := newCrashFS(1, "/d")
	c.put(logPath, ofVersion(data, '7'))
	before := c.contents()
	l, _, err := OpenLog(c, logPath, func(byte, []byte) error { t.Error("OpenLog delivered a record"); return nil })
	if l != nil || err == nil || err.Error() != logPath+" is a log of version 7; this program knows version 2" {
		t.Errorf("opening a log of version 7: got error %v", err)
	}
	if !maps.Equal(c.contents(), before) {
		t.Errorf("opening a log of version 7 changed files: %q", c.names())
	}
	for bit := range 8 {
		flipped := bytes.Clone(data)
		flipped[len(logMagic)] ^= 1 << bit
		if _, _, r, _ := recoverLog(t, flipped); !r.HeaderDamaged {
			t.Errorf("bit %d of the version flipped: %+v, want a damaged header", bit, r)
		}
	}
}

// OpenStore, OpenSpool and LoadRestartState return an error if one of their files is a log of
// another version, and they change no file.
func TestLogVersionOfEveryFile(t *testing.T) {
	for _, tt := range []struct {
		what, path string
		open       func(FS) error
	}{
		{"a site's log", "/s/ab/ab.log", openStoreOn},
		{"the cursors", "/s/" + ConsumersFile, openStoreOn},
		{"the numbers of batches", "/s/" + stateFile, openStoreOn},
		{"a scrape of a spool", "/s/" + scrapeFileName(7), openSpoolOn},
		{"the spool's record", "/s/" + spoolMetaName, openSpoolOn},
		{"the state of a member", "/s/" + memberFile, func(fsys FS) error {
			_, err := LoadRestartState(fsys, "/s")
			return err
		}},
	} {
		fsys := newCrashFS(1, "/s", "/s/ab")
		fsys.put(tt.path, append(ofVersion(appendLogHeader(nil, []byte("site")), '7'), "of whatever form"...))
		before := fsys.contents()
		if err := tt.open(fsys); err == nil || !strings.Contains(err.Error(), tt.path+" is a log of version 7; this program knows version 2") {
			t.Errorf("%s of version 7: got error %v", tt.what, err)
		}
		if !maps.Equal(fsys.contents(), before) {
			t.Errorf("%s of version 7: opening it changed files: %q", tt.what, fsys.names())
		}
	}
}

func openStoreOn(fsys FS) error {
	_, err := OpenStore(StoreConfig{FS: fsys, Dir: "/s", Retention: time.Hour, Now: time.Now, OnError: func(error) {}})
	return err
}

func openSpoolOn(fsys FS) error {
	_, err := OpenSpool(SpoolConfig{FS: fsys, Dir: "/s", ClusterID: "site",
		Now: func() Moment { return Moment{Wall: 1} }, OnError: func(error) {}})
	return err
}
