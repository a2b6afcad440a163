package main

// A clock that counts since this machine booted: no operator, NTP or dead battery steps it. It
// never goes back while its ID is the same. It counts suspended time where the system tells of
// it. Two readings with different IDs are not comparable.

import (
	"bytes"
	"crypto/rand"
	"strconv"
	"strings"
	"time"
)

const (
	// Other than CLOCK_MONOTONIC, which Go's time has, it counts suspended time.
	uptimeFile = "/proc/uptime"
	bootIDFile = "/proc/sys/kernel/random/boot_id"
)

// BootClock tells the time since boot. It is safe for concurrent use.
type BootClock struct {
	readFile func(name string) ([]byte, error)
	id       string
	system   bool // the system tells; else the clock is this process's own
	base     int64
	start    time.Time // when base was read; its monotonic part counts
}

// NewBootClock returns a clock that reads the system's by readFile, or one of
// this process alone where the system has none.
func NewBootClock(readFile func(name string) ([]byte, error)) *BootClock {
	c := &BootClock{readFile: readFile, start: time.Now()}
	id, err := readFile(bootIDFile)
	text := string(bytes.TrimSpace(id))
	base, ok := c.uptime()
	if err != nil || !ok || !validBootID(text) {
		c.id = "process-" + rand.Text()
		return c
	}
	c.id, c.base, c.system = text, base, true
	return c
}

// Now returns the milliseconds since boot, and the ID of this boot.
func (c *BootClock) Now() (ms int64, id string) {
	counted := c.base + time.Since(c.start).Milliseconds()
	if c.system {
		// Less than was counted without it is no clock of this boot.
		if ms, ok := c.uptime(); ok && ms+1000 >= counted {
			return ms, c.id
		}
	}
	return counted, c.id
}

// uptime reads "seconds.hundredths idle".
func (c *BootClock) uptime() (ms int64, ok bool) {
	b, err := c.readFile(uptimeFile)
	text, _, found := strings.Cut(string(b), " ")
	seconds, parseErr := strconv.ParseFloat(text, 64)
	if err != nil || !found || parseErr != nil || !(seconds >= 0 && seconds < 1e12) {
		return 0, false
	}
	return int64(seconds * 1000), true
}

func validBootID(s string) bool {
	for _, b := range []byte(s) {
		if b <= ' ' || b > '~' {
			return false
		}
	}
	return len(s) >= 8 && len(s) <= 64
}
