package main

// The boot-time clock counts the time since this machine booted, or since this process started if
// the system does not report its uptime. No operator, NTP daemon or dead battery can step it. Where
// the system reports it, the clock includes the time during which the machine was suspended.
// Readings with different boot IDs cannot be compared. Readings with the same boot ID normally do
// not decrease, but they may, for example when a container restarts; Moment.Since allows for that.

import (
	"bytes"
	"crypto/rand"
	"strconv"
	"strings"
	"time"
)

const (
	// The seconds in uptimeFile include the time during which the machine was suspended.
	// CLOCK_MONOTONIC, which package time uses, does not include it.
	uptimeFile = "/proc/uptime"
	bootIDFile = "/proc/sys/kernel/random/boot_id"
)

// BootClock is a boot-time clock. It is safe for concurrent use.
type BootClock struct {
	readFile func(name string) ([]byte, error)
	id       string
	hasFile  bool      // the uptime and the boot ID could be read when the clock was created; otherwise the clock counts from the start of this process
	base     int64     // ms; the uptime when the clock was created; 0 if hasFile is false
	start    time.Time // when the clock was created; its monotonic reading is used
}

// NewBootClock returns a clock that reads Linux's uptime and boot ID through readFile. If the
// uptime or the boot ID is missing or malformed, the clock counts from the start of this process,
// under a random ID.
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

// Now returns the milliseconds since boot, or since the start of this process if hasFile is false,
// and the boot ID.
func (c *BootClock) Now() (ms int64, bootID string) {
	counted := c.base + time.Since(c.start).Milliseconds()
	if c.hasFile {
		// counted is the uptime according to this process. An uptime in the file that is lower
		// cannot be of this boot, so ignore it. The tolerance of one second covers rounding.
		if ms, ok := c.uptime(); ok && ms+1000 >= counted {
			return ms, c.id
		}
	}
	return counted, c.id
}

// uptime reads the first field of uptimeFile, which is in seconds with two decimals, and returns it
// in milliseconds. ok is false if the file cannot be read or is malformed.
func (c *BootClock) uptime() (ms int64, ok bool) {
	b, err := c.readFile(uptimeFile)
	text, _, found := strings.Cut(string(b), " ")
	seconds, parseErr := strconv.ParseFloat(text, 64)
	if err != nil || !found || parseErr != nil || !(seconds >= 0 && seconds < 1e12) {
		return 0, false
	}
	return int64(seconds * 1000), true
}
