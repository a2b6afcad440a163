package main

import (
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// The client logs when it begins to shift the source's times, when the shift changes, and when it
// ends. It logs a change at most once in failureLogInterval. Before it has heard a server's time, it
// logs nothing.
func TestClientLogsShift(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		source := &counting{date: true}
		c, hub, log := newTestClient(t, "", func(cfg *ClientConfig, _ *ClientReloadConfig) { cfg.FromClient.Transport = source })
		hub.tellsTime = true
		for i, tt := range []struct {
			ahead time.Duration
			want  string // text of the only log line about the clock; "" for none
		}{
			{10 * time.Minute, `level=WARN msg="the source's clock is off; sample times are shifted to the servers' clocks" off="10m0s ahead" advice="set the clock`},
			{10 * time.Minute, ""},
			{10*time.Minute + 20*time.Second, ""},
			{-40 * time.Minute, ""}, // 6 minutes after the last line
			{-40 * time.Minute, ""},
			{-40 * time.Minute, `off="40m0s behind"`},
			{0, `level=INFO msg="the source's clock agrees with the servers' clocks again; sample times are not shifted"`},
			{0, ""},
		} {
			log.Reset()
			source.extra = tt.ahead
			if err := c.ScrapeOnceAndDrain(t.Context()); err != nil {
				t.Fatal(err)
			}
			n := strings.Count(log.String(), "clock")
			lines := strings.Count(log.String(), "the source's clock")
			if (lines > 0) != (tt.want != "") || !strings.Contains(log.String(), tt.want) || lines > 1 || tt.want == "" && n > 0 {
				t.Errorf("scrape %d: want the line %q, got:\n%s", i, tt.want, log)
			}
			time.Sleep(2 * time.Minute)
		}
	})
}
