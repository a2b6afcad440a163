package main

// The mode client: its flags, its files and token, and the wiring of a client. Flags win over
// the token. A token goes out over plain HTTP only to loopback, or when a flag allows it.

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"time"
)

const (
	attemptTimeout = 40 * time.Second // more than a server waits for its disk
	scrapeTimeout  = time.Minute      // at most; a client may have less patience
	dialTimeout    = 10 * time.Second
	minSalt        = 16 // bytes
)

// clientConfig is what the flags of --mode client say.
type clientConfig struct {
	from, fromToken, fromCA         *string
	token, id, toCA, toCrt, toKey   *string
	matchFile, saltFile, listen     *string
	to, match, labels, rename, anon *ListFlag
	plain, once, dryRun             *bool
	interval, scrapeInterval        *time.Duration
	spoolDir                        *string
	spoolAge                        *time.Duration
	bytes, spoolLimit               *SizeFlag
	level                           *slog.Level
	anonymize                       []string
	source                          *url.URL
	set                             []Label
	renames                         map[string]string
}

// ClientMode runs --mode client.
func ClientMode(ctx context.Context, c *Command) error {
	c.About = "scrapes a Prometheus that nobody can reach, and pushes what it has."
	c.Example = "telemeter --mode client --from http://localhost:9090 --token-file site-7.token"
	var f clientConfig
	c.Group("Source", func() {
		f.from = c.String("from", "http://localhost:9090", "`URL` of a Prometheus, or with a path of any endpoint, such as an exporter's /metrics")
		f.fromToken = c.String("from-token-file", "", "`FILE` with a bearer token for the source")
		f.fromCA = c.String("from-ca-file", "", "`FILE` of CA certificates that vouch for the source")
		f.scrapeInterval = c.Duration("scrape-interval", 0, "`TIME` between scrapes, if shorter than --interval")
	})
	c.Group("Which samples", func() {
		f.match = c.List("match", "`SELECTOR` of series to push (none: all)")
		f.matchFile = c.String("match-file", "", "`FILE` of such selectors, one a line")
		f.labels = c.List("label", "`NAME=VALUE` to set on every sample")
		f.rename = c.List("rename", "`OLD=NEW` for the name of a metric; ALERTS=alerts unless ALERTS is named")
		f.anon = c.List("anonymize-labels", "`NAMES` of labels whose values are replaced by keyed hashes, separated by commas")
		f.saltFile = c.String("anonymize-salt-file", "", "`FILE` with the key of these hashes, of 16 bytes or more")
	})
	c.Group("Destination", func() {
		f.token = c.String("token-file", "", "`FILE` with the token; it says ID, servers and certificate (needed to push)")
		f.to = c.List("to", "`URL` of a server, instead of the token's; tried in order")
		f.id = c.String("id", "", "`ID` of the cluster, instead of the token's")
		f.toCA = c.String("to-ca-file", "", "`FILE` of CA certificates that vouch for the servers, instead of the token's pin")
		f.toCrt = c.String("to-crt", "", "`FILE` with a client certificate")
		f.toKey = c.String("to-key", "", "`FILE` with its key")
		f.interval = c.Duration("interval", 2*time.Minute, "`TIME` between pushes, each of all scrapes since the one before")
		f.plain = c.Bool("plain-http", false, "send the token over http:// to other hosts too, readable by whoever sees the network")
		f.bytes = c.Size("limit-bytes", 1<<20, "`SIZE` of a push's body, as the servers limit it; more becomes several pushes")
	})
	c.Group("Spool", func() {
		f.spoolDir = c.String("spool-dir", "telemeter-spool", "`DIR` of the scrapes that not every consumer has read; empty to hold them in memory only")
		f.spoolLimit = c.Size("spool-limit", 1<<30, "`SIZE` of the spool on disk; then the oldest scrapes are dropped, first those that a server holds")
		f.spoolAge = c.Duration("spool-age", 2*time.Hour, "`TIME` that a scrape is kept at most for consumers to read; servers refuse what is older than their --retention")
	})
	c.Group("Other", func() {
		f.listen = c.String("listen", "localhost:9002", "`ADDRESS` for health, own metrics and /federate of the last set sent; empty for none")
		f.once = c.Bool("once", false, "scrape once, push all that is spooled, and exit")
		f.dryRun = c.Bool("dry-run", false, "print what would leave the site, and push nothing")
		f.level = c.LogLevel()
	})
	if err := c.ParseArgs(); err != nil {
		return err
	}
	f.check(c)
	if err := c.Err(); err != nil {
		return err
	}
	log := c.Logger(*f.level)
	metrics := NewMetrics()
	RegisterProcess(metrics)
	client, load, err := newClient(&f, log, metrics)
	if err != nil {
		return err
	}
	if *f.dryRun {
		ctx, cancel := context.WithTimeout(ctx, *f.interval)
		defer cancel()
		got, err := client.Scrape(ctx)
		if err != nil {
			return fmt.Errorf("source: %w", err)
		}
		_, err = c.Stdout.Write(got.AppendText(nil, got.List.Samples))
		return err
	}
	if err := f.open(client); err != nil {
		return err
	}
	err = f.push(ctx, client, load, log, metrics)
	return errors.Join(err, client.Close())
}

// open opens the client's spool.
func (f *clientConfig) open(client *Client) error {
	spool := SpoolConfig{FS: DiskFS{}, Limit: int64(*f.spoolLimit), MaxAge: *f.spoolAge}
	if *f.spoolDir != "" {
		dir, err := filepath.Abs(*f.spoolDir)
		if err != nil {
			return fmt.Errorf("opening spool: %w", err)
		}
		spool.Dir = dir
	}
	if err := client.Open(spool); err != nil {
		return fmt.Errorf("%w (--spool-dir DIR puts the spool elsewhere)", err)
	}
	return nil
}

// push runs a client that has its spool.
func (f *clientConfig) push(ctx context.Context, client *Client, reload func() error, log *slog.Logger, metrics *Metrics) error {
	if *f.once {
		ctx, cancel := context.WithTimeout(ctx, *f.interval)
		defer cancel()
		return client.Once(ctx)
	}
	parts := []func(context.Context) error{client.Run}
	if *f.listen != "" {
		ln, err := Listen(*f.listen)
		if err != nil {
			return err
		}
		defer ln.Close()
		web := HTTPServer{Name: "client", Listener: ln, Handler: client.Handler(), Log: log}
		parts = append(parts, web.Run)
		log.Info("listening", "address", ln.Addr())
	}
	return Serve(ctx, log, metrics, reload, func() {}, parts...)
}

// check finds what contradicts itself, before any file is read.
func (f *clientConfig) check(c *Command) {
	u, err := url.Parse(*f.from)
	ok := err == nil && (u.Scheme == "http" || u.Scheme == "https") && u.Host != ""
	c.Require(ok, "--from %s is not an http:// or https:// URL", *f.from)
	if ok {
		if strings.Trim(u.Path, "/") == "" {
			u.Path = "/federate"
		}
		f.source = u
		c.Require(*f.fromToken == "" || u.Scheme == "https" || IsLoopback(u.Hostname()) || *f.plain,
			"--from-token-file would go over plain HTTP to %s: use https://, or --plain-http if that is meant", u.Host)
	}
	c.Require(*f.token != "" || *f.dryRun, "--token-file FILE is missing; telemeter --mode token makes one on a server")
	for _, names := range *f.anon {
		for name := range strings.SplitSeq(names, ",") {
			err := CheckLabelName(name)
			c.Require(err == nil, "--anonymize-labels: %v", err)
			f.anonymize = append(f.anonymize, name)
		}
	}
	c.Require(len(f.anonymize) == 0 || *f.saltFile != "", "--anonymize-labels needs --anonymize-salt-file: without a secret, values could be guessed; make one with: head -c 32 /dev/urandom | base64 > salt")
	c.Require(len(f.anonymize) > 0 || *f.saltFile == "", "--anonymize-salt-file does nothing without --anonymize-labels")
	f.set, err = ParseLabels(*f.labels)
	c.Require(err == nil, "--label: %v", err)
	f.renames, err = ParseRename(append([]string{"ALERTS=alerts"}, *f.rename...))
	c.Require(err == nil, "--rename: %v", err)
	_, err = ParseSelectors(*f.match)
	c.Require(err == nil, "--match: %v", err)
	for _, s := range *f.to {
		_, err := BaseURL(s)
		c.Require(err == nil, "--to: %v", err)
	}
	if *f.id != "" {
		err := CheckClusterID(*f.id)
		c.Require(err == nil, "--id: %v", err)
	}
	c.Require((*f.toCrt == "") == (*f.toKey == ""), "--to-crt and --to-key need each other")
	c.Require(*f.interval >= time.Second, "--interval is at least 1s")
	if *f.scrapeInterval == 0 {
		*f.scrapeInterval = *f.interval
	}
	c.Require(*f.scrapeInterval >= time.Second && *f.scrapeInterval <= *f.interval, "--scrape-interval is at least 1s, and at most --interval")
	c.Require(*f.spoolLimit >= 1<<20 && int64(*f.spoolLimit) >= 2*int64(*f.bytes), "--spool-limit is at least 1MiB, and twice --limit-bytes")
	c.Require(*f.spoolAge >= *f.interval, "--spool-age is at least --interval: a scrape waits that long for its push")
	c.Require(*f.bytes >= 1<<10 && *f.bytes <= 64<<20, "--limit-bytes is from 1KiB to 64MiB")
	if *f.listen != "" {
		_, _, err := net.SplitHostPort(*f.listen)
		c.Require(err == nil, "--listen: %v", err)
	}
	c.Require(!*f.once || !*f.dryRun, "--once pushes and --dry-run does not: choose one")
}

// newClient reads the files, and returns a client and what reloads it.
func newClient(f *clientConfig, log *slog.Logger, m *Metrics) (*Client, func() error, error) {
	var client *Client
	first, token, err := f.load()
	if err != nil {
		return nil, nil, err
	}
	cfg := ClientConfig{
		From: f.source, Interval: *f.interval, LimitBytes: int64(*f.bytes), Metrics: m, Log: log, Now: time.Now,
		ScrapeInterval: *f.scrapeInterval, Boot: NewBootClock(os.ReadFile).Now,
		Cluster: token.Cluster, To: token.URLs,
	}
	fromTLS, toTLS, err := f.certificates(token.Pin)
	if err != nil {
		return nil, nil, err
	}
	from, to := newRenewable(fromTLS), newRenewable(toTLS)
	cfg.FromClient, cfg.ToClient = from.client(scrapeTimeout), to.client(attemptTimeout)
	client = NewClient(cfg)
	client.Reload(first)
	return client, func() error {
		st, again, err := f.load()
		if err != nil {
			return err
		}
		if again.Cluster != token.Cluster || !slices.Equal(again.URLs, token.URLs) || again.Pin != token.Pin {
			return fmt.Errorf("the new token is for other servers or another cluster ID: restart to use it")
		}
		fromTLS, toTLS, err := f.certificates(token.Pin)
		if err != nil {
			return err
		}
		from.renew(fromTLS)
		to.renew(toTLS)
		client.Reload(st)
		return nil
	}, nil
}

// renewable is a transport that a reload replaces, with its certificates.
type renewable struct{ now atomic.Pointer[http.Client] } // for its transport

func newRenewable(config *tls.Config) *renewable {
	r := &renewable{}
	r.now.Store(NewHTTPClient(config, 0, dialTimeout))
	return r
}

func (r *renewable) RoundTrip(req *http.Request) (*http.Response, error) {
	return r.now.Load().Transport.RoundTrip(req)
}

// client returns a client that is like any other, but for its transport.
func (r *renewable) client(timeout time.Duration) *http.Client {
	c := NewHTTPClient(nil, timeout, dialTimeout)
	c.Transport = r
	return c
}

// renew takes effect with the next request: no connection of before is used again.
func (r *renewable) renew(config *tls.Config) {
	r.now.Swap(NewHTTPClient(config, 0, dialTimeout)).CloseIdleConnections()
}

// certificates reads what vouches for the source and for the servers, and for this
// client.
func (f *clientConfig) certificates(pin string) (from, to *tls.Config, err error) {
	from = &tls.Config{MinVersion: tls.VersionTLS12}
	if *f.fromCA != "" {
		if from.RootCAs, err = ReadCAs(*f.fromCA); err != nil {
			return nil, nil, err
		}
	}
	to = &tls.Config{MinVersion: tls.VersionTLS12}
	if *f.toCA != "" {
		if to.RootCAs, err = ReadCAs(*f.toCA); err != nil {
			return nil, nil, err
		}
	} else if pin != "" {
		if to, err = PinnedTLS(pin); err != nil {
			return nil, nil, fmt.Errorf("token: %w", err)
		}
	}
	if *f.toCrt != "" {
		pair, err := tls.LoadX509KeyPair(*f.toCrt, *f.toKey)
		if err != nil {
			return nil, nil, fmt.Errorf("reading client certificate: %w", err)
		}
		// Asked for at each handshake, so that a renewed one is used.
		to.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			if fresh, err := tls.LoadX509KeyPair(*f.toCrt, *f.toKey); err == nil {
				return &fresh, nil
			}
			return &pair, nil
		}
	}
	return from, to, nil
}

// load reads what a reload reads. The token returned has what the flags override.
func (f *clientConfig) load() (st ClientState, t Token, err error) {
	if *f.fromToken != "" {
		b, err := ReadSecret(*f.fromToken, MaxToken)
		if err != nil {
			return st, t, fmt.Errorf("reading the source's token: %w", err)
		}
		st.FromToken = string(b)
	}
	if st.Match, err = ReadSelectors(*f.match, *f.matchFile); err != nil {
		return st, t, err
	}
	if len(st.Match) == 0 && !f.source.Query().Has("match[]") {
		// All, as Prometheus's /federate takes it: it refuses to be asked nothing.
		if st.Match, err = ParseSelectors([]string{`{__name__=~".+"}`}); err != nil {
			return st, t, err
		}
	}
	var salt []byte
	if *f.saltFile != "" {
		if salt, err = ReadSecret(*f.saltFile, MaxToken); err != nil {
			return st, t, fmt.Errorf("reading salt: %w", err)
		}
		if len(salt) < minSalt {
			return st, t, fmt.Errorf("%s holds %d bytes; a salt has %d or more", *f.saltFile, len(salt), minSalt)
		}
	}
	st.Cleaner = func() *Cleaner {
		c := &Cleaner{Rename: f.renames, Labels: f.set, Anonymize: f.anonymize}
		c.Salt(salt)
		return c
	}
	if *f.dryRun {
		return st, t, nil
	}
	b, err := ReadSecret(*f.token, MaxToken)
	if err != nil {
		return st, t, fmt.Errorf("reading token: %w", err)
	}
	st.Token = string(b)
	// A token of another make is as good if --authorize takes it; it says nothing.
	t, parseErr := ParseToken(st.Token)
	if parseErr == nil && t.Kind != KindClient {
		return st, t, fmt.Errorf("%s holds an %s token, not a client's", *f.token, t.Kind)
	}
	st.Expires = t.Expires
	if *f.id != "" {
		t.Cluster = *f.id
	}
	if len(*f.to) > 0 {
		t.URLs = *f.to
	}
	var bad UsageError
	if t.Cluster == "" {
		bad = append(bad, fmt.Sprintf("%s says no cluster ID (%v): add --id", *f.token, parseErr))
	}
	if len(t.URLs) == 0 {
		bad = append(bad, fmt.Sprintf("%s names no server: add --to URL", *f.token))
	}
	t.URLs = slices.Clone(t.URLs)
	for i, s := range t.URLs {
		u, err := BaseURL(s)
		if err != nil {
			bad = append(bad, fmt.Sprintf("server: %v", err))
			continue
		}
		t.URLs[i] = u.String()
		if u.Scheme == "http" && !IsLoopback(u.Hostname()) && !*f.plain {
			bad = append(bad, fmt.Sprintf("%s is plain HTTP: whoever sees the network could read the token; use https://, or --plain-http if that is meant", s))
		}
	}
	if len(bad) > 0 {
		return st, t, bad
	}
	return st, t, nil
}
