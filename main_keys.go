package main

// The modes keygen and token: what an operator does with keys. Only a token goes to stdout;
// everything said about it goes to stderr. No secret is printed but the token asked for.

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

func KeygenMode(_ context.Context, c *Command) error {
	c.About = "makes the servers' keys and certificate, or rotates a key. It never overwrites one."
	c.Example = "telemeter --mode keygen --keys keys --host hub.example"
	var dir, rotate *string
	var hosts *ListFlag
	c.Group("Flags", func() {
		dir = c.String("keys", "keys", "`DIR` of the keys: cluster.key, token.key, tls.crt, tls.key")
		hosts = c.List("host", "`NAME` or address by which clients reach the servers; without any no certificate is made")
		rotate = c.String("rotate", "", "`KEY` to renew, cluster or token: a new one comes first, old ones stay valid")
	})
	if err := c.ParseArgs(); err != nil {
		return err
	}
	c.Require(*dir != "", "--keys DIR is missing")
	c.Require(slices.Contains([]string{"", "cluster", "token"}, *rotate), "--rotate takes cluster or token")
	c.Require(*rotate == "" || len(*hosts) == 0, "--rotate and --host are two different things to do")
	if err := c.Err(); err != nil {
		return err
	}
	if *rotate != "" {
		if err := RotateKey(*dir, *rotate); err != nil {
			return fmt.Errorf("rotating key: %w", err)
		}
		fmt.Fprintf(c.Stderr, "%s.key has a new first key; copy it to every server, send them SIGHUP, and delete its old lines later\n", filepath.Join(*dir, *rotate))
		return nil
	}
	created, kept, err := Keygen(*dir, *hosts, time.Now())
	for _, path := range created {
		fmt.Fprintln(c.Stderr, "made", path)
	}
	for _, path := range kept {
		fmt.Fprintln(c.Stderr, "kept", path)
	}
	if err != nil {
		return fmt.Errorf("making keys: %w", err)
	}
	return nil
}

func TokenMode(_ context.Context, c *Command) error {
	c.About = "makes a site's token, on stdout, or says what one holds."
	c.Example = "telemeter --mode token --keys keys --id site-7 --to https://hub.example:9003 > site-7.token"
	var dir, id, inspect *string
	var to, labelFlags *ListFlag
	var ttl *time.Duration
	c.Group("Make a token", func() {
		dir = c.String("keys", "keys", "`DIR` of the keys")
		id = c.String("id", "", "`ID` of the cluster that the token is for")
		to = c.List("to", "`URL` of a server, for the client; of an https one the certificate among the keys is pinned")
		ttl = c.Duration("ttl", 0, "`TIME` after which it expires and the site goes silent; 0 for until it is revoked")
		labelFlags = c.List("label", "`NAME=VALUE` to set on every sample of this site")
	})
	c.Group("Look at one", func() {
		inspect = c.String("inspect", "", "`FILE` with a token: say what it holds, and whether it verifies")
	})
	if err := c.ParseArgs(); err != nil {
		return err
	}
	c.Require(*dir != "", "--keys DIR is missing")
	if *inspect != "" {
		c.Require(*id == "" && len(*to) == 0 && *ttl == 0 && len(*labelFlags) == 0, "--inspect goes with --keys alone")
		if err := c.Err(); err != nil {
			return err
		}
		return inspectToken(c.Stdout, *dir, *inspect)
	}
	err := CheckClusterID(*id)
	c.Require(err == nil, "--id: %v", err)
	c.Require(*ttl >= 0, "--ttl is not below 0")
	labels, err := ParseLabels(*labelFlags)
	c.Require(err == nil, "--label: %v", err)
	t := Token{Kind: KindClient, Cluster: *id, Labels: map[string]string{}, Issued: time.Now().Unix(), ID: NewTokenID()}
	for _, l := range labels {
		t.Labels[string(l.Name)] = string(l.Value)
	}
	secure := false
	for _, s := range *to {
		u, err := BaseURL(s)
		c.Require(err == nil, "--to: %v", err)
		if err == nil {
			t.URLs = append(t.URLs, u.String())
			secure = secure || u.Scheme == "https"
		}
	}
	if err := c.Err(); err != nil {
		return err
	}
	keys, err := ReadKeys(*dir, TokenKeyFile)
	if err != nil {
		return err
	}
	crt := filepath.Join(*dir, TLSCertFile)
	b, err := ReadFile(crt, MaxFile)
	switch {
	case err == nil && secure:
		if t.Pin, err = PinFromPEM(b); err != nil {
			return fmt.Errorf("reading %s: %w", crt, err)
		}
	case err != nil && !errors.Is(err, os.ErrNotExist):
		return fmt.Errorf("reading certificate: %w", err)
	}
	if *ttl > 0 {
		t.Expires = time.Now().Add(*ttl).Unix()
	}
	token, err := keys.Sign(t)
	if err != nil {
		return fmt.Errorf("signing token: %w", err)
	}
	fmt.Fprintf(c.Stderr, "token %s for cluster ID %s\n", t.ID, t.Cluster)
	_, err = fmt.Fprintln(c.Stdout, token)
	return err
}

func inspectToken(w io.Writer, dir, file string) error {
	b, err := ReadSecret(file, MaxToken)
	if err != nil {
		return fmt.Errorf("reading token: %w", err)
	}
	t, err := ParseToken(string(b))
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
		t.Kind, t.Cluster, t.ID, t.KeyID, at(t.Issued), at(t.Expires), strings.Join(t.URLs, " "), t.Pin, strings.Join(labels, " "))
	keys, err := ReadKeys(dir, TokenKeyFile)
	if err != nil {
		fmt.Fprintf(w, "verifies:   not known: %v\n", err)
		return nil
	}
	if _, err := keys.Verify(string(b), time.Now()); err != nil {
		fmt.Fprintf(w, "verifies:   no: %v\n", err)
		return fmt.Errorf("%s does not verify: %w", file, err)
	}
	fmt.Fprintf(w, "verifies:   yes, under the keys in %s\n", dir)
	return nil
}
