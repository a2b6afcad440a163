package main

// This file implements the mode server: its flags and the wiring of a server. Conflicts among flags
// are reported before any file or socket is opened. Each part is built after the parts that it
// needs. The parts end in the opposite order, the store last. A reload that fails changes nothing.

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

type serverFlags struct {
	externalAddr, internalAddr      string
	federateTokenFile, clientCAFile string
	internalOpen                    bool
	consumers                       []string
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
	checkOnly                       bool
}

func serverMode(ctx context.Context, c *command) error {
	c.about = "receives pushes from many sites, and serves the samples to a central Prometheus."
	c.example = "telemeter --mode server --keys keys --listen :9003 --storage-dir /var/lib/telemeter"
	c.usual = []string{"keys", "listen", "listen-internal", "federate-token-file", "storage-dir", "revoked-file", "listen-cluster", "join"}
	var f serverFlags
	f.define(c)
	if err := c.parseArgs(); err != nil {
		return err
	}
	f.check(c)
	if err := c.err(); err != nil {
		return err
	}
	p := &serverProcess{serverFlags: f, log: c.logger(f.logLevel), warnings: &c.warnings, metrics: NewMetrics(), now: c.now}
	if f.checkOnly {
		return p.runChecks(c.stdout)
	}
	return p.run(ctx)
}

func (f *serverFlags) define(c *command) {
	c.defineGroup("Listeners", func() {
		c.addressFlag(&f.externalAddr, "listen", ":9003", "`ADDRESS` address for clients: /authorize and /upload; uses TLS if --keys has tls.crt and tls.key")
		c.addressFlag(&f.internalAddr, "listen-internal", "localhost:9004", "`ADDRESS` address for scrapers and operators: /federate, /metrics; on another address than loopback, uses TLS if --keys has tls.crt and tls.key")
		c.StringVar(&f.federateTokenFile, "federate-token-file", "", "`FILE` file with the bearer token that scrapers must send to the internal listener")
		listFlag(c, &f.consumers, "consumer", "`NAME` name of a consumer that may scrape /federate?consumer=NAME; without it, every name may", parseEach(func(name string) (string, error) {
			return name, CheckConsumerName(name)
		}))
		c.BoolVar(&f.internalOpen, "internal-open", false, "allow other hosts to use the internal listener without a token")
		c.StringVar(&f.clientCAFile, "tls-client-ca", "", "`FILE` file with CA certificates; clients must also present a certificate signed by one of the CAs")
	})
	c.defineGroup("Who may push", func() {
		c.StringVar(&f.keys, "keys", "", "`DIR` directory of the keys that --mode keygen created (required)")
		c.StringVar(&f.revokedFile, "revoked-file", "", "`FILE` file with revoked token IDs and cluster IDs, one per line")
		c.urlFlag(&f.authorize, "authorize", "", "`URL` URL of a service that checks client tokens instead of this server; it is asked in the protocol of the original telemeter's --authorize")
		c.durationFlag(&f.rateInterval, "ratelimit", time.Second, 0, 0, "`TIME` shortest average time between pushes of one cluster ID; a push counts once for each --limit-bytes that it decodes to; bursts of 60 are allowed; 0: no limit")
	})
	c.defineGroup("Which samples", func() {
		c.labelsFlag(&f.labels, "label", "`NAME=VALUE` label to set on every sample")
		c.selectorsFlag(&f.allow, "allow", "`SELECTOR` selector of series to accept; without any selector, all series are accepted")
		c.StringVar(&f.allowFile, "allow-file", "", "`FILE` file with selectors of series to accept, one per line")
		c.labelNamesFlag(&f.elide, "elide-label", "`NAME` name of a label to remove from every sample", false)
		c.labelsFlag(&f.required, "required-label", "`NAME=VALUE` label without which a sample is dropped; an empty VALUE accepts any value of the label")
	})
	c.defineGroup("Storage", func() {
		c.StringVar(&f.storageDir, "storage-dir", "telemeter-data", "`DIR` directory of the logs with the samples; empty: keep samples in memory only")
		c.durationFlag(&f.retention, "retention", 2*time.Hour, 1, MaxRetention, "`TIME` how long samples are kept, by their own timestamps; a consumer's out_of_order_time_window must be an hour longer")
		c.durationFlag(&f.maxSampleAge, "max-sample-age", 10*time.Minute, 1, 0, "`TIME` how long the newest sample of a series is served again in every scrape")
	})
	c.defineGroup("Limits", func() {
		c.sizeFlag(&f.limitBytes, "limit-bytes", 1<<20, 1<<10, 64<<20, "`SIZE` largest body of a push; after decompression, 8 times this size")
		c.countFlag(&f.limitSeries, "limit-series", 20_000, "`N` largest number of series kept per cluster ID, with 1KiB of text each on average; samples of more series are dropped")
		c.countFlag(&f.limitSites, "limit-clusters", 10_000, "`N` largest number of cluster IDs that the server keeps")
		c.countFlag(&f.limitSamples, "limit-samples", 50_000_000, "`N` largest number of samples kept of all cluster IDs together, about 12 bytes each")
		c.sizeFlag(&f.limitStorage, "limit-storage", 0, 0, 0, "`SIZE` largest size of all logs together; 0: limited by the disk only")
		c.countFlag(&f.limitScrape, "limit-scrape", 500_000, "`N` largest number of samples in one scrape")
	})
	f.ring.define(c)
	c.defineGroup("Other", func() {
		c.BoolVar(&f.checkOnly, "check", false, "check the flags, the files and the storage directory, print a line for each, and exit; change nothing, even if a server is running")
		c.logFlags(&f.logLevel)
	})
}

// check adds each conflict among the flags to the problems of c.
func (f *serverFlags) check(c *command) {
	c.addProblemUnless(f.keys != "" || c.isMeant("keys"), "--keys DIR is missing: create the keys with telemeter --mode keygen --keys keys")
	c.addProblemUnless(f.isInternalLocal() || f.federateTokenFile != "" || f.internalOpen,
		"--listen-internal %s can be reached from other hosts: add --federate-token-file, or add --internal-open to allow access without a token", f.internalAddr)
	c.addProblemUnless(!f.internalOpen || f.federateTokenFile == "", "--internal-open and --federate-token-file exclude each other: choose one")
	f.ring.check(c)
}

// isInternalLocal reports whether --listen-internal is a loopback address, which other hosts cannot
// reach.
func (f *serverFlags) isInternalLocal() bool { return isLoopbackAddr(f.internalAddr) }

// isLoopbackAddr reports whether the host in addr, which is host:port, is a loopback address.
func isLoopbackAddr(addr string) bool {
	host, _, _ := net.SplitHostPort(addr)
	return IsLoopbackHost(host)
}

// serverProcess is one run of --mode server: a Server with its flags, log, metrics, store, ring and
// listeners.
type serverProcess struct {
	serverFlags
	log      *slog.Logger
	warnings *WarningLog // newest warnings and errors of log
	metrics  *Metrics
	now      func() time.Time

	certificate atomic.Pointer[tls.Config] // TLS configuration of the external listener; its certificate is also that of the internal listener; nil if --keys has no certificate
	forwarder   *Forwarder                 // nil for a server without a ring
	node        *ringNode                  // nil for a server without a ring
	store       *Store
	server      *Server
	issued      *issuedLoader

	conns              *ConnMetrics // of all listeners
	external, internal HTTPServer
}

// run builds the parts of the server and serves until ctx ends. Then it closes the parts in the
// opposite order.
func (p *serverProcess) run(ctx context.Context) (err error) {
	RegisterProcessMetrics(p.metrics)
	if err := p.resolveStorageDir(); err != nil {
		return err
	}
	// Load the keys before the store is opened, so that a server with faulty keys does not create a
	// storage directory.
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
	// Open the store before the ring node. The store locks the storage directory, and the ring node
	// keeps its restart state in that directory.
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

// resolveStorageDir makes the path of --storage-dir absolute. It warns if the path is empty.
func (p *serverProcess) resolveStorageDir() (err error) {
	if p.storageDir == "" {
		p.log.Warn("--storage-dir is empty: samples are kept in memory only, and a restart loses them")
	} else if p.storageDir, err = filepath.Abs(p.storageDir); err != nil {
		return flagError("storage-dir", p.storageDir, err)
	}
	return nil
}

// newForwarder sets p.forwarder to a new Forwarder. Until the forwarder gets its first view of the
// ring, its OwnsSite returns false for every site.
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

// openStore opens the store with the limits in the flags. Later errors of the store are logged and
// counted.
func (p *serverProcess) openStore() (err error) {
	failures := p.metrics.Counter("telemeter_store_errors_total", "Errors of the store; each is logged.")
	cfg := StoreConfig{
		FS: DiskFS{}, Dir: p.storageDir, Retention: p.retention, MaxSampleAge: p.maxSampleAge, LimitSeries: p.limitSeries,
		LimitSites: p.limitSites, LimitSamples: p.limitSamples, LimitStorage: p.limitStorage, Now: p.now, Consumers: p.consumers,
		NowInterval: newServerClock(p.now, p.metrics, p.log).NowInterval,
		OnError: func(err error) {
			failures.Inc()
			p.log.Error("store error", "err", err)
		},
		OnWarning: func(err error) { p.log.Warn("store warning", "err", err) },
	}
	if p.forwarder != nil {
		cfg.Owned = p.forwarder.OwnsSite
	}
	if p.store, err = OpenStore(cfg); err != nil {
		return flagError("storage-dir", p.storageDir, err)
	}
	return nil
}

// newServer sets p.server to a new Server that uses the keys and rules in state. The Server is not
// ready yet.
func (p *serverProcess) newServer(state ReloadableServerConfig) {
	cfg := ServerConfig{
		Name: p.ring.name, Store: p.store, Forwarder: p.forwarder, Metrics: p.metrics, Log: p.log, Warnings: p.warnings, Now: p.now, SDScheme: p.sdScheme(),
		HostLimits:   p.hostLimits,
		MaxSampleAge: p.maxSampleAge, LimitBytes: p.limitBytes, LimitScrape: p.limitScrape, RateInterval: p.rateInterval,
	}
	if p.node != nil {
		cfg.Member, cfg.Gossip = p.node.member, p.node.gossip
	}
	if p.authorize != nil {
		cfg.ExternalAuthorizer = NewExternalAuthorizer(p.authorize, NewHTTPClient(&tls.Config{MinVersion: tls.VersionTLS12}, 10*time.Second, 10*time.Second), p.now)
	}
	p.server = NewServer(cfg)
	p.server.Reload(state)
	p.issued = newIssuedLoader(p.keys, p.server, p.log, p.metrics)
}

// hostLimits returns how much of the disk and of the memory of this host is used.
func (p *serverProcess) hostLimits() (limits []LimitStatus) {
	if p.storageDir != "" {
		if free, total, known := diskBytes(p.storageDir); known {
			limits = append(limits, LimitStatus{Name: "disk", Unit: "bytes", Used: float64(total - free), Limit: float64(total)})
		}
	}
	if used, total, known := ProcessMemory(); known {
		limits = append(limits, LimitStatus{Name: "memory of this process", Unit: "bytes", Used: used, Limit: total, Informative: true})
	}
	return limits
}

// isInternalTLS reports whether the internal listener uses TLS. It does not on loopback, where nobody
// can read the traffic and the commands of operators stay short.
func (p *serverProcess) isInternalTLS() bool {
	return p.certificate.Load() != nil && !p.isInternalLocal()
}

// sdScheme returns the text that precedes the address of the internal listener in /sd.
func (p *serverProcess) sdScheme() string {
	if p.isInternalTLS() {
		return SDSchemeTLS
	}
	return ""
}

// listenHTTP opens the external listener, with TLS if there is a certificate, and the internal
// listener, with TLS if isInternalTLS. It accepts no connections; serveListeners does.
func (p *serverProcess) listenHTTP() error {
	external, err := listenFlag("listen", p.externalAddr)
	if err != nil {
		return err
	}
	p.conns = NewConnMetrics(p.metrics)
	p.external = HTTPServer{Name: "external", Listener: external, Handler: p.server.ExternalHandler(), Conns: p.conns, Log: p.log}
	if p.certificate.Load() != nil {
		p.external.TLS = &tls.Config{MinVersion: tls.VersionTLS12, GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
			return p.certificate.Load(), nil
		}}
	}
	internal, err := listenFlag("listen-internal", p.internalAddr)
	if err != nil {
		return err
	}
	p.internal = HTTPServer{Name: "internal", Listener: internal, Handler: p.server.InternalHandler(IsOnLoopback(internal)), TrackConns: true, Conns: p.conns, Log: p.log}
	if p.isInternalTLS() {
		// --tls-client-ca does not apply here, because scrapers send the federate token instead.
		p.internal.TLS = &tls.Config{MinVersion: tls.VersionTLS12, GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			return &p.certificate.Load().Certificates[0], nil
		}}
	}
	p.warnOfPlainHTTP()
	version, _ := ProgramVersion()
	p.log.Info("serving", "version", version, "external", external.Addr(), "tls", p.external.TLS != nil, "internal", internal.Addr(),
		"storage", p.storageDir, "sites", len(p.store.Stats().Sites), "internal_tls", p.internal.TLS != nil)
	return nil
}

// warnOfPlainHTTP warns of each listener for other hosts that has no TLS, because there is no
// certificate.
func (p *serverProcess) warnOfPlainHTTP() {
	if p.certificate.Load() != nil {
		return
	}
	if !isLoopbackAddr(p.externalAddr) {
		p.log.Warn("clients connect over plain HTTP, because --keys has no tls.crt: anybody on the network can read tokens and samples; create a certificate with telemeter --mode keygen --host NAME")
	}
	if !p.isInternalLocal() {
		p.log.Warn("scrapers connect over plain HTTP, because --keys has no tls.crt: anybody on the network can read samples and the federate token; create a certificate with telemeter --mode keygen --host NAME, or make sure that the network is trusted")
	}
}

// closeListeners closes the external and the internal listener if they were opened. They may be
// closed already, which is harmless.
func (p *serverProcess) closeListeners() {
	for _, s := range []HTTPServer{p.external, p.internal} {
		if s.Listener != nil {
			s.Listener.Close()
		}
	}
}

// serve answers clients, scrapers and other members until ctx ends. At the end it logs how many
// samples the consumers have not read.
func (p *serverProcess) serve(ctx context.Context) error {
	defer p.server.LogUnreadSamples()
	if p.node == nil {
		p.server.SetReady(true)
		return p.serveListeners(ctx)
	}
	// Gossip ends after the listeners, so that this server can still forward the pushes that are in
	// flight.
	return runWhile(ctx, p.node.run, p.serveListeners)
}

// serveListeners serves all listeners until ctx ends, and reloads on SIGHUP.
func (p *serverProcess) serveListeners(ctx context.Context) error {
	parts := []func(context.Context) error{p.external.Run, p.serveInternalUntilRead, p.issued.run, tuneGC}
	if p.node != nil {
		members := HTTPServer{Name: "members", Listener: p.node.tcp, Handler: p.server.ForwardHandler(), Conns: p.conns, Log: p.log}
		parts = append(parts, members.Run, p.setReadyOnceSettled)
	}
	return runWithReloads(ctx, p.log, p.metrics, p.reload, p.announceStop, parts...)
}

// serveInternalUntilRead serves the internal listener until ctx ends. If ctx ends because of
// SIGTERM, it goes on serving until no push is in flight and every recent consumer has read all
// samples, until a time limit has passed, or until a second signal arrives; see
// Server.WaitUntilRead.
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

// setReadyOnceSettled makes the server ready when the RingKeeper builds its first ring, from which
// the owners of sites are known. It returns when ctx ends.
func (p *serverProcess) setReadyOnceSettled(ctx context.Context) error {
	select {
	case <-p.node.member.Settled():
		p.server.SetReady(true)
		p.log.Info("ready: the owners of sites are known", "members", len(p.node.member.View().Members))
		<-ctx.Done()
	case <-ctx.Done():
	}
	return nil
}

// announceStop makes the server not ready, so that it refuses new pushes. A member of a ring also
// announces to the other members that it is about to leave, so that they stop forwarding pushes to
// it.
func (p *serverProcess) announceStop() {
	p.server.SetReady(false)
	if p.node != nil {
		p.node.gossip.AnnounceLeaving()
	}
}

// reload reads keys, certificate, revocations, federate token and selectors again. It replaces them
// only if all of them could be read. A server that started without TLS stays without TLS until a
// restart. If they could be read, reload also loads the list of issued tokens.
func (p *serverProcess) reload() error {
	var ringKeys Keys
	if p.node != nil {
		var err error
		if ringKeys, err = readKeyFile(p.keys, ClusterKeyFile); err != nil {
			return err
		}
	}
	// loadConfigAndSetCertificate comes last, because it replaces the certificate at once. If a
	// later file could not be read, the reload would fail although the certificate has changed.
	state, err := p.loadConfigAndSetCertificate()
	if err != nil {
		return err
	}
	p.server.Reload(state)
	p.issued.load()
	if p.external.TLS == nil && p.certificate.Load() != nil {
		p.log.Warn("--keys has a tls.crt now, but clients and scrapers connect over plain HTTP until this server is restarted")
	}
	if p.node == nil {
		return nil
	}
	return errors.Join(p.node.gossip.SetKeys(ringKeys), p.forwarder.SetKeys(ringKeys))
}

// loadConfigAndSetCertificate reads all files that a reload reads, except cluster.key. If all of
// them can be read, it replaces the certificate of the listeners, and returns the contents of the
// other files. It warns of each secret file that every user may read, at every reload again,
// so that the operator sees whether a chmod was enough.
func (p *serverProcess) loadConfigAndSetCertificate() (config ReloadableServerConfig, err error) {
	warnOfReadableSecrets(p.log, filepath.Join(p.keys, ClusterKeyFile), filepath.Join(p.keys, TokenKeyFile), filepath.Join(p.keys, TLSKeyFile), p.federateTokenFile)
	if config.Keys, err = readKeyFile(p.keys, TokenKeyFile); err != nil {
		return config, err
	}
	if config.Revoked, err = readRevoked(p.revokedFile); err != nil {
		return config, err
	}
	if p.authorize == nil { // the service of --authorize accepts tokens that are not in the list
		warnOfUnknownRevoked(p.log, p.keys, p.revokedFile, config.Revoked)
	}
	if config.FederateToken, err = p.loadFederateToken(); err != nil {
		return config, err
	}
	allow, err := readSelectors(p.allow, "allow-file", p.allowFile)
	if err != nil {
		return config, err
	}
	config.Normalizer = &ServerNormalizer{Elide: p.elide, Labels: p.labels, Required: p.required, Allow: allow}
	return config, p.loadAndSetCertificate()
}

// loadFederateToken returns the token in the file of --federate-token-file, or "" without that
// flag. A token with any character that is not visible ASCII is an error.
func (p *serverProcess) loadFederateToken() (string, error) {
	b, err := readOptionalSecret("federate-token-file", p.federateTokenFile)
	if err != nil {
		return "", err
	}
	token := string(b)
	if strings.ContainsFunc(token, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return "", fmt.Errorf("--federate-token-file %s contains more than a token: it must be one word of visible ASCII characters", p.federateTokenFile)
	}
	return token, nil
}

// loadAndSetCertificate reads tls.crt and tls.key in the directory --keys and replaces the
// certificate of the listeners. If both files are missing, the server has no certificate yet and
// --tls-client-ca is not set, the listeners stay plain HTTP. In all other cases a missing file is an
// error, because the server must not fall back to plain HTTP.
func (p *serverProcess) loadAndSetCertificate() error {
	crt, key := filepath.Join(p.keys, TLSCertFile), filepath.Join(p.keys, TLSKeyFile)
	_, crtErr := os.Stat(crt)
	_, keyErr := os.Stat(key)
	if errors.Is(crtErr, os.ErrNotExist) && errors.Is(keyErr, os.ErrNotExist) && p.certificate.Load() == nil {
		if p.clientCAFile != "" {
			return fmt.Errorf("--tls-client-ca needs tls.crt and tls.key in %s: create them with telemeter --mode keygen --keys %s --host NAME", p.keys, p.keys)
		}
		return nil
	}
	pair, err := tls.LoadX509KeyPair(crt, key)
	if errors.Is(err, os.ErrPermission) {
		return flagError("keys", p.keys, err)
	}
	if err != nil {
		return fmt.Errorf("--keys %s: reading %s and %s: %w: restore both files from a copy, or move both away to make new ones with telemeter --mode keygen --keys %s --host NAME", p.keys, TLSCertFile, TLSKeyFile, err, p.keys)
	}
	config := &tls.Config{MinVersion: tls.VersionTLS12, Certificates: []tls.Certificate{pair}, NextProtos: []string{"http/1.1"}}
	if p.clientCAFile != "" {
		if config.ClientCAs, err = readCAs("tls-client-ca", p.clientCAFile); err != nil {
			return err
		}
		config.ClientAuth = tls.RequireAndVerifyClientCert
	}
	p.certificate.Store(config)
	return nil
}

// newServerClock returns a CheckedWallClock, by which the store judges the age of samples. The
// parameter now is the wall clock. Steps of the wall clock by more than ten seconds are logged and
// counted. newServerClock also registers metrics for the clock.
func newServerClock(now func() time.Time, metrics *Metrics, log *slog.Logger) *CheckedWallClock {
	steps := metrics.Counter("telemeter_clock_steps_total", "Steps of this host's wall clock by more than ten seconds.")
	begin := time.Now()
	clock := NewCheckedWallClock(now, func() time.Duration { return time.Since(begin) }, func(c WallClockStepEvent) {
		step := c.Size.Round(time.Millisecond)
		switch {
		case c.Reverted:
			log.Info("the wall clock was set back to the old time; no sample expired because of the step", "step", step)
		case c.Accepted:
			log.Warn("the wall clock has kept its new time for five minutes: samples expire by the new time from now on", "step", step)
		default:
			steps.Inc()
			log.Error("the wall clock was set: for five minutes only samples that are too old by both the old and the new time expire, and a push gets 503 if its samples are acceptable by only one of the two times; make sure that this host keeps time (NTP)", "step", step)
		}
	})
	wall := metrics.Gauge("telemeter_time_seconds", "This host's wall clock.")
	doubt := metrics.Gauge("telemeter_clock_step_seconds", "Size of the last step of the wall clock while the new time is not trusted yet; 0 otherwise.")
	metrics.OnCollect(func() {
		doubt.Set(clock.StepInDoubt().Seconds())
		wall.Set(float64(now().UnixMilli()) / 1000)
	})
	return clock
}
