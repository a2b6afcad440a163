package main

// TestSpeedScale pushes to one server as many sites at once, each in its own time, while a consumer
// scrapes the server. It prints what the server needed. With -speed scale:N there are N sites. Without
// -speed, it does the same at a tiny size and prints nothing.

import (
	"fmt"
	"os"
	"regexp"
	"slices"
	"strconv"
	"testing"
	"time"
)

// speedScale has the numbers of a run of TestSpeedScale.
type speedScale struct {
	sites, series  int
	interval       time.Duration // between two pushes of a site
	duration       time.Duration
	scrapeInterval time.Duration
}

// No push of the sites is refused. In the end the consumer has read every sample, and the server has
// dropped none that was unread.
func TestSpeedScale(t *testing.T) {
	scale := speedScale{sites: 40, series: 10, interval: 500 * time.Millisecond, duration: 2 * time.Second, scrapeInterval: 200 * time.Millisecond}
	kind, sites, err := parseSpeed(*speedFlag)
	if err != nil {
		t.Fatal(err)
	}
	switch kind {
	case "":
	case "scale":
		scale = speedScale{sites: sites, series: 100, interval: time.Minute, duration: 5 * time.Minute, scrapeInterval: 15 * time.Second}
	default:
		t.Skip("-speed " + *speedFlag + " is another test")
	}
	r := newSpeedRig(t, speedSize{series: scale.series})
	machine := describeMachine()
	server := r.startSpeedServer(r.TempDir(), "--limit-scrape", "1000000")
	cfg := r.load("scale", scale.sites, server)
	cfg.Pushes, cfg.Interval, cfg.Duration, cfg.Format, cfg.Encoding = 0, scale.interval, scale.duration, LoadText, LoadGzip
	if *speedFlag != "" {
		cfg.Progress = os.Stderr
	}
	var report LoadReport
	ended := make(chan struct{})
	var lines []int
	var slowest time.Duration
	cpu := server.cpuSeconds(func() {
		go func() {
			report = RunLoad(t.Context(), cfg)
			close(ended)
		}()
		lines, slowest = r.scrapeUntil(server, scale.scrapeInterval, ended)
	})
	if err := report.Err(); err != nil {
		t.Errorf("%v:\n%s", err, &report)
	}
	if least := scale.sites * int(scale.duration/scale.interval) / 2; report.Pushes < least {
		t.Errorf("%d pushes, want at least %d", report.Pushes, least)
	}
	if lost := server.metric("telemeter_store_samples_unread_dropped_total"); lost > 0 {
		t.Errorf("the server dropped %v unread samples", lost)
	}
	if *speedFlag == "" {
		return
	}
	fmt.Printf("%s at the beginning, %s at the end\n%d sites with %d series, each pushes every %v, and a scrape every %v\n\n| what | figure |\n|---|---|\n",
		machine, loadAverage(), scale.sites, scale.series, scale.interval, scale.scrapeInterval)
	for _, row := range [][2]string{
		{"pushes, all answered with 200", formatCount(float64(report.Pushes))},
		{"samples a second", formatCount(float64(report.Samples) / report.Took.Seconds())},
		{"latency of a push", report.latencyText()},
		{"CPU time of the server, in cores", fmt.Sprintf("%.2f", cpu/report.Took.Seconds())},
		{"memory of the server in MiB", formatCount(server.metric("process_resident_memory_bytes") / (1 << 20))},
		{"scrapes, their lines, and the slowest", fmt.Sprintf("%d, %s to %s, %.1f s", len(lines), formatCount(float64(slices.Min(lines))), formatCount(float64(slices.Max(lines))), slowest.Seconds())},
	} {
		fmt.Printf("| %s | %s |\n", row[0], row[1])
	}
}

// scrapeUntil scrapes server as a consumer in the given interval until ended is closed, and then
// until the consumer has read every sample. It returns the lines of each scrape, and the longest time
// of a scrape.
func (r *speedRig) scrapeUntil(server *speedProcess, interval time.Duration, ended <-chan struct{}) (lines []int, slowest time.Duration) {
	r.Helper()
	scraper := r.newScraper()
	for due := time.Now(); ; {
		isLast := false
		select {
		case <-ended:
			isLast = true
		default:
		}
		answer, n, _, took := r.scrape(scraper, server, "?consumer=central", isLast)
		lines, slowest = append(lines, n), max(slowest, took)
		if isLast && backlogOf(answer) == 0 {
			return lines, slowest
		}
		if due = due.Add(interval); !isLast {
			Sleep(r.Context(), time.Until(due), nil)
		}
	}
}

// backlogOf returns the samples that, says an answer of /federate, its consumer had not read before
// the answer. It returns 1 if the answer says nothing of a backlog.
func backlogOf(answer []byte) (samples int) {
	found := backlogLine.FindAllSubmatch(answer, -1)
	for _, m := range found {
		n, _ := strconv.Atoi(string(m[1]))
		samples += n
	}
	if len(found) == 0 {
		return 1
	}
	return samples
}

var backlogLine = regexp.MustCompile(`(?m)^telemeter_cluster_backlog_samples\{.*\} (\d+)`)
