package main

// Tests of key generation and rotation: no run overwrites or loses a key, and runs of Keygen that
// race leave one complete set of files.

import (
	"crypto/tls"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"syscall"
	"testing"
)

// authTree returns the content of each file in dir, by the file's name. It fails the test if the
// certificate does not have mode 0644 or another file does not have mode 0600.
func authTree(t *testing.T, dir string) map[string]string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	files := map[string]string{}
	for _, e := range entries {
		info, err := e.Info()
		if err != nil {
			t.Fatal(err)
		}
		want := fs.FileMode(0o600)
		if e.Name() == TLSCertFile || e.Name() == SpareCertFile {
			want = 0o644
		}
		if info.Mode() != want {
			t.Errorf("file %s has mode %v, want %v", e.Name(), info.Mode(), want)
		}
		data, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			t.Fatal(err)
		}
		files[e.Name()] = string(data)
	}
	return files
}

// checkKeygen runs Keygen in dir and returns the files in dir as authTree does. It fails the test
// unless Keygen reports wantCreated as created and wantKept as kept. The directory of the spare key is
// dir with -spare added.
func checkKeygen(t *testing.T, dir string, hosts, wantCreated, wantKept []string) map[string]string {
	t.Helper()
	created, kept, err := Keygen(dir, dir+"-spare", hosts, testNow)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		about     string
		got, want []string
	}{{"created", created, wantCreated}, {"kept", kept, wantKept}} {
		var want []string
		for _, name := range c.want {
			if name == SpareKeyFile {
				want = append(want, filepath.Join(dir+"-spare", name))
			} else {
				want = append(want, filepath.Join(dir, name))
			}
		}
		if !slices.Equal(c.got, want) {
			t.Errorf("files reported as %s: got %q, want %q", c.about, c.got, want)
		}
	}
	return authTree(t, dir)
}

// Keygen creates dir with mode 0700, and two different key files in it. Without hosts it creates no
// certificate.
func TestKeygen(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "deep", "keys")
	files := checkKeygen(t, dir, nil, []string{ClusterKeyFile, TokenKeyFile}, nil)
	if info, err := os.Stat(dir); err != nil || info.Mode() != fs.ModeDir|0o700 {
		t.Errorf("directory: got mode %v and error %v, want mode 0700", info.Mode(), err)
	}
	for _, name := range []string{ClusterKeyFile, TokenKeyFile} {
		if _, err := ParseKeys([]byte(files[name])); err != nil {
			t.Errorf("parsing %s: %v", name, err)
		}
	}
	if len(files) != 2 || files[ClusterKeyFile] == files[TokenKeyFile] {
		t.Errorf("got files %q, want two different key files", files)
	}
}

// A later run of Keygen creates only the missing files and leaves all others unchanged. The
// certificate that it creates matches the key that it creates.
func TestKeygenAgain(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "keys")
	first := checkKeygen(t, dir, nil, []string{ClusterKeyFile, TokenKeyFile}, nil)
	second := checkKeygen(t, dir, []string{"hub.example"}, []string{TLSKeyFile, TLSCertFile, SpareKeyFile, SpareCertFile}, []string{ClusterKeyFile, TokenKeyFile})
	third := checkKeygen(t, dir, []string{"HUB.example"}, nil, []string{ClusterKeyFile, TokenKeyFile, TLSCertFile, TLSKeyFile, SpareCertFile})
	if len(second) != 5 || !reflect.DeepEqual(second, third) ||
		second[ClusterKeyFile] != first[ClusterKeyFile] || second[TokenKeyFile] != first[TokenKeyFile] {
		t.Errorf("a later run changed files:\n%q\n%q\n%q", first, second, third)
	}
	if _, err := tls.X509KeyPair([]byte(second[TLSCertFile]), []byte(second[TLSKeyFile])); err != nil {
		t.Errorf("certificate and key: %v", err)
	}
	if err := os.Remove(filepath.Join(dir, TokenKeyFile)); err != nil {
		t.Fatal(err)
	}
	checkKeygen(t, dir, nil, []string{TokenKeyFile}, []string{ClusterKeyFile, SpareCertFile})
}

// Keygen refuses a bad host before it creates anything.
func TestKeygenBadHost(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "keys")
	if _, _, err := Keygen(dir, dir+"-spare", []string{"https://x"}, testNow); err == nil {
		t.Error("Keygen accepts a URL as a host")
	}
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Keygen with a bad host left a directory behind: %v", err)
	}
}

// Keygen refuses hosts that the existing certificate is not for, and writes nothing. If tls.crt is
// then moved away, Keygen makes a certificate for all hosts with the old pin. A rotation to the spare
// key keeps all hosts.
func TestKeygenMoreHosts(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "keys")
	checkKeygen(t, dir, []string{"hub.example"}, []string{ClusterKeyFile, TokenKeyFile, TLSKeyFile, TLSCertFile, SpareKeyFile, SpareCertFile}, nil)
	old, _, err := readCert(filepath.Join(dir, TLSCertFile))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(dir, TokenKeyFile)); err != nil {
		t.Fatal(err)
	}
	hosts := []string{"hub.example", "other.example", "192.0.2.1"}
	created, kept, err := Keygen(dir, dir+"-spare", hosts, testNow)
	if want := filepath.Join(dir, TLSCertFile) + " is not for the host other.example 192.0.2.1: it is for hub.example: move "; err == nil || !strings.HasPrefix(err.Error(), want) || created != nil || kept != nil {
		t.Errorf("hosts that the certificate lacks: created %q, kept %q, error %v; want the error %q", created, kept, err, want)
	}
	if err := os.Remove(filepath.Join(dir, TLSCertFile)); err != nil {
		t.Fatal(err)
	}
	checkKeygen(t, dir, hosts, []string{TokenKeyFile, TLSCertFile}, []string{ClusterKeyFile, TLSKeyFile, SpareCertFile})
	check := func(when string) (pin string) {
		t.Helper()
		cert, _, err := readCert(filepath.Join(dir, TLSCertFile))
		if err != nil {
			t.Fatal(err)
		}
		if err := checkCertHosts(filepath.Join(dir, TLSCertFile), hosts); err != nil {
			t.Errorf("%s: %v", when, err)
		}
		if _, err := tls.LoadX509KeyPair(filepath.Join(dir, TLSCertFile), filepath.Join(dir, TLSKeyFile)); err != nil {
			t.Errorf("%s: certificate and key: %v", when, err)
		}
		return CertPin(cert)
	}
	if pin := check("the new certificate"); pin != CertPin(old) {
		t.Errorf("the new certificate has the pin %s, want the old pin %s", pin, CertPin(old))
	}
	spare, _, err := readCert(filepath.Join(dir, SpareCertFile))
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := RotateTLSKey(dir, dir+"-spare", testNow); err != nil {
			t.Fatal(err)
		}
		if pin := check("after a rotation"); pin != CertPin(spare) {
			t.Errorf("after a rotation the certificate has the pin %s, want the pin of the spare key %s", pin, CertPin(spare))
		}
		if spare, _, err = readCert(filepath.Join(dir, SpareCertFile)); err != nil {
			t.Fatal(err)
		}
	}
}

// Keygen refuses to run, and writes nothing, if tls.crt exists without tls.key, or tls.key exists
// without tls.crt and there are no hosts or the key cannot be read.
func TestKeygenHalfPair(t *testing.T) {
	for _, name := range []string{TLSCertFile, TLSKeyFile} {
		for _, hosts := range [][]string{nil, {"hub.example"}} {
			dir := t.TempDir()
			path := filepath.Join(dir, name)
			// A dangling link counts as an existing file, because it may point to a disk that is
			// not mounted.
			if err := os.Symlink(filepath.Join(dir, "away", "x"), path); err != nil {
				t.Fatal(err)
			}
			created, kept, err := Keygen(dir, dir+"-spare", hosts, testNow)
			if err == nil || !strings.Contains(err.Error(), path) || created != nil || kept != nil {
				t.Errorf("only %s exists: created %q, kept %q, error %v; want an error with the path", name, created, kept, err)
			}
			if entries, _ := os.ReadDir(dir); len(entries) != 1 {
				t.Errorf("only %s exists: Keygen failed, but left %v", name, entries)
			}
		}
	}
}

// Keygen returns an error if dir or its parent is a regular file.
func TestKeygenFails(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{file, filepath.Join(file, "sub")} {
		if _, _, err := Keygen(dir, dir+"-spare", nil, testNow); err == nil {
			t.Errorf("Keygen in %s: got no error", dir)
		}
	}
}

// If several runs of Keygen race, they leave one complete set of files, in which the certificate
// and the TLS key match, and the spare certificate and the spare key too.
func TestKeygenRace(t *testing.T) {
	for range 5 {
		dir := t.TempDir()
		created := make(chan []string)
		for range 8 {
			go func() {
				names, _, _ := Keygen(dir, dir+"-spare", []string{"hub.example"}, testNow) // the error is ignored, because a run that loses the race may fail
				created <- names
			}()
		}
		var all []string
		for range 8 {
			all = append(all, <-created...)
		}
		if files := authTree(t, dir); len(files) != 5 || len(all) != 6 {
			t.Errorf("the runs left %d files and reported %q as created, want 5 files and the spare key, each reported once", len(files), all)
		}
		if _, err := tls.LoadX509KeyPair(filepath.Join(dir, SpareCertFile), filepath.Join(dir+"-spare", SpareKeyFile)); err != nil {
			t.Errorf("spare certificate and key: %v", err)
		}
		if _, err := tls.LoadX509KeyPair(filepath.Join(dir, TLSCertFile), filepath.Join(dir, TLSKeyFile)); err != nil {
			t.Errorf("certificate and key: %v", err)
		}
	}
}

// If several calls of createKeyFile create the same file, one call succeeds and the others return
// fs.ErrExist. No temporary file remains in the directory.
func TestCreateKeyFileNeverReplaces(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x.key")
	errs := make(chan error)
	for n := range 8 {
		go func() { errs <- createKeyFile(path, []byte{byte(n)}, 0o600) }()
	}
	won := 0
	for range 8 {
		if err := <-errs; err == nil {
			won++
		} else if !errors.Is(err, fs.ErrExist) {
			t.Errorf("got error %v, want %v", err, fs.ErrExist)
		}
	}
	if won != 1 {
		t.Errorf("%d of 8 calls succeeded, want 1", won)
	}
	if files := authTree(t, filepath.Dir(path)); len(files) != 1 {
		t.Errorf("the calls left %q, want one file", files)
	}
}

// handWrittenTokenKeys creates the key files in a new directory, with a token.key as an operator
// may write it: keyLine(1), a comment, and keyLine(2) without a line end. It returns the directory,
// and the path and content of token.key.
func handWrittenTokenKeys(t *testing.T) (dir, path, content string) {
	t.Helper()
	dir = t.TempDir()
	if _, _, err := Keygen(dir, dir+"-spare", nil, testNow); err != nil {
		t.Fatal(err)
	}
	path = filepath.Join(dir, TokenKeyFile)
	content = keyLine(1) + "\n# from 2024\n" + keyLine(2)
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return dir, path, content
}

// A rotation adds a key above the old keys and comments. New tokens are signed with the new key. A
// token that an old key signed stays valid until that key is deleted.
func TestRotateKey(t *testing.T) {
	dir, _, old := handWrittenTokenKeys(t)
	before := testKeys(t, 1, 2)
	token := signToken(t, before, authToken())
	if err := RotateKey(dir, "token"); err != nil {
		t.Fatal(err)
	}
	text := authTree(t, dir)[TokenKeyFile]
	if !strings.HasSuffix(text, "\n"+old+"\n") {
		t.Errorf("the rotation changed the old lines: %q", text)
	}
	after, err := ParseKeys([]byte(text))
	if err != nil || len(after.IDs()) != 3 || !slices.Equal(after.IDs()[1:], before.IDs()) {
		t.Fatalf("got keys %v and error %v, want a new key and then %v", after.IDs(), err, before.IDs())
	}
	if tok, err := after.Verify(token, testNow); err != nil || tok.KeyID != before.IDs()[0] {
		t.Errorf("old token after the rotation: got %+v, %v", tok, err)
	}
	if _, err := testKeys(t, 2).Verify(token, testNow); !errors.Is(err, ErrTokenForged) {
		t.Errorf("old token after its key is deleted: got error %v, want %v", err, ErrTokenForged)
	}
	if tok, err := ParseUnverifiedToken(signToken(t, after, authToken())); err != nil || tok.KeyID != after.IDs()[0] {
		t.Errorf("new token: got %+v, %v; want key ID %s", tok, err, after.IDs()[0])
	}
}

// A rotation keeps the mode and the owner of the key file. If the test runs as root, it gives the
// file to another user first.
func TestRotateKeyKeepsModeAndOwner(t *testing.T) {
	dir, path, _ := handWrittenTokenKeys(t)
	uid := os.Getuid()
	if uid == 0 {
		uid = 12345
		if err := os.Chown(path, uid, uid); err != nil {
			t.Fatal(err)
		}
	}
	for _, mode := range []fs.FileMode{0o600, 0o640} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		if err := RotateKey(dir, "token"); err != nil {
			t.Fatal(err)
		}
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if st, ok := info.Sys().(*syscall.Stat_t); !ok || int(st.Uid) != uid || info.Mode() != mode {
			t.Errorf("after the rotation: mode %v, %+v; want mode %v and user %d", info.Mode(), info.Sys(), mode, uid)
		}
	}
}

// RotateKey refuses a key file with 16 keys, an unknown key name, and a key file that is invalid or
// missing. A refused rotation changes no file.
func TestRotateKeyRefuses(t *testing.T) {
	dir, path, _ := handWrittenTokenKeys(t)
	for n := 1; n < maxKeys; n++ {
		if err := RotateKey(dir, "cluster"); err != nil {
			t.Fatalf("rotation %d: %v", n, err)
		}
	}
	if err := os.WriteFile(path, []byte("# none\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	before := authTree(t, dir)
	for _, c := range []struct{ about, name, want string }{
		{"file with 16 keys", "cluster", "delete the oldest keys"},
		{"file without a key", "token", "contains no key"},
		{"empty name", "", "want cluster or token"},
		{"name of another file", "tls", "want cluster or token"},
		{"path as a name", "../token", "want cluster or token"},
	} {
		if err := RotateKey(dir, c.name); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: got error %v, want an error with %q", c.about, err, c.want)
		}
	}
	if after := authTree(t, dir); !reflect.DeepEqual(after, before) {
		t.Errorf("refused rotations changed files:\n%q\n%q", before, after)
	}
	if err := RotateKey(t.TempDir(), "token"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("missing file: got error %v, want %v", err, fs.ErrNotExist)
	}
}
