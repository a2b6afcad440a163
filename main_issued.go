package main

// This file uses the list of issued tokens in the directory --keys. The mode token prints the list.
// A server loads the list when it starts and at SIGHUP, and polls it for changes, so that a new copy
// of the list needs no SIGHUP. If a server cannot read the list, it logs and counts the failure,
// keeps the list that it read before, and tries again. A directory without a list is no failure.

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"text/tabwriter"
	"time"
)

// issuedPollInterval is how often a server checks whether the list of issued tokens has changed.
const issuedPollInterval = time.Minute

// issuedUnreadable is the message about a list of issued tokens that cannot be read.
const issuedUnreadable = "the list of issued tokens cannot be read; the list read before stays in use: correct the file or its mode, or copy it again from the host on which tokens are created"

// readIssued reads the list of issued tokens in dir, the directory of --keys. If there is no list,
// the error wraps fs.ErrNotExist.
func readIssued(dir string) (IssuedTokens, error) {
	path := filepath.Join(dir, IssuedFile)
	b, err := readSmallFile(path, MaxIssuedFile)
	if err != nil {
		return IssuedTokens{}, fmt.Errorf("reading issued tokens: %w", err)
	}
	l, err := ParseIssuedTokens(b)
	if err != nil {
		return IssuedTokens{}, fmt.Errorf("reading %s: %w", path, err)
	}
	return l, nil
}

// listTokens writes a table of the issued tokens in the list in keysDir to w. If there are none, it
// says so on stderr. revokedFile names the file of --revoked-file, or is "".
func listTokens(w, stderr io.Writer, keysDir, revokedFile string, now time.Time) error {
	keys, err := readKeyFile(keysDir, TokenKeyFile)
	if err != nil {
		return err
	}
	revoked, err := readRevoked(revokedFile)
	if err != nil {
		return err
	}
	issued, err := readIssued(keysDir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if len(issued.Tokens()) == 0 {
		fmt.Fprintf(stderr, "%s lists no token: --mode token --id ID adds each token that it creates; tokens of versions without this list are not in it\n", filepath.Join(keysDir, IssuedFile))
		return nil
	}
	if revokedFile == "" {
		fmt.Fprintln(stderr, "--revoked-file was not given: revoked tokens are listed as valid")
	}
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "CLUSTER ID\tTOKEN ID\tISSUED\tEXPIRES\tSTATE\tLABELS")
	for _, t := range issued.Tokens() {
		state := "valid"
		switch {
		case revoked.IsRevoked(t):
			state = "revoked"
		case t.IsExpired(now):
			state = "expired"
		case !slices.Contains(keys.IDs(), t.KeyID):
			state = "no key" // the key that signed the token is not in token.key
		}
		cells := []string{t.ClusterID, t.ID, formatTokenTime(t.Issued), formatTokenTime(t.Expires), state, formatTokenLabels(t.Labels)}
		fmt.Fprintln(table, strings.TrimRight(strings.Join(cells, "\t"), "\t"))
	}
	return table.Flush()
}

// warnOfUnknownRevoked logs a warning of IDs in revoked that the list of issued tokens in keysDir does
// not have, because a misspelled ID revokes nothing. It logs nothing if the list is empty or missing,
// or cannot be read, which is reported elsewhere.
func warnOfUnknownRevoked(log *slog.Logger, keysDir, revokedFile string, revoked RevokedIDs) {
	issued, err := readIssued(keysDir)
	if err != nil || len(issued.Tokens()) == 0 {
		return
	}
	if unknown := revoked.NotIssued(issued); len(unknown) > 0 {
		log.Warn("a line of --revoked-file is no token ID and no cluster ID in the list of issued tokens: it may be misspelled, and then revokes nothing; correct it, or copy the newest list from the host on which tokens are created",
			"file", revokedFile, "list", filepath.Join(keysDir, IssuedFile), "lines", len(unknown), "ids", strings.Join(unknown[:min(len(unknown), 5)], " "))
	}
}

// formatTokenTime formats a time in a token, in Unix seconds. 0 stands for no time.
func formatTokenTime(s int64) string {
	if s == 0 {
		return "never"
	}
	return time.Unix(s, 0).UTC().Format(time.RFC3339)
}

// formatTokenLabels formats the labels of a token, sorted by name, with quoted values.
func formatTokenLabels(labels map[string]string) string {
	texts := slices.Sorted(maps.Keys(labels))
	for i, name := range texts {
		texts[i] = name + "=" + strconv.Quote(labels[name])
	}
	return strings.Join(texts, " ")
}

// issuedLoader loads the list of issued tokens in the directory dir into a server. It is safe for
// concurrent use.
type issuedLoader struct {
	dir      string
	server   *Server
	log      *slog.Logger
	tokens   *Gauge
	failures *Counter

	mu     sync.Mutex     // guards loaded, and makes the server's list change together with it
	loaded *issuedVersion // version of the server's list; nil if the newest attempt to load a list failed
}

func newIssuedLoader(dir string, server *Server, log *slog.Logger, m *Metrics) *issuedLoader {
	return &issuedLoader{
		dir: dir, server: server, log: log,
		tokens:   m.Gauge("telemeter_issued_tokens", "Tokens in the list of issued tokens in --keys, when the server read it last."),
		failures: m.Counter("telemeter_issued_errors_total", "Failures to read the list of issued tokens in --keys; each is logged, and the server keeps the list that it read before."),
	}
}

// issuedVersion tells versions of a list of issued tokens apart. The zero value stands for no list.
type issuedVersion struct {
	modified time.Time
	size     int64
}

// version returns the present version of the list. If the list cannot be examined, load reports it.
func (l *issuedLoader) version() issuedVersion {
	info, err := os.Stat(filepath.Join(l.dir, IssuedFile))
	if err != nil {
		return issuedVersion{}
	}
	return issuedVersion{info.ModTime(), info.Size()}
}

// load gives the list to the server. A missing list counts as an empty list. If two calls overlap,
// the server may get the older list of the two; run then loads the newer list, because loaded is the
// version of the older list.
func (l *issuedLoader) load() {
	before := l.version() // of the list that is read, or of an older one
	path := filepath.Join(l.dir, IssuedFile)
	issued, err := readIssued(l.dir)
	missing := errors.Is(err, fs.ErrNotExist)
	if err != nil && !missing {
		l.failures.Inc()
		l.log.Error(issuedUnreadable, "err", err)
		l.set(nil, nil)
		return
	}
	known := l.countSites()
	l.set(&issued, &before)
	if missing {
		level := slog.LevelInfo
		if known > 0 {
			level = slog.LevelWarn // the list has been removed, perhaps by mistake
		}
		l.log.Log(context.Background(), level, "no list of issued tokens: sites that have never pushed are not known; copy the list from the host on which tokens are created", "file", path)
		return
	}
	l.log.Info("loaded the list of issued tokens", "file", path, "tokens", len(issued.Tokens()), "sites_with_valid_token", l.countSites())
}

// set gives the list to the server, unless list is nil, and sets loaded to version.
func (l *issuedLoader) set(list *IssuedTokens, version *issuedVersion) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if list != nil {
		l.server.SetIssuedTokens(*list)
		l.tokens.Set(float64(len(list.Tokens())))
	}
	l.loaded = version
}

// isLoaded reports whether the server has the present version of the list.
func (l *issuedLoader) isLoaded() bool {
	now := l.version()
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.loaded != nil && *l.loaded == now
}

// countSites returns the number of sites that have a valid token according to the server's list.
func (l *issuedLoader) countSites() (n int) {
	for range l.server.IssuedSites() {
		n++
	}
	return n
}

// run loads the list. Then, every issuedPollInterval until ctx ends, it loads the list again if the
// list has changed or could not be read.
func (l *issuedLoader) run(ctx context.Context) error {
	l.load()
	ticker := time.NewTicker(issuedPollInterval)
	defer ticker.Stop()
	for {
		select {
		case <-ticker.C:
			if !l.isLoaded() {
				l.load()
			}
		case <-ctx.Done():
			return nil
		}
	}
}
