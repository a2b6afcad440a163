// Telemeter federates Prometheus samples from isolated sites by push.
//
// A client beside a Prometheus that nobody can reach scrapes it, cleans and anonymizes the
// samples, keeps the scrapes in a spool on disk, and pushes them to a server. A server
// authenticates the push, brings it into a normal form, stores it in the log of its site, and
// serves it to the central Prometheus. Several servers form a ring, which gives every site one
// owner. A site forgets a scrape only when every consumer has read it.
//
// The package is flat. The name of a file begins with its family; the file that gives a family
// its name is where to begin reading. A family uses only families below it, and its lower-case
// names stay inside: TestFamilies holds both.
//
//	main      modes, flags, the files they name, wiring, signals
//	client    scrape, clean, spool, push; the client's own listener
//	server    routes, authentication, upload, /federate, forwarding to owners, drain
//	hashring  jump hash, slots and claims: which member owns a site
//	gossip    who is a member: SWIM state machine, packets, UDP
//	store     the sites: series, batches, cursors, recovery, retention, limits
//	auth      keys, tokens, certificates, revocation, sealing, replay window
//	sanitize  selectors, the client's cleanup, the server's normal form
//	sample    the sample model; text and protobuf under limits; exposition
//	push      messages between client and server: names of scrapes, clocks, answers
//	log       append-only files of checksummed records; the seam to the disk
//	http      listeners, connections and handlers that several share
//	metrics   the process's own metrics
//	wire      one cursor over foreign bytes
package main

// The process: modes, exit status and signals. Every conflict among flags is found before
// anything is opened or sent. Secrets come from files, never from flags or the environment.
// The family main wires the others, and decides nothing about samples, tokens or storage.

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

	secondSignalGrace = 2 * time.Second // to end in good order after a second signal
)

// errTerminated is the cause of a context that ended with SIGTERM: there is time to end in
// good order.
var errTerminated = errors.New("terminated")

func main() { os.Exit(runProcess(time.Now)) }

// runProcess is run with the arguments and signals of this process. The first signal ends the
// context. The second ends the process after a short time, whatever is in flight.
func runProcess(now func() time.Time) int {
	ctx, cancel := context.WithCancelCause(context.Background())
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	go func() {
		if <-signals == syscall.SIGTERM {
			cancel(errTerminated)
		}
		cancel(nil)
		<-signals
		time.Sleep(secondSignalGrace)
		os.Exit(exitFailure)
	}()
	// Later SIGHUP means reload. Until then the files are about to be read anyway.
	signal.Ignore(syscall.SIGHUP)
	return run(ctx, now, os.Args[1:], os.Stdout, os.Stderr)
}

// run runs the mode that args name until it is done or ctx ends, and returns the exit status. now
// is the wall clock.
func run(ctx context.Context, now func() time.Time, args []string, stdout, stderr io.Writer) int {
	modes := map[string]func(context.Context, *command) error{
		"server": serverMode, "client": clientMode, "keygen": keygenMode, "token": tokenMode, "version": versionMode,
	}
	mode := modeArg(args)
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
	c := newCommand(mode, args, stdout, stderr)
	c.now = now
	err := f(ctx, c)
	var bad usageError
	switch {
	case err == nil:
		return exitOK
	case errors.Is(err, flag.ErrHelp):
		c.writeHelp(stdout)
		return exitOK
	case errors.As(err, &bad):
		fmt.Fprintf(stderr, "telemeter: the command line needs a change:\n  %s\ntelemeter --mode %s --help lists the flags\n",
			strings.Join(bad, "\n  "), mode)
		return exitUsage
	}
	fmt.Fprintf(stderr, "telemeter: %v\n", err)
	return exitFailure
}

// modeArg returns the value of --mode, wherever it stands: the other flags depend on it.
func modeArg(args []string) string {
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

// versionMode runs --mode version.
func versionMode(_ context.Context, c *command) error {
	c.about = "prints the version."
	c.example = "telemeter --mode version"
	if err := c.parseArgs(); err != nil {
		return err
	}
	if err := c.err(); err != nil {
		return err
	}
	version, revision := ProgramVersion()
	_, err := fmt.Fprintf(c.stdout, "telemeter %s (revision %s, %s, %s/%s)\n", version, revision, runtime.Version(), runtime.GOOS, runtime.GOARCH)
	return err
}
