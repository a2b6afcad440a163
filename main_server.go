package main

// The mode server: its flags, its files, and the wiring of a server. All conflicts among flags
// are found before anything is opened. A reload that fails changes nothing. The store is the
// last to stop.

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
)

// serverConfig is what the flags of --mode server say.
type serverConfig struct {
	listen, internal, keys, dir         *string
	retention, maxAge, rate             *time.Duration
	labels, allow, elide, required      *ListFlag
	revoked, allowFile, clientCA, token *string
	authorize                           *string
	bytes, storage                      *SizeFlag
	series, clusters, samples, scrape   *int
	open                                *bool
	cluster                             RingFlags
	level                               *slog.Level
}

func ServerMode(ctx context.Context, c *Command) error {
	c.About = "takes pushes of many sites, and serves them to a central Prometheus."
	c.Example = "telemeter --mode server --keys keys --listen :9003 --storage-dir /var/lib/telemeter"
	var f serverConfig
	c.Group("Listeners", func() {
		f.listen = c.String("listen", ":9003", "`ADDRESS` for clients: /authorize, /upload; TLS if the keys have tls.crt and tls.key")
		f.internal = c.String("listen-internal", "localhost:9004", "`ADDRESS` for scrapers and operators: /federate, /metrics")
		f.token = c.String("federate-token-file", "", "`FILE` with the bearer token that the internal listener asks for")
		f.open = c.Bool("internal-open", false, "let the internal listener be reached from other hosts without a token")
		f.clientCA = c.String("tls-client-ca", "", "`FILE` of CA certificates: clients need a certificate of one of them as well")
	})
	c.Group("Who may push", func() {
		f.keys = c.String("keys", "", "`DIR` with the keys that keygen made (needed)")
		f.revoked = c.String("revoked-file", "", "`FILE` of revoked token IDs and cluster IDs, one a line")
		f.authorize = c.String("authorize", "", "`URL` that is asked instead about client tokens, as /authorize is")
		f.rate = c.Duration("ratelimit", time.Second, "`TIME` between pushes of one cluster ID, in bursts of 60; 0 for no limit")
	})
	c.Group("Which samples", func() {
		f.labels = c.List("label", "`NAME=VALUE` to set on every sample")
		f.allow = c.List("allow", "`SELECTOR` of series that are taken (none: all)")
		f.allowFile = c.String("allow-file", "", "`FILE` of such selectors, one a line")
		f.elide = c.List("elide-label", "`NAME` of a label to remove")
		f.required = c.List("required-label", "`NAME=VALUE` that a sample must have; an empty VALUE asks for any")
	})
	c.Group("Storage", func() {
		f.dir = c.String("storage-dir", "telemeter-data", "`DIR` of the logs; empty to hold samples in memory only")
		f.retention = c.Duration("retention", 2*time.Hour, "`TIME` that samples are held, by their own time; a consumer's out_of_order_time_window has to be an hour longer")
		f.maxAge = c.Duration("max-sample-age", 10*time.Minute, "`TIME` that the newest sample of a series is shown")
	})
	c.Group("Limits", func() {
		f.bytes = c.Size("limit-bytes", 1<<20, "`SIZE` of a push's body; decompressed, 8 times as much")
		f.series = c.Int("limit-series", 20_000, "`N` series held for each cluster ID, of 1KiB on average")
		f.clusters = c.Int("limit-clusters", 10_000, "`N` cluster IDs known")
		f.samples = c.Int("limit-samples", 50_000_000, "`N` samples held in all, at about 12 bytes each")
		f.storage = c.Size("limit-storage", 0, "`SIZE` of all logs; 0 for what the disk has")
		f.scrape = c.Int("limit-scrape", 500_000, "`N` samples in one scrape")
	})
	f.cluster.Define(c)
	c.Group("Other", func() { f.level = c.LogLevel() })
	if err := c.ParseArgs(); err != nil {
		return err
	}
	c.Require(*f.keys != "", "--keys DIR is missing; telemeter --mode keygen --keys keys makes the directory")
	labels, err := ParseLabels(*f.labels)
	c.Require(err == nil, "--label: %v", err)
	required, err := ParseLabels(*f.required)
	c.Require(err == nil, "--required-label: %v", err)
	for _, name := range *f.elide {
		err := CheckLabelName(name)
		c.Require(err == nil, "--elide-label: %v", err)
	}
	_, err = ParseSelectors(*f.allow)
	c.Require(err == nil, "--allow: %v", err)
	_, _, err = net.SplitHostPort(*f.listen)
	c.Require(err == nil, "--listen: %v", err)
	host, _, err := net.SplitHostPort(*f.internal)
	c.Require(err == nil, "--listen-internal: %v", err)
	c.Require(err != nil || IsLoopback(host) || *f.token != "" || *f.open,
		"--listen-internal %s can be reached from other hosts: add --federate-token-file, or --internal-open if that is meant", *f.internal)
	c.Require(!*f.open || *f.token == "", "--internal-open and --federate-token-file contradict each other")
	c.Require(*f.retention > 0 && *f.retention <= MaxRetention, "--retention is above 0 and at most %v", MaxRetention)
	c.Require(*f.maxAge > 0, "--max-sample-age is above 0")
	c.Require(*f.rate >= 0, "--ratelimit is not below 0")
	c.Require(*f.bytes >= 1<<10 && *f.bytes <= 64<<20, "--limit-bytes is from 1KiB to 64MiB")
	c.Require(*f.series > 0, "--limit-series is above 0")
	c.Require(*f.clusters > 0, "--limit-clusters is above 0")
	c.Require(*f.samples > 0, "--limit-samples is above 0")
	c.Require(*f.scrape > 0, "--limit-scrape is above 0")
	f.cluster.Check(c)
	var asker *Authorizer
	if *f.authorize != "" {
		asker, err = NewAuthorizer(*f.authorize, NewHTTPClient(&tls.Config{MinVersion: tls.VersionTLS12}, 10*time.Second, 10*time.Second))
		c.Require(err == nil, "--authorize: %v", err)
	}
	if err := c.Err(); err != nil {
		return err
	}
	log := c.Logger(*f.level)
	return runServer(ctx, c.Now, log, &f, asker, labels, required)
}

// runServer serves until ctx ends.
func runServer(ctx context.Context, now func() time.Time, log *slog.Logger, f *serverConfig, asker *Authorizer, labels, required []Label) (err error) {
	metrics := NewMetrics()
	RegisterProcess(metrics)
	failures := metrics.Counter("telemeter_store_errors_total", "Failures of the store that were logged.")
	dir := *f.dir
	if dir == "" {
		log.Warn("no --storage-dir: samples are held in memory only, and a restart loses them")
	} else if dir, err = filepath.Abs(dir); err != nil {
		return fmt.Errorf("storage directory: %w", err)
	}
	// Keys first: a mistake there should not leave a storage directory behind.
	var tlsConfig atomic.Pointer[tls.Config]
	load := func() (ServerState, error) { return loadServer(f, labels, required, &tlsConfig) }
	state, err := load()
	if err != nil {
		return err
	}
	var server *Server
	var owned func(hash uint64) bool
	if f.cluster.Wanted() { // before there is a ring, nothing is this server's
		owned = func(hash uint64) bool { return server != nil && server.Owned(hash) }
	}
	store, err := OpenStore(StoreConfig{
		FS: DiskFS{}, Dir: dir, Retention: *f.retention, MaxSampleAge: *f.maxAge, LimitSeries: *f.series,
		LimitClusters: *f.clusters, LimitSamples: *f.samples, LimitStorage: int64(*f.storage), Now: now, Owned: owned,
		Span: serverClock(now, metrics, log).Span,
		OnError: func(err error) {
			failures.Inc()
			log.Error("store", "err", err)
		},
		OnWarning: func(err error) { log.Warn("store", "err", err) },
	})
	if err != nil {
		return fmt.Errorf("opening store: %w", err)
	}
	defer func() { err = errors.Join(err, store.Close()) }()
	var node *RingNode
	config := ServerConfig{
		Name: *f.cluster.name, Store: store, Metrics: metrics, Log: log, Now: now, MaxSampleAge: *f.maxAge, LimitBytes: int64(*f.bytes),
		LimitScrape: *f.scrape, RateEvery: *f.rate, Authorizer: asker,
	}
	if f.cluster.Wanted() {
		if node, err = NewRingNode(&f.cluster, *f.keys, *f.internal, dir, metrics, log, func() *Server { return server }); err != nil {
			return err
		}
		defer node.Close()
		config.Forwarder, config.Member = node.Forward, node.Member
	}
	server = NewServer(config)
	server.Reload(state)
	storeCtx, stopStore := context.WithCancel(context.Background())
	maintained := make(chan error, 1)
	go func() { maintained <- store.Run(storeCtx) }()
	defer func() {
		stopStore()
		err = errors.Join(err, <-maintained)
	}()
	external, err := Listen(*f.listen)
	if err != nil {
		return err
	}
	defer external.Close()
	internal, err := Listen(*f.internal)
	if err != nil {
		return err
	}
	defer internal.Close()
	web := HTTPServer{Name: "external", Listener: external, Handler: server.External(), Log: log}
	if tlsConfig.Load() != nil {
		web.TLS = &tls.Config{MinVersion: tls.VersionTLS12, GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
			return tlsConfig.Load(), nil
		}}
	} else if host, _, _ := net.SplitHostPort(external.Addr().String()); !IsLoopback(host) {
		log.Warn("the keys have no tls.crt: clients are served plain HTTP, and whoever sees the network can read tokens and samples")
	}
	inside := HTTPServer{Name: "internal", Listener: internal, Handler: server.Internal(), TrackConns: true, Log: log}
	version, _ := Version()
	st := store.Stats()
	log.Info("serving", "version", version, "external", external.Addr(), "tls", web.TLS != nil, "internal", internal.Addr(),
		"storage", dir, "clusters", len(st.Sites))
	defer server.LogUnread()
	parts := []func(context.Context) error{web.Run, func(ctx context.Context) error {
		// Scrapes go on after SIGTERM, until a second signal.
		serving, end := context.WithCancel(context.WithoutCancel(ctx))
		defer end()
		stop := context.AfterFunc(ctx, func() {
			defer end()
			if errors.Is(context.Cause(ctx), ErrTerminated) {
				again, stop := signal.NotifyContext(serving, os.Interrupt, syscall.SIGTERM)
				defer stop()
				server.Drain(again)
			}
		})
		defer stop()
		return inside.Run(serving)
	}}
	if node == nil {
		server.SetReady(true)
	} else {
		parts = append(parts, node.Web.Run, node.Watch(func() {
			server.SetReady(true)
			log.Info("ready: there is a ring to go by")
		}))
		// After HTTP, so that what is in flight still knows the owners.
		defer func() { err = errors.Join(err, node.Leave()) }()
		node.Start()
	}
	return Serve(ctx, log, metrics, func() error {
		// All is read before anything is replaced: load is last, it replaces the certificate.
		var clusterKeys Keys
		if node != nil {
			if clusterKeys, err = ReadKeys(*f.keys, ClusterKeyFile); err != nil {
				return err
			}
		}
		state, err := load()
		if err != nil {
			return err
		}
		server.Reload(state)
		if web.TLS == nil && tlsConfig.Load() != nil {
			log.Warn("the keys have a tls.crt now: clients are served plain HTTP until this server is restarted")
		}
		if node != nil {
			return node.Reload(clusterKeys)
		}
		return nil
	}, func() {
		server.SetReady(false)
		if node != nil {
			node.Announce() // so that the others send nothing more here
		}
	}, parts...)
}

// serverClock returns the clock by which samples expire. It logs and counts the steps of
// the wall clock.
func serverClock(now func() time.Time, metrics *Metrics, log *slog.Logger) *WallClock {
	steps := metrics.Counter("telemeter_clock_steps_total", "Steps of this host's wall clock by more than ten seconds.")
	begin := time.Now()
	clock := NewWallClock(now, func() time.Duration { return time.Since(begin) }, func(c WallClockStep) {
		step := c.Step.Round(time.Millisecond)
		switch {
		case c.Returned:
			log.Info("the wall clock was set back to the old time", "step", step)
		case c.Believed:
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

// loadServer reads all that a reload reads; tlsConfig is replaced if all is well.
func loadServer(f *serverConfig, labels, required []Label, tlsConfig *atomic.Pointer[tls.Config]) (st ServerState, err error) {
	if st.Keys, err = ReadKeys(*f.keys, TokenKeyFile); err != nil {
		return st, err
	}
	if *f.revoked != "" {
		b, err := ReadFile(*f.revoked, MaxRevokedFile)
		if err != nil {
			return st, fmt.Errorf("reading revocations: %w", err)
		}
		if st.Revoked, err = ParseRevoked(b); err != nil {
			return st, fmt.Errorf("reading %s: %w", *f.revoked, err)
		}
	}
	if *f.token != "" {
		b, err := ReadSecret(*f.token, MaxToken)
		if err != nil {
			return st, fmt.Errorf("reading federate token: %w", err)
		}
		if st.FederateToken = string(b); strings.ContainsFunc(st.FederateToken, func(r rune) bool { return r <= ' ' || r > '~' }) {
			return st, fmt.Errorf("%s holds more than a token: no Authorization header could carry it", *f.token)
		}
	}
	allow, err := ReadSelectors(*f.allow, *f.allowFile)
	if err != nil {
		return st, err
	}
	st.Normalizer = &Normalizer{Elide: *f.elide, Labels: labels, Required: required, Allow: allow}
	crt, key := filepath.Join(*f.keys, TLSCertFile), filepath.Join(*f.keys, TLSKeyFile)
	_, noCrt := os.Stat(crt)
	_, noKey := os.Stat(key)
	// Half a pair is a mistake, and no reason to serve plain HTTP.
	if errors.Is(noCrt, os.ErrNotExist) && errors.Is(noKey, os.ErrNotExist) && tlsConfig.Load() == nil {
		if *f.clientCA != "" {
			return st, fmt.Errorf("--tls-client-ca needs tls.crt and tls.key in %s: keygen --host NAME makes them", *f.keys)
		}
		return st, nil
	}
	pair, err := tls.LoadX509KeyPair(crt, key)
	if err != nil {
		return st, fmt.Errorf("reading certificate: %w", err)
	}
	config := &tls.Config{MinVersion: tls.VersionTLS12, Certificates: []tls.Certificate{pair}, NextProtos: []string{"http/1.1"}}
	if *f.clientCA != "" {
		if config.ClientCAs, err = ReadCAs(*f.clientCA); err != nil {
			return st, err
		}
		config.ClientAuth = tls.RequireAndVerifyClientCert
	}
	tlsConfig.Store(config)
	return st, nil
}
