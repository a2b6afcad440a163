package main

// This file implements the modes keygen and token, with which an operator creates keys and tokens.
// When the mode token creates a token, it writes only the token to stdout, so that stdout can be
// redirected to a file, and its messages to stderr. The modes print no secret except a new token.

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

type keygenFlags struct {
	keys, spare, rotate string
	hosts               []string
}

func keygenMode(_ context.Context, c *command) error {
	c.about = "creates the servers' keys and certificate, or rotates a key. Existing keys are never overwritten."
	c.example = "telemeter --mode keygen --keys keys --host hub.example"
	var f keygenFlags
	c.defineGroup("Flags", func() {
		c.StringVar(&f.keys, "keys", "keys", "`DIR` directory of the keys: cluster.key, token.key, tls.crt, tls.key, tls-spare.crt")
		listFlag(c, &f.hosts, "host", "`NAME` host name or IP address of the servers, for their certificate; without --host, no certificate is created", parseEach(func(host string) (string, error) {
			return host, CheckHost(host)
		}))
		c.StringVar(&f.rotate, "rotate", "", "`KEY` key to rotate: cluster or token: a new key is put first in its file, and the old keys stay valid; tls: the spare TLS key replaces the TLS key, and a new spare is created")
		c.StringVar(&f.spare, "spare", "", "`DIR` directory of the spare TLS key, which the servers must not have")
		c.Lookup("spare").DefValue = "the directory --keys with -spare added"
	})
	if err := c.parseArgs(); err != nil {
		return err
	}
	f.fillAndCheck(c)
	if err := c.err(); err != nil {
		return err
	}
	switch f.rotate {
	case "":
		return f.create(c.stderr, c.now())
	case "tls":
		return f.rotateTLS(c.stderr, c.now())
	}
	if err := RotateKey(f.keys, f.rotate); err != nil {
		return keysError(f.keys, err)
	}
	fmt.Fprintf(c.stderr, "%s.key has a new first key: copy the file to every server, send every server SIGHUP, and delete the old lines later\n", filepath.Join(f.keys, f.rotate))
	return nil
}

// fillAndCheck fills in the directory of the spare key, and adds each conflict among the flags to the
// problems of c.
func (f *keygenFlags) fillAndCheck(c *command) {
	c.addProblemUnless(f.keys != "", "--keys DIR is empty: name the directory of the keys")
	c.addProblemUnless(slices.Contains([]string{"", "cluster", "token", "tls"}, f.rotate), "--rotate must be cluster, token or tls")
	c.addProblemUnless(f.rotate == "" || len(f.hosts) == 0, "--rotate and --host cannot be combined: a rotation keeps the host names of the certificate")
	if c.isSet("spare") {
		c.addProblemUnless(f.spare != "", "--spare DIR is empty: name the directory of the spare TLS key")
		c.addProblemUnless(f.rotate == "" || f.rotate == "tls", "--spare has no effect with --rotate %s: remove it", f.rotate)
	} else {
		f.spare = filepath.Clean(f.keys) + "-spare"
		if abs, err := filepath.Abs(f.keys); err == nil && strings.HasSuffix(filepath.Clean(f.keys), ".") { // such as --keys .
			f.spare = abs + "-spare"
		}
	}
	c.addProblemUnless(f.spare == "" || !isBelow(f.spare, f.keys), "--spare must not be in the directory --keys, because that directory is copied to the servers: choose another directory")
}

// isBelow reports whether path is the directory dir or lies below it.
func isBelow(path, dir string) bool {
	absPath, err1 := filepath.Abs(path)
	absDir, err2 := filepath.Abs(dir)
	relative, err3 := filepath.Rel(absDir, absPath)
	return cmp.Or(err1, err2, err3) == nil && filepath.IsLocal(relative)
}

// create creates the keys that are missing. It writes to w the files that it created and found, and
// what to do with a new spare key.
func (f *keygenFlags) create(w io.Writer, now time.Time) error {
	created, kept, err := Keygen(f.keys, f.spare, f.hosts, now)
	for _, path := range created {
		fmt.Fprintln(w, "created", path)
	}
	for _, path := range kept {
		fmt.Fprintln(w, "kept", path)
	}
	pathErr := new(os.PathError)
	switch {
	case errors.As(err, &pathErr) && isBelow(pathErr.Path, f.spare):
		return flagError("spare", f.spare, err)
	case err != nil:
		return flagError("keys", f.keys, err)
	}
	crt := filepath.Join(f.keys, TLSCertFile)
	if slices.Contains(created, crt) && !slices.Contains(created, filepath.Join(f.keys, TLSKeyFile)) {
		fmt.Fprintf(w, "%s is a new certificate for the old key, so tokens keep their pin: copy it to every server, send every server SIGHUP, and give it to each program that trusts the old certificate, such as Prometheus (ca_file)\n", crt)
	}
	if slices.Contains(created, filepath.Join(f.spare, SpareKeyFile)) {
		fmt.Fprintf(w, "%s has a spare TLS key: move this directory to a safe place that is not on a server\n", f.spare)
		fmt.Fprintf(w, "if tls.key leaks or is lost, telemeter --mode keygen --keys %s --rotate tls --spare DIR replaces it by the spare key, and clients go on with their tokens\n", f.keys)
		if !slices.Contains(created, filepath.Join(f.keys, TLSKeyFile)) {
			fmt.Fprintf(w, "tokens that exist already do not accept the spare key: make new tokens for the sites\n")
		}
	}
	return nil
}

// rotateTLS replaces the TLS key by the spare key, and writes to w what to do next.
func (f *keygenFlags) rotateTLS(w io.Writer, now time.Time) error {
	if err := RotateTLSKey(f.keys, f.spare, now); err != nil {
		return fmt.Errorf("rotating the TLS key: %w", err)
	}
	in := func(name string) string { return filepath.Join(f.keys, name) }
	fmt.Fprintf(w, `the spare key is now the TLS key, and %[5]s has a new spare key and the old pair
- copy %[1]s, %[2]s and %[3]s to every server, and send every server SIGHUP
- make ca.crt of Prometheus again from %[1]s and %[3]s, and give the new %[1]s to every other program that trusts the old one
- make a new token for each site: its old token accepts the old key, too, and will not accept the new spare key
- a site whose token has no spare pin (see telemeter --mode token --inspect FILE) cannot push until it has a new token
- move %[5]s to a safe place that is not on a server
`, in(TLSCertFile), in(TLSKeyFile), in(SpareCertFile), f.keys, f.spare)
	return nil
}

type tokenFlags struct {
	keys, id, inspect string
	to                []*url.URL
	labels            []Label
	ttl               time.Duration
	list              bool
	revokedFile       string
}

func tokenMode(_ context.Context, c *command) error {
	c.about = "creates a token for a site and prints it to stdout, inspects a token, or lists all tokens."
	c.example = "telemeter --mode token --keys keys --id site-7 --to https://hub.example:9003 > site-7.token"
	var f tokenFlags
	c.defineGroup("Make a token", func() {
		c.StringVar(&f.keys, "keys", "keys", "`DIR` directory of the keys")
		c.clusterIDFlag(&f.id, "id", "`ID` cluster ID of the site that the token is for")
		c.serverURLsFlag(&f.to, "to", "`URL` URL of a server that the client pushes to; for an https URL, the certificate in --keys and the spare certificate are pinned")
		c.durationFlag(&f.ttl, "ttl", 0, 0, 0, "`TIME` how long the token is valid, after which the site can no longer push; 0: until it is revoked")
		c.labelsFlag(&f.labels, "label", "`NAME=VALUE` label to set on every sample of this site")
	})
	c.defineGroup("Inspect a token", func() {
		c.StringVar(&f.inspect, "inspect", "", "`FILE` file with a token: print its contents, and whether the keys in --keys verify it")
	})
	c.defineGroup("List all tokens", func() {
		c.BoolVar(&f.list, "list", false, "print the tokens that were created with the keys in --keys, as listed in "+IssuedFile+" in --keys, and whether each is still valid")
		c.StringVar(&f.revokedFile, "revoked-file", "", "`FILE` the servers' file of revoked tokens, for the list")
	})
	if err := c.parseArgs(); err != nil {
		return err
	}
	c.addProblemUnless(f.keys != "", "--keys DIR is empty: name the directory of the keys")
	c.addProblemUnless(f.list || f.revokedFile == "", "--revoked-file can be combined only with --list: add --list, or remove --revoked-file")
	if f.list {
		c.addProblemUnless(f.inspect == "" && f.id == "" && len(f.to) == 0 && f.ttl == 0 && len(f.labels) == 0,
			"--list can be combined only with --keys and --revoked-file: remove the other flags; to see only one site, search the list for its cluster ID")
	} else if f.inspect != "" {
		c.addProblemUnless(f.id == "" && len(f.to) == 0 && f.ttl == 0 && len(f.labels) == 0, "--inspect can be combined only with --keys: remove the other flags")
	} else {
		c.addProblemUnless(c.isSet("id") || c.isMeant("id"), "--id ID is missing: name the site with a cluster ID, or use --inspect FILE or --list")
	}
	if err := c.err(); err != nil {
		return err
	}
	if f.list {
		return listTokens(c.stdout, c.stderr, f.keys, f.revokedFile, c.now())
	}
	if f.inspect != "" {
		return inspectToken(c.stdout, f.keys, f.inspect, c.now())
	}
	t, signed, err := f.makeToken(c.now())
	if err != nil {
		return err
	}
	if err := RecordIssuedToken(f.keys, signed); err != nil {
		return fmt.Errorf("recording the token: %w; no token was printed: every token must be listed in %s, so let this user write that file, make room on its disk, and run the command again",
			err, filepath.Join(f.keys, IssuedFile))
	}
	fmt.Fprintf(c.stderr, "token %s for cluster ID %s\n", t.ID, t.ClusterID)
	for _, u := range f.to {
		if u.Port() == "" {
			port := map[string]string{"http": "80", "https": "443"}[u.Scheme]
			fmt.Fprintf(c.stderr, "--to %s has no port, so the client connects to port %s; servers listen on port 9003 by default\n", u, port)
		}
	}
	switch {
	case len(f.to) == 0:
		fmt.Fprintln(c.stderr, "no server in the token: the client that uses it needs --to URL; a script needs none")
	case t.Pin == "" && slices.ContainsFunc(f.to, func(u *url.URL) bool { return u.Scheme == "https" }):
		fmt.Fprintf(c.stderr, "no pin: %s is missing: the client will accept the server only if a CA that the site trusts signed its certificate; if --mode keygen made the certificate, copy %s from a server to %s and create the token again\n",
			filepath.Join(f.keys, TLSCertFile), TLSCertFile, f.keys)
	case t.Pin != "" && t.SparePin == "":
		fmt.Fprintf(c.stderr, "no spare pin: %s is missing: if the TLS key is replaced, the site will need a new token; to avoid that, create a spare key with telemeter --mode keygen --keys %s, and create the token again\n",
			filepath.Join(f.keys, SpareCertFile), f.keys)
	}
	if _, err = fmt.Fprintln(c.stdout, signed); err != nil {
		return fmt.Errorf("printing the token: %w; nobody has this token: run the command again and use the new token", err)
	}
	return nil
}

// makeToken creates a client token from the flags and signs it with the first key in token.key. If
// one of the servers has an https URL and the directory --keys has a certificate, the token
// contains the certificate's pin, and the pin of the spare certificate if there is one. now is the
// issue time.
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
	if t.Pin, err = readPin(filepath.Join(f.keys, TLSCertFile), secure); err != nil {
		return t, "", err
	}
	if t.SparePin, err = readPin(filepath.Join(f.keys, SpareCertFile), t.Pin != ""); err != nil {
		return t, "", err
	}
	if t.Pin != "" && t.SparePin == t.Pin {
		return t, "", fmt.Errorf("the rotation of the TLS key in %s was interrupted, and the token would pin no spare key: complete the rotation with telemeter --mode keygen --keys %s --rotate tls", f.keys, f.keys)
	}
	if signed, err = keys.Sign(t); err != nil {
		return t, "", fmt.Errorf("signing token: %w", err)
	}
	return t, signed, nil
}

// readPin returns the pin of the certificate in the file at path. It returns "" if there is no such
// file, or if wanted is false.
func readPin(path string, wanted bool) (pin string, err error) {
	b, err := readSmallFile(path, maxRulesFile)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return "", nil
	case err != nil:
		return "", keysError(filepath.Dir(path), err)
	case !wanted:
		return "", nil
	}
	if pin, err = PinFromPEM(b); err != nil {
		return "", fmt.Errorf("--keys %s: reading %s: %w: restore the file from a copy, such as the one on a server", filepath.Dir(path), path, err)
	}
	return pin, nil
}

// inspectToken writes to w the contents of the token in file, and whether the keys in keysDir
// verify the token. It returns an error if the token cannot be read or the keys do not verify it.
// If the keys cannot be read, it writes that the answer is unknown, and returns nil.
func inspectToken(w io.Writer, keysDir, file string, now time.Time) error {
	b, err := ReadSecret(file, MaxToken)
	if errors.Is(err, ErrEmptySecret) {
		return fmt.Errorf("--inspect %w: name a file that telemeter --mode token has written", err)
	}
	if err != nil {
		return flagError("inspect", file, err)
	}
	t, err := ParseUnverifiedToken(string(b))
	if err != nil {
		return fmt.Errorf("--inspect %s: parsing token: %w: name a file that telemeter --mode token has written", file, err)
	}
	fmt.Fprintf(w, "kind:       %s\ncluster ID: %s\ntoken ID:   %s\nkey ID:     %s\nissued:     %s\nexpires:    %s\nservers:    %s\npin:        %s\nspare pin:  %s\nlabels:     %s\n",
		t.Kind, t.ClusterID, t.ID, t.KeyID, formatTokenTime(t.Issued), formatTokenTime(t.Expires), strings.Join(t.URLs, " "), t.Pin, t.SparePin, formatTokenLabels(t.Labels))
	keys, err := readKeyFile(keysDir, TokenKeyFile)
	if err != nil {
		fmt.Fprintf(w, "verifies:   unknown: %v\n", err)
		return nil
	}
	if _, err := keys.Verify(string(b), now); err != nil {
		fmt.Fprintf(w, "verifies:   no: %v\n", err)
		return fmt.Errorf("verifying token %s: %w", file, err)
	}
	fmt.Fprintf(w, "verifies:   yes, under the keys in %s\n", keysDir)
	return nil
}
