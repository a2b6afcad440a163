package main

// This file implements --check of the modes server and client. It reads the files with the
// functions that a start uses, so that a check and a start have the same errors. A check changes
// nothing: it creates no directory, takes no lock, opens no port, and pushes no sample, so that it
// may run beside a server or client that uses the same files. Each result is one line on stdout,
// which begins with ok, WARN or FAIL. Warnings that a start would log are results, too.

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

const (
	checkTimeout   = 20 * time.Second    // limit for the check of the source, and for the check of each server
	clockTolerance = time.Minute         // a larger difference between two clocks is a warning
	expiresSoon    = 30 * 24 * time.Hour // a token or certificate that expires within this time is a warning
)

// checkReport prints the results of checks to out, and counts them. It is also a slog.Handler,
// which prints log records of at least level Warn as warnings.
type checkReport struct {
	out            io.Writer
	checks, failed int
	warned         []string // all warnings, because two checks may cause the same one
}

// result prints that a check succeeded, or that it failed with err. The parameter what names the
// object of the check, and detail describes it. An error that begins with the same words as the
// object does not repeat them. result returns whether err is nil.
func (r *checkReport) result(err error, what, detail string, args ...any) bool {
	r.checks++
	if err != nil {
		r.failed++
		text := strings.TrimLeft(strings.TrimPrefix(err.Error(), what), ": ")
		fmt.Fprintf(r.out, "FAIL %s: %s\n", what, strings.ReplaceAll(text, "\n", "; "))
		return false
	}
	if detail != "" {
		what += ": " + fmt.Sprintf(detail, args...)
	}
	fmt.Fprintf(r.out, "ok   %s\n", what)
	return true
}

// warn prints a warning, unless it was printed before.
func (r *checkReport) warn(format string, args ...any) {
	if text := fmt.Sprintf(format, args...); !slices.Contains(r.warned, text) {
		r.warned = append(r.warned, text)
		fmt.Fprintf(r.out, "WARN %s\n", text)
	}
}

// err returns an error if a check has failed.
func (r *checkReport) err() error {
	if r.failed > 0 {
		return fmt.Errorf("%d of %d checks failed", r.failed, r.checks)
	}
	return nil
}

// Enabled implements slog.Handler.
func (r *checkReport) Enabled(_ context.Context, level slog.Level) bool {
	return level >= slog.LevelWarn
}

// Handle implements slog.Handler.
func (r *checkReport) Handle(_ context.Context, record slog.Record) error {
	text := record.Message
	record.Attrs(func(a slog.Attr) bool {
		text += fmt.Sprintf(" %s=%v", a.Key, a.Value)
		return true
	})
	r.warn("%s", text)
	return nil
}

// WithAttrs implements slog.Handler. It drops the attributes, which only say which part logs.
func (r *checkReport) WithAttrs([]slog.Attr) slog.Handler { return r }

// WithGroup implements slog.Handler.
func (r *checkReport) WithGroup(string) slog.Handler { return r }

// runChecks checks the flags, the files, the source and the servers of a client, and prints the
// results to out. It returns an error if a check has failed.
func (p *clientProcess) runChecks(ctx context.Context, out io.Writer) error {
	r := &checkReport{out: out}
	p.log = slog.New(r)
	r.result(nil, "flags", "")
	warnOfReadableSecrets(p.log, p.secretFiles()...)
	sourceReady, serversReady := p.checkSourceFiles(r), p.checkServerFiles(r)
	exists := r.checkDir("spool directory", "--spool-dir", p.spoolDir, p.spoolLimit, "--spool-limit")
	if serversReady && exists {
		r.result(CheckSpoolSite(p.spoolDir, p.token.ClusterID), "spool of cluster ID "+p.token.ClusterID, "readable")
	}
	if sourceReady {
		p.checkSources(ctx, r)
	} else {
		r.warn("the source was not tried: first correct the files for it")
	}
	if serversReady {
		p.checkServers(ctx, r)
	} else {
		r.warn("no server was tried: first correct the files for the servers")
	}
	return r.err()
}

// checkSourceFiles checks the files that scrapes of the source need. ok is false if one is faulty.
func (p *clientProcess) checkSourceFiles(r *checkReport) (ok bool) {
	ok = true
	check := func(err error, flag, file, detail string, args ...any) {
		if file != "" || err != nil {
			ok = r.result(err, strings.TrimSpace(flag+" "+file), detail, args...) && ok
		}
	}
	_, err := p.loadSourceAuthorization()
	if p.fromUserFile != "" {
		check(err, "--from-user-file", p.fromUserFile, "has a user and a password")
	} else {
		check(err, "--from-token-file", p.fromTokenFile, "has a token")
	}
	_, err = p.loadSourceTransport()
	check(err, "--from-ca-file and --from-crt", strings.TrimSpace(p.fromCAFile+" "+p.fromCertFile), "valid")
	match, err := p.loadSelectors()
	check(err, "--match-file", p.matchFile, "selectors with those of --match: %d", len(match))
	salt, err := p.loadSalt()
	check(err, "--anonymize-salt-file", p.saltFile, "%d bytes", len(salt))
	return ok
}

// checkServerFiles checks the files that pushes to the servers need. ok is false if one is faulty.
func (p *clientProcess) checkServerFiles(r *checkReport) (ok bool) {
	_, token, err := p.loadToken()
	p.token = token
	if !r.result(err, "--token-file "+p.tokenFile, "%s", describeToken(token)) {
		return false
	}
	switch left := time.Until(time.Unix(token.Expires, 0)); {
	case token.Expires == 0 || left > expiresSoon:
	case left > 0:
		r.warn("the token expires in %v: make a new one on the hub with telemeter --mode token", left.Round(time.Minute))
	default:
		r.warn("the token has expired, by the clock of this host: make a new one on the hub with telemeter --mode token")
	}
	_, err = p.loadServerTransport(token.Pins())
	if files := strings.TrimSpace(strings.Join([]string{p.toCAFile, p.toCertFile, p.toProxyUserFile}, " ")); files != "" || err != nil {
		return r.result(err, "files for the servers", "%s: valid", files)
	}
	return true
}

// describeToken returns what a token says, without its secret.
func describeToken(t Token) string {
	text := "cluster ID " + t.ClusterID
	if t.ID != "" {
		text += ", token ID " + t.ID
	}
	expires := "never expires"
	if t.Expires != 0 {
		expires = "expires " + time.Unix(t.Expires, 0).UTC().Format(time.RFC3339)
	}
	pin := "no pin"
	if pins := t.Pins(); len(pins) > 0 {
		pin = "pins " + strings.Join(pins, " and ")
	}
	return fmt.Sprintf("%s, %s, %s, servers %s", text, expires, pin, strings.Join(t.URLs, " "))
}

// checkSources checks each source, and warns of external labels that tell replicas apart and that
// --elide-label does not name.
func (p *clientProcess) checkSources(ctx context.Context, r *checkReport) {
	var external []map[string]string
	for _, u := range p.sources {
		if labels := p.checkSource(ctx, r, u); labels != nil {
			external = append(external, labels)
		}
	}
	if text := DescribeReplicas(external, p.elide); text != "" {
		r.warn("%s", text)
	}
}

// checkSource scrapes a source once, and asks its query API. It returns the external labels of the
// source; nil if they are not known. It needs no token of the client, so that it also works if the
// files for the servers are faulty.
func (p *clientProcess) checkSource(ctx context.Context, r *checkReport, from *url.URL) (external map[string]string) {
	what := "source " + from.Redacted()
	source := *p
	source.from, source.sources = from, []*url.URL{from}
	source.dryRun, source.metrics = true, NewMetrics()
	source.toCAFile, source.toCertFile, source.toProxy = "", "", nil
	if err := source.newClient(); err != nil {
		r.result(err, what, "")
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	begin := time.Now()
	got, err := source.client.Scrape(ctx)
	took := time.Since(begin).Round(time.Millisecond)
	if err != nil {
		r.result(err, what, "")
		return nil
	}
	r.result(nil, what, "%d series in %v", got.Samples, took)
	source.client.LogUnmatchedFlags(got)
	if off := time.Duration(got.SourceTime-got.At.Wall) * time.Millisecond; off.Abs() > clockTolerance {
		r.warn("the clock of the source is %s the clock of this host: set both (NTP); until then, the client corrects the times of samples", describeOffset(off))
	}
	if p.backfill == 0 && len(p.sources) == 1 || !IsFederate(from) {
		return nil
	}
	external, err = source.client.ExternalLabels(ctx, got)
	if err != nil {
		r.warn("the samples of missing scrapes cannot be fetched from %s: %v: permit /api/v1/query beside /federate, or set --backfill 0", from.Redacted(), err)
		return nil
	}
	names := cmp.Or(strings.Join(slices.Sorted(maps.Keys(external)), ", "), "none")
	r.result(nil, "queries at "+from.Redacted(), "answered; external labels: %s", names)
	return external
}

// checkServers exchanges the token at each server, and compares the server's clock to the clock of
// this host. It needs no file for the source, so that it also works if these files are faulty.
func (p *clientProcess) checkServers(ctx context.Context, r *checkReport) {
	servers := *p
	servers.metrics = NewMetrics()
	servers.fromTokenFile, servers.fromUserFile, servers.fromCAFile, servers.fromCertFile, servers.matchFile, servers.saltFile = "", "", "", "", "", ""
	if err := servers.newClient(); err != nil {
		r.result(err, "client", "")
		return
	}
	for _, server := range servers.token.URLs {
		servers.checkServer(ctx, r, server)
	}
}

// checkServer exchanges the token at one server.
func (p *clientProcess) checkServer(ctx context.Context, r *checkReport, server string) {
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	begin := time.Now()
	behind, known, err := p.client.TryServer(ctx, server)
	took := time.Since(begin).Round(time.Millisecond)
	trust := "plain HTTP"
	if strings.HasPrefix(server, "https:") {
		switch {
		case p.toCAFile != "":
			trust = "certificate verified with --to-ca-file"
		case p.token.Pin != "":
			trust = "certificate has the token's pin"
		default:
			trust = "certificate verified with the system's CAs"
		}
	}
	if !r.result(adviseOnSilence(err), "server "+server, "accepts the token; %s; %v", trust, took) || !known {
		return
	}
	off := time.Duration(behind) * time.Millisecond
	if off.Abs() > clockTolerance {
		r.warn("the clock of the server %s is %s the clock of this host: set both (NTP)", server, describeOffset(off))
	} else {
		r.result(nil, "clock of the server "+server, "differs by %v from the clock of this host", off.Abs())
	}
}

// describeOffset returns how far a clock is ahead of another one, or behind it if ahead is
// negative.
func describeOffset(ahead time.Duration) string {
	if ahead < 0 {
		return fmt.Sprintf("%v behind", -ahead)
	}
	return fmt.Sprintf("%v ahead of", ahead)
}

// adviseOnSilence adds to err what to check if err says that a server accepted the connection, but did
// not answer in checkTimeout. Errors of a proxy have their own advice.
func adviseOnSilence(err error) error {
	var byProxy *proxyError
	if errors.As(err, &byProxy) || isDialError(err) || !errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	return fmt.Errorf("%w: no answer in %v: check the address in --to or in the token, and that no firewall is in the way", err, checkTimeout)
}

// runChecks checks the flags, the files and the storage directory of a server, and prints the
// results to out. It returns an error if a check has failed.
func (p *serverProcess) runChecks(out io.Writer) error {
	r := &checkReport{out: out}
	p.log = slog.New(r)
	r.result(nil, "flags", "")
	p.checkKeys(r)
	p.checkIssued(r)
	if _, err := readRevoked(p.revokedFile); p.revokedFile != "" {
		r.result(err, "--revoked-file "+p.revokedFile, "valid")
	}
	if _, err := p.loadFederateToken(); p.federateTokenFile != "" {
		r.result(err, "--federate-token-file "+p.federateTokenFile, "has a token")
	}
	if allow, err := readSelectors(p.allow, "allow-file", p.allowFile); p.allowFile != "" {
		r.result(err, "--allow-file "+p.allowFile, "selectors with those of --allow: %d", len(allow))
	}
	// Load everything as a start does. This also prints the warnings of a start.
	if _, err := p.loadConfigAndSetCertificate(); r.failed == 0 && err != nil {
		r.result(err, "files", "")
	}
	if err := p.resolveStorageDir(); err != nil {
		r.result(err, "storage directory", "")
	} else if p.storageDir != "" {
		r.checkDir("storage directory", "--storage-dir", p.storageDir, p.limitStorage, "--limit-storage")
	}
	return r.err()
}

// checkIssued checks the list of issued tokens. A start is possible without the list.
func (p *serverProcess) checkIssued(r *checkReport) {
	issued, err := readIssued(p.keys)
	switch {
	case err == nil:
		r.result(nil, filepath.Join(p.keys, IssuedFile), "tokens: %d", len(issued.Tokens()))
	case !errors.Is(err, fs.ErrNotExist):
		r.warn("%s: %v", issuedUnreadable, err)
	}
}

// checkKeys checks the keys and the certificate in the directory of --keys.
func (p *serverProcess) checkKeys(r *checkReport) {
	files := []string{TokenKeyFile}
	if p.ring.enabled() {
		files = append(files, ClusterKeyFile)
	}
	for _, file := range files {
		keys, err := readKeyFile(p.keys, file)
		r.result(err, filepath.Join(p.keys, file), "key IDs %s", strings.Join(keys.IDs(), " "))
	}
	what := filepath.Join(p.keys, TLSCertFile)
	if err := p.loadAndSetCertificate(); err != nil {
		r.result(err, what, "")
		return
	}
	config := p.certificate.Load()
	if config == nil {
		r.result(nil, what, "none")
		p.warnOfPlainHTTP()
		return
	}
	p.checkCertificate(r, what, config)
}

// checkCertificate prints the names, the expiry and the pin of the server's certificate.
func (p *serverProcess) checkCertificate(r *checkReport, what string, config *tls.Config) {
	cert, err := x509.ParseCertificate(config.Certificates[0].Certificate[0])
	if err != nil {
		r.result(fmt.Errorf("parsing: %w", err), what, "")
		return
	}
	names := slices.Clone(cert.DNSNames)
	for _, ip := range cert.IPAddresses {
		names = append(names, ip.String())
	}
	r.result(nil, what, "fits tls.key; for %s; expires %s; pin %s", strings.Join(names, " "), cert.NotAfter.UTC().Format(time.RFC3339), CertPin(cert))
	if left := cert.NotAfter.Sub(p.now()); left < expiresSoon {
		r.warn("%s expires in %v: renew it; clients that use the pin in their token ignore the expiry, all others refuse an expired certificate", what, left.Round(time.Minute))
	}
}

// checkDir checks whether a start could use dir, the directory of the given flag, without creating
// or locking it. limit is how many bytes the process may write to it, by the flag limitFlag; 0
// means that the disk is the limit. An empty dir means that the process uses memory only. exists
// reports whether dir exists and can be used.
func (r *checkReport) checkDir(what, flag, dir string, limit int64, limitFlag string) (exists bool) {
	if dir == "" {
		r.warn("%s: %s is empty: memory only, and a restart loses everything", what, flag)
		return false
	}
	if abs, err := filepath.Abs(dir); err == nil {
		dir = abs
	}
	what += " " + dir
	existing, err := nearestDir(dir)
	if err == nil {
		err = checkWritable(existing, dir)
	}
	if err != nil {
		r.result(fmt.Errorf("%w; or name another directory with %s", err, flag), what, "")
		return false
	}
	state := "does not exist yet, a start creates it"
	if existing == dir {
		state = lockState(filepath.Join(dir, "lock"))
	}
	free, _, known := diskBytes(existing)
	if known {
		state += fmt.Sprintf("; %s free", formatSize(free>>20<<20))
	}
	r.result(nil, what, "writable by user ID %d; %s", os.Getuid(), state)
	if known && limit > free {
		r.warn("%s: %s free, but %s is %s: make room, or lower the limit", what, formatSize(free>>20<<20), limitFlag, formatSize(limit))
	}
	return existing == dir
}

// nearestDir returns dir if it exists, and its nearest existing parent otherwise. It is an error if
// that is not a directory.
func nearestDir(dir string) (string, error) {
	info, err := os.Stat(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist) && filepath.Dir(dir) != dir:
		return nearestDir(filepath.Dir(dir))
	case err != nil:
		return "", err
	case !info.IsDir():
		return "", fmt.Errorf("%s is not a directory: move it away", dir)
	}
	return dir, nil
}

// checkWritable returns an error if this user cannot create files in the directory existing, or if
// LockDir would refuse dir.
func checkWritable(existing, dir string) error {
	const read, write, search = 4, 2, 1
	if err := syscall.Access(existing, read|write|search); err != nil {
		return fmt.Errorf("user ID %d cannot write to %s: %w: run the check as the user of the service, or give this user the directory with chown", os.Getuid(), existing, err)
	}
	if existing != dir {
		return nil
	}
	if err := CheckLockDir(dir); err != nil {
		return err
	}
	lock := filepath.Join(dir, "lock")
	if err := syscall.Access(lock, read|write); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("user ID %d cannot open %s, which another user created: %w: run the check as the user of the service, or give this user the directory with chown -R", os.Getuid(), lock, err)
	}
	return nil
}

// lockState describes whether a process holds the lock of LockDir on the file at path, according to
// /proc/locks. It does not try the lock, because a process that starts at that moment would fail.
func lockState(path string) string {
	var st syscall.Stat_t
	if syscall.Stat(path, &st) != nil {
		return "not in use"
	}
	locks, err := os.ReadFile("/proc/locks")
	if err != nil {
		return "perhaps in use" // only Linux has /proc/locks
	}
	dev := uint64(st.Dev)
	major, minor := dev>>8&0xfff|dev>>32&^0xfff, dev&0xff|dev>>12&^0xff // the encoding of makedev(3)
	file := fmt.Sprintf(" %02x:%02x:%d ", major, minor, st.Ino)
	for line := range strings.Lines(string(locks)) {
		if strings.Contains(line, " FLOCK ") && strings.Contains(line, file) {
			return "in use by a running process"
		}
	}
	return "not in use"
}

// diskBytes returns how many bytes this user can still write to the file system of dir, and the size
// of the file system.
func diskBytes(dir string) (free, total int64, known bool) {
	var st syscall.Statfs_t
	if syscall.Statfs(dir, &st) != nil {
		return 0, 0, false
	}
	return int64(st.Bavail) * int64(st.Bsize), int64(st.Blocks) * int64(st.Bsize), true
}
