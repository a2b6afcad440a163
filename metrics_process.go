package main

// This file registers metrics about the process, such as memory and CPU time, and about the version
// of this binary. Most of the metrics about the process have the same names as in Prometheus's
// client libraries. Some of them are read from /proc.

import (
	"bytes"
	"cmp"
	"os"
	"path"
	"runtime"
	"runtime/metrics"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// RegisterProcessMetrics registers telemeter_build_info and the metrics about the process. It does
// not register the metrics that are read from /proc if /proc cannot be read, for example on systems
// without /proc.
func RegisterProcessMetrics(m *Metrics) {
	version, revision := ProgramVersion()
	m.Gauge("telemeter_build_info", "Always 1; the labels are the version, the commit and the Go version of this binary.",
		"version", "revision", "goversion").Set(1, version, revision, runtime.Version())
	cpu := m.Counter("process_cpu_seconds_total", "User and system CPU time of this process, in seconds.")
	maxFDs := m.Gauge("process_max_fds", "Limit on open file descriptors of this process.")
	goroutines := m.Gauge("go_goroutines", "Number of goroutines that currently exist.")
	heap := m.Gauge("go_memstats_heap_alloc_bytes", "Bytes of heap objects that the garbage collector has not freed.")
	cycles := m.Counter("go_gc_cycles_total", "Garbage collection cycles completed since the process started.")
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
		// Use metrics.Read, because runtime.ReadMemStats would pause all goroutines.
		mem := []metrics.Sample{{Name: "/memory/classes/heap/objects:bytes"}, {Name: "/gc/cycles/total:gc-cycles"}}
		metrics.Read(mem)
		heap.Set(float64(mem[0].Value.Uint64()))
		cycles.RaiseTo(float64(mem[1].Value.Uint64()))
	})

	if _, ok := readProc(); !ok {
		return
	}
	resident := m.Gauge("process_resident_memory_bytes", "Resident memory of this process, in bytes.")
	start := m.Gauge("process_start_time_seconds", "Start time of this process, in seconds since the Unix epoch.")
	openFDs := m.Gauge("process_open_fds", "Number of file descriptors that this process has open.")
	m.OnCollect(func() {
		if p, ok := readProc(); ok {
			resident.Set(p.resident)
			start.Set(p.start)
			openFDs.Set(p.openFDs)
		}
	})
}

// procStats holds the statistics of this process that readProc reads from /proc.
type procStats struct {
	resident float64 // bytes of resident memory of the process
	start    float64 // start of the process, in Unix seconds
	openFDs  float64 // number of open file descriptors
}

// readProc reads statistics of this process from the files in /proc that proc(5) describes. ok is
// false if a file cannot be read or parsed. The kernel adjusts its boot time when the wall clock is
// set, so that the start time changes with the wall clock.
func readProc() (p procStats, ok bool) {
	const ticks = 100 // clock ticks per second (USER_HZ), the same on every Linux architecture of Go
	stat, err1 := os.ReadFile("/proc/self/stat")
	system, err2 := os.ReadFile("/proc/stat")
	fds, err3 := os.ReadDir("/proc/self/fd")
	// Split the text after its last parenthesis, because field 2, the command in parentheses, can
	// contain spaces and parentheses. So fields[0] is field 3 of proc(5).
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
	p.openFDs = float64(len(fds) - 1) // without the descriptor that ReadDir itself used
	return p, cmp.Or(err1, err2, err3) == nil
}

// ProcessMemory returns the resident memory of this process and the memory that it may use, in bytes.
func ProcessMemory() (resident, limit float64, known bool) {
	p, ok := readProc()
	limit, known = memoryLimit(os.ReadFile)
	return p.resident, limit, ok && known
}

// memoryLimit returns how many bytes of memory this process may use: the memory of the host, or the
// limit of the control group (version 2) of this process if that is lower. It ignores the limits of
// the groups above this group.
func memoryLimit(readFile func(name string) ([]byte, error)) (limit float64, known bool) {
	info, _ := readFile("/proc/meminfo")
	fields := strings.Fields(string(info))
	if len(fields) < 2 || fields[0] != "MemTotal:" {
		return 0, false
	}
	kilobytes, err := strconv.ParseFloat(fields[1], 64)
	limit = 1024 * kilobytes
	groups, _ := readFile("/proc/self/cgroup")
	for line := range strings.Lines(string(groups)) {
		if group, isVersion2 := strings.CutPrefix(strings.TrimSpace(line), "0::"); isVersion2 {
			text, _ := readFile(path.Join("/sys/fs/cgroup", group, "memory.max"))                  // missing in the root group
			if bytes, err := strconv.ParseFloat(strings.TrimSpace(string(text)), 64); err == nil { // "max" means no limit
				limit = min(limit, bytes)
			}
		}
	}
	return limit, err == nil
}
