package main

import (
	"fmt"
	"testing"
	"time"
)

// Offset compares the source's clock with the clock of each observed server and returns the median
// of these offsets. For an even number of servers it returns the middle offset that is nearer to 0.
// If the machine rebooted after the scrape, Offset uses the wall clock.
func TestSourceClockOffset(t *testing.T) {
	const server = 1_700_000_000_000
	at := func(boot int64, id string) Moment { return Moment{Wall: 5_000_000 + boot, Boot: boot, BootID: id} }
	for _, tt := range []struct {
		name  string
		ahead []int64 // for each observed server, by how many ms its clock is ahead of the true time
		then  Moment  // the client's clocks when the source was scraped
		want  int64   // wanted offset in ms of a source whose clock shows the true time
		known bool
	}{
		{"no server", nil, at(1000, "a"), 0, false},
		{"one server", []int64{0}, at(1000, "a"), 0, true},
		{"one server with a wrong clock", []int64{3600_000}, at(1000, "a"), 3600_000, true},
		{"three servers: the median", []int64{100, 3600_000, -50}, at(1000, "a"), 100, true},
		{"two servers: the offset nearer to 0", []int64{3600_000, 7}, at(1000, "a"), 7, true},
		{"two servers: a negative offset nearer to 0", []int64{-9, 3600_000}, at(1000, "a"), -9, true},
		{"four servers: the middle offset nearer to 0", []int64{-3600_000, -5, 3, 3600_000}, at(1000, "a"), 3, true},
		{"a scrape before a reboot", []int64{0}, at(999_000, "before"), 0, true},
	} {
		c := NewSourceClockTracker(0)
		for i, ahead := range tt.ahead {
			boot := int64(1_000_000 + i*1000) // the server answers after the scrape
			c.Observe(fmt.Sprint(i), server+boot+ahead, at(boot, "a"))
		}
		got, known := c.Offset(tt.then, server+tt.then.Boot)
		if got != tt.want || known != tt.known {
			t.Errorf("%s: got an offset of %d ms, known %v; want %d, %v", tt.name, got, known, tt.want, tt.known)
		}
		if got, _ := c.Offset(tt.then, server+tt.then.Boot-90_000); known && got < tt.want+89_000-90_000 {
			t.Errorf("%s: a source 90 s behind has an offset of %d ms", tt.name, got)
		}
	}
}

// A step of the client's wall clock between a scrape and a server's answer does not change the
// offset, if both are in the same boot.
func TestSourceClockIgnoresWallClockStep(t *testing.T) {
	c := NewSourceClockTracker(0)
	c.Observe("a", 1_700_000_000_000, Moment{Wall: 77, Boot: 500_000, BootID: "a"})
	if got, _ := c.Offset(Moment{Wall: 999_999_999, Boot: 400_000, BootID: "a"}, 1_700_000_000_000-100_000); got != 0 {
		t.Errorf("got an offset of %d ms, want 0", got)
	}
}

// SourceClockTracker keeps the newest observation of each of the maxServersObserved servers that
// answered last. It ignores server times that are out of range. It forgets all observations when
// the boot ID changes.
func TestSourceClockObserves(t *testing.T) {
	at := Moment{Wall: 1, Boot: 1, BootID: "a"}
	c := NewSourceClockTracker(0)
	for _, ms := range []int64{0, -1, maxServerTime + 1} {
		c.Observe("x", ms, at)
	}
	if _, known := c.Offset(at, 1); known {
		t.Error("a time that is out of range counts as an observation")
	}
	for i := range int64(40) {
		c.Observe(fmt.Sprint(i), 1000+i, at)
		c.Observe("0", 5000, at)
	}
	if len(c.servers) != maxServersObserved || c.servers[maxServersObserved-1].name != "0" || c.servers[0].name != "25" {
		t.Errorf("got the observations %+v, want those of the 16 servers that answered last", c.servers)
	}
	c.Observe("0", 6000, Moment{Wall: 1, Boot: 1, BootID: "b"})
	if len(c.servers) != 1 {
		t.Errorf("after a new boot ID got the observations %+v, want one", c.servers)
	}
}

// NextShift returns the previous shift while the error of the source's clock differs from that
// shift by at most shiftTolerance. Otherwise it returns the error as the new shift, or 0 if the
// error is below one minute.
func TestSourceClockShift(t *testing.T) {
	at := Moment{Wall: 1, Boot: 1, BootID: "a"}
	c := NewSourceClockTracker(0)
	if ms, known := c.NextShift(at, 1); ms != 0 || known {
		t.Errorf("before any observation: got a shift of %d ms, known %v; want 0, false", ms, known)
	}
	const now = 1_700_000_000_000
	c.Observe("a", now, at)
	for i, tt := range []struct{ off, want int64 }{
		{0, 0}, {59_999, 0}, {-59_999, 0}, {60_000, 60_000}, {45_000, 60_000}, {90_000, 60_000}, {30_000, 60_000}, {29_999, 0},
		{-3600_000, -3600_000}, {-3590_000, -3600_000}, {-3569_999, -3569_999}, {0, 0},
	} {
		if got, known := c.NextShift(at, now-tt.off); got != tt.want || !known {
			t.Errorf("row %d: at an error of %d ms got a shift of %d ms, want %d", i, tt.off, got, tt.want)
		}
	}
}

// A new SourceClockTracker continues with the last shift of the previous process.
func TestSourceClockShiftAfterRestart(t *testing.T) {
	at := Moment{Wall: 1, Boot: 1, BootID: "a"}
	const now = 1_700_000_000_000
	c := NewSourceClockTracker(100_000)
	c.Observe("a", now, at)
	if got, _ := c.NextShift(at, now-110_000); got != 100_000 {
		t.Errorf("got a shift of %d ms, want 100000", got)
	}
}

// Moment.Since returns the time between two moments. It uses the boot-time clock if both moments
// have the same boot ID and that clock has not gone back. Otherwise it uses the wall clock. The
// result is never negative.
func TestMomentSince(t *testing.T) {
	then := Moment{Wall: 1000_000, Boot: 500_000, BootID: "a"}
	for _, tt := range []struct {
		now  Moment
		want time.Duration
	}{
		{Moment{1060_000, 560_000, "a"}, time.Minute},
		{Moment{9999_000, 560_000, "a"}, time.Minute},
		{Moment{0, 560_000, "a"}, time.Minute},
		{Moment{1090_000, 560_000, "b"}, 90 * time.Second},
		{Moment{900_000, 560_000, "b"}, 0},
		{Moment{1090_000, 5, "a"}, 90 * time.Second}, // the boot-time clock went back although the boot ID is the same, so the wall clock counts
	} {
		if got := tt.now.Since(then); got != tt.want {
			t.Errorf("at %+v: got %v, want %v", tt.now, got, tt.want)
		}
	}
}
