package main

// The boot-time clock: it counts since this machine booted, so that no operator, NTP or dead
// battery steps it. It never goes back while the boot ID is the same. It counts suspended time
// where the system does. Two readings with different boot IDs cannot be compared.

import (
	"bytes"
	"crypto/rand"
	"strconv"
	"strings"
	"time"
)

const (
	// uptimeFile counts suspended time, as CLOCK_MONOTONIC, which package time uses, does not.
	uptimeFile = "/proc/uptime"
	bootIDFile = "/proc/sys/kernel/random/boot_id"
)

// BootClock is a boot-time clock. It is safe for concurrent use.
type BootClock struct {
	readFile func(name string) ([]byte, error)
	id       string
	hasFile  bool      // uptimeFile can be read; else the clock counts from the start of this process
	base     int64     // ms since boot at start
	start    time.Time // its monotonic part counts
}

// NewBootClock returns a clock that reads Linux's by readFile. Elsewhere it counts from the start
// of this process, under an ID of its own.
func NewBootClock(readFile func(name string) ([]byte, error)) *BootClock {
	c := &BootClock{readFile: readFile, start: time.Now()}
	id, err := readFile(bootIDFile)
	text := string(bytes.TrimSpace(id))
	base, ok := c.uptime()
	if err != nil || !ok || !IsBootID(text) {
		c.id = "process-" + rand.Text()
		return c
	}
	c.id, c.base, c.hasFile = text, base, true
	return c
}

// Now returns the milliseconds since boot, and the ID of this boot.
func (c *BootClock) Now() (ms int64, bootID string) {
	counted := c.base + time.Since(c.start).Milliseconds()
	if c.hasFile {
		// An uptime below the time that this process counted is not of this boot.
		if ms, ok := c.uptime(); ok && ms+1000 >= counted {
			return ms, c.id
		}
	}
	return counted, c.id
}

// uptime reads the first field of uptimeFile, seconds with hundredths.
func (c *BootClock) uptime() (ms int64, ok bool) {
	b, err := c.readFile(uptimeFile)
	text, _, found := strings.Cut(string(b), " ")
	seconds, parseErr := strconv.ParseFloat(text, 64)
	if err != nil || !found || parseErr != nil || !(seconds >= 0 && seconds < 1e12) {
		return 0, false
	}
	return int64(seconds * 1000), true
}
