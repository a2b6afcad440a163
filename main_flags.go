package main

// The flags of a mode. All conflicts are collected, and reported in one message. Help lists
// every flag in its group with its default. This file must not know the meaning of any flag.

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"math"
	"strconv"
	"strings"
	"time"
)

const helpIndent, helpWidth = 29, 96 // columns

// MaxFile bounds a file of rules or certificates, in bytes.
const MaxFile = 4 << 20

// UsageError is everything that is wrong with a command line.
type UsageError []string

func (e UsageError) Error() string { return strings.Join(e, "; ") }

// Command is one mode's flags, in groups for --help.
type Command struct {
	*flag.FlagSet
	Mode           string
	args           []string
	Stdout, Stderr io.Writer
	Now            func() time.Time // the wall clock
	About, Example string
	groups         []flagGroup
	problems       UsageError
}

type flagGroup struct {
	title string
	names []string
}

// NewCommand returns a command without flags but --mode.
func NewCommand(mode string, args []string, stdout, stderr io.Writer) *Command {
	c := &Command{Mode: mode, Stdout: stdout, Stderr: stderr, Now: time.Now, args: args}
	c.FlagSet = flag.NewFlagSet(mode, flag.ContinueOnError)
	c.SetOutput(io.Discard)
	c.String("mode", mode, "")
	return c
}

// Group begins a group of flags; those defined until the next belong to it.
func (c *Command) Group(title string, define func()) {
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

func (c *Command) Help(w io.Writer) {
	fmt.Fprintf(w, "telemeter --mode %s: %s\n", c.Mode, c.About)
	for _, g := range c.groups {
		fmt.Fprintf(w, "\n%s:\n", g.title)
		for _, name := range g.names {
			f := c.Lookup(name)
			arg, text := flag.UnquoteUsage(f)
			text = strings.TrimPrefix(text, arg+" ") // they read on from the argument
			switch f.DefValue {
			case "", "false", "0", "0s":
			default:
				text += fmt.Sprintf(" (default %s)", shortDuration(f.DefValue))
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
	fmt.Fprintf(w, "\nExample:\n  %s\n", c.Example)
}

// shortDuration writes 10m0s as 10m, and leaves what is not a duration.
func shortDuration(s string) string {
	if t, ok := strings.CutSuffix(s, "m0s"); ok {
		s = t + "m"
	}
	if t, ok := strings.CutSuffix(s, "h0m"); ok {
		s = t + "h"
	}
	return s
}

// ParseArgs parses the arguments, and goes on after what is no flag, or not this
// mode's. Conflicts are collected afterwards by Check, and returned all at once by
// Conflicts; a value that does not parse is returned here: checks would judge what
// took its place.
func (c *Command) ParseArgs() error {
	misread := false
	for args := c.args; len(args) > 0; {
		err := c.Parse(args)
		if errors.Is(err, flag.ErrHelp) {
			return err
		}
		rest := c.Args()
		switch {
		case err != nil:
			c.Require(false, "%v", err)
			switch {
			case strings.HasPrefix(err.Error(), "invalid "): // "value" or "boolean value"
				misread = true
			case len(rest) == len(args): // bad syntax is not passed over
				rest = rest[1:]
			case len(rest) > 0 && !strings.HasPrefix(rest[0], "-") && !strings.Contains(args[len(args)-len(rest)-1], "="):
				rest = rest[1:] // the value of a flag that is not known
			}
		case len(rest) > 0:
			c.Require(false, "unexpected argument %q: every value belongs to a flag", rest[0])
			rest = rest[1:]
		}
		args = rest
	}
	if mode := c.Lookup("mode").Value.String(); mode != c.Mode {
		c.Require(false, "--mode %s and --mode %s are two different things to do", c.Mode, mode)
	}
	if misread {
		return c.Err()
	}
	return nil
}

func (c *Command) Require(ok bool, format string, args ...any) {
	if !ok {
		c.problems = append(c.problems, fmt.Sprintf(format, args...))
	}
}

func (c *Command) Err() error {
	if len(c.problems) > 0 {
		return c.problems
	}
	return nil
}

// ListFlag is a flag that may be repeated.
type ListFlag []string

func (l *ListFlag) String() string     { return strings.Join(*l, ",") }
func (l *ListFlag) Set(v string) error { *l = append(*l, v); return nil }

func (c *Command) List(name, text string) *ListFlag {
	l := &ListFlag{}
	c.Var(l, name, text+"; may be repeated")
	return l
}

// SizeFlag is a flag in bytes, with a binary unit if need be.
type SizeFlag int64

var sizeUnits = []struct {
	suffix string
	bytes  SizeFlag
}{{"GiB", 1 << 30}, {"MiB", 1 << 20}, {"KiB", 1 << 10}, {"", 1}}

func (s *SizeFlag) String() string {
	for _, u := range sizeUnits {
		if *s != 0 && *s%u.bytes == 0 {
			return strconv.FormatInt(int64(*s/u.bytes), 10) + u.suffix
		}
	}
	return "0"
}

func (s *SizeFlag) Set(v string) error {
	for _, u := range sizeUnits {
		if n, ok := strings.CutSuffix(v, u.suffix); ok {
			i, err := strconv.ParseUint(n, 10, 63)
			if err != nil || i > uint64(math.MaxInt64/u.bytes) {
				return errors.New("not a number of bytes, such as 1048576 or 1MiB")
			}
			*s = SizeFlag(i) * u.bytes
			return nil
		}
	}
	return nil
}

func (c *Command) Size(name string, value SizeFlag, text string) *SizeFlag {
	s := value
	c.Var(&s, name, text)
	return &s
}

func (c *Command) LogLevel() *slog.Level {
	level := slog.LevelInfo
	c.TextVar(&level, "log-level", level, "`LEVEL` of what is logged: DEBUG, INFO, WARN or ERROR")
	return &level
}

func (c *Command) Logger(level slog.Level) *slog.Logger {
	return slog.New(slog.NewTextHandler(c.Stderr, &slog.HandlerOptions{Level: level}))
}
