package main

// Tests of the metrics about the process: they must have plausible values. The test reads the
// values of its own process.

import (
	"runtime"
	"testing"
)

// RegisterProcessMetrics registers all its metrics, and their values are positive. Only the number
// of garbage collections may still be 0. The metrics from /proc are expected on Linux only.
func TestRegisterProcess(t *testing.T) {
	m := NewMetrics()
	RegisterProcessMetrics(m)
	got := metricsParsed(t, m)
	positive := []string{"telemeter_build_info", "process_cpu_seconds_total", "process_max_fds", "go_goroutines", "go_memstats_heap_alloc_bytes"}
	if runtime.GOOS == "linux" {
		positive = append(positive, "process_resident_memory_bytes", "process_open_fds", "process_start_time_seconds")
	}
	for _, name := range positive {
		mf := got[name]
		if mf == nil || mf.Metric[0].GetGauge().GetValue()+mf.Metric[0].GetCounter().GetValue() <= 0 {
			t.Errorf("metric %s: got %v, want a value above 0", name, mf)
		}
	}
	if got["go_gc_cycles_total"] == nil {
		t.Error("metric go_gc_cycles_total is missing")
	}
}
