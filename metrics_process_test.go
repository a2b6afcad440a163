package main

// Tests of the metrics about the process: they must have plausible values. TestRegisterProcess reads
// the values of its own process.

import (
	"io/fs"
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

// The memory limit is the memory of the host, or that of the process's control group if it is lower.
func TestMemoryLimit(t *testing.T) {
	const host, service = "MemTotal:  2048 kB\nMemFree: 1 kB\n", "/sys/fs/cgroup/system.slice/t.service/memory.max"
	for _, tt := range []struct {
		name  string
		files map[string]string
		want  float64
	}{
		{"no control group", map[string]string{"/proc/meminfo": host}, 2 << 20},
		{"container", map[string]string{"/proc/meminfo": host, "/proc/self/cgroup": "0::/\n", "/sys/fs/cgroup/memory.max": "1048576\n"}, 1 << 20},
		{"service", map[string]string{"/proc/meminfo": host, "/proc/self/cgroup": "1:cpu:/a\n0::/system.slice/t.service\n", service: "4096\n"}, 4096},
		{"no limit", map[string]string{"/proc/meminfo": host, "/proc/self/cgroup": "0::/system.slice/t.service\n", service: "max\n"}, 2 << 20},
		{"limit above the memory", map[string]string{"/proc/meminfo": host, "/proc/self/cgroup": "0::/\n", "/sys/fs/cgroup/memory.max": "8388608\n"}, 2 << 20},
		{"no /proc", nil, 0},
		{"faulty /proc", map[string]string{"/proc/meminfo": "MemTotal: much kB\n"}, 0},
	} {
		got, known := memoryLimit(func(name string) ([]byte, error) {
			if text, ok := tt.files[name]; ok {
				return []byte(text), nil
			}
			return nil, fs.ErrNotExist
		})
		if got != tt.want || known != (tt.want > 0) {
			t.Errorf("%s: got %v, known: %t; want %v", tt.name, got, known, tt.want)
		}
	}
	if resident, limit, known := ProcessMemory(); runtime.GOOS == "linux" && (!known || resident <= 0 || limit < resident) {
		t.Errorf("this process: resident %v, limit %v, known: %t", resident, limit, known)
	}
}
