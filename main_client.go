package main

// The mode client: its flags, its files and token, and the wiring of a client. Flags win over
// the token. A token goes out over plain HTTP only to loopback, or when a flag allows it.

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
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

// clientFlags are the flags of --mode client.
type clientFlags struct {
	from                            *url.URL
	fromTokenFile, fromCAFile       string
	scrapeInterval                  time.Duration
	match                           Selectors
	matchFile                       string
	labels                          []Label
	renames                         map[string]string
	anonymize                       []string
	saltFile                        string
	tokenFile                       string
	to                              []*url.URL
	id                              string
	toCAFile, toCertFile, toKeyFile string
	interval                        time.Duration
	plainHTTP                       bool
	limitBytes                      int64
	spoolDir                        string
	spoolLimit                      int64
	spoolAge                        time.Duration
	listen                          string
	once, dryRun                    bool
	logLevel                        slog.Level
}

// clientMode runs --mode client.
func clientMode(ctx context.Context, c *command) error {
	c.about = "scrapes a Prometheus that nobody can reach, and pushes what it has."
	c.example = "telemeter --mode client --from http://localhost:9090 --token-file site-7.token"
	var f clientFlags
	f.define(c)
	if err := c.parseArgs(); err != nil {
		return err
	}
	f.fillAndCheck(c)
	if err := c.err(); err != nil {
		return err
	}
	p := &clientProcess{clientFlags: f, log: c.logger(f.logLevel), metrics: NewMetrics()}
	return p.run(ctx, c.stdout)
}

func (f *clientFlags) define(c *command) {
	c.defineGroup("Source", func() {
		c.urlFlag(&f.from, "from", "http://localhost:9090", "`URL` of a Prometheus, or with a path of any endpoint, such as an exporter's /metrics")
		c.StringVar(&f.fromTokenFile, "from-token-file", "", "`FILE` with a bearer token for the source")
		c.StringVar(&f.fromCAFile, "from-ca-file", "", "`FILE` of CA certificates that vouch for the source")
		c.durationFlag(&f.scrapeInterval, "scrape-interval", 0, 0, 0, "`TIME` between scrapes, if shorter than --interval")
	})
	c.defineGroup("Which samples", func() {
		c.selectorsFlag(&f.match, "match", "`SELECTOR` of series to push (none: all)")
		c.StringVar(&f.matchFile, "match-file", "", "`FILE` of such selectors, one a line")
		c.labelsFlag(&f.labels, "label", "`NAME=VALUE` to set on every sample")
		c.metricRenamesFlag(&f.renames, "rename", []string{"ALERTS=alerts"}, "`OLD=NEW` for the name of a metric; ALERTS=alerts unless ALERTS is named")
		c.labelNamesFlag(&f.anonymize, "anonymize-labels", "`NAMES` of labels whose values are replaced by keyed hashes, separated by commas", true)
		c.StringVar(&f.saltFile, "anonymize-salt-file", "", "`FILE` with the key of these hashes, of 16 bytes or more")
	})
	c.defineGroup("Destination", func() {
		c.StringVar(&f.tokenFile, "token-file", "", "`FILE` with the token; it says ID, servers and certificate (needed to push)")
		c.serverURLsFlag(&f.to, "to", "`URL` of a server, instead of the token's; tried in order")
		c.clusterIDFlag(&f.id, "id", "`ID` of the cluster, instead of the token's")
		c.StringVar(&f.toCAFile, "to-ca-file", "", "`FILE` of CA certificates that vouch for the servers, instead of the token's pin")
		c.StringVar(&f.toCertFile, "to-crt", "", "`FILE` with a client certificate")
		c.StringVar(&f.toKeyFile, "to-key", "", "`FILE` with its key")
		c.durationFlag(&f.interval, "interval", 2*time.Minute, time.Second, 0, "`TIME` between pushes, each of all scrapes since the one before")
		c.BoolVar(&f.plainHTTP, "plain-http", false, "send the token over http:// to other hosts too, readable by whoever sees the network")
		c.sizeFlag(&f.limitBytes, "limit-bytes", 1<<20, 1<<10, 64<<20, "`SIZE` of a push's body, as the servers limit it; more becomes several pushes")
	})
	c.defineGroup("Spool", func() {
		c.StringVar(&f.spoolDir, "spool-dir", "telemeter-spool", "`DIR` of the scrapes that not every consumer has read; empty to hold them in memory only")
		c.sizeFlag(&f.spoolLimit, "spool-limit", 1<<30, 1<<20, 0, "`SIZE` of the spool on disk; then the oldest scrapes are dropped, first those that a server holds")
		c.durationFlag(&f.spoolAge, "spool-age", 2*time.Hour, 0, 0, "`TIME` that a scrape is kept at most for consumers to read; servers refuse what is older than their --retention")
	})
	c.defineGroup("Other", func() {
		c.optionalAddressFlag(&f.listen, "listen", "localhost:9002", "`ADDRESS` for health, own metrics and /federate of the last set sent; empty for none")
		c.BoolVar(&f.once, "once", false, "scrape once, push all that is spooled, and exit")
		c.BoolVar(&f.dryRun, "dry-run", false, "print what would leave the site, and push nothing")
		c.logLevelFlag(&f.logLevel)
	})
}

// fillAndCheck collects conflicts among flags, and fills in defaults that depend on others.
func (f *clientFlags) fillAndCheck(c *command) {
	if strings.Trim(f.from.Path, "/") == "" {
		f.from.Path = "/federate"
	}
	if f.scrapeInterval == 0 {
		f.scrapeInterval = f.interval
	}
	c.addProblemUnless(f.fromTokenFile == "" || f.from.Scheme == "https" || isLoopback(f.from.Hostname()) || f.plainHTTP,
		"--from-token-file would go over plain HTTP to %s: use https://, or --plain-http if that is meant", f.from.Host)
	c.addProblemUnless(f.tokenFile != "" || f.dryRun, "--token-file FILE is missing; telemeter --mode token makes one on a server")
	c.addProblemUnless(len(f.anonymize) == 0 || f.saltFile != "", "--anonymize-labels needs --anonymize-salt-file: without a secret, values could be guessed; make one with: head -c 32 /dev/urandom | base64 > salt")
	c.addProblemUnless(len(f.anonymize) > 0 || f.saltFile == "", "--anonymize-salt-file does nothing without --anonymize-labels")
	c.addProblemUnless((f.toCertFile == "") == (f.toKeyFile == ""), "--to-crt and --to-key need each other")
	c.addProblemUnless(f.scrapeInterval >= time.Second && f.scrapeInterval <= f.interval, "--scrape-interval is at least 1s, and at most --interval")
	c.addProblemUnless(f.spoolLimit >= 2*f.limitBytes, "--spool-limit is at least twice --limit-bytes")
	c.addProblemUnless(f.spoolAge >= f.interval, "--spool-age is at least --interval: a scrape waits that long for its push")
	c.addProblemUnless(!f.once || !f.dryRun, "--once pushes and --dry-run does not: choose one")
}

// clientProcess is a client with all that it needs.
type clientProcess struct {
	clientFlags
	log     *slog.Logger
	metrics *Metrics

	token          Token // of the start
	fromTLS, toTLS *renewableTransport
	client         *Client
}

// run makes the client, and runs it until ctx ends or its work is done.
func (p *clientProcess) run(ctx context.Context, stdout io.Writer) error {
	RegisterProcessMetrics(p.metrics)
	if err := p.newClient(); err != nil {
		return err
	}
	if p.dryRun {
		return p.printScrape(ctx, stdout)
	}
	if err := p.openSpool(); err != nil {
		return err
	}
	return errors.Join(p.runOnceOrUntilEnd(ctx), p.client.Close())
}

// newClient makes a client from flags and files.
func (p *clientProcess) newClient() error {
	state, token, err := p.loadConfigAndToken()
	if err != nil {
		return err
	}
	fromTLS, toTLS, err := p.loadTLSConfigs(token.Pin)
	if err != nil {
		return err
	}
	p.token, p.fromTLS, p.toTLS = token, newRenewableTransport(fromTLS), newRenewableTransport(toTLS)
	p.client = NewClient(ClientConfig{
		From: p.from, Interval: p.interval, LimitBytes: p.limitBytes, Metrics: p.metrics, Log: p.log, Now: time.Now,
		ScrapeInterval: p.scrapeInterval, Boot: NewBootClock(os.ReadFile).Now, ClusterID: token.ClusterID, To: token.URLs,
		FromClient: p.fromTLS.httpClient(scrapeTimeout), ToClient: p.toTLS.httpClient(attemptTimeout),
	})
	p.client.Reload(state)
	return nil
}

// reload reads all files before it replaces anything.
func (p *clientProcess) reload() error {
	state, token, err := p.loadConfigAndToken()
	if err != nil {
		return err
	}
	if token.ClusterID != p.token.ClusterID || !slices.Equal(token.URLs, p.token.URLs) || token.Pin != p.token.Pin {
		return errors.New("the new token is for other servers or another cluster ID: restart to use it")
	}
	fromTLS, toTLS, err := p.loadTLSConfigs(token.Pin)
	if err != nil {
		return err
	}
	p.fromTLS.renew(fromTLS)
	p.toTLS.renew(toTLS)
	p.client.Reload(state)
	return nil
}

// printScrape writes the samples of one scrape as they would leave the site.
func (p *clientProcess) printScrape(ctx context.Context, w io.Writer) error {
	ctx, cancel := context.WithTimeout(ctx, p.interval)
	defer cancel()
	got, err := p.client.Scrape(ctx)
	if err != nil {
		return fmt.Errorf("source: %w", err)
	}
	_, err = w.Write(got.AppendText(nil, got.List.Samples))
	return err
}

// openSpool opens the client's spool.
func (p *clientProcess) openSpool() error {
	spool := SpoolConfig{FS: DiskFS{}, Limit: p.spoolLimit, MaxAge: p.spoolAge}
	if p.spoolDir != "" {
		dir, err := filepath.Abs(p.spoolDir)
		if err != nil {
			return fmt.Errorf("opening spool: %w", err)
		}
		spool.Dir = dir
	}
	if err := p.client.OpenSpool(spool); err != nil {
		return fmt.Errorf("%w (--spool-dir DIR puts the spool elsewhere)", err)
	}
	return nil
}

// runOnceOrUntilEnd scrapes and pushes: once, or until ctx ends.
func (p *clientProcess) runOnceOrUntilEnd(ctx context.Context) error {
	if p.once {
		ctx, cancel := context.WithTimeout(ctx, p.interval)
		defer cancel()
		return p.client.ScrapeOnceAndDrain(ctx)
	}
	parts := []func(context.Context) error{p.client.Run}
	if p.listen != "" {
		ln, err := Listen(p.listen)
		if err != nil {
			return err
		}
		defer ln.Close()
		web := HTTPServer{Name: "client", Listener: ln, Handler: p.client.Handler(), Log: p.log}
		parts = append(parts, web.Run)
		p.log.Info("listening", "address", ln.Addr())
	}
	return runWithReloads(ctx, p.log, p.metrics, p.reload, func() {}, parts...)
}

// renewableTransport is a transport that a reload replaces, with its certificates.
type renewableTransport struct{ current atomic.Pointer[http.Client] } // for its transport

func newRenewableTransport(config *tls.Config) *renewableTransport {
	t := &renewableTransport{}
	t.current.Store(NewHTTPClient(config, 0, dialTimeout))
	return t
}

func (t *renewableTransport) RoundTrip(req *http.Request) (*http.Response, error) {
	return t.current.Load().Transport.RoundTrip(req)
}

// httpClient returns an HTTP client over t.
func (t *renewableTransport) httpClient(timeout time.Duration) *http.Client {
	c := NewHTTPClient(nil, timeout, dialTimeout)
	c.Transport = t
	return c
}

// renew takes effect with the next request: no connection of before is used again.
func (t *renewableTransport) renew(config *tls.Config) {
	t.current.Swap(NewHTTPClient(config, 0, dialTimeout)).CloseIdleConnections()
}

// loadTLSConfigs reads the certificates that vouch for the source, for the servers and for this
// client.
func (f *clientFlags) loadTLSConfigs(pin string) (from, to *tls.Config, err error) {
	from = &tls.Config{MinVersion: tls.VersionTLS12}
	if f.fromCAFile != "" {
		if from.RootCAs, err = readCAs(f.fromCAFile); err != nil {
			return nil, nil, err
		}
	}
	to = &tls.Config{MinVersion: tls.VersionTLS12}
	if f.toCAFile != "" {
		if to.RootCAs, err = readCAs(f.toCAFile); err != nil {
			return nil, nil, err
		}
	} else if pin != "" {
		if to, err = PinnedTLS(pin); err != nil {
			return nil, nil, fmt.Errorf("token: %w", err)
		}
	}
	if f.toCertFile != "" {
		pair, err := tls.LoadX509KeyPair(f.toCertFile, f.toKeyFile)
		if err != nil {
			return nil, nil, fmt.Errorf("reading client certificate: %w", err)
		}
		// Asked for at each handshake, so that a renewed one is used.
		to.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			if renewed, err := tls.LoadX509KeyPair(f.toCertFile, f.toKeyFile); err == nil {
				return &renewed, nil
			}
			return &pair, nil
		}
	}
	return from, to, nil
}

// loadConfigAndToken reads the files that a reload reads again. The token returned has the values
// of flags that override its own.
func (f *clientFlags) loadConfigAndToken() (config ClientReloadConfig, t Token, err error) {
	if config.FromToken, err = f.loadSourceToken(); err != nil {
		return config, t, err
	}
	if config.Match, err = f.loadSelectors(); err != nil {
		return config, t, err
	}
	salt, err := f.loadSalt()
	if err != nil {
		return config, t, err
	}
	config.NewCleaner = func() *ClientCleaner {
		c := &ClientCleaner{Rename: f.renames, Labels: f.labels, Anonymize: f.anonymize}
		c.SetSalt(salt)
		return c
	}
	if f.dryRun {
		return config, t, nil
	}
	if config.Token, t, err = f.loadToken(); err != nil {
		return config, t, err
	}
	config.TokenExpires = t.Expires
	return config, t, nil
}

func (f *clientFlags) loadSourceToken() (string, error) {
	b, err := readOptionalSecret(f.fromTokenFile, "the source's token")
	return string(b), err
}

// loadSelectors returns the selectors to ask the source for: all series if neither flags nor the
// source's URL have one, because Prometheus's /federate refuses to be asked for nothing.
func (f *clientFlags) loadSelectors() (Selectors, error) {
	match, err := readSelectors(f.match, f.matchFile)
	if err == nil && len(match) == 0 && !f.from.Query().Has("match[]") {
		return ParseSelectors([]string{`{__name__=~".+"}`})
	}
	return match, err
}

func (f *clientFlags) loadSalt() ([]byte, error) {
	salt, err := readOptionalSecret(f.saltFile, "salt")
	if err != nil || salt == nil {
		return nil, err
	}
	if len(salt) < minSalt {
		return nil, fmt.Errorf("%s holds %d bytes; a salt has %d or more", f.saltFile, len(salt), minSalt)
	}
	return salt, nil
}

// loadToken returns the text of the client's token, and its contents, where flags override cluster
// ID and servers.
func (f *clientFlags) loadToken() (text string, t Token, err error) {
	b, err := ReadSecret(f.tokenFile, MaxToken)
	if err != nil {
		return "", t, fmt.Errorf("reading token: %w", err)
	}
	// A token in another format is as good if the servers --authorize it; it names nothing.
	t, parseErr := ParseUnverifiedToken(string(b))
	if parseErr == nil && t.Kind != KindClient {
		return "", t, fmt.Errorf("%s holds an %s token, not a client's", f.tokenFile, t.Kind)
	}
	if f.id != "" {
		t.ClusterID = f.id
	}
	var bad usageError
	if t.ClusterID == "" {
		bad = append(bad, fmt.Sprintf("%s says no cluster ID (%v): add --id", f.tokenFile, parseErr))
	}
	servers, problems := f.chooseServerURLs(t.URLs)
	if bad = append(bad, problems...); len(bad) > 0 {
		return "", t, bad
	}
	t.URLs = servers
	return string(b), t, nil
}

// chooseServerURLs returns the servers to push to: those of --to, else those of the token.
func (f *clientFlags) chooseServerURLs(tokenURLs []string) (urls []string, problems usageError) {
	servers := f.to
	if len(servers) == 0 {
		for _, s := range tokenURLs {
			u, err := parseServerURL(s)
			if err != nil {
				problems = append(problems, fmt.Sprintf("server: %v", err))
				continue
			}
			servers = append(servers, u)
		}
		if len(tokenURLs) == 0 {
			problems = append(problems, fmt.Sprintf("%s names no server: add --to URL", f.tokenFile))
		}
	}
	for _, u := range servers {
		if u.Scheme == "http" && !isLoopback(u.Hostname()) && !f.plainHTTP {
			problems = append(problems, fmt.Sprintf("%s is plain HTTP: whoever sees the network could read the token; use https://, or --plain-http if that is meant", u))
		}
		urls = append(urls, u.String())
	}
	return urls, problems
}
