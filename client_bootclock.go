package main

// The boot-time clock counts the time since this machine booted. No operator, NTP daemon or dead
// battery can step it. Its readings never decrease while the boot ID stays the same. It includes
// suspended time where the system reports it. Readings with different boot IDs cannot be compared.

import (
	"bytes"
	"crypto/rand"
	"strconv"
	"strings"
	"time"
)

const (
	// uptimeFile includes suspended time. CLOCK_MONOTONIC, which package time uses, does not.
	uptimeFile = "/proc/uptime"
	bootIDFile = "/proc/sys/kernel/random/boot_id"
)

// BootClock is a boot-time clock. It is safe for concurrent use.
type BootClock struct {
	readFile func(name string) ([]byte, error)
	id       string
	hasFile  bool      // uptimeFile can be read; otherwise the clock counts from the start of this process
	base     int64     // ms between the boot and start
	start    time.Time // when the clock was created; its monotonic reading is used
}

// NewBootClock returns a clock that reads Linux's uptime and boot ID through readFile. If either is
// missing or malformed, the clock counts from the start of this process, under a random ID.
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
		// Ignore an uptime below the time that this process has counted, because it cannot be of
		// this boot. The tolerance of one second covers rounding.
		if ms, ok := c.uptime(); ok && ms+1000 >= counted {
			return ms, c.id
		}
	}
	return counted, c.id
}

// uptime returns the first field of uptimeFile in milliseconds. The file has seconds with two
// decimals.
func (c *BootClock) uptime() (ms int64, ok bool) {
	b, err := c.readFile(uptimeFile)
	text, _, found := strings.Cut(string(b), " ")
	seconds, parseErr := strconv.ParseFloat(text, 64)
	if err != nil || !found || parseErr != nil || !(seconds >= 0 && seconds < 1e12) {
		return 0, false
	}
	return int64(seconds * 1000), true
}
