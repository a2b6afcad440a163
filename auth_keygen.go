package main

// Key files are made and rotated here. No existing key is overwritten, and none is left half
// written, because a file gets its name only when it is complete and synced.

import (
	"cmp"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"
)

// Keygen fills dir (created 0700 if missing) with the key files it lacks, and
// when hosts are given with a TLS key and a certificate for them. Nothing that
// exists is overwritten: kept lists what was there already, created what is new,
// also when an error ends it early. One of tls.crt and tls.key without the other
// is an error before anything is written.
func Keygen(dir string, hosts []string, now time.Time) (created, kept []string, err error) {
	crt, tlsKey := filepath.Join(dir, TLSCertFile), filepath.Join(dir, TLSKeyFile)
	var pair []string
	for _, path := range []string{crt, tlsKey} {
		// Lstat: a dangling link is somebody's file too.
		if _, err := os.Lstat(path); err == nil {
			pair = append(pair, path)
		} else if !errors.Is(err, fs.ErrNotExist) {
			return nil, nil, err
		}
	}
	if len(pair) == 1 {
		return nil, nil, fmt.Errorf("%s is half of a pair: restore the other half, or delete it", pair[0])
	}
	var crtPEM, keyPEM []byte
	if len(hosts) > 0 {
		// Also when it is not needed, so that a bad host is always told.
		if crtPEM, keyPEM, err = SelfSigned(hosts, now); err != nil {
			return nil, nil, err
		}
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, nil, err
	}
	for _, name := range []string{ClusterKeyFile, TokenKeyFile} {
		path := filepath.Join(dir, name)
		switch err := install(path, newKeyLine(), 0o600, nil, os.Link); {
		case err == nil:
			created = append(created, path)
		case errors.Is(err, fs.ErrExist):
			kept = append(kept, path)
		default:
			return created, kept, err
		}
	}
	if len(hosts) == 0 {
		return created, kept, nil
	}
	if len(pair) == 2 {
		return created, append(kept, pair...), nil
	}
	// The key first: of two racing runs only the one whose key won goes on to
	// write a certificate, so the pair always matches.
	if err := install(tlsKey, keyPEM, 0o600, nil, os.Link); err != nil {
		return created, kept, err
	}
	if err := install(crt, crtPEM, 0o644, nil, os.Link); err != nil {
		os.Remove(tlsKey) // useless alone, and the next run would refuse it
		return created, kept, err
	}
	return append(created, crt, tlsKey), kept, nil
}

// RotateKey puts a new key first into dir's "cluster" or "token" key file; the
// old ones stay below it and still verify. The file is replaced atomically and
// keeps its mode and owner (root may rotate the key of a server that is not
// root). Of two rotations at once, one may be lost; no old key ever is.
func RotateKey(dir, which string) error {
	if which != "cluster" && which != "token" {
		return fmt.Errorf("cannot rotate %q: want cluster or token", which)
	}
	path := filepath.Join(dir, which+".key")
	old, err := ReadSecret(path, MaxKeyFile)
	if err != nil {
		return err
	}
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	ks, err := ParseKeys(old)
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	data := append(append(newKeyLine(), old...), '\n')
	if len(ks.keys) == maxKeys || len(data) > MaxKeyFile {
		return fmt.Errorf("%s is full (%d keys, %d bytes): delete old keys, which are the lowest lines, and rotate again", path, maxKeys, MaxKeyFile)
	}
	return install(path, data, info.Mode().Perm(), info, os.Rename)
}

func newKeyLine() []byte {
	secret := make([]byte, keySize)
	rand.Read(secret) // never fails since Go 1.24
	return append(base64.StdEncoding.AppendEncode(nil, secret), '\n')
}

// install writes data beside path, syncs it and then gives it its name by place:
// os.Link never replaces (fs.ErrExist), os.Rename always does. Either way the
// name never stands for a part of the data. A non-nil like lends its owner.
func install(path string, data []byte, mode fs.FileMode, like fs.FileInfo, place func(from, to string) error) error {
	dir := filepath.Dir(path)
	f, err := os.CreateTemp(dir, "."+filepath.Base(path)+".*") // 0600 from the start
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	if like != nil {
		if st, ok := like.Sys().(*syscall.Stat_t); ok {
			err = f.Chown(int(st.Uid), int(st.Gid))
		}
	}
	// Chmod because the umask is not ours to trust. All of them run, so that the
	// file is always closed; the first failure is the one told.
	_, werr := f.Write(data)
	if err := cmp.Or(err, werr, f.Chmod(mode), f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := place(f.Name(), path); err != nil {
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return cmp.Or(d.Sync(), d.Close())
}
