package main

// The modes keygen and token, by which an operator makes keys and tokens. Only a token goes to
// stdout; everything said about it goes to stderr. No secret is printed but the token asked for.

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// keygenMode runs --mode keygen.
func keygenMode(_ context.Context, c *command) error {
	c.about = "makes the servers' keys and certificate, or rotates a key. It never overwrites one."
	c.example = "telemeter --mode keygen --keys keys --host hub.example"
	var dir, rotate string
	var hosts []string
	c.defineGroup("Flags", func() {
		c.StringVar(&dir, "keys", "keys", "`DIR` of the keys: cluster.key, token.key, tls.crt, tls.key")
		c.stringsFlag(&hosts, "host", "`NAME` or address by which clients reach the servers; without any no certificate is made")
		c.StringVar(&rotate, "rotate", "", "`KEY` to renew, cluster or token: a new one comes first, old ones stay valid")
	})
	if err := c.parseArgs(); err != nil {
		return err
	}
	c.addProblemUnless(dir != "", "--keys DIR is missing")
	c.addProblemUnless(slices.Contains([]string{"", "cluster", "token"}, rotate), "--rotate takes cluster or token")
	c.addProblemUnless(rotate == "" || len(hosts) == 0, "--rotate and --host are two different things to do")
	if err := c.err(); err != nil {
		return err
	}
	if rotate != "" {
		if err := RotateKey(dir, rotate); err != nil {
			return fmt.Errorf("rotating key: %w", err)
		}
		fmt.Fprintf(c.stderr, "%s.key has a new first key; copy it to every server, send them SIGHUP, and delete its old lines later\n", filepath.Join(dir, rotate))
		return nil
	}
	created, kept, err := Keygen(dir, hosts, time.Now())
	for _, path := range created {
		fmt.Fprintln(c.stderr, "made", path)
	}
	for _, path := range kept {
		fmt.Fprintln(c.stderr, "kept", path)
	}
	if err != nil {
		return fmt.Errorf("making keys: %w", err)
	}
	return nil
}

// tokenFlags are the flags of --mode token.
type tokenFlags struct {
	keys, id, inspect string
	to                []*url.URL
	labels            []Label
	ttl               time.Duration
}

// tokenMode runs --mode token.
func tokenMode(_ context.Context, c *command) error {
	c.about = "makes a site's token, on stdout, or says what one holds."
	c.example = "telemeter --mode token --keys keys --id site-7 --to https://hub.example:9003 > site-7.token"
	var f tokenFlags
	c.defineGroup("Make a token", func() {
		c.StringVar(&f.keys, "keys", "keys", "`DIR` of the keys")
		c.clusterIDFlag(&f.id, "id", "`ID` of the cluster that the token is for")
		c.serverURLsFlag(&f.to, "to", "`URL` of a server, for the client; of an https one the certificate among the keys is pinned")
		c.durationFlag(&f.ttl, "ttl", 0, 0, 0, "`TIME` after which it expires and the site goes silent; 0 for until it is revoked")
		c.labelsFlag(&f.labels, "label", "`NAME=VALUE` to set on every sample of this site")
	})
	c.defineGroup("Look at one", func() {
		c.StringVar(&f.inspect, "inspect", "", "`FILE` with a token: say what it holds, and whether it verifies")
	})
	if err := c.parseArgs(); err != nil {
		return err
	}
	c.addProblemUnless(f.keys != "", "--keys DIR is missing")
	if f.inspect != "" {
		c.addProblemUnless(f.id == "" && len(f.to) == 0 && f.ttl == 0 && len(f.labels) == 0, "--inspect goes with --keys alone")
	} else {
		c.addProblemUnless(c.isSet("id"), "--id ID is missing")
	}
	if err := c.err(); err != nil {
		return err
	}
	if f.inspect != "" {
		return inspectToken(c.stdout, f.keys, f.inspect)
	}
	t, signed, err := f.makeToken(time.Now())
	if err != nil {
		return err
	}
	fmt.Fprintf(c.stderr, "token %s for cluster ID %s\n", t.ID, t.ClusterID)
	_, err = fmt.Fprintln(c.stdout, signed)
	return err
}

// makeToken makes and signs a client token. It pins the certificate among the keys if one of the
// servers is an https one.
func (f *tokenFlags) makeToken(now time.Time) (t Token, signed string, err error) {
	t = Token{Kind: KindClient, ClusterID: f.id, Labels: map[string]string{}, Issued: now.Unix(), ID: NewTokenID()}
	for _, l := range f.labels {
		t.Labels[string(l.Name)] = string(l.Value)
	}
	if f.ttl > 0 {
		t.Expires = now.Add(f.ttl).Unix()
	}
	secure := false
	for _, u := range f.to {
		t.URLs = append(t.URLs, u.String())
		secure = secure || u.Scheme == "https"
	}
	keys, err := readKeyFile(f.keys, TokenKeyFile)
	if err != nil {
		return t, "", err
	}
	crt := filepath.Join(f.keys, TLSCertFile)
	b, err := readSmallFile(crt, maxRulesFile)
	switch {
	case err == nil && secure:
		if t.Pin, err = PinFromPEM(b); err != nil {
			return t, "", fmt.Errorf("reading %s: %w", crt, err)
		}
	case err != nil && !errors.Is(err, os.ErrNotExist):
		return t, "", fmt.Errorf("reading certificate: %w", err)
	}
	if signed, err = keys.Sign(t); err != nil {
		return t, "", fmt.Errorf("signing token: %w", err)
	}
	return t, signed, nil
}

// inspectToken writes the contents of a token, and whether it verifies under the keys in keysDir.
func inspectToken(w io.Writer, keysDir, file string) error {
	b, err := ReadSecret(file, MaxToken)
	if err != nil {
		return fmt.Errorf("reading token: %w", err)
	}
	t, err := ParseUnverifiedToken(string(b))
	if err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	at := func(s int64) string {
		if s == 0 {
			return "never"
		}
		return time.Unix(s, 0).UTC().Format(time.RFC3339)
	}
	labels := slices.Sorted(maps.Keys(t.Labels))
	for i, name := range labels {
		labels[i] = name + "=" + strconv.Quote(t.Labels[name])
	}
	fmt.Fprintf(w, "kind:       %s\ncluster ID: %s\ntoken ID:   %s\nkey ID:     %s\nissued:     %s\nexpires:    %s\nservers:    %s\npin:        %s\nlabels:     %s\n",
		t.Kind, t.ClusterID, t.ID, t.KeyID, at(t.Issued), at(t.Expires), strings.Join(t.URLs, " "), t.Pin, strings.Join(labels, " "))
	keys, err := readKeyFile(keysDir, TokenKeyFile)
	if err != nil {
		fmt.Fprintf(w, "verifies:   not known: %v\n", err)
		return nil
	}
	if _, err := keys.Verify(string(b), time.Now()); err != nil {
		fmt.Fprintf(w, "verifies:   no: %v\n", err)
		return fmt.Errorf("%s does not verify: %w", file, err)
	}
	fmt.Fprintf(w, "verifies:   yes, under the keys in %s\n", keysDir)
	return nil
}
