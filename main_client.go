package main

// This file implements the mode client: its flags, the loading of the files that the flags name,
// and the wiring of a Client. The flags --id, --to and --to-ca-file take precedence over the
// contents of the token. The client sends a token over plain HTTP only to a loopback address,
// unless --plain-http is set.

import (
	"context"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
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
	"unicode"
)

const (
	attemptTimeout = 40 * time.Second // limit of one push request; longer than the 30 s that a server may take to forward or store a push
	scrapeTimeout  = time.Minute      // upper bound of one scrape of the source; Client may set a shorter timeout
	dialTimeout    = 10 * time.Second // limit for connecting to the source or to a server
	minSalt        = 16               // smallest salt for anonymization, in bytes
)

type clientFlags struct {
	from                            *url.URL   // the first of sources
	sources                         []*url.URL // the values of --from
	elide                           []string
	fromTokenFile, fromUserFile     string
	fromCAFile                      string
	fromCertFile, fromKeyFile       string
	scrapeInterval, backfill        time.Duration
	dryBackfill                     time.Duration // backfill, if --dry-run and --backfill are given
	match                           Selectors
	matchFile                       string
	labels                          []Label
	renames                         map[string]string
	anonymize                       []string
	saltFile                        string
	tokenFile                       string
	ownTokenOnly                    bool // for --mode load, which has no flag for the cluster ID of a token of another kind
	to                              []*url.URL
	id                              string
	toCAFile, toCertFile, toKeyFile string
	toProxy                         *url.URL // nil without --to-proxy
	toProxyUserFile                 string
	interval                        time.Duration
	plainHTTP                       bool
	limitBytes                      int64
	spoolDir                        string
	spoolLimit                      int64
	spoolAge                        time.Duration
	listen                          string
	once, dryRun, checkOnly         bool
	logLevel                        slog.Level
}

func clientMode(ctx context.Context, c *command) error {
	c.about = "scrapes a Prometheus that cannot be reached from outside, and pushes its samples."
	c.example = "telemeter --mode client --from http://localhost:9090 --token-file site-7.token"
	c.usual = []string{"from", "token-file", "match", "anonymize-labels", "anonymize-salt-file", "spool-dir", "interval", "dry-run"}
	var f clientFlags
	f.define(c)
	if err := c.parseArgs(); err != nil {
		return err
	}
	f.fillAndCheck(c)
	if err := c.err(); err != nil {
		return err
	}
	p := &clientProcess{clientFlags: f, log: c.logger(f.logLevel), warnings: &c.warnings, metrics: NewMetrics()}
	if f.checkOnly {
		return p.runChecks(ctx, c.stdout)
	}
	return p.run(ctx, c.stdout, c.stderr)
}

func (f *clientFlags) define(c *command) {
	c.defineGroup("Source", func() {
		c.urlsFlag(&f.sources, "from", "http://localhost:9090", "`URL` URL of the Prometheus to scrape; a URL with a path can be any exposition endpoint, such as an exporter's /metrics; further URLs: replicas")
		c.StringVar(&f.fromTokenFile, "from-token-file", "", "`FILE` file with a bearer token to send to the source")
		c.StringVar(&f.fromUserFile, "from-user-file", "", "`FILE` file with one line USER:PASSWORD for the source (HTTP basic authentication)")
		c.StringVar(&f.fromCAFile, "from-ca-file", "", "`FILE` file with CA certificates to verify the source's certificate")
		c.StringVar(&f.fromCertFile, "from-crt", "", "`FILE` file with a client certificate to present to the source")
		c.StringVar(&f.fromKeyFile, "from-key", "", "`FILE` file with the private key of --from-crt")
		c.durationFlag(&f.scrapeInterval, "scrape-interval", 0, 0, 0, "`TIME` time between scrapes, if shorter than --interval")
		c.durationFlag(&f.backfill, "backfill", 2*time.Hour, 0, 0, "`TIME` fetch the samples of scrapes that were missed in this time from the source's /api/v1/query; 0: do not fetch them")
	})
	c.defineGroup("Which samples", func() {
		c.selectorsFlag(&f.match, "match", "`SELECTOR` selector of series to push; without any selector, all series are pushed")
		c.StringVar(&f.matchFile, "match-file", "", "`FILE` file with selectors of series to push, one per line")
		c.labelsFlag(&f.labels, "label", "`NAME=VALUE` label to set on every sample")
		c.labelNamesFlag(&f.elide, "elide-label", "`NAME` label to remove, such as replica", false)
		c.metricRenamesFlag(&f.renames, "rename", []string{"ALERTS=alerts"}, "`OLD=NEW` new name for a metric; ALERTS is renamed to alerts unless a --rename names ALERTS")
		c.labelNamesFlag(&f.anonymize, "anonymize-labels", "`NAMES` names of labels whose values are replaced by keyed hashes, separated by commas", true)
		c.StringVar(&f.saltFile, "anonymize-salt-file", "", "`FILE` file with the secret key for --anonymize-labels, at least 16 bytes")
	})
	c.defineGroup("Destination", func() {
		c.StringVar(&f.tokenFile, "token-file", "", "`FILE` file with the site's token, which contains the cluster ID, the servers' URLs and the pin of their certificate (required to push)")
		c.serverURLsFlag(&f.to, "to", "`URL` URL of a server to push to, instead of the token's servers; several are tried in order")
		c.clusterIDFlag(&f.id, "id", "`ID` cluster ID of the site, instead of the token's")
		c.StringVar(&f.toCAFile, "to-ca-file", "", "`FILE` file with CA certificates to verify the servers' certificates, instead of the token's pin")
		c.StringVar(&f.toCertFile, "to-crt", "", "`FILE` file with a client certificate to present to the servers")
		c.StringVar(&f.toKeyFile, "to-key", "", "`FILE` file with the private key of --to-crt")
		parsedFlag(c, &f.toProxy, "to-proxy", "", "`URL` URL of a proxy through which the servers are reached: http://, https:// or socks5://, with a port; the proxy variables of the environment are not used", parseProxyURL)
		c.StringVar(&f.toProxyUserFile, "to-proxy-user-file", "", "`FILE` file with one line USER:PASSWORD for the proxy")
		c.durationFlag(&f.interval, "interval", 2*time.Minute, time.Second, 0, "`TIME` time between pushes; each push sends all scrapes since the previous push")
		c.BoolVar(&f.plainHTTP, "plain-http", false, "allow tokens to be sent to other hosts over http://, where anybody on the network can read them")
		c.sizeFlag(&f.limitBytes, "limit-bytes", 1<<20, 1<<10, 64<<20, "`SIZE` largest body of one push, at most the servers' --limit-bytes; larger scrapes are split into several pushes")
	})
	c.defineGroup("Spool", func() {
		c.StringVar(&f.spoolDir, "spool-dir", "telemeter-spool", "`DIR` directory for scrapes that not every consumer has read yet; empty: keep them in memory only")
		c.sizeFlag(&f.spoolLimit, "spool-limit", 1<<30, 1<<20, 0, "`SIZE` largest size of the spool on disk; when it is full, the oldest scrapes are dropped, starting with scrapes that a server holds")
		c.durationFlag(&f.spoolAge, "spool-age", 2*time.Hour, 0, 0, "`TIME` how long a scrape is kept until all consumers have read it; servers refuse samples older than their --retention")
	})
	c.defineGroup("Other", func() {
		c.optionalAddressFlag(&f.listen, "listen", "localhost:9002", "`ADDRESS` address for health checks, the client's own metrics, and /federate with the samples sent last; empty: do not listen")
		c.BoolVar(&f.once, "once", false, "scrape once, push all scrapes in the spool, and exit")
		c.BoolVar(&f.dryRun, "dry-run", false, "print the samples that would leave the site, and on standard error a summary, without pushing them")
		c.BoolVar(&f.checkOnly, "check", false, "check the flags, the files, the source and the servers, print a line for each, and exit; push nothing and change nothing")
		c.logFlags(&f.logLevel)
	})
}

// fillAndCheck fills in the defaults that depend on other flags. It adds each conflict among the
// flags to the problems of c.
func (f *clientFlags) fillAndCheck(c *command) {
	f.from = f.sources[0]
	for _, u := range f.sources {
		if strings.Trim(u.Path, "/") == "" {
			u.Path = "/federate"
		}
	}
	if f.dryRun && c.isSet("backfill") {
		f.dryBackfill = f.backfill
		c.addProblemUnless(IsFederate(f.from), "--backfill has no effect with --from %s, which is no /federate of a Prometheus: remove it", f.from)
	}
	c.addProblemUnless(!c.isSet("backfill") || f.backfill <= f.spoolAge, "--backfill must be at most --spool-age, because older scrapes are dropped: raise --spool-age too")
	c.addProblemUnless(!c.isSet("backfill") || !f.once, "--backfill has no effect with --once, because the time between two runs is no outage: remove it")
	if f.once {
		f.backfill = 0
	}
	if f.scrapeInterval == 0 {
		f.scrapeInterval = f.interval
	}
	var urls []string
	for _, u := range f.sources {
		c.addProblemUnless(!slices.Contains(urls, u.String()), "--from %s is given twice: remove one", u)
		c.addProblemUnless(IsFederate(u) == IsFederate(f.from), "--from %s and --from %s cannot be replicas of one Prometheus, because only one of them is a /federate: correct them", f.from, u)
		urls = append(urls, u.String())
		plainAllowed := u.Scheme == "https" || IsLoopbackHost(u.Hostname()) || f.plainHTTP
		c.addProblemUnless(f.fromTokenFile == "" || plainAllowed, "--from-token-file would be sent to %s over plain HTTP: use https://, or add --plain-http to allow it", u.Host)
		c.addProblemUnless(f.fromUserFile == "" || plainAllowed, "--from-user-file would be sent to %s over plain HTTP: use https://, or add --plain-http to allow it", u.Host)
		c.addProblemUnless(slices.Equal(u.Query()["match[]"], f.from.Query()["match[]"]), "--from: the URL of %s has other match[] parameters than the first one, although replicas have the same series: use the same ones, or --match", u.Host)
		c.addProblemUnless(!f.isOwnFederate(u), "--from is this client's own --listen: %s serves the samples that this client sent last; pass the URL of the Prometheus to scrape, or another --listen", f.listen)
	}
	c.addProblemUnless(f.fromTokenFile == "" || f.fromUserFile == "", "--from-token-file and --from-user-file exclude each other, because a request has one kind of credentials: choose one")
	c.addProblemUnless((f.fromCertFile == "") == (f.fromKeyFile == ""), "--from-crt and --from-key must be given together")
	isHTTPS := slices.ContainsFunc(f.sources, func(u *url.URL) bool { return u.Scheme == "https" })
	c.addProblemUnless(f.fromCertFile == "" || isHTTPS, "--from-crt has no effect, because the URL in --from is not https://: use https://, or remove it")
	c.addProblemUnless(f.toProxyUserFile == "" || f.toProxy != nil, "--to-proxy-user-file has no effect without --to-proxy: add --to-proxy URL, or remove it")
	c.addProblemUnless(f.tokenFile != "" || f.dryRun || c.isMeant("token-file"), "--token-file FILE is missing: %s", getToken)
	c.addProblemUnless(len(f.anonymize) == 0 || f.saltFile != "", "--anonymize-labels needs --anonymize-salt-file, because without a secret key the values could be guessed; create one with: head -c 32 /dev/urandom | base64 > salt")
	c.addProblemUnless(len(f.anonymize) > 0 || f.saltFile == "", "--anonymize-salt-file has no effect without --anonymize-labels: add --anonymize-labels, or remove it")
	c.addProblemUnless((f.toCertFile == "") == (f.toKeyFile == ""), "--to-crt and --to-key must be given together")
	c.addProblemUnless(f.scrapeInterval >= time.Second && f.scrapeInterval <= f.interval, "--scrape-interval must be at least 1s, and at most --interval")
	c.addProblemUnless(f.spoolLimit >= 2*f.limitBytes, "--spool-limit must be at least twice --limit-bytes")
	c.addProblemUnless(f.spoolAge >= f.interval, "--spool-age must be at least --interval, because a scrape can wait that long for its push")
	c.addProblemUnless(!f.checkOnly || !f.once && !f.dryRun, "--check cannot be combined with --once or --dry-run: run one after the other")
	c.addProblemUnless(!f.once || !f.dryRun, "--once and --dry-run exclude each other, because --dry-run does not push: choose one")
}

// isOwnFederate reports whether from is the /federate of this client's own listener, so that the
// client would push its last scrape again. A client with --once or --dry-run has no listener.
func (f *clientFlags) isOwnFederate(from *url.URL) bool {
	host, port, err := net.SplitHostPort(f.listen)
	if err != nil || f.once || f.dryRun {
		return false
	}
	isLocal := host == "" || IsLoopbackHost(host) || net.ParseIP(host).IsUnspecified()
	return isLocal && IsLoopbackHost(from.Hostname()) && from.Port() == port && strings.Trim(from.Path, "/") == "federate"
}

// clientProcess is one run of --mode client: a Client with its flags, log, metrics, token and HTTP
// transports.
type clientProcess struct {
	clientFlags
	log      *slog.Logger
	warnings *WarningLog // newest warnings and errors of log
	metrics  *Metrics

	token                      Token // as loaded at the start; a reload must not change its cluster ID or URLs
	fromTransport, toTransport *renewableTransport
	client                     *Client
}

// run builds the client and runs it until ctx ends. With --once, it returns after one scrape and
// after pushing the spool. With --dry-run, it returns after it has printed one scrape.
func (p *clientProcess) run(ctx context.Context, stdout, stderr io.Writer) error {
	RegisterProcessMetrics(p.metrics)
	if err := p.newClient(); err != nil {
		return err
	}
	if p.dryRun {
		limited, cancel := context.WithTimeout(ctx, p.interval+p.dryBackfill)
		defer cancel()
		return p.client.DryRun(limited, p.dryBackfill, stdout, stderr)
	}
	if err := p.openSpool(); err != nil {
		return err
	}
	return errors.Join(p.runOnceOrUntilEnd(ctx), p.client.Close())
}

// newClient sets p.client to a Client built from the flags and the files that they name.
func (p *clientProcess) newClient() error {
	state, token, err := p.loadConfigAndToken()
	if err != nil {
		return err
	}
	from, err := p.loadSourceTransport()
	if err != nil {
		return err
	}
	to, err := p.loadServerTransport(token.Pins())
	if err != nil {
		return err
	}
	p.token, p.fromTransport, p.toTransport = token, newRenewableTransport(from), newRenewableTransport(to)
	toClient := p.toTransport.httpClient(attemptTimeout)
	toClient.Transport = trustTransport{next: p.toTransport, caFile: p.toCAFile, trustAdvice: clientTrustAdvice}
	p.logSystemCAs()
	p.client = NewClient(ClientConfig{
		From: p.from, Replicas: p.sources[1:], Interval: p.interval, LimitBytes: p.limitBytes, Metrics: p.metrics, Log: p.log, Warnings: p.warnings, Now: time.Now,
		ScrapeInterval: p.scrapeInterval, Backfill: p.backfill, Boot: NewBootClock(os.ReadFile).Now, ClusterID: token.ClusterID, To: token.URLs,
		FromClient: p.fromTransport.httpClient(scrapeTimeout), ToClient: toClient,
	})
	p.client.Reload(state)
	return nil
}

// reload reads again all files that the flags name, and makes the client use their new contents. It
// reads all of them before it replaces anything, so that a reload that fails changes nothing. A
// token with other servers or another cluster ID is an error, because only a restart can change
// these.
func (p *clientProcess) reload() error {
	state, token, err := p.loadConfigAndToken()
	if err != nil {
		return err
	}
	if token.ClusterID != p.token.ClusterID || !slices.Equal(token.URLs, p.token.URLs) {
		return errors.New("the token in --token-file is for other servers or another cluster ID: restart the client to use it")
	}
	from, err := p.loadSourceTransport()
	if err != nil {
		return err
	}
	to, err := p.loadServerTransport(token.Pins())
	if err != nil {
		return err
	}
	p.fromTransport.renew(from)
	p.toTransport.renew(to)
	p.client.Reload(state)
	return nil
}

// openSpool opens the client's spool in --spool-dir, or in memory if --spool-dir is empty.
func (p *clientProcess) openSpool() error {
	spool := SpoolConfig{FS: DiskFS{}, Limit: p.spoolLimit, MaxAge: p.spoolAge}
	if p.spoolDir != "" {
		dir, err := filepath.Abs(p.spoolDir)
		if err != nil {
			return flagError("spool-dir", p.spoolDir, err)
		}
		spool.Dir = dir
	}
	if err := p.client.OpenSpool(spool); err != nil {
		return flagError("spool-dir", p.spoolDir, err)
	}
	return nil
}

// runOnceOrUntilEnd runs the client, and its HTTP listener if --listen is not empty, until ctx ends
// or one of them fails. It reloads on SIGHUP. With --once it scrapes once, pushes all scrapes in the
// spool, and returns; it gives up after --interval.
func (p *clientProcess) runOnceOrUntilEnd(ctx context.Context) error {
	if p.once {
		ctx, cancel := context.WithTimeout(ctx, p.interval)
		defer cancel()
		return p.client.ScrapeOnceAndDrain(ctx)
	}
	parts := []func(context.Context) error{p.client.Run}
	if p.listen != "" {
		ln, err := listenFlag("listen", p.listen)
		if err != nil {
			return err
		}
		defer ln.Close()
		web := HTTPServer{Name: "client", Listener: ln, Handler: p.client.Handler(IsOnLoopback(ln)), Conns: NewConnMetrics(p.metrics), Log: p.log}
		parts = append(parts, web.Run)
		p.log.Info("listening", "address", ln.Addr())
	}
	return runWithReloads(ctx, p.log, p.metrics, p.reload, func() {}, parts...)
}

// renewableTransport is an http.RoundTripper that a reload can replace. current is an http.Client,
// of which only the field Transport is used. A renewableTransport is safe for concurrent use.
type renewableTransport struct{ current atomic.Pointer[http.Client] }

func newRenewableTransport(first http.RoundTripper) *renewableTransport {
	t := &renewableTransport{}
	t.current.Store(&http.Client{Transport: first})
	return t
}

// RoundTrip sends req over the current transport.
func (t *renewableTransport) RoundTrip(req *http.Request) (*http.Response, error) {
	return t.current.Load().Transport.RoundTrip(req)
}

// httpClient returns an HTTP client that sends its requests over t. timeout bounds each request.
func (t *renewableTransport) httpClient(timeout time.Duration) *http.Client {
	c := NewHTTPClient(nil, timeout, dialTimeout)
	c.Transport = t
	return c
}

// renew makes t send all later requests over the transport next. They do not use the connections
// that were opened before.
func (t *renewableTransport) renew(next http.RoundTripper) {
	t.current.Swap(&http.Client{Transport: next}).CloseIdleConnections()
}

// loadSourceTransport reads the certificate files of --from-ca-file and --from-crt, and returns the
// transport for connections to the source.
func (f *clientFlags) loadSourceTransport() (http.RoundTripper, error) {
	config, err := loadTLSConfig("from", f.fromCAFile, f.fromCertFile, f.fromKeyFile)
	if err != nil {
		return nil, err
	}
	return NewHTTPClient(config, 0, dialTimeout).Transport, nil
}

// loadServerTransport reads the files of --to-ca-file, --to-crt and --to-proxy-user-file, and
// returns the transport for connections to the servers. If --to-ca-file is set, its CAs verify the
// servers. Otherwise the servers must have a key with one of pins. If there is no pin either, the
// system's CAs verify the servers.
func (f *clientFlags) loadServerTransport(pins []string) (http.RoundTripper, error) {
	config, err := loadTLSConfig("to", f.toCAFile, f.toCertFile, f.toKeyFile)
	if err != nil {
		return nil, err
	}
	if f.toCAFile == "" && len(pins) > 0 {
		pinned, err := PinnedTLS(pins...)
		if err != nil {
			return nil, fmt.Errorf("using the pins in the token: %w", err)
		}
		pinned.GetClientCertificate = config.GetClientCertificate
		config = pinned
	}
	transport := NewHTTPClient(config, 0, dialTimeout).Transport
	if f.toProxy == nil {
		return transport, nil
	}
	var user *url.Userinfo
	if f.toProxyUserFile != "" {
		if user, err = readUserFile("to-proxy-user-file", f.toProxyUserFile); err != nil {
			return nil, err
		}
	}
	return newProxyTransport(transport.(*http.Transport), f.toProxy, user), nil
}

// loadTLSConfig returns a TLS configuration for a client. If caFile is not empty, only the CAs in
// it verify the peer. If certFile is not empty, the client presents the certificate in it, with the
// key in keyFile. side is "from" or "to", with which the names of the three flags begin.
func loadTLSConfig(side, caFile, certFile, keyFile string) (config *tls.Config, err error) {
	config = &tls.Config{MinVersion: tls.VersionTLS12}
	if caFile != "" {
		if config.RootCAs, err = readCAs(side+"-ca-file", caFile); err != nil {
			return nil, err
		}
	}
	if certFile == "" {
		return config, nil
	}
	pair, err := tls.LoadX509KeyPair(certFile, keyFile)
	if pathErr := new(os.PathError); errors.As(err, &pathErr) {
		return nil, flagError(side+"-crt", fmt.Sprintf("%s and --%s-key %s", certFile, side, keyFile), err)
	}
	if err != nil {
		return nil, fmt.Errorf("--%[1]s-crt %[2]s and --%[1]s-key %[3]s: %[4]w: name PEM files with a certificate and its private key", side, certFile, keyFile, err)
	}
	// Every handshake in which the peer asks for a certificate reads the files again, so that a
	// renewed client certificate is used without a reload. If the files cannot be read then, the
	// client presents pair, which was read above.
	config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
		if renewed, err := tls.LoadX509KeyPair(certFile, keyFile); err == nil {
			return &renewed, nil
		}
		return &pair, nil
	}
	return config, nil
}

// loadConfigAndToken reads all files that a reload reads, except the certificates: the source's
// token, the selectors, the salt and the client's token. The flags --id and --to, if set, replace
// the cluster ID and the URLs in the returned token. With --dry-run, the client's token is not
// read. loadConfigAndToken also warns of each secret file that every user may read.
func (p *clientProcess) loadConfigAndToken() (config ClientReloadConfig, t Token, err error) {
	warnOfReadableSecrets(p.log, p.secretFiles()...)
	if config.FromAuthorization, err = p.loadSourceAuthorization(); err != nil {
		return config, t, err
	}
	if config.Match, err = p.loadSelectors(); err != nil {
		return config, t, err
	}
	salt, err := p.loadSalt()
	if err != nil {
		return config, t, err
	}
	config.NewCleaner = func() *ClientCleaner {
		c := &ClientCleaner{Rename: p.renames, Labels: p.labels, Elide: p.elide, Anonymize: p.anonymize}
		c.SetSalt(salt)
		return c
	}
	if p.dryRun {
		return config, t, nil
	}
	if config.Token, t, err = p.loadToken(); err != nil {
		return config, t, err
	}
	config.TokenExpires = t.Expires
	return config, t, nil
}

// secretFiles returns the paths of all files with secrets that the flags name. A path is empty if
// its flag is not set.
func (f *clientFlags) secretFiles() []string {
	return []string{f.tokenFile, f.fromTokenFile, f.fromUserFile, f.fromKeyFile, f.saltFile, f.toKeyFile, f.toProxyUserFile}
}

// loadSourceAuthorization returns the value of the header Authorization for the source, by the file
// of --from-token-file or --from-user-file. It returns "" without these flags.
func (f *clientFlags) loadSourceAuthorization() (string, error) {
	if f.fromUserFile != "" {
		user, err := readUserFile("from-user-file", f.fromUserFile)
		if err != nil {
			return "", err
		}
		password, _ := user.Password()
		return "Basic " + base64.StdEncoding.EncodeToString([]byte(user.Username()+":"+password)), nil
	}
	token, err := readOptionalSecret("from-token-file", f.fromTokenFile)
	if err != nil || token == nil {
		return "", err
	}
	if strings.ContainsFunc(string(token), unicode.IsControl) {
		return "", fmt.Errorf("--from-token-file %s has several lines or other control characters: write the token alone into the file, on one line", f.fromTokenFile)
	}
	return "Bearer " + string(token), nil
}

// loadSelectors returns the selectors of --match and --match-file. If neither these flags nor the
// query of the URL in --from has a selector, it returns one selector that matches all series,
// because Prometheus's /federate serves no samples without match[].
func (f *clientFlags) loadSelectors() (Selectors, error) {
	match, err := readSelectors(f.match, "match-file", f.matchFile)
	if err == nil && len(match) == 0 && !f.from.Query().Has("match[]") {
		return ParseSelectors([]string{MatchAll})
	}
	return match, err
}

// loadSalt returns the salt in the file of --anonymize-salt-file, or nil without that flag. A salt
// of fewer than minSalt bytes is an error.
func (f *clientFlags) loadSalt() ([]byte, error) {
	salt, err := readOptionalSecret("anonymize-salt-file", f.saltFile)
	if err != nil || salt == nil {
		return nil, err
	}
	if len(salt) < minSalt {
		return nil, fmt.Errorf("--anonymize-salt-file %s has %d bytes, fewer than %d: create a salt with: head -c 32 /dev/urandom | base64 > salt", f.saltFile, len(salt), minSalt)
	}
	return salt, nil
}
