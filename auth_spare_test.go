package main

// Tests of the spare TLS key: a rotation puts it in place with the same host names, a rotation that
// was interrupted anywhere can be run again, and a missing or wrong spare key changes nothing.

import (
	"bytes"
	"crypto/tls"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
)

// spareFiles are the files of the TLS keys after a rotation, in the order in which a rotation writes
// them. Each path is below the directory that has the directories keys and keys-spare.
var spareFiles = [...]string{
	"keys-spare/tls.key.old", "keys-spare/tls.crt.old", "keys/tls.key", "keys/tls.crt", "keys-spare/tls-spare.key", "keys/tls-spare.crt",
}

// tlsFiles returns the content of each of spareFiles that exists below dir.
func tlsFiles(t *testing.T, dir string) map[string]string {
	t.Helper()
	files := map[string]string{}
	for _, name := range spareFiles {
		b, err := os.ReadFile(filepath.Join(dir, name))
		if err == nil {
			files[name] = string(b)
		} else if !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
	}
	return files
}

// writeTLSFiles makes files the only ones of spareFiles that exist below dir.
func writeTLSFiles(t *testing.T, dir string, files map[string]string) {
	t.Helper()
	for _, name := range spareFiles {
		if text, ok := files[name]; ok {
			writeIn(t, dir, name, text)
		} else if err := os.Remove(filepath.Join(dir, name)); err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
	}
}

// newSpareKeys creates keys for two hosts and a spare key in a new directory, and returns it.
func newSpareKeys(t *testing.T) (dir string) {
	t.Helper()
	dir = t.TempDir()
	if _, _, err := Keygen(filepath.Join(dir, "keys"), filepath.Join(dir, "keys-spare"), []string{"hub.example", "192.0.2.1"}, testNow); err != nil {
		t.Fatal(err)
	}
	return dir
}

func rotateTLSIn(dir string) error {
	return RotateTLSKey(filepath.Join(dir, "keys"), filepath.Join(dir, "keys-spare"), testNow)
}

// mustBeRotated checks that now has the former spare pair of before as its TLS pair, a new spare pair,
// and the TLS pair of before as its old pair, and that the certificates have the same hosts.
func mustBeRotated(t *testing.T, before, now map[string]string) {
	t.Helper()
	if now["keys/tls.crt"] != before["keys/tls-spare.crt"] || now["keys/tls.key"] != before["keys-spare/tls-spare.key"] {
		t.Error("the TLS pair is not the former spare pair")
	}
	if now["keys-spare/tls.crt.old"] != before["keys/tls.crt"] || now["keys-spare/tls.key.old"] != before["keys/tls.key"] {
		t.Error("the old pair is not the former TLS pair")
	}
	if now["keys-spare/tls-spare.key"] == before["keys-spare/tls-spare.key"] {
		t.Error("there is no new spare key")
	}
	for crt, key := range map[string]string{"keys/tls.crt": "keys/tls.key", "keys/tls-spare.crt": "keys-spare/tls-spare.key"} {
		pair, err := tls.X509KeyPair([]byte(now[crt]), []byte(now[key]))
		if err != nil {
			t.Errorf("%s and %s: %v", crt, key, err)
			continue
		}
		if !slices.Equal(pair.Leaf.DNSNames, []string{"hub.example"}) || len(pair.Leaf.IPAddresses) != 1 || pair.Leaf.IPAddresses[0].String() != "192.0.2.1" {
			t.Errorf("%s has the hosts %q and %v", crt, pair.Leaf.DNSNames, pair.Leaf.IPAddresses)
		}
	}
}

// A rotation that was interrupted after any number of its writes leaves files with which the same
// command completes the rotation, with the same result.
func TestRotateTLSKeyInterrupted(t *testing.T) {
	dir := newSpareKeys(t)
	before := tlsFiles(t, dir)
	if err := rotateTLSIn(dir); err != nil {
		t.Fatal(err)
	}
	after := tlsFiles(t, dir)
	mustBeRotated(t, before, after)
	for n := range spareFiles { // with n = len(spareFiles), the rotation would be complete
		files := maps.Clone(before)
		for _, name := range spareFiles[:n] {
			files[name] = after[name]
		}
		writeTLSFiles(t, dir, files)
		if err := rotateTLSIn(dir); err != nil {
			t.Errorf("interrupted after %d writes: %v", n, err)
		}
		mustBeRotated(t, before, tlsFiles(t, dir))
	}
}

// A rotation works if tls.key and tls.crt are lost.
func TestRotateLostTLSKey(t *testing.T) {
	for _, lost := range [][]string{{"keys/tls.key"}, {"keys/tls.key", "keys/tls.crt"}} {
		dir := newSpareKeys(t)
		before := tlsFiles(t, dir)
		files := maps.Clone(before)
		for _, name := range lost {
			delete(files, name)
		}
		writeTLSFiles(t, dir, files)
		if err := rotateTLSIn(dir); err != nil {
			t.Errorf("without %q: %v", lost, err)
		}
		if now := tlsFiles(t, dir); now["keys/tls.key"] != before["keys-spare/tls-spare.key"] || now["keys/tls.crt"] != before["keys/tls-spare.crt"] {
			t.Errorf("without %q: the TLS pair is not the spare pair", lost)
		}
	}
}

// A rotation without the right spare key changes no file, and its error says what to do.
func TestRotateTLSKeyRefuses(t *testing.T) {
	other := tlsFiles(t, newSpareKeys(t))
	for _, c := range []struct {
		about  string
		change func(map[string]string)
		want   []string
	}{
		{"no spare key", func(f map[string]string) { delete(f, "keys-spare/tls-spare.key") }, []string{"keys-spare/tls-spare.key is missing", "--spare DIR", "run keygen"}},
		{"another spare key", func(f map[string]string) { f["keys-spare/tls-spare.key"] = other["keys-spare/tls-spare.key"] }, []string{"is not the key of", "--spare DIR"}},
		{"garbage", func(f map[string]string) { f["keys-spare/tls-spare.key"] = "garbage" }, []string{"is not the key of"}},
		{"no spare certificate", func(f map[string]string) { delete(f, "keys/tls-spare.crt") }, []string{"tls-spare.crt is missing", "--mode keygen --keys"}},
		{"no certificate at all", func(f map[string]string) {
			delete(f, "keys/tls-spare.crt")
			delete(f, "keys/tls.crt")
			delete(f, "keys/tls.key")
		}, []string{"no TLS key", "--host NAME"}},
	} {
		dir := newSpareKeys(t)
		files := tlsFiles(t, dir)
		c.change(files)
		writeTLSFiles(t, dir, files)
		err := rotateTLSIn(dir)
		for _, want := range c.want {
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%s: got error %v, want one with %q", c.about, err, want)
			}
		}
		if got := tlsFiles(t, dir); !reflect.DeepEqual(got, files) {
			t.Errorf("%s: the failed rotation changed files", c.about)
		}
	}
}

// If the spare certificate is missing, Keygen makes one for the spare key that exists, so that tokens
// which pin the key stay useful. It refuses a spare key that is the key in use.
func TestKeygenAdoptsSpareKey(t *testing.T) {
	dir := newSpareKeys(t)
	keys, spare := filepath.Join(dir, "keys"), filepath.Join(dir, "keys-spare")
	files := tlsFiles(t, dir)
	oldPin, err := PinFromPEM([]byte(files["keys/tls-spare.crt"]))
	if err != nil {
		t.Fatal(err)
	}
	delete(files, "keys/tls-spare.crt")
	writeTLSFiles(t, dir, files)
	if _, kept, err := Keygen(keys, spare, nil, testNow); err != nil || !slices.Contains(kept, filepath.Join(spare, SpareKeyFile)) {
		t.Errorf("kept %q, error %v; want the spare key to be kept", kept, err)
	}
	if pin, err := PinFromPEM([]byte(tlsFiles(t, dir)["keys/tls-spare.crt"])); err != nil || pin != oldPin {
		t.Errorf("the new spare certificate has the pin %s, %v; want %s", pin, err, oldPin)
	}
	files["keys-spare/tls-spare.key"] = files["keys/tls.key"]
	writeTLSFiles(t, dir, files)
	if _, _, err := Keygen(keys, spare, nil, testNow); err == nil || !strings.Contains(err.Error(), "is the key in use") {
		t.Errorf("a spare key that is the key in use: got error %v", err)
	}
}

// Files of certificates can be joined into one file of CAs, because each ends with a line end.
func TestRotatedCertificateEndsLine(t *testing.T) {
	dir := newSpareKeys(t)
	if err := rotateTLSIn(dir); err != nil {
		t.Fatal(err)
	}
	files := tlsFiles(t, dir)
	both := []byte(files["keys/tls.crt"] + files["keys/tls-spare.crt"])
	if bytes.Count(both, []byte("-----BEGIN CERTIFICATE-----\n")) != 2 || !bytes.HasSuffix(both, []byte("-----\n")) {
		t.Errorf("the joined file is %s", both)
	}
}
