package main

// This file implements the types of flags, the parsing of a mode's command line, and --help. The
// flags of the modes are defined in main_server.go, main_ring.go, main_client.go and main_keys.go.
// Most types of flags check a value when it is set. Problems are collected and reported together.
// --help lists the flags by group, with each default that is not empty, false or zero.

import (
	"context"
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

	"github.com/prometheus/common/model"
)

const helpIndent, helpWidth = 29, 96 // in --help: columns for the name of a flag and its argument, and maximum columns of a line

// usageError lists problems of a command line, one per element. If a mode returns a usageError, the
// process exits with the status exitUsage.
type usageError []string

func (e usageError) Error() string { return strings.Join(e, "; ") }

// command is the command line of one mode: its flags in groups, its arguments and its output.
type command struct {
	*flag.FlagSet
	mode           string
	args           []string
	stdout, stderr io.Writer
	now            func() time.Time // the wall clock
	about, example string           // for --help: what the mode does, and a command line
	usual          []string         // the flags that --help lists first
	logsJSON       bool             // --log-format json
	warnings       WarningLog       // newest lines of level warning and above of the loggers that logger returned
	groups         []flagGroup      // in the order in which --help lists them
	problems       usageError
	meant          []string // flags that unknown flags are probably misspellings of
}

// flagGroup is a titled group of flags in --help.
type flagGroup struct {
	title string
	names []string
}

// newCommand returns a command for mode that has only the flag --mode. The function that implements
// the mode adds the other flags.
func newCommand(mode string, args []string, stdout, stderr io.Writer) *command {
	c := &command{mode: mode, stdout: stdout, stderr: stderr, now: time.Now, args: args}
	c.FlagSet = flag.NewFlagSet(mode, flag.ContinueOnError)
	c.SetOutput(io.Discard)
	c.String("mode", mode, "`MODE`")
	return c
}

// defineGroup calls define, which defines flags in c. It then adds a group with these flags to
// c.groups.
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

// writeHelp writes the --help of the mode to w: c.about, the usual flags, the other flags by group,
// and an example. The usage text of a flag may begin with the name of the flag's argument in back
// quotes. writeHelp prints that name beside the flag and removes it from the text.
func (c *command) writeHelp(w io.Writer) {
	fmt.Fprintf(w, "telemeter --mode %s: %s\n", c.mode, c.about)
	if len(c.usual) > 0 {
		c.writeHelpGroup(w, flagGroup{"Usual flags", c.usual})
		fmt.Fprintf(w, "\nRarely needed\n")
	}
	for _, g := range c.groups {
		g.names = slices.DeleteFunc(slices.Clone(g.names), func(name string) bool { return slices.Contains(c.usual, name) })
		if len(g.names) > 0 {
			c.writeHelpGroup(w, g)
		}
	}
	fmt.Fprintf(w, "\nExample:\n  %s\n", c.example)
}

// writeHelpGroup writes the title and the flags of a group to w.
func (c *command) writeHelpGroup(w io.Writer, g flagGroup) {
	fmt.Fprintf(w, "\n%s:\n", g.title)
	for _, name := range g.names {
		f := c.Lookup(name)
		arg, text := flag.UnquoteUsage(f)
		text = strings.TrimPrefix(text, arg+" ")
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

// parseArgs parses all arguments and adds each problem to c.problems. It continues after an
// argument with a problem, so that it also finds problems of later arguments. It accepts the syntax
// of package flag, but its messages write every flag with two dashes. It returns flag.ErrHelp for
// --help. If the value of a number, a duration, a size or a switch does not parse, it returns all
// problems found so far as an error, because later checks would not see that value. In all other
// cases it returns nil, and the method err returns the problems.
func (c *command) parseArgs() (helpOrMisread error) {
	misread, lastSwitch := false, ""
	for args := c.args; len(args) > 0; {
		arg := args[0]
		args = args[1:]
		name, value, hasValue := cutFlag(arg)
		f := c.Lookup(name)
		isValue := len(args) > 0 && !strings.HasPrefix(args[0], "-") // whether the next argument looks like a value
		switch {
		case name == "help": // also as a word without dashes
			return flag.ErrHelp
		case name == "" || !strings.HasPrefix(arg, "-"):
			advice := "every value must follow its flag"
			if lastSwitch != "" {
				advice = fmt.Sprintf("--%s is a switch; write its value as --%s=true or --%s=false", lastSwitch, lastSwitch, lastSwitch)
			}
			c.addProblemUnless(false, "unexpected argument %q: %s", arg, advice)
			continue
		case name == "h":
			return flag.ErrHelp
		case f == nil:
			c.addProblemUnless(false, "unknown flag --%s%s", name, c.adviceOnUnknownFlag(name))
			if !hasValue && isValue {
				args = args[1:] // skip the probable value of the unknown flag
			}
			continue
		}
		lastSwitch = ""
		sw, ok := f.Value.(interface{ IsBoolFlag() bool })
		isSwitch := ok && sw.IsBoolFlag()
		switch {
		case hasValue:
		case isSwitch:
			value, lastSwitch = "true", name
		case len(args) == 0 || c.isFlag(args[0]):
			argument, _ := flag.UnquoteUsage(f)
			c.addProblemUnless(false, "--%s needs a value: write --%s %s", name, name, argument)
			continue
		default:
			value, args = args[0], args[1:]
		}
		if err := c.Set(name, value); err != nil {
			if isSwitch {
				err = fmt.Errorf("use --%s or --%s=false", name, name)
			}
			c.addProblemUnless(false, "invalid value %q for --%s: %v", value, name, err)
			misread = true
		}
	}
	if mode := c.Lookup("mode").Value.String(); mode != c.mode {
		c.addProblemUnless(false, "--mode %s and --mode %s cannot be combined: choose one mode", c.mode, mode)
	}
	if misread {
		return c.err()
	}
	return nil
}

// cutFlag splits an argument --NAME=VALUE, --NAME, -NAME=VALUE or -NAME.
func cutFlag(arg string) (name, value string, hasValue bool) {
	return strings.Cut(strings.TrimPrefix(strings.TrimPrefix(arg, "-"), "-"), "=")
}

// isFlag reports whether arg sets a flag of c.
func (c *command) isFlag(arg string) bool {
	name, _, _ := cutFlag(arg)
	return strings.HasPrefix(arg, "-") && c.Lookup(name) != nil
}

// adviceOnUnknownFlag returns the end of a message about a flag that the mode does not have: the
// other modes that have it, or else the flag of this mode with the nearest name, or "". It adds that
// flag to c.meant.
func (c *command) adviceOnUnknownFlag(name string) string {
	var others []string
	for mode, f := range modes() {
		o := newCommand(mode, []string{"--help"}, io.Discard, io.Discard)
		f(context.Background(), o) // returns flag.ErrHelp when it has defined its flags
		if o.Lookup(name) != nil {
			others = append(others, mode)
		}
	}
	if len(others) > 0 {
		slices.Sort(others)
		return fmt.Sprintf(": it is a flag of --mode %s, not of --mode %s", strings.Join(others, " and --mode "), c.mode)
	}
	var names []string
	c.VisitAll(func(f *flag.Flag) { names = append(names, f.Name) })
	if near := nearest(strings.TrimLeft(name, "-"), names); near != "" {
		c.meant = append(c.meant, near)
		return fmt.Sprintf(": did you mean --%s?", near)
	}
	return ""
}

// nearest returns the name that a person probably meant by word, or "" if no name is near. A name
// is near if it differs in few letters, else if it begins with the word, contains it, or is a part
// of it, as "listen" is of "web.listen-address".
func nearest(word string, names []string) string {
	if near := NearestName(word, names); near != "" || len(word) < 3 {
		return near
	}
	for _, near := range []func(name string) bool{
		func(name string) bool { return strings.HasPrefix(name, word) },
		func(name string) bool { return strings.Contains(name, word) },
		func(name string) bool { return len(name) >= 4 && strings.Contains(word, name) },
	} {
		if i := slices.IndexFunc(names, near); i >= 0 {
			return names[i]
		}
	}
	return ""
}

// addProblemUnless adds a problem, formatted like fmt.Sprintf, if ok is false.
func (c *command) addProblemUnless(ok bool, format string, args ...any) {
	if !ok {
		c.problems = append(c.problems, fmt.Sprintf(format, args...))
	}
}

// err returns all problems found so far as a usageError, or nil if there are none.
func (c *command) err() error {
	if len(c.problems) > 0 {
		return c.problems
	}
	return nil
}

// isMeant reports whether an unknown flag is probably a misspelling of --name. A message that --name
// is missing would then be a second message about the same mistake.
func (c *command) isMeant(name string) bool { return slices.Contains(c.meant, name) }

// isSet reports whether the parsed arguments contain the flag --name.
func (c *command) isSet(name string) bool {
	set := false
	c.Visit(func(f *flag.Flag) { set = set || f.Name == name })
	return set
}

// funcFlag is a flag.Value. Its method Set calls the function set. Its method String always returns
// def, the default, because the text is used only to show the default in --help.
type funcFlag struct {
	def string
	set func(text string) error
}

func (f *funcFlag) String() string        { return f.def }
func (f *funcFlag) Set(text string) error { return f.set(text) }

// parsedFlag defines the flag --name. Setting the flag stores the result of parse in *p. If parse
// returns an error, *p stays unchanged and the error becomes a problem of c. def is only shown in
// --help: the caller must store the default in *p.
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

// listFlag defines the flag --name, which may be repeated. Each time the flag is set, parse gets
// the texts of all its occurrences so far and returns the whole list for *p. If parse fails because
// of a new text, the error becomes a problem of c, and later calls of parse do not get that text.
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

// numberFlag defines the flag --name with the default def. A value below min or above max becomes a
// problem of c; a max of 0 means no upper bound. If parse refuses a text, flag.FlagSet.Parse
// returns the error.
func numberFlag[T ~int | ~int64](c *command, p *T, name string, def, min, max T, usage string, parse func(string) (T, error), format func(T) string) {
	*p = def
	c.Var(&funcFlag{format(def), func(text string) error {
		v, err := parse(text)
		if err != nil {
			return err
		}
		*p = v
		c.addProblemUnless(v >= min && (max == 0 || v <= max), "--%s must be %s", name, boundsText(min, max, format))
		return nil
	}}, name, usage)
}

// boundsText describes the range from min to max, as in "--interval must be at least 1s".
func boundsText[T ~int | ~int64](min, max T, format func(T) string) string {
	switch {
	case max > 0 && min > 1:
		return "from " + format(min) + " to " + format(max)
	case max > 0:
		return "above 0 and at most " + format(max)
	case min == 0:
		return "0 or more"
	case min == 1:
		return "above 0"
	}
	return "at least " + format(min)
}

// durationFlag defines a flag for a duration from min to max. A max of 0 means no upper bound.
func (c *command) durationFlag(p *time.Duration, name string, def, min, max time.Duration, usage string) {
	numberFlag(c, p, name, def, min, max, usage, parseDuration, formatDuration)
}

// parseDuration parses a duration in the notation of Go, such as 1.5h or 300ms, or in the notation
// of Prometheus, which also has days, weeks and years, such as 1d12h.
func parseDuration(text string) (time.Duration, error) {
	d, err := time.ParseDuration(text)
	if err != nil {
		var long model.Duration
		long, err = model.ParseDuration(text)
		d = time.Duration(long)
	}
	if err != nil {
		return 0, errors.New("not a duration, such as 30s, 10m, 2h or 1d12h")
	}
	return d, nil
}

// formatDuration formats d like Duration.String, but without zero units at the end: 10m for 10m0s.
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

// countFlag defines a flag for an integer above 0.
func (c *command) countFlag(p *int, name string, def int, usage string) {
	numberFlag(c, p, name, def, 1, 0, usage, parseInt, strconv.Itoa)
}

// parseInt parses an integer, in decimal or with the prefix of another base, such as 0x.
func parseInt(text string) (int, error) {
	n, err := strconv.ParseInt(text, 0, strconv.IntSize)
	if err != nil {
		return 0, errors.New("not a whole number, such as 1000")
	}
	return int(n), nil
}

// sizeFlag defines a flag for a number of bytes from min to max, such as 1048576 or 1MiB. A max of
// 0 means no upper bound.
func (c *command) sizeFlag(p *int64, name string, def, min, max int64, usage string) {
	numberFlag(c, p, name, def, min, max, usage, parseSize, formatSize)
}

// sizeUnits are the suffixes of sizes, the largest first.
var sizeUnits = []struct {
	suffix string
	bytes  int64
}{{"GiB", 1 << 30}, {"MiB", 1 << 20}, {"KiB", 1 << 10}, {"", 1}}

// formatSize formats n bytes in the largest unit that divides n.
func formatSize(n int64) string {
	for _, u := range sizeUnits {
		if n != 0 && n%u.bytes == 0 {
			return strconv.FormatInt(n/u.bytes, 10) + u.suffix
		}
	}
	return "0"
}

// parseSize returns the number of bytes that text names: a decimal number, which may have a suffix
// from sizeUnits.
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

// addressFlag defines a flag for an address host:port. The host may be empty.
func (c *command) addressFlag(p *string, name, def, usage string) {
	*p = def
	parsedFlag(c, p, name, def, usage, parseAddress)
}

// optionalAddressFlag defines a flag for an address host:port or the empty string.
func (c *command) optionalAddressFlag(p *string, name, def, usage string) {
	*p = def
	parsedFlag(c, p, name, def, usage, func(text string) (string, error) {
		if text == "" {
			return "", nil
		}
		return parseAddress(text)
	})
}

// addressesFlag defines a repeatable flag for a list of addresses host:port.
func (c *command) addressesFlag(p *[]string, name, usage string) {
	listFlag(c, p, name, usage, parseEach(parseAddress))
}

// parseAddress returns text unchanged. It is an error if text is not host:port.
func parseAddress(text string) (string, error) {
	host, port, err := net.SplitHostPort(text)
	if _, notNumber := strconv.ParseUint(text, 10, 16); notNumber == nil {
		return "", fmt.Errorf("%q is not HOST:PORT: write localhost:%s for this host only, or :%s", text, text, text)
	}
	if err != nil {
		return "", fmt.Errorf("%q is not HOST:PORT, such as localhost:9000 or :9000", text)
	}
	if _, err := net.LookupPort("tcp", port); err != nil || port == "" {
		return "", fmt.Errorf("%q has no valid port: use a number from 0 to 65535, such as %s", text, net.JoinHostPort(host, "9000"))
	}
	return text, nil
}

// parseEach returns a function that applies parse to each text. The function returns the list of
// results, or the first error.
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

// urlFlag defines a flag for an http:// or https:// URL without credentials. If def is empty and the
// flag is not set, *p stays unchanged.
func (c *command) urlFlag(p **url.URL, name, def, usage string) {
	if def != "" {
		*p, _ = c.parseURL(name, def)
	}
	parsedFlag(c, p, name, def, usage, func(text string) (*url.URL, error) { return c.parseURL(name, text) })
}

// urlsFlag is urlFlag for a flag that may be repeated. The first value replaces the default.
func (c *command) urlsFlag(p *[]*url.URL, name, def, usage string) {
	first, _ := c.parseURL(name, def)
	*p = []*url.URL{first}
	var given []*url.URL
	parsedFlag(c, p, name, def, usage+"; may be repeated", func(text string) ([]*url.URL, error) {
		u, err := c.parseURL(name, text)
		if err == nil {
			given = append(given, u)
		}
		return given, err
	})
}

// parseURL returns the URL in the value of the flag --name.
func (c *command) parseURL(name, text string) (*url.URL, error) {
	u, err := parseHTTPURL(text)
	if err == nil && u.User != nil {
		err = fmt.Errorf("%s contains credentials, which every user of this host can see in a command line: remove them", u.Redacted())
		if file := name + "-user-file"; c.Lookup(file) != nil {
			err = fmt.Errorf("%w, and write USER:PASSWORD into a file that --%s names", err, file)
		}
	}
	return u, err
}

// serverURLsFlag defines a repeatable flag for a list of URLs of servers; see parseServerURL.
func (c *command) serverURLsFlag(p *[]*url.URL, name, usage string) {
	listFlag(c, p, name, usage, parseEach(parseServerURL))
}

func (c *command) clusterIDFlag(p *string, name, usage string) {
	parsedFlag(c, p, name, "", usage, func(id string) (string, error) { return id, CheckClusterID(id) })
}

// labelsFlag defines a repeatable flag for a list of labels NAME=VALUE. If several labels have the
// same name, the last value is used.
func (c *command) labelsFlag(p *[]Label, name, usage string) {
	listFlag(c, p, name, usage, ParseLabels)
}

// labelNamesFlag defines a repeatable flag for a list of label names. If splitCommas is set, one
// value may contain several names separated by commas.
func (c *command) labelNamesFlag(p *[]string, name, usage string, splitCommas bool) {
	listFlag(c, p, name, usage, func(texts []string) (names []string, err error) {
		for _, text := range texts {
			if splitCommas {
				for name := range strings.SplitSeq(text, ",") {
					names = append(names, strings.TrimSpace(name))
				}
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

// selectorsFlag defines a repeatable flag for a list of series selectors.
func (c *command) selectorsFlag(p *Selectors, name, usage string) {
	listFlag(c, p, name, usage, func(texts []string) (Selectors, error) { return parseSelectors(texts, "'", "'") })
}

// metricRenamesFlag defines a repeatable flag for a list of renames OLD=NEW of metrics. def has the
// default renames. A default rename stays in effect unless the flag renames the same OLD.
func (c *command) metricRenamesFlag(p *map[string]string, name string, def []string, usage string) {
	*p, _ = ParseRenames(def)
	listFlag(c, p, name, usage, func(texts []string) (map[string]string, error) {
		return ParseRenames(slices.Concat(def, texts))
	})
}

// logFlags defines --log-level, with the default INFO, and --log-format.
func (c *command) logFlags(level *slog.Level) {
	*level = slog.LevelInfo
	parsedFlag(c, level, "log-level", level.String(), "`LEVEL` lowest level of messages to log: DEBUG, INFO, WARN or ERROR", func(text string) (l slog.Level, err error) {
		if l.UnmarshalText([]byte(text)) != nil {
			err = fmt.Errorf("%q is no level: use DEBUG, INFO, WARN or ERROR", text)
		}
		return l, err
	})
	parsedFlag(c, &c.logsJSON, "log-format", "text", "`FORMAT` format of the log: text or json", func(text string) (bool, error) {
		if text != "text" && text != "json" {
			return false, fmt.Errorf("%q is no format: use text or json", text)
		}
		return text == "json", nil
	})
}

// logger returns a logger that writes lines of at least level to c.stderr, in the format of
// --log-format. Addresses and durations have the same text in both formats. c.warnings remembers the
// newest warnings and errors.
func (c *command) logger(level slog.Level) *slog.Logger {
	options := &slog.HandlerOptions{Level: level}
	if !c.logsJSON {
		return slog.New(c.warnings.Handler(slog.NewTextHandler(c.stderr, options)))
	}
	options.ReplaceAttr = func(_ []string, a slog.Attr) slog.Attr {
		if text, ok := a.Value.Any().(fmt.Stringer); ok && a.Value.Kind() != slog.KindTime {
			a.Value = slog.StringValue(text.String())
		}
		return a
	}
	return slog.New(c.warnings.Handler(slog.NewJSONHandler(c.stderr, options)))
}
