package main

// Tests of RetryRead through OpenLog and ListLogs: reads of files and directories that fail once,
// twice, or always.

import (
	"bytes"
	"errors"
	"io/fs"
	"maps"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// If the read of a log, of a copy set aside or of the directory fails, it is retried. If a retry
// succeeds, the log is opened as usual. If all retries fail, the error is returned after one to
// three seconds. In both cases no file is changed.
func TestLogReadsAgain(t *testing.T) {
	good, records, _ := sampleLog()
	other := bytes.Clone(good)
	other[40] ^= 1
	bad := bytes.Clone(good)
	bad[30] ^= 1
	for _, tt := range []struct {
		name, op, path string
		data           []byte
	}{
		{"a log", "read", logPath, good},
		{"the first copy", "read", logPath + ".damaged", bad},
		{"the last copy", "read", logPath + ".damaged-3", bad},
		{"the directory", "readdir", "/d", good},
	} {
		for _, f := range readFaults {
			synctest.Test(t, func(t *testing.T) {
				c := newCrashFS(1, "/d")
				c.put(logPath, tt.data)
				for _, suffix := range []string{".damaged", ".damaged-2"} {
					c.put(logPath+suffix, other)
				}
				c.put(logPath+".damaged-3", bad)
				before := c.contents()
				c.hook = f.hook(tt.op, tt.path)
				begin := time.Now()
				var got []logRec
				logs, _, err := ListLogs(c, "/d")
				var r LogRecovery
				if err == nil {
					_, r, err = OpenLog(c, logPath, collectLog(&got))
				}
				took := time.Since(begin)
				if !maps.Equal(c.contents(), before) {
					t.Errorf("reading %s fails as %v: files were changed: %q", tt.name, f, c.names())
				}
				if f.n == 0 {
					if !errors.Is(err, f.err) || !strings.Contains(err.Error(), tt.path) || took < time.Second || took > 3*time.Second {
						t.Errorf("reading %s always fails with %v: got error %v after %v", tt.name, f.err, err, took)
					}
					return
				}
				if err != nil || r.Err != nil || !slices.Equal(logs, []string{logPath}) || took > time.Second {
					t.Errorf("reading %s fails as %v: got logs %q, %+v, %v after %v", tt.name, f, logs, r, err, took)
				}
				if damaged := &tt.data[0] == &bad[0]; damaged != (r.CopyPath == logPath+".damaged-3") || !damaged && !slices.Equal(got, records) {
					t.Errorf("reading %s fails as %v: got records %v, %+v", tt.name, f, got, r)
				}
			})
		}
	}
}

// A missing log is reported at once, without a retry.
func TestLogMissing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, begin := newCrashFS(1, "/d"), time.Now()
		if _, _, err := OpenLog(c, logPath, nil); !errors.Is(err, fs.ErrNotExist) || time.Since(begin) > 0 {
			t.Errorf("opening a missing log: got error %v after %v, want %v at once", err, time.Since(begin), fs.ErrNotExist)
		}
	})
}
