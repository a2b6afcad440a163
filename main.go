// Telemeter federates Prometheus samples from isolated sites by push.
//
// This file is the command line: usage, flags into one config struct per mode,
// signals, and the wiring of the rooms. Invariants: every conflict among flags is
// found before anything is opened or sent; secrets come from files, never from
// flags or the environment. It decides nothing about samples, tokens or storage.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"os"
	"os/signal"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"
)

const usage = `telemeter: Prometheus push federation for isolated sites.

Usage: telemeter --mode MODE [flags]

Modes:
  server   take pushes of many sites, and serve them to a central Prometheus
  client   scrape a Prometheus that nobody can reach, and push what it has
  keygen   make the servers' keys and certificate, or rotate a key
  token    make a site's token, or say what one holds
  version  print the version

telemeter --mode MODE --help lists the flags of a mode.

Set-up in four commands:
  telemeter --mode keygen --keys keys --host hub.example
  telemeter --mode server --keys keys --listen :9003 --storage-dir /var/lib/telemeter
  telemeter --mode token --keys keys --id site-7 --to https://hub.example:9003 > site-7.token
  telemeter --mode client --from http://localhost:9090 --token-file site-7.token
`

const (
	exitOK      = 0
	exitFailure = 1
	exitUsage   = 2

	hurry = 2 * time.Second // to end in good order after a second signal
)

// ErrTerminated is the cause of a context that ended with SIGTERM: there is time to end in
// good order.
var ErrTerminated = errors.New("terminated")

func main() { os.Exit(runProcess(time.Now)) }

// runProcess is run with the arguments and signals of this process.
func runProcess(now func() time.Time) int {
	ctx, cancel := context.WithCancelCause(context.Background())
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	go func() {
		if <-signals == syscall.SIGTERM {
			cancel(ErrTerminated)
		}
		cancel(nil)
		<-signals // requests in flight that hang are waited for no longer
		time.Sleep(hurry)
		os.Exit(exitFailure)
	}()
	// It means reload, later; before that, a file is about to be read anyway.
	signal.Ignore(syscall.SIGHUP)
	return runAt(ctx, now, os.Args[1:], os.Stdout, os.Stderr)
}

// run is main without the process: it returns the exit status.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	return runAt(ctx, time.Now, args, stdout, stderr)
}

// runAt is run by a wall clock.
func runAt(ctx context.Context, now func() time.Time, args []string, stdout, stderr io.Writer) int {
	modes := map[string]func(context.Context, *Command) error{
		"server": ServerMode, "client": ClientMode, "keygen": KeygenMode, "token": TokenMode, "version": versionMode,
	}
	mode := modeOf(args)
	if mode == "" {
		if slices.ContainsFunc(args, func(a string) bool { return a == "-h" || a == "-help" || a == "--help" }) {
			io.WriteString(stdout, usage)
			return exitOK
		}
		fmt.Fprintf(stderr, "telemeter: --mode is missing\n\n%s", usage)
		return exitUsage
	}
	f := modes[mode]
	if f == nil {
		fmt.Fprintf(stderr, "telemeter: there is no mode %q; modes: %s\n", mode, strings.Join(slices.Sorted(maps.Keys(modes)), ", "))
		return exitUsage
	}
	c := NewCommand(mode, args, stdout, stderr)
	c.Now = now
	err := f(ctx, c)
	var bad UsageError
	switch {
	case err == nil:
		return exitOK
	case errors.Is(err, flag.ErrHelp):
		c.Help(stdout)
		return exitOK
	case errors.As(err, &bad):
		fmt.Fprintf(stderr, "telemeter: the command line needs a change:\n  %s\ntelemeter --mode %s --help lists the flags\n",
			strings.Join(bad, "\n  "), mode)
		return exitUsage
	}
	fmt.Fprintf(stderr, "telemeter: %v\n", err)
	return exitFailure
}

// modeOf finds --mode, wherever it stands: what other flags there are depends on it.
func modeOf(args []string) string {
	for i, a := range args {
		name, value, has := strings.Cut(strings.TrimPrefix(strings.TrimPrefix(a, "-"), "-"), "=")
		if name == "mode" && strings.HasPrefix(a, "-") {
			if !has && i+1 < len(args) {
				value = args[i+1]
			}
			return value
		}
	}
	return ""
}

func versionMode(_ context.Context, c *Command) error {
	c.About = "prints the version."
	c.Example = "telemeter --mode version"
	if err := c.ParseArgs(); err != nil {
		return err
	}
	if err := c.Err(); err != nil {
		return err
	}
	version, revision := Version()
	_, err := fmt.Fprintf(c.Stdout, "telemeter %s (revision %s, %s, %s/%s)\n", version, revision, runtime.Version(), runtime.GOOS, runtime.GOARCH)
	return err
}
