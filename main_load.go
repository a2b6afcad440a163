package main

// This file implements the mode load: its flags and the wiring of the load generator. It signs a
// token for each site with the servers' token.key, so that no token files are needed. These tokens
// are upload tokens that expire soon after the run, and they are not recorded as issued. A server
// trusts the made-up sites like all others, so the mode warns where the samples go.

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

const (
	loadTokenGrace = time.Hour      // how long a load site's token is valid after the run
	maxLoadTime    = 24 * time.Hour // longest run without --duration for which the tokens are valid
)

type loadFlags struct {
	trust     clientFlags // only the flags for the destination are used
	keys      string
	sites     int
	prefix    string
	series    int
	inFlight  int
	pushes    int
	duration  time.Duration
	interval  time.Duration
	encoding  string
	format    string
	spool     bool
	reconnect bool
}

func loadMode(ctx context.Context, c *command) error {
	c.about = "pushes made-up series as many sites at once, and prints what the servers took."
	c.example = "telemeter --mode load --keys keys --to https://hub.example:9003 --sites 100 --interval 2s"
	var f loadFlags
	f.define(c)
	if err := c.parseArgs(); err != nil {
		return err
	}
	f.check(c)
	if err := c.err(); err != nil {
		return err
	}
	cfg, err := f.config(c.now())
	if err != nil {
		return err
	}
	if isTerminal(c.stderr) {
		cfg.Progress = c.stderr
	}
	fmt.Fprintf(c.stderr, "warning: the servers store the pushed series and serve them to every consumer; %s in alerts until revoked: use servers that are only for this\n", f.describeSites(cfg))
	report := RunLoad(ctx, cfg)
	if report.Stopped != nil {
		return report.Stopped
	}
	if _, err := io.WriteString(c.stdout, report.String()); err != nil {
		return fmt.Errorf("printing the report: %w", err)
	}
	return report.Err()
}

func (f *loadFlags) define(c *command) {
	c.defineGroup("Destination", func() {
		c.serverURLsFlag(&f.trust.to, "to", "`URL` URL of a server; several share the sites")
		c.StringVar(&f.keys, "keys", "", "`DIR` directory of the servers' keys, to make a token for each site")
		c.StringVar(&f.trust.tokenFile, "token-file", "", "`FILE` file with the token of one site, instead of --keys")
		c.StringVar(&f.trust.toCAFile, "to-ca-file", "", "`FILE` file with CA certificates to verify the servers' certificates, instead of the pin in the keys or the token")
		c.StringVar(&f.trust.toCertFile, "to-crt", "", "`FILE` file with a client certificate to present to the servers")
		c.StringVar(&f.trust.toKeyFile, "to-key", "", "`FILE` file with the private key of --to-crt")
		c.BoolVar(&f.trust.plainHTTP, "plain-http", false, "allow tokens to be sent to other hosts over http://, where anybody on the network can read them")
		c.BoolVar(&f.reconnect, "reconnect", false, "open a connection for each push, as sites do whose connections a server closes in between")
	})
	c.defineGroup("Load", func() {
		numberFlag(c, &f.sites, "sites", 100, 1, 1_000_000, "`N` number of sites, which push in turn", parseInt, strconv.Itoa)
		c.StringVar(&f.prefix, "prefix", "load", "`ID` beginning of the sites' cluster IDs; a number such as -000001 follows")
		numberFlag(c, &f.series, "series", 225, 1, 1_000_000, "`N` series of each site, nine in a metric family, with 250 bytes of text or more", parseInt, strconv.Itoa)
		numberFlag(c, &f.inFlight, "in-flight", 64, 1, maxLoadInFlight, "`N` largest number of pushes in flight, never more than the number of sites; a site can have more than one", parseInt, strconv.Itoa)
		c.durationFlag(&f.duration, "duration", 30*time.Second, 0, 0, "`TIME` how long to push; 0: until each site has pushed --pushes times")
		c.durationFlag(&f.interval, "interval", 0, 0, 0, "`TIME` time between two pushes of a site; the sites are spread evenly over it; 0: as fast as possible")
		numberFlag(c, &f.pushes, "pushes", 0, 0, 0, "`N` largest number of pushes of each site; 0: no limit", parseInt, strconv.Itoa)
		choiceFlag(c, &f.format, "format", "`FORMAT` format of the pushes", LoadText, LoadProtobuf)
		choiceFlag(c, &f.encoding, "encoding", "`NAME` compression of the pushes", LoadGzip, LoadSnappy, LoadIdentity)
		c.BoolVar(&f.spool, "spool", true, "name the scrapes in the pushes, as a client with a spool does; a server that knows a consumer does not sync these pushes; --spool=false: push like a script, so that servers sync each push")
	})
}

const maxLoadInFlight = 4096 // most connections that a server keeps open on one listener

// choiceFlag defines a flag whose value is one of choices. The first choice is the default.
func choiceFlag(c *command, p *string, name, usage string, choices ...string) {
	*p = choices[0]
	list := strings.Join(choices[:len(choices)-1], ", ") + " or " + choices[len(choices)-1]
	parsedFlag(c, p, name, choices[0], usage+": "+list, func(text string) (string, error) {
		if !slices.Contains(choices, text) {
			return "", fmt.Errorf("%q is unknown: use %s", text, list)
		}
		return text, nil
	})
}

// check adds each conflict among the flags to the problems of c.
func (f *loadFlags) check(c *command) {
	c.addProblemUnless(f.keys != "" || f.trust.tokenFile != "" || c.isMeant("keys") || c.isMeant("token-file"), "--keys DIR is missing: name the directory with the servers' token.key, or add --token-file FILE to push as one site")
	c.addProblemUnless(f.keys == "" || f.trust.tokenFile == "", "--keys and --token-file exclude each other: choose one")
	c.addProblemUnless(f.trust.tokenFile == "" || !c.isSet("sites") && !c.isSet("prefix"), "--sites and --prefix have no effect with --token-file, which is the token of one site: remove them, or use --keys")
	c.addProblemUnless(f.keys == "" || c.isSet("to") || c.isMeant("to"), "--to URL is missing: name the server to push to, such as --to https://hub.example:9003")
	c.addProblemUnless(f.duration > 0 || f.pushes > 0, "--duration 0 needs --pushes N, which then ends the run")
	c.addProblemUnless((f.trust.toCertFile == "") == (f.trust.toKeyFile == ""), "--to-crt and --to-key must be given together")
	c.addProblemUnless(CheckClusterID(f.prefix+"-000001") == nil, "--prefix: %q is not the beginning of a cluster ID: use letters, digits and . _ : @ -, with a letter or digit first", f.prefix)
	if f.keys != "" {
		_, problems := f.trust.chooseServerURLs(nil)
		if len(f.trust.to) > 0 {
			c.problems = append(c.problems, problems...)
		}
	}
}

// config reads the keys or the token file, makes a token for each site, and returns the
// configuration of the load generator. now is the issue time of the tokens.
func (f *loadFlags) config(now time.Time) (cfg LoadConfig, err error) {
	cfg = LoadConfig{
		Series: f.series, Format: f.format, Encoding: f.encoding,
		InFlight: f.inFlight, Duration: f.duration, Interval: f.interval, Pushes: f.pushes, IsTokenFile: f.trust.tokenFile != "",
	}
	if f.spool {
		cfg.FirstSpoolID = rand.Uint64N(math.MaxUint64) + 1
	}
	var pins []string
	if f.trust.tokenFile != "" {
		f.trust.ownTokenOnly = true
		text, t, err := f.trust.loadToken()
		if err != nil {
			return cfg, err
		}
		cfg.Tokens, cfg.To, pins = []string{text}, t.URLs, t.Pins()
	} else {
		if cfg.Tokens, err = f.makeTokens(now); err != nil {
			return cfg, err
		}
		pin, err1 := readPin(filepath.Join(f.keys, TLSCertFile), true)
		sparePin, err2 := readPin(filepath.Join(f.keys, SpareCertFile), pin != "")
		if err := errors.Join(err1, err2); err != nil {
			return cfg, err
		}
		pins = Token{Pin: pin, SparePin: sparePin}.Pins()
		cfg.To, _ = f.trust.chooseServerURLs(nil) // check has added the problems
	}
	cfg.ToClient, err = f.httpClient(pins)
	return cfg, err
}

// makeTokens returns an upload token for each site.
func (f *loadFlags) makeTokens(now time.Time) (tokens []string, err error) {
	keys, err := readKeyFile(f.keys, TokenKeyFile)
	if err != nil {
		return nil, err
	}
	for i := range f.sites {
		text, err := keys.Sign(Token{
			Kind: KindUpload, ClusterID: f.siteName(i), Labels: map[string]string{}, ID: NewTokenID(),
			Issued: now.Unix(), Expires: now.Add(cmp.Or(f.duration, maxLoadTime) + loadTokenGrace).Unix(),
		})
		if err != nil {
			return nil, err
		}
		tokens = append(tokens, text)
	}
	return tokens, nil
}

// siteName returns the cluster ID of site i. The first site has the number 1.
func (f *loadFlags) siteName(i int) string { return fmt.Sprintf("%s-%06d", f.prefix, i+1) }

// describeSites returns the beginning of a sentence about all sites.
func (f *loadFlags) describeSites(cfg LoadConfig) string {
	if f.keys == "" {
		t, _ := ParseUnverifiedToken(cfg.Tokens[0]) // a token of another kind has no cluster ID that is known here
		return fmt.Sprintf("the site %s stays", cmp.Or(t.ClusterID, f.trust.id))
	}
	if len(cfg.Tokens) == 1 {
		return fmt.Sprintf("the site %s stays", f.siteName(0))
	}
	return fmt.Sprintf("the sites %s to %s stay", f.siteName(0), f.siteName(len(cfg.Tokens)-1))
}

// httpClient returns the HTTP client for the pushes. It keeps a connection for each push in flight.
func (f *loadFlags) httpClient(pins []string) (*http.Client, error) {
	next, err := f.trust.loadServerTransport(pins)
	if err != nil {
		return nil, err
	}
	if t, ok := next.(*http.Transport); ok {
		t.MaxIdleConnsPerHost, t.DisableKeepAlives = f.inFlight, f.reconnect
		t.WriteBufferSize = 64 << 10 // most pushes then need one write, which saves a third of the generator's CPU time
	}
	client := NewHTTPClient(nil, attemptTimeout, dialTimeout)
	advice := trustAdvice{"--keys " + f.keys, "pass the keys directory of these servers as --keys", "start the run again"}
	if f.trust.tokenFile != "" {
		advice = trustAdvice{"the token", ReplaceToken, "start the run again"}
	}
	client.Transport = trustTransport{next: next, caFile: f.trust.toCAFile, trustAdvice: advice}
	return client, nil
}

// isTerminal reports whether w is a terminal, or another character device.
func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	info, err := f.Stat()
	return err == nil && info.Mode()&os.ModeCharDevice != 0
}
