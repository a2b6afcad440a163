package main

// The mode server: its flags, and the wiring of a server. All conflicts among flags are found
// before anything is opened. The parts are built in the order in which they need each other, and
// end in the opposite order: the store is the last. A reload that fails changes nothing.

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
)

// serverFlags are the flags of --mode server.
type serverFlags struct {
	externalAddr, internalAddr      string
	federateTokenFile, clientCAFile string
	internalOpen                    bool
	keys, revokedFile               string
	authorize                       *url.URL
	rateInterval                    time.Duration
	labels, required                []Label
	allow                           Selectors
	allowFile                       string
	elide                           []string
	storageDir                      string
	retention, maxSampleAge         time.Duration
	limitBytes, limitStorage        int64
	limitSeries, limitSites         int
	limitSamples, limitScrape       int
	ring                            ringFlags
	logLevel                        slog.Level
}

// serverMode runs --mode server.
func serverMode(ctx context.Context, c *command) error {
	c.about = "takes pushes of many sites, and serves them to a central Prometheus."
	c.example = "telemeter --mode server --keys keys --listen :9003 --storage-dir /var/lib/telemeter"
	var f serverFlags
	f.define(c)
	if err := c.parseArgs(); err != nil {
		return err
	}
	f.check(c)
	if err := c.err(); err != nil {
		return err
	}
	p := &serverProcess{serverFlags: f, log: c.logger(f.logLevel), metrics: NewMetrics(), now: c.now}
	return p.run(ctx)
}

func (f *serverFlags) define(c *command) {
	c.defineGroup("Listeners", func() {
		c.addressFlag(&f.externalAddr, "listen", ":9003", "`ADDRESS` for clients: /authorize, /upload; TLS if the keys have tls.crt and tls.key")
		c.addressFlag(&f.internalAddr, "listen-internal", "localhost:9004", "`ADDRESS` for scrapers and operators: /federate, /metrics")
		c.StringVar(&f.federateTokenFile, "federate-token-file", "", "`FILE` with the bearer token that the internal listener asks for")
		c.BoolVar(&f.internalOpen, "internal-open", false, "let the internal listener be reached from other hosts without a token")
		c.StringVar(&f.clientCAFile, "tls-client-ca", "", "`FILE` of CA certificates: clients need a certificate of one of them as well")
	})
	c.defineGroup("Who may push", func() {
		c.StringVar(&f.keys, "keys", "", "`DIR` with the keys that keygen made (needed)")
		c.StringVar(&f.revokedFile, "revoked-file", "", "`FILE` of revoked token IDs and cluster IDs, one a line")
		c.urlFlag(&f.authorize, "authorize", "", "`URL` that is asked instead about client tokens, as /authorize is")
		c.durationFlag(&f.rateInterval, "ratelimit", time.Second, 0, 0, "`TIME` between pushes of one cluster ID, in bursts of 60; 0 for no limit")
	})
	c.defineGroup("Which samples", func() {
		c.labelsFlag(&f.labels, "label", "`NAME=VALUE` to set on every sample")
		c.selectorsFlag(&f.allow, "allow", "`SELECTOR` of series that are taken (none: all)")
		c.StringVar(&f.allowFile, "allow-file", "", "`FILE` of such selectors, one a line")
		c.labelNamesFlag(&f.elide, "elide-label", "`NAME` of a label to remove", false)
		c.labelsFlag(&f.required, "required-label", "`NAME=VALUE` that a sample must have; an empty VALUE asks for any")
	})
	c.defineGroup("Storage", func() {
		c.StringVar(&f.storageDir, "storage-dir", "telemeter-data", "`DIR` of the logs; empty to hold samples in memory only")
		c.durationFlag(&f.retention, "retention", 2*time.Hour, 1, MaxRetention, "`TIME` that samples are held, by their own time; a consumer's out_of_order_time_window has to be an hour longer")
		c.durationFlag(&f.maxSampleAge, "max-sample-age", 10*time.Minute, 1, 0, "`TIME` that the newest sample of a series is shown")
	})
	c.defineGroup("Limits", func() {
		c.sizeFlag(&f.limitBytes, "limit-bytes", 1<<20, 1<<10, 64<<20, "`SIZE` of a push's body; decompressed, 8 times as much")
		c.countFlag(&f.limitSeries, "limit-series", 20_000, "`N` series held for each cluster ID, of 1KiB on average")
		c.countFlag(&f.limitSites, "limit-clusters", 10_000, "`N` cluster IDs known")
		c.countFlag(&f.limitSamples, "limit-samples", 50_000_000, "`N` samples held in all, at about 12 bytes each")
		c.sizeFlag(&f.limitStorage, "limit-storage", 0, 0, 0, "`SIZE` of all logs; 0 for what the disk has")
		c.countFlag(&f.limitScrape, "limit-scrape", 500_000, "`N` samples in one scrape")
	})
	f.ring.define(c)
	c.defineGroup("Other", func() { c.logLevelFlag(&f.logLevel) })
}

// check collects conflicts among flags.
func (f *serverFlags) check(c *command) {
	c.addProblemUnless(f.keys != "", "--keys DIR is missing; telemeter --mode keygen --keys keys makes the directory")
	host, _, _ := net.SplitHostPort(f.internalAddr)
	c.addProblemUnless(isLoopback(host) || f.federateTokenFile != "" || f.internalOpen,
		"--listen-internal %s can be reached from other hosts: add --federate-token-file, or --internal-open if that is meant", f.internalAddr)
	c.addProblemUnless(!f.internalOpen || f.federateTokenFile == "", "--internal-open and --federate-token-file contradict each other")
	f.ring.check(c)
}

// serverProcess is a server with all that it needs, from flags to listeners.
type serverProcess struct {
	serverFlags
	log     *slog.Logger
	metrics *Metrics
	now     func() time.Time

	certificate atomic.Pointer[tls.Config] // for the external listener; nil: plain HTTP
	forwarder   *Forwarder                 // this and node are nil for a server alone
	node        *ringNode
	store       *Store
	server      *Server

	external, internal HTTPServer
}

// run builds the parts, each after those that it needs, and serves until ctx ends.
func (p *serverProcess) run(ctx context.Context) (err error) {
	RegisterProcessMetrics(p.metrics)
	if p.storageDir == "" {
		p.log.Warn("no --storage-dir: samples are held in memory only, and a restart loses them")
	} else if p.storageDir, err = filepath.Abs(p.storageDir); err != nil {
		return fmt.Errorf("storage directory: %w", err)
	}
	// Keys first: a mistake there should not leave a storage directory behind.
	state, err := p.loadConfigAndSetCertificate()
	if err != nil {
		return err
	}
	var ringKeys Keys
	if p.ring.enabled() {
		if ringKeys, err = readKeyFile(p.keys, ClusterKeyFile); err != nil {
			return err
		}
		if err := p.newForwarder(ringKeys); err != nil {
			return err
		}
	}
	// The store locks the directory, which also has the state of the ring's member.
	if err := p.openStore(); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.store.Close()) }()
	if p.ring.enabled() {
		if p.node, err = p.openRingNode(ringKeys); err != nil {
			return err
		}
		defer p.node.closeSockets()
	}
	p.newServer(state)
	defer p.closeListeners()
	if err := p.listenHTTP(); err != nil {
		return err
	}
	return runWhile(ctx, p.store.Run, p.serve)
}

// newForwarder makes the forwarder, which owns nothing until there is a ring.
func (p *serverProcess) newForwarder(ringKeys Keys) error {
	box, err := NewMessageSealer(ringKeys, ringName)
	if err != nil {
		return err
	}
	p.forwarder = NewForwarder(ForwarderConfig{
		Name: p.ring.name, Sealer: box, Client: NewHTTPClient(nil, time.Minute, forwardDialTimeout), Log: p.log, Metrics: p.metrics,
	})
	return nil
}

func (p *serverProcess) openStore() (err error) {
	failures := p.metrics.Counter("telemeter_store_errors_total", "Failures of the store that were logged.")
	cfg := StoreConfig{
		FS: DiskFS{}, Dir: p.storageDir, Retention: p.retention, MaxSampleAge: p.maxSampleAge, LimitSeries: p.limitSeries,
		LimitSites: p.limitSites, LimitSamples: p.limitSamples, LimitStorage: p.limitStorage, Now: p.now,
		NowInterval: newServerClock(p.now, p.metrics, p.log).NowInterval,
		OnError: func(err error) {
			failures.Inc()
			p.log.Error("store", "err", err)
		},
		OnWarning: func(err error) { p.log.Warn("store", "err", err) },
	}
	if p.forwarder != nil {
		cfg.Owned = p.forwarder.OwnsSite
	}
	if p.store, err = OpenStore(cfg); err != nil {
		return fmt.Errorf("opening store: %w", err)
	}
	return nil
}

func (p *serverProcess) newServer(state ReloadableServerConfig) {
	cfg := ServerConfig{
		Name: p.ring.name, Store: p.store, Forwarder: p.forwarder, Metrics: p.metrics, Log: p.log, Now: p.now,
		MaxSampleAge: p.maxSampleAge, LimitBytes: p.limitBytes, LimitScrape: p.limitScrape, RateInterval: p.rateInterval,
	}
	if p.node != nil {
		cfg.Member, cfg.Gossip = p.node.member, p.node.gossip
	}
	if p.authorize != nil {
		cfg.ExternalAuthorizer = NewExternalAuthorizer(p.authorize, NewHTTPClient(&tls.Config{MinVersion: tls.VersionTLS12}, 10*time.Second, 10*time.Second))
	}
	p.server = NewServer(cfg)
	p.server.Reload(state)
}

// listenHTTP opens the external and the internal listener.
func (p *serverProcess) listenHTTP() error {
	external, err := Listen(p.externalAddr)
	if err != nil {
		return err
	}
	p.external = HTTPServer{Name: "external", Listener: external, Handler: p.server.ExternalHandler(), Log: p.log}
	if p.certificate.Load() != nil {
		p.external.TLS = &tls.Config{MinVersion: tls.VersionTLS12, GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
			return p.certificate.Load(), nil
		}}
	} else if host, _, _ := net.SplitHostPort(external.Addr().String()); !isLoopback(host) {
		p.log.Warn("the keys have no tls.crt: clients are served plain HTTP, and whoever sees the network can read tokens and samples")
	}
	internal, err := Listen(p.internalAddr)
	if err != nil {
		return err
	}
	p.internal = HTTPServer{Name: "internal", Listener: internal, Handler: p.server.InternalHandler(), TrackConns: true, Log: p.log}
	version, _ := ProgramVersion()
	p.log.Info("serving", "version", version, "external", external.Addr(), "tls", p.external.TLS != nil, "internal", internal.Addr(),
		"storage", p.storageDir, "sites", len(p.store.Stats().Sites))
	return nil
}

func (p *serverProcess) closeListeners() {
	for _, s := range []HTTPServer{p.external, p.internal} {
		if s.Listener != nil {
			s.Listener.Close() // once more, if it has served
		}
	}
}

// serve answers clients and scrapers until ctx ends, and then logs unread samples.
func (p *serverProcess) serve(ctx context.Context) error {
	defer p.server.LogUnreadSamples()
	if p.node == nil {
		p.server.SetReady(true)
		return p.serveListeners(ctx)
	}
	// Gossip ends after HTTP, so that requests in flight still find the owners.
	return runWhile(ctx, p.node.run, p.serveListeners)
}

// serveListeners runs the listeners until ctx ends.
func (p *serverProcess) serveListeners(ctx context.Context) error {
	parts := []func(context.Context) error{p.external.Run, p.serveInternalUntilRead}
	if p.node != nil {
		members := HTTPServer{Name: "members", Listener: p.node.tcp, Handler: p.server.ForwardHandler(), Log: p.log}
		parts = append(parts, members.Run, p.setReadyOnceSettled)
	}
	return runWithReloads(ctx, p.log, p.metrics, p.reload, p.announceStop, parts...)
}

// serveInternalUntilRead goes on after ctx has ended with SIGTERM, until consumers have read all
// samples, for a limited time, or until a second signal.
func (p *serverProcess) serveInternalUntilRead(ctx context.Context) error {
	serving, end := context.WithCancel(context.WithoutCancel(ctx))
	defer end()
	stop := context.AfterFunc(ctx, func() {
		defer end()
		if errors.Is(context.Cause(ctx), errTerminated) {
			drain, stop := signal.NotifyContext(serving, os.Interrupt, syscall.SIGTERM)
			defer stop()
			p.server.WaitUntilRead(drain)
		}
	})
	defer stop()
	return p.internal.Run(serving)
}

// setReadyOnceSettled makes the server ready when there is a ring, and ends with ctx.
func (p *serverProcess) setReadyOnceSettled(ctx context.Context) error {
	select {
	case <-p.node.member.Settled():
		p.server.SetReady(true)
		p.log.Info("ready: there is a ring to go by")
		<-ctx.Done()
	case <-ctx.Done():
	}
	return nil
}

// announceStop has clients and the other members send nothing more here.
func (p *serverProcess) announceStop() {
	p.server.SetReady(false)
	if p.node != nil {
		p.node.gossip.AnnounceLeaving()
	}
}

// reload reads all files before it replaces anything.
func (p *serverProcess) reload() error {
	var ringKeys Keys
	if p.node != nil {
		var err error
		if ringKeys, err = readKeyFile(p.keys, ClusterKeyFile); err != nil {
			return err
		}
	}
	state, err := p.loadConfigAndSetCertificate() // last: it replaces the certificate
	if err != nil {
		return err
	}
	p.server.Reload(state)
	if p.external.TLS == nil && p.certificate.Load() != nil {
		p.log.Warn("the keys have a tls.crt now: clients are served plain HTTP until this server is restarted")
	}
	if p.node == nil {
		return nil
	}
	return errors.Join(p.node.gossip.SetKeys(ringKeys), p.forwarder.SetKeys(ringKeys))
}

// loadConfigAndSetCertificate reads the files that a reload reads again. It replaces the
// certificate if all is well.
func (p *serverProcess) loadConfigAndSetCertificate() (config ReloadableServerConfig, err error) {
	if config.Keys, err = readKeyFile(p.keys, TokenKeyFile); err != nil {
		return config, err
	}
	if config.Revoked, err = p.loadRevoked(); err != nil {
		return config, err
	}
	if config.FederateToken, err = p.loadFederateToken(); err != nil {
		return config, err
	}
	allow, err := readSelectors(p.allow, p.allowFile)
	if err != nil {
		return config, err
	}
	config.Normalizer = &ServerNormalizer{Elide: p.elide, Labels: p.labels, Required: p.required, Allow: allow}
	return config, p.loadAndSetCertificate()
}

func (p *serverProcess) loadRevoked() (RevokedIDs, error) {
	if p.revokedFile == "" {
		return RevokedIDs{}, nil
	}
	b, err := readSmallFile(p.revokedFile, MaxRevokedFile)
	if err != nil {
		return RevokedIDs{}, fmt.Errorf("reading revocations: %w", err)
	}
	revoked, err := ParseRevokedIDs(b)
	if err != nil {
		return RevokedIDs{}, fmt.Errorf("reading %s: %w", p.revokedFile, err)
	}
	return revoked, nil
}

func (p *serverProcess) loadFederateToken() (string, error) {
	b, err := readOptionalSecret(p.federateTokenFile, "federate token")
	if err != nil {
		return "", err
	}
	token := string(b)
	if strings.ContainsFunc(token, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return "", fmt.Errorf("%s holds more than a token: no Authorization header could carry it", p.federateTokenFile)
	}
	return token, nil
}

// loadAndSetCertificate replaces the certificate. Without one the server serves plain HTTP; half a
// pair is a mistake, and no reason to.
func (p *serverProcess) loadAndSetCertificate() error {
	crt, key := filepath.Join(p.keys, TLSCertFile), filepath.Join(p.keys, TLSKeyFile)
	_, crtErr := os.Stat(crt)
	_, keyErr := os.Stat(key)
	if errors.Is(crtErr, os.ErrNotExist) && errors.Is(keyErr, os.ErrNotExist) && p.certificate.Load() == nil {
		if p.clientCAFile != "" {
			return fmt.Errorf("--tls-client-ca needs tls.crt and tls.key in %s: keygen --host NAME makes them", p.keys)
		}
		return nil
	}
	pair, err := tls.LoadX509KeyPair(crt, key)
	if err != nil {
		return fmt.Errorf("reading certificate: %w", err)
	}
	config := &tls.Config{MinVersion: tls.VersionTLS12, Certificates: []tls.Certificate{pair}, NextProtos: []string{"http/1.1"}}
	if p.clientCAFile != "" {
		if config.ClientCAs, err = readCAs(p.clientCAFile); err != nil {
			return err
		}
		config.ClientAuth = tls.RequireAndVerifyClientCert
	}
	p.certificate.Store(config)
	return nil
}

// newServerClock returns the clock by which samples expire. It logs and counts the steps of the
// wall clock.
func newServerClock(now func() time.Time, metrics *Metrics, log *slog.Logger) *CheckedWallClock {
	steps := metrics.Counter("telemeter_clock_steps_total", "Steps of this host's wall clock by more than ten seconds.")
	begin := time.Now()
	clock := NewCheckedWallClock(now, func() time.Duration { return time.Since(begin) }, func(c WallClockStepEvent) {
		step := c.Size.Round(time.Millisecond)
		switch {
		case c.Reverted:
			log.Info("the wall clock was set back to the old time", "step", step)
		case c.Accepted:
			log.Warn("the wall clock's new time has held for five minutes: samples expire by it from now on", "step", step)
		default:
			steps.Inc()
			log.Error("the wall clock was set: for five minutes no sample expires, and a push gets 503 if its samples are right by the old time or the new time only; make sure that this host keeps time (NTP)", "step", step)
		}
	})
	wall := metrics.Gauge("telemeter_time_seconds", "This host's wall clock.")
	doubt := metrics.Gauge("telemeter_clock_step_seconds", "By how much the wall clock was set, while that is in doubt; 0 otherwise.")
	metrics.OnCollect(func() {
		doubt.Set(clock.StepInDoubt().Seconds())
		wall.Set(float64(now().UnixMilli()) / 1000)
	})
	return clock
}
