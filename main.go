// Telemeter federates Prometheus samples from isolated sites by push.
//
// A client runs at an isolated site, beside a Prometheus that cannot be reached from outside. The
// client scrapes this Prometheus, cleans and anonymizes the samples, keeps each scrape in a spool,
// usually on disk, and pushes the scrapes to a server. The server authenticates the push, converts
// the samples to a normal form, appends them to the log of the site, and serves them to a central
// Prometheus. Several servers can form a ring, which gives every site one owner. The client removes
// a delivered scrape from its spool when every known consumer has read it. It also removes scrapes
// that the servers refuse, and the oldest scrapes when the spool reaches its limit of size or age.
// A consumer is a scraper, such as a central Prometheus, that gives a name when it scrapes the
// servers.
//
// The package is flat, and its files are grouped into families. The part of a file's name before
// the first underscore is its family: store.go and store_recovery.go belong to the family store.
// Start reading a family at the file that has no underscore in its name, such as store.go. A family
// may use only the families below it in the list here. Other families may use the upper-case names
// of a family, but not its lower-case names. TestFamilies enforces these rules.
//
//	main      command line: modes, flags, files that flags name, signals; status on a terminal; wiring of the parts
//	client    the client: scrape, clean, spool and push; its own HTTP listener and status; the load generator
//	server    the server: HTTP routes, authentication, upload, /federate, forwarding, status, drain
//	hashring  which member of the ring owns a site: jump hash, slots, claims
//	gossip    which servers are members of the ring: SWIM state machine, packets, UDP
//	store     samples of all sites on disk: series, batches, cursors, recovery, retention, limits
//	auth      keys, tokens, certificates, revocation, sealing of messages, replay window
//	sanitize  series selectors, the client's cleaning, the server's normal form of samples
//	sample    sample model; decoding of text and protobuf under limits; text exposition
//	push      parts of a push and its answer that client and server share: scrape names, clocks
//	log       append-only files of checksummed records; the interface to the file system
//	http      HTTP listeners, connections and handlers that client and server share; the status page
//	metrics   the metrics that the process exposes about itself
//	wire      decoding of untrusted bytes: a cursor that remembers the first error
package main

// This file implements main: it selects the mode, handles signals and sets the exit status. A mode
// checks its flags before it opens a file or sends a request, except that the client reads its
// token before it checks the servers' URLs. Flags name the files of secrets, so that no secret is
// on the command line or in the environment. The family main wires the other families together; it
// makes no decision about samples, tokens or storage.

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
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
  server   receive pushes from many sites, and serve the samples to a central Prometheus
  client   scrape a Prometheus that cannot be reached from outside, and push its samples
  keygen   create the servers' keys and certificate, or rotate a key
  token    create a token for a site, inspect a token, or list all tokens
  status   show the state of a running server or client, and its problems
  show     print the documents and configurations that this binary contains
  load     push made-up series as many sites, to measure how much servers take
  version  print the version

telemeter --mode MODE --help lists the flags of a mode. telemeter --version prints the version.
telemeter --mode show --file README.md prints an introduction.

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

	secondSignalGrace = 2 * time.Second // time from the second signal to a forced exit
)

// errTerminated is the cancellation cause of the process's context after SIGTERM. Before a server
// then exits, it waits a limited time for consumers to read its samples; see
// serveInternalUntilRead.
var errTerminated = errors.New("terminated")

func main() { os.Exit(runProcess(time.Now)) }

// runProcess calls run with the arguments, streams and signals of this process, and returns the
// exit status. The first SIGINT or SIGTERM cancels the context of run; after SIGTERM, the cause is
// errTerminated. The second signal makes the process exit after secondSignalGrace, even if requests
// are still in flight. now is the wall clock.
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
	// Ignore SIGHUP until runWithReloads makes SIGHUP start a reload. Until then, SIGHUP must not
	// end the process. It starts no reload either, even if the files were already read.
	signal.Ignore(syscall.SIGHUP)
	return run(ctx, now, os.Args[1:], os.Stdout, os.Stderr)
}

// run runs the mode that --mode in args selects until the mode is done or ctx ends. It returns
// exitOK, exitFailure, or exitUsage for a faulty command line. now is the wall clock.
func run(ctx context.Context, now func() time.Time, args []string, stdout, stderr io.Writer) int {
	mode, args, problem := chooseMode(args)
	if mode == "" {
		if problem != "" {
			fmt.Fprintf(stderr, "telemeter: %s\n", problem)
			return exitUsage
		}
		io.WriteString(stdout, usage)
		return exitOK
	}
	c := newCommand(mode, args, stdout, stderr)
	c.now = now
	err := modes()[mode](ctx, c)
	var bad usageError
	switch {
	case err == nil:
		return exitOK
	case errors.Is(err, flag.ErrHelp):
		c.writeHelp(stdout)
		return exitOK
	case errors.As(err, &bad):
		fmt.Fprintf(stderr, "telemeter: invalid command line:\n  %s\ntelemeter --mode %s --help lists the flags\n",
			strings.Join(bad, "\n  "), mode)
		return exitUsage
	}
	if c.logsJSON {
		c.logger(slog.LevelError).Error("telemeter failed", "err", err)
	} else {
		fmt.Fprintf(stderr, "telemeter: %v\n", err)
	}
	return exitFailure
}

// modes returns the function of each mode.
func modes() map[string]func(context.Context, *command) error {
	return map[string]func(context.Context, *command) error{
		"server": serverMode, "client": clientMode, "keygen": keygenMode, "token": tokenMode, "load": loadMode, "status": statusMode, "show": showMode, "version": versionMode,
	}
}

// chooseMode returns the mode that args select and the arguments of this mode. It also understands
// habits from other programs: --version anywhere; -v, version and help as the first argument; and a
// mode as a word together with a request for help, such as "server --help". If mode is "", problem
// says what is wrong with args, or is "" if args ask for the usage text.
func chooseMode(args []string) (mode string, modeArgs []string, problem string) {
	names := slices.Sorted(maps.Keys(modes()))
	first, word := "", "" // word is a mode in args that is no value of --mode
	if len(args) > 0 {
		first = args[0]
	}
	for _, a := range args[:min(len(args), 2)] {
		if a = strings.TrimLeft(a, "-"); word == "" && slices.Contains(names, a) {
			word = a
		}
	}
	isHelp := func(a string) bool { return a == "-h" || a == "-help" || a == "--help" }
	mode = modeArg(args)
	switch {
	case slices.Contains(args, "--version") || slices.Contains(args, "-version") || mode == "" && (first == "version" || first == "-v"):
		return "version", nil, ""
	case mode == "" && (first == "help" || slices.ContainsFunc(args, isHelp)):
		return word, []string{"--help"}, ""
	case first == "help":
		args = []string{"--help"}
	case mode == "" && word != "" && strings.TrimLeft(first, "-") == word:
		correct := append([]string{"telemeter", "--mode", word}, args[1:]...)
		return "", nil, "the mode is the value of the flag --mode; run this command:\n  " + shellJoin(correct)
	case mode == "" && (first == "" || strings.HasPrefix(first, "-")):
		return "", nil, "--mode is missing: choose one of the modes below\n\n" + strings.TrimSuffix(usage, "\n")
	case mode == "":
		mode = first
	}
	if !slices.Contains(names, mode) {
		problem = fmt.Sprintf("unknown mode %q", mode)
		if near := nearest(mode, names); near != "" {
			problem += fmt.Sprintf(": did you mean --mode %s?", near)
		}
		return "", nil, fmt.Sprintf("%s\nThe modes are %s; telemeter --help explains them", problem, strings.Join(names, ", "))
	}
	return mode, args, ""
}

// shellJoin returns a command line for a POSIX shell that passes the given words.
func shellJoin(words []string) string {
	quoted := make([]string, len(words))
	for i, word := range words {
		plain := func(r rune) bool {
			return 'a' <= r && r <= 'z' || 'A' <= r && r <= 'Z' || '0' <= r && r <= '9' || strings.ContainsRune("-_./:=@%+,", r)
		}
		if quoted[i] = word; word == "" || strings.ContainsFunc(word, func(r rune) bool { return !plain(r) }) {
			quoted[i] = "'" + strings.ReplaceAll(word, "'", `'\''`) + "'"
		}
	}
	return strings.Join(quoted, " ")
}

// modeArg returns the value of --mode in args, or "" if --mode is missing. It accepts --mode at any
// position. It runs before the flags are parsed, because the mode determines which flags exist.
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

func versionMode(_ context.Context, c *command) error {
	c.about = "prints the version, the revision and the Go version of this program."
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
