package main

// Types of flags, and the command line of a mode; the flags themselves are in main_server.go,
// main_ring.go, main_client.go and main_keys.go. A value is checked when it is set, and conflicts
// are collected, so that one message reports all of them. Help lists every flag in its group with
// its default.

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
)

const helpIndent, helpWidth = 29, 96 // columns

// usageError is everything that is wrong with a command line.
type usageError []string

func (e usageError) Error() string { return strings.Join(e, "; ") }

// command is one mode with its flags, in groups for --help.
type command struct {
	*flag.FlagSet
	mode           string
	args           []string
	stdout, stderr io.Writer
	now            func() time.Time // the wall clock
	about, example string
	groups         []flagGroup
	problems       usageError
}

type flagGroup struct {
	title string
	names []string
}

// newCommand returns a command that has no flag but --mode.
func newCommand(mode string, args []string, stdout, stderr io.Writer) *command {
	c := &command{mode: mode, stdout: stdout, stderr: stderr, now: time.Now, args: args}
	c.FlagSet = flag.NewFlagSet(mode, flag.ContinueOnError)
	c.SetOutput(io.Discard)
	c.String("mode", mode, "")
	return c
}

// defineGroup defines a group of flags: those that define defines.
func (c *command) defineGroup(title string, define func()) {
	before := map[string]bool{}
	c.VisitAll(func(f *flag.Flag) { before[f.Name] = true })
	define()
	g := flagGroup{title: title}
	c.VisitAll(func(f *flag.Flag) {
		if !before[f.Name] {
			g.names = append(g.names, f.Name)
		}
	})
	c.groups = append(c.groups, g)
}

// writeHelp writes what the mode does, its flags and an example.
func (c *command) writeHelp(w io.Writer) {
	fmt.Fprintf(w, "telemeter --mode %s: %s\n", c.mode, c.about)
	for _, g := range c.groups {
		fmt.Fprintf(w, "\n%s:\n", g.title)
		for _, name := range g.names {
			f := c.Lookup(name)
			arg, text := flag.UnquoteUsage(f)
			text = strings.TrimPrefix(text, arg+" ") // they read on from the argument
			switch f.DefValue {
			case "", "false", "0", "0s":
			default:
				text += fmt.Sprintf(" (default %s)", f.DefValue)
			}
			fmt.Fprintf(w, "  %-27s", strings.TrimSpace("--"+name+" "+arg))
			column := helpIndent
			for _, word := range strings.Fields(text) {
				if column += 1 + len(word); column > helpWidth {
					fmt.Fprintf(w, "\n%*s", helpIndent, "")
					column = helpIndent + 1 + len(word)
				}
				io.WriteString(w, " "+word)
			}
			fmt.Fprintln(w)
		}
	}
	fmt.Fprintf(w, "\nExample:\n  %s\n", c.example)
}

// parseArgs parses the arguments, and goes on after one that is no flag, or not of this mode. It
// collects problems for err. If a number or a switch does not parse, it returns them at once:
// later checks would judge the default in its place.
func (c *command) parseArgs() (helpOrMisread error) {
	misread := false
	for args := c.args; len(args) > 0; {
		err := c.Parse(args)
		if errors.Is(err, flag.ErrHelp) {
			return err
		}
		rest := c.Args()
		switch {
		case err != nil:
			c.addProblemUnless(false, "%v", err)
			switch {
			case strings.HasPrefix(err.Error(), "invalid "): // "value" or "boolean value"
				misread = true
			case len(rest) == len(args): // bad syntax is not passed over
				rest = rest[1:]
			case len(rest) > 0 && !strings.HasPrefix(rest[0], "-") && !strings.Contains(args[len(args)-len(rest)-1], "="):
				rest = rest[1:] // the value of a flag that is not known
			}
		case len(rest) > 0:
			c.addProblemUnless(false, "unexpected argument %q: every value belongs to a flag", rest[0])
			rest = rest[1:]
		}
		args = rest
	}
	if mode := c.Lookup("mode").Value.String(); mode != c.mode {
		c.addProblemUnless(false, "--mode %s and --mode %s are two different things to do", c.mode, mode)
	}
	if misread {
		return c.err()
	}
	return nil
}

// addProblemUnless adds a problem unless ok.
func (c *command) addProblemUnless(ok bool, format string, args ...any) {
	if !ok {
		c.problems = append(c.problems, fmt.Sprintf(format, args...))
	}
}

// err returns a usageError of all problems, or nil.
func (c *command) err() error {
	if len(c.problems) > 0 {
		return c.problems
	}
	return nil
}

// isSet reports whether the arguments have a flag.
func (c *command) isSet(name string) bool {
	set := false
	c.Visit(func(f *flag.Flag) { set = set || f.Name == name })
	return set
}

// funcFlag is a flag.Value that a function sets.
type funcFlag struct {
	def string
	set func(text string) error
}

func (f *funcFlag) String() string        { return f.def }
func (f *funcFlag) Set(text string) error { return f.set(text) }

// parsedFlag defines a flag whose text parse turns into *p; an error is a problem. def is not
// parsed.
func parsedFlag[T any](c *command, p *T, name, def, usage string, parse func(text string) (T, error)) {
	c.Var(&funcFlag{def, func(text string) error {
		v, err := parse(text)
		if err == nil {
			*p = v
		}
		c.addProblemUnless(err == nil, "--%s: %v", name, err)
		return nil
	}}, name, usage)
}

// listFlag defines a flag that may be repeated. parse gets all of its texts, those included that
// came before; one with an error is left out.
func listFlag[T any](c *command, p *T, name, usage string, parse func(texts []string) (T, error)) {
	var texts []string
	parsedFlag(c, p, name, "", usage+"; may be repeated", func(text string) (T, error) {
		all := append(slices.Clip(texts), text)
		v, err := parse(all)
		if err == nil {
			texts = all
		}
		return v, err
	})
}

// numberFlag defines a flag that has to be from min to max, where a max of 0 is no bound.
func numberFlag[T ~int | ~int64](c *command, p *T, name string, def, min, max T, usage string, parse func(string) (T, error), format func(T) string) {
	*p = def
	c.Var(&funcFlag{format(def), func(text string) error {
		v, err := parse(text)
		if err != nil {
			return err
		}
		*p = v
		c.addProblemUnless(v >= min && (max == 0 || v <= max), "--%s is %s", name, boundsText(min, max, format))
		return nil
	}}, name, usage)
}

func boundsText[T ~int | ~int64](min, max T, format func(T) string) string {
	switch {
	case max > 0 && min > 1:
		return "from " + format(min) + " to " + format(max)
	case max > 0:
		return "above 0 and at most " + format(max)
	case min == 0:
		return "not below 0"
	case min == 1:
		return "above 0"
	}
	return "at least " + format(min)
}

// durationFlag defines a flag for a time from min to max; a max of 0 is no bound.
func (c *command) durationFlag(p *time.Duration, name string, def, min, max time.Duration, usage string) {
	numberFlag(c, p, name, def, min, max, usage, time.ParseDuration, formatDuration)
}

// formatDuration writes 10m0s as 10m.
func formatDuration(d time.Duration) string {
	s := d.String()
	if t, ok := strings.CutSuffix(s, "m0s"); ok {
		s = t + "m"
	}
	if t, ok := strings.CutSuffix(s, "h0m"); ok {
		s = t + "h"
	}
	return s
}

// countFlag defines a flag for a number above 0.
func (c *command) countFlag(p *int, name string, def int, usage string) {
	numberFlag(c, p, name, def, 1, 0, usage, parseInt, strconv.Itoa)
}

func parseInt(text string) (int, error) {
	n, err := strconv.ParseInt(text, 0, strconv.IntSize)
	if err != nil {
		return 0, errors.New("not a number")
	}
	return int(n), nil
}

// sizeFlag defines a flag for bytes, with a binary unit if need be, from min to max; a max of 0 is
// no bound.
func (c *command) sizeFlag(p *int64, name string, def, min, max int64, usage string) {
	numberFlag(c, p, name, def, min, max, usage, parseSize, formatSize)
}

var sizeUnits = []struct {
	suffix string
	bytes  int64
}{{"GiB", 1 << 30}, {"MiB", 1 << 20}, {"KiB", 1 << 10}, {"", 1}}

func formatSize(n int64) string {
	for _, u := range sizeUnits {
		if n != 0 && n%u.bytes == 0 {
			return strconv.FormatInt(n/u.bytes, 10) + u.suffix
		}
	}
	return "0"
}

func parseSize(text string) (int64, error) {
	for _, u := range sizeUnits {
		if digits, ok := strings.CutSuffix(text, u.suffix); ok {
			n, err := strconv.ParseUint(digits, 10, 63)
			if err != nil || n > uint64(math.MaxInt64/u.bytes) {
				break
			}
			return int64(n) * u.bytes, nil
		}
	}
	return 0, errors.New("not a number of bytes, such as 1048576 or 1MiB")
}

// addressFlag defines a flag for host:port.
func (c *command) addressFlag(p *string, name, def, usage string) {
	*p = def
	parsedFlag(c, p, name, def, usage, parseAddress)
}

// optionalAddressFlag defines a flag for host:port or nothing.
func (c *command) optionalAddressFlag(p *string, name, def, usage string) {
	*p = def
	parsedFlag(c, p, name, def, usage, func(text string) (string, error) {
		if text == "" {
			return "", nil
		}
		return parseAddress(text)
	})
}

// stringsFlag defines a flag for a list of anything.
func (c *command) stringsFlag(p *[]string, name, usage string) {
	listFlag(c, p, name, usage, func(texts []string) ([]string, error) { return texts, nil })
}

// addressesFlag defines a flag for a list of host:port.
func (c *command) addressesFlag(p *[]string, name, usage string) {
	listFlag(c, p, name, usage, parseEach(parseAddress))
}

func parseAddress(text string) (string, error) {
	_, _, err := net.SplitHostPort(text)
	return text, err
}

// parseEach returns a function that parses each text by itself.
func parseEach[T any](parse func(string) (T, error)) func([]string) ([]T, error) {
	return func(texts []string) (all []T, err error) {
		for _, text := range texts {
			v, err := parse(text)
			if err != nil {
				return nil, err
			}
			all = append(all, v)
		}
		return all, nil
	}
}

// urlFlag defines a flag for an http:// or https:// URL. Without a default, *p may stay nil.
func (c *command) urlFlag(p **url.URL, name, def, usage string) {
	if def != "" {
		*p, _ = parseHTTPURL(def)
	}
	parsedFlag(c, p, name, def, usage, parseHTTPURL)
}

// serverURLsFlag defines a flag for a list of URLs of servers.
func (c *command) serverURLsFlag(p *[]*url.URL, name, usage string) {
	listFlag(c, p, name, usage, parseEach(parseServerURL))
}

// clusterIDFlag defines a flag for a cluster ID.
func (c *command) clusterIDFlag(p *string, name, usage string) {
	parsedFlag(c, p, name, "", usage, func(id string) (string, error) { return id, CheckClusterID(id) })
}

// labelsFlag defines a flag for a list of NAME=VALUE, later ones winning.
func (c *command) labelsFlag(p *[]Label, name, usage string) {
	listFlag(c, p, name, usage, ParseLabels)
}

// labelNamesFlag defines a flag for a list of names of labels, each of them also several between
// commas if splitCommas.
func (c *command) labelNamesFlag(p *[]string, name, usage string, splitCommas bool) {
	listFlag(c, p, name, usage, func(texts []string) (names []string, err error) {
		for _, text := range texts {
			if splitCommas {
				names = append(names, strings.Split(text, ",")...)
			} else {
				names = append(names, text)
			}
		}
		for _, name := range names {
			if err := CheckSettableLabelName(name); err != nil {
				return nil, err
			}
		}
		return names, nil
	})
}

// selectorsFlag defines a flag for a list of selectors of series.
func (c *command) selectorsFlag(p *Selectors, name, usage string) {
	listFlag(c, p, name, usage, ParseSelectors)
}

// metricRenamesFlag defines a flag for a list of OLD=NEW names of metrics, on top of def.
func (c *command) metricRenamesFlag(p *map[string]string, name string, def []string, usage string) {
	*p, _ = ParseRenames(def)
	listFlag(c, p, name, usage, func(texts []string) (map[string]string, error) {
		return ParseRenames(slices.Concat(def, texts))
	})
}

// logLevelFlag defines --log-level.
func (c *command) logLevelFlag(p *slog.Level) {
	*p = slog.LevelInfo
	c.TextVar(p, "log-level", *p, "`LEVEL` of what is logged: DEBUG, INFO, WARN or ERROR")
}

// logger returns a logger to Stderr.
func (c *command) logger(level slog.Level) *slog.Logger {
	return slog.New(slog.NewTextHandler(c.stderr, &slog.HandlerOptions{Level: level}))
}
