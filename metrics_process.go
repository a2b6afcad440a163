package main

// Metrics that every process has, under the names of Prometheus's own libraries, and the
// version of this binary. Most of them are read from /proc.

import (
	"bytes"
	"cmp"
	"os"
	"runtime"
	"runtime/metrics"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// RegisterProcessMetrics adds the metrics of a process that Prometheus's own libraries have,
// under the same names, and telemeter_build_info. Without /proc those read from it are
// absent.
func RegisterProcessMetrics(m *Metrics) {
	version, revision := ProgramVersion()
	m.Gauge("telemeter_build_info", "Constant 1, labelled with what this binary was built from.",
		"version", "revision", "goversion").Set(1, version, revision, runtime.Version())
	cpu := m.Counter("process_cpu_seconds_total", "User and system CPU time spent in seconds.")
	maxFDs := m.Gauge("process_max_fds", "Maximum number of open file descriptors.")
	goroutines := m.Gauge("go_goroutines", "Number of goroutines.")
	heap := m.Gauge("go_memstats_heap_alloc_bytes", "Bytes of heap objects, live or not yet collected.")
	cycles := m.Counter("go_gc_cycles_total", "Completed garbage collections.")
	m.OnCollect(func() {
		var usage syscall.Rusage
		if syscall.Getrusage(syscall.RUSAGE_SELF, &usage) == nil {
			cpu.RaiseTo(time.Duration(usage.Utime.Nano() + usage.Stime.Nano()).Seconds())
		}
		var limit syscall.Rlimit
		if syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit) == nil {
			maxFDs.Set(float64(limit.Cur))
		}
		goroutines.Set(float64(runtime.NumGoroutine()))
		// Unlike runtime.ReadMemStats, this does not stop the world.
		mem := []metrics.Sample{{Name: "/memory/classes/heap/objects:bytes"}, {Name: "/gc/cycles/total:gc-cycles"}}
		metrics.Read(mem)
		heap.Set(float64(mem[0].Value.Uint64()))
		cycles.RaiseTo(float64(mem[1].Value.Uint64()))
	})

	if _, ok := readProc(); !ok {
		return
	}
	resident := m.Gauge("process_resident_memory_bytes", "Resident memory size in bytes.")
	start := m.Gauge("process_start_time_seconds", "Start time of the process since unix epoch in seconds.")
	openFDs := m.Gauge("process_open_fds", "Number of open file descriptors.")
	m.OnCollect(func() {
		if p, ok := readProc(); ok {
			resident.Set(p.resident)
			start.Set(p.start)
			openFDs.Set(p.openFDs)
		}
	})
}

type procStats struct{ resident, start, openFDs float64 } // bytes, Unix seconds, number

// readProc reads /proc as proc(5) describes it. The kernel's boot time follows
// the wall clock's corrections, and so does the start time told.
func readProc() (p procStats, ok bool) {
	const ticks = 100 // USER_HZ, the same on every architecture Go has on Linux
	stat, err1 := os.ReadFile("/proc/self/stat")
	system, err2 := os.ReadFile("/proc/stat")
	fds, err3 := os.ReadDir("/proc/self/fd")
	// The second field, the command, may hold spaces and parentheses itself.
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	if cmp.Or(err1, err2, err3) != nil || len(fields) <= 24-3 {
		return p, false
	}
	_, boot, _ := strings.Cut(string(system), "\nbtime ")
	boot, _, _ = strings.Cut(boot, "\n")
	booted, err1 := strconv.ParseFloat(boot, 64)
	started, err2 := strconv.ParseFloat(fields[22-3], 64)
	pages, err3 := strconv.ParseFloat(fields[24-3], 64)
	p.resident, p.start = pages*float64(os.Getpagesize()), booted+started/ticks
	p.openFDs = float64(len(fds) - 1) // one of them is the listing's own
	return p, cmp.Or(err1, err2, err3) == nil
}
