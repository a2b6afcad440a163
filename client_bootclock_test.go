package main

import (
	"errors"
	"os"
	"testing"
	"testing/synctest"
	"time"
)

// The boot-time clock of Linux includes the time for which the machine was suspended. If the uptime
// file is missing, malformed or behind the time that the process has counted, the clock returns the
// uptime at the start of the process plus the time since then.
func TestBootClock(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		files := map[string]string{uptimeFile: "100.25 7.00\n", bootIDFile: "4789e580-6b9d-41f7-b180-bcdd10d7b67b\n"}
		read := func(name string) ([]byte, error) {
			if s, ok := files[name]; ok {
				return []byte(s), nil
			}
			return nil, errors.New("no such file")
		}
		c := NewBootClock(read)
		check := func(what string, want int64) {
			t.Helper()
			if ms, id := c.Now(); ms != want || id != "4789e580-6b9d-41f7-b180-bcdd10d7b67b" {
				t.Errorf("%s: got %d ms and boot ID %q, want %d ms and the ID of the file", what, ms, id, want)
			}
		}
		check("at the start", 100_250)
		// The machine was suspended for an hour, which the process's monotonic clock does not
		// count.
		files[uptimeFile] = "3700.25 7.00\n"
		check("after a suspend", 3_700_250)
		time.Sleep(4000 * time.Second)
		for _, bad := range []string{"", "nonsense", "-5 1", "NaN 1", "1e300 1", "7.5 1"} {
			files[uptimeFile] = bad
			check("with uptime "+bad, 4_100_250)
		}
		delete(files, uptimeFile)
		check("without uptime", 4_100_250)
	})
}

// If the boot ID file is missing or malformed, each process uses a random boot ID of its own. So
// the boot-time clocks of two processes are never compared.
func TestBootClockOfProcess(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for name, id := range map[string]string{"missing": "", "empty": "\n", "not printable": "abc\x00defghijk", "long": string(make([]byte, 100))} {
			read := func(file string) ([]byte, error) {
				if file == uptimeFile {
					return []byte("5.00 1.00\n"), nil
				}
				if id == "" {
					return nil, os.ErrNotExist
				}
				return []byte(id), nil
			}
			c, other := NewBootClock(read), NewBootClock(read)
			before, mine := c.Now()
			_, others := other.Now()
			if mine == others || !IsBootID(mine) {
				t.Errorf("boot ID file %s: two clocks have the IDs %q and %q, want two different valid IDs", name, mine, others)
			}
			time.Sleep(90 * time.Second)
			if after, same := c.Now(); after-before != 90_000 || same != mine {
				t.Errorf("boot ID file %s: the clock counted %d ms in 90 s, and its ID is %q after %q", name, after-before, same, mine)
			}
		}
	})
}
