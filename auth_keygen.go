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

// Keygen creates the key files that dir lacks, and if hosts are given a TLS key and a certificate
// for them. dir is created with mode 0700 if it is missing. No file is overwritten: created and
// kept list the new files and the old ones, also after an error. If one of tls.crt and tls.key
// exists without the other, that is an error, and nothing is written.
func Keygen(dir string, hosts []string, now time.Time) (created, kept []string, err error) {
	crt, tlsKey := filepath.Join(dir, TLSCertFile), filepath.Join(dir, TLSKeyFile)
	pair, err := existingTLSPair(crt, tlsKey)
	if err != nil {
		return nil, nil, err
	}
	var crtPEM, keyPEM []byte
	if len(hosts) > 0 {
		// Also when there is a pair, so that a bad host is always an error.
		if crtPEM, keyPEM, err = SelfSignedCert(hosts, now); err != nil {
			return nil, nil, err
		}
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, nil, err
	}
	for _, name := range []string{ClusterKeyFile, TokenKeyFile} {
		path := filepath.Join(dir, name)
		switch err := createKeyFile(path, generateKeyLine(), 0o600); {
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
	if pair != nil {
		return created, append(kept, pair...), nil
	}
	// The key comes first: of two runs at once, only the one that created the key goes on to
	// create the certificate, so the pair always matches.
	if err := createKeyFile(tlsKey, keyPEM, 0o600); err != nil {
		return created, kept, err
	}
	if err := createKeyFile(crt, crtPEM, 0o644); err != nil {
		os.Remove(tlsKey) // useless alone, and the next run would refuse it
		return created, kept, err
	}
	return append(created, crt, tlsKey), kept, nil
}

// existingTLSPair returns the paths of a certificate and its key if both exist, and nil if neither
// does. It is an error if one exists without the other.
func existingTLSPair(certPath, keyPath string) (paths []string, err error) {
	var pair []string
	for _, path := range []string{certPath, keyPath} {
		// Lstat, because a dangling link is a file too.
		if _, err := os.Lstat(path); err == nil {
			pair = append(pair, path)
		} else if !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
	}
	if len(pair) == 1 {
		return nil, fmt.Errorf("%s is half of a pair: restore the other half, or delete it", pair[0])
	}
	return pair, nil
}

// RotateKey puts a new key first into dir's "cluster" or "token" key file; the old keys stay below
// it and still verify. The file is replaced atomically and keeps its mode and owner, so that root
// may rotate the key of a server that does not run as root. Of two rotations at once one may be
// lost, but no old key.
func RotateKey(dir, keyName string) error {
	if keyName != "cluster" && keyName != "token" {
		return fmt.Errorf("cannot rotate %q: want cluster or token", keyName)
	}
	path := filepath.Join(dir, keyName+".key")
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
	data := append(append(generateKeyLine(), old...), '\n')
	if len(ks.keys) == maxKeys || len(data) > MaxKeyFile {
		return fmt.Errorf("%s is full (%d keys, %d bytes): delete old keys, which are the lowest lines, and rotate again", path, maxKeys, MaxKeyFile)
	}
	return writeKeyFile(path, data, info.Mode().Perm(), info, os.Rename)
}

func generateKeyLine() []byte {
	secret := make([]byte, keySize)
	rand.Read(secret) // never fails since Go 1.24
	return append(base64.StdEncoding.AppendEncode(nil, secret), '\n')
}

// createKeyFile makes a file with data. It never replaces one: the error is then fs.ErrExist.
func createKeyFile(path string, data []byte, mode fs.FileMode) error {
	return writeKeyFile(path, data, mode, nil, os.Link)
}

// writeKeyFile writes data to a temporary file beside path, syncs it, and names it path by
// linkOrRename. The name never stands for a part of the data. Unless ownerFrom is nil, the
// file gets its owner.
func writeKeyFile(path string, data []byte, mode fs.FileMode, ownerFrom fs.FileInfo, linkOrRename func(from, to string) error) error {
	dir := filepath.Dir(path)
	f, err := os.CreateTemp(dir, "."+filepath.Base(path)+".*") // 0600 from the start
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	if ownerFrom != nil {
		if st, ok := ownerFrom.Sys().(*syscall.Stat_t); ok {
			err = f.Chown(int(st.Uid), int(st.Gid))
		}
	}
	// Chmod, because the umask may take more away. All of these run, so that the file is
	// always closed. The first error is returned.
	_, werr := f.Write(data)
	if err := cmp.Or(err, werr, f.Chmod(mode), f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := linkOrRename(f.Name(), path); err != nil {
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return cmp.Or(d.Sync(), d.Close())
}
