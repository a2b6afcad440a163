package main

import (
	"fmt"
	"testing"
)

func TestSourceClockOffset(t *testing.T) {
	const server = 1_700_000_000_000
	at := func(boot int64, id string) Moment { return Moment{Wall: 5_000_000 + boot, Boot: boot, BootID: id} }
	for _, tt := range []struct {
		name  string
		ahead []int64 // of each server observed
		then  Moment  // of the scrape
		want  int64   // of a source that goes with the servers at 0
		known bool
	}{
		{"nobody", nil, at(1000, "a"), 0, false},
		{"one", []int64{0}, at(1000, "a"), 0, true},
		{"one that is wrong", []int64{3600_000}, at(1000, "a"), 3600_000, true},
		{"the median", []int64{100, 3600_000, -50}, at(1000, "a"), 100, true},
		{"of two the nearer", []int64{3600_000, 7}, at(1000, "a"), 7, true},
		{"of two the nearer, behind", []int64{-9, 3600_000}, at(1000, "a"), -9, true},
		{"of four the nearer of the middle", []int64{-3600_000, -5, 3, 3600_000}, at(1000, "a"), 3, true},
		{"another boot", []int64{0}, at(999_000, "before"), 0, true},
	} {
		c := NewSourceClockTracker(0)
		for i, ahead := range tt.ahead {
			boot := int64(1_000_000 + i*1000) // later
			c.Observe(fmt.Sprint(i), server+boot+ahead, at(boot, "a"))
		}
		got, known := c.Offset(tt.then, server+tt.then.Boot)
		if got != tt.want || known != tt.known {
			t.Errorf("%s: %d, %v, want %d", tt.name, got, known, tt.want)
		}
		if got, _ := c.Offset(tt.then, server+tt.then.Boot-90_000); known && got < tt.want+89_000-90_000 {
			t.Errorf("%s: %d of a source that is behind", tt.name, got)
		}
	}
}

// A step of the client's wall clock between scrape and answer moves nothing within a boot.
func TestSourceClockWall(t *testing.T) {
	c := NewSourceClockTracker(0)
	c.Observe("a", 1_700_000_000_000, Moment{Wall: 77, Boot: 500_000, BootID: "a"})
	if got, _ := c.Offset(Moment{Wall: 999_999_999, Boot: 400_000, BootID: "a"}, 1_700_000_000_000-100_000); got != 0 {
		t.Errorf("got %d", got)
	}
}

// The newest of each server counts, of the 16 that answered last; a time that no clock shows is
// ignored.
func TestSourceClockObserves(t *testing.T) {
	at := Moment{Wall: 1, Boot: 1, BootID: "a"}
	c := NewSourceClockTracker(0)
	for _, ms := range []int64{0, -1, maxServerTime + 1} {
		c.Observe("x", ms, at)
	}
	if _, known := c.Offset(at, 1); known {
		t.Error("a time that no clock shows counts")
	}
	for i := range int64(40) {
		c.Observe(fmt.Sprint(i), 1000+i, at)
		c.Observe("0", 5000, at)
	}
	if len(c.servers) != maxServersObserved || c.servers[maxServersObserved-1].name != "0" || c.servers[0].name != "25" {
		t.Errorf("observed %+v", c.servers)
	}
	c.Observe("0", 6000, Moment{Wall: 1, Boot: 1, BootID: "b"})
	if len(c.servers) != 1 {
		t.Errorf("clocks of two boots: %+v", c.servers)
	}
}

func TestSourceClockShift(t *testing.T) {
	at := Moment{Wall: 1, Boot: 1, BootID: "a"}
	c := NewSourceClockTracker(0)
	if ms, known := c.NextShift(at, 1); ms != 0 || known {
		t.Errorf("before any server is observed: %d, %v", ms, known)
	}
	const now = 1_700_000_000_000
	c.Observe("a", now, at)
	for i, tt := range []struct{ off, want int64 }{
		{0, 0}, {59_999, 0}, {-59_999, 0}, {60_000, 60_000}, {45_000, 60_000}, {90_000, 60_000}, {30_000, 60_000}, {29_999, 0},
		{-3600_000, -3600_000}, {-3590_000, -3600_000}, {-3569_999, -3569_999}, {0, 0},
	} {
		if got, known := c.NextShift(at, now-tt.off); got != tt.want || !known {
			t.Errorf("%d: at an error of %d ms the shift is %d, want %d", i, tt.off, got, tt.want)
		}
	}
	// One that was in use before goes on.
	c = NewSourceClockTracker(100_000)
	c.Observe("a", now, at)
	if got, _ := c.NextShift(at, now-110_000); got != 100_000 {
		t.Errorf("got %d", got)
	}
}

func TestShiftText(t *testing.T) {
	for text, want := range map[string]string{
		"":                                "",
		"a 1 5\n":                         "a 1 1005\n",
		"a 1 -5\n":                        "a 1 995\n",
		"a 1\n":                           "a 1\n",
		"a 1000 5\nb NaN 6\nc -Inf 7\n":   "a 1000 1005\nb NaN 1006\nc -Inf 1007\n",
		"a{x=\"b 3\"} 4\n":                "a{x=\"b 3\"} 4\n",
		"a{x=\"1 2 3\"} 4 5\n":            "a{x=\"1 2 3\"} 4 1005\n",
		"{\"a 1\",x=\"} 1\"} 4.5e+10 5\n": "{\"a 1\",x=\"} 1\"} 4.5e+10 1005\n",
		"{\"a 1\"} 4\n":                   "{\"a 1\"} 4\n",
	} {
		if got := string(shiftTimes([]byte(text), 1000)); got != want {
			t.Errorf("%q: got %q, want %q", text, got, want)
		}
	}
}
