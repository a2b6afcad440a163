package main

// This file creates and rotates key files. A rotation keeps every key that the file had before; but
// if two rotations run at once, one of the two new keys may be lost. A file gets its name only when
// it is complete and synced, so a key file's name never names a partly written file.

import (
	"bytes"
	"cmp"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

// Keygen creates the cluster and token key files that dir lacks. If hosts is not empty, Keygen also
// creates a TLS key and a certificate for hosts, unless dir already has both. If dir has only the TLS
// key, Keygen creates the certificate for that key, so that tokens keep their pin. If dir then has a
// TLS key, Keygen creates a spare TLS key in spareDir, unless dir has the certificate of one. It
// creates the directories with mode 0700 if they do not exist. It never overwrites a file. created
// lists the files that Keygen created, and kept lists the files that it would have created but found.
// After an error, the lists contain the files that Keygen had finished before the error. Keygen
// writes nothing and returns an error if tls.crt exists without tls.key, if tls.key exists without
// tls.crt and hosts is empty, or if tls.crt is not for all of hosts.
func Keygen(dir, spareDir string, hosts []string, now time.Time) (created, kept []string, err error) {
	crt, tlsKey := filepath.Join(dir, TLSCertFile), filepath.Join(dir, TLSKeyFile)
	existing, err := existingFiles(crt, tlsKey)
	if err != nil {
		return nil, nil, err
	}
	hasCert, hasKey := slices.Contains(existing, crt), slices.Contains(existing, tlsKey)
	var crtPEM, keyPEM []byte
	switch {
	case hasCert && !hasKey:
		err = fmt.Errorf("%s exists without %s: restore %[2]s from a copy, or delete %[1]s", crt, TLSKeyFile)
	case hasCert && len(hosts) > 0:
		err = checkCertHosts(crt, hosts)
	case hasKey && !hasCert && len(hosts) == 0:
		err = fmt.Errorf("%s exists without %s: restore %[2]s from a copy, or add --host NAME to make a certificate for the key", tlsKey, TLSCertFile)
	case hasKey && !hasCert:
		if keyPEM, err = readPEM(tlsKey); err == nil {
			if crtPEM, err = certForHosts(keyPEM, hosts, now); err != nil {
				err = fmt.Errorf("making a certificate for %s: %w: restore %s from a copy", tlsKey, err, TLSCertFile)
			}
		}
	case len(hosts) > 0:
		crtPEM, keyPEM, err = SelfSignedCert(hosts, now)
	}
	if err != nil {
		return nil, nil, err
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
	switch {
	case len(existing) == 0 && len(hosts) == 0:
		return created, kept, nil
	case hasCert:
		if len(hosts) > 0 {
			kept = append(kept, existing...)
		}
	default:
		// Create the TLS key before the certificate. If two runs of Keygen race, only a run that
		// created or read the key goes on to create the certificate. So the key and the certificate
		// always match. If the certificate cannot be created, the next run creates it for the key.
		if hasKey {
			kept = append(kept, tlsKey)
		} else if err := createKeyFile(tlsKey, keyPEM, 0o600); err != nil {
			return created, kept, err
		} else {
			created = append(created, tlsKey)
		}
		switch err := createKeyFile(crt, crtPEM, 0o644); {
		case err == nil:
			created = append(created, crt)
		case errors.Is(err, fs.ErrExist): // of another run
			kept = append(kept, crt)
		default:
			return created, kept, err
		}
	}
	spareCreated, spareKept, err := createSpare(dir, spareDir, now)
	return append(created, spareCreated...), append(kept, spareKept...), err
}

// existingFiles returns the paths of the files that exist.
func existingFiles(paths ...string) (existing []string, err error) {
	for _, path := range paths {
		// Lstat does not follow links, so that a dangling symbolic link counts as an existing file.
		if _, err := os.Lstat(path); err == nil {
			existing = append(existing, path)
		} else if !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
	}
	return existing, nil
}

// checkCertHosts returns an error if the certificate in the file at path is not for all of hosts.
func checkCertHosts(path string, hosts []string) error {
	b, err := readPEM(path)
	if err != nil {
		return err
	}
	cert, err := firstCert(b)
	if err != nil {
		return fmt.Errorf("%s: %w: restore the file from a copy, such as the one on a server", path, err)
	}
	var missing []string
	for _, host := range hosts {
		if cert.VerifyHostname(host) != nil {
			missing = append(missing, host)
		}
	}
	if len(missing) == 0 {
		return nil
	}
	has := slices.Clone(cert.DNSNames)
	for _, ip := range cert.IPAddresses {
		has = append(has, ip.String())
	}
	advice := fmt.Sprintf("move %s away (%s stays, so tokens keep their pin), and run keygen again with all --host names", path, TLSKeyFile)
	if !bytes.Equal(cert.RawIssuer, cert.RawSubject) { // not made by keygen
		advice = "get a certificate for all host names from the CA that signed it"
	}
	return fmt.Errorf("%s is not for the host %s: it is for %s: %s", path, strings.Join(missing, " "), strings.Join(has, " "), advice)
}

// RotateKey adds a new key as the first line of dir's cluster.key or token.key. keyName is
// "cluster" or "token"; RotateTLSKey rotates the TLS key. The old keys stay below the new key and
// still verify. The file is replaced atomically and keeps its mode and owner, so that root can
// rotate the keys of a server that does not run as root. If two rotations run at once, one of the
// two new keys may be lost, but no old key is lost.
func RotateKey(dir, keyName string) error {
	if keyName != "cluster" && keyName != "token" {
		return fmt.Errorf("cannot rotate %q: want cluster or token", keyName)
	}
	path := filepath.Join(dir, keyName+".key")
	old, err := ReadSecret(path, MaxKeyFile)
	if errors.Is(err, ErrEmptySecret) {
		return fmt.Errorf("%w: restore the file from a copy, such as the one on a server", err)
	}
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
		return fmt.Errorf("%s is full (the limits are %d keys and %d bytes): delete the oldest keys, which are the lowest lines, and rotate again", path, maxKeys, MaxKeyFile)
	}
	return writeKeyFile(path, data, info.Mode().Perm(), info, os.Rename)
}

func generateKeyLine() []byte {
	secret := make([]byte, keySize)
	rand.Read(secret) // crypto/rand.Read never returns an error since Go 1.24
	return append(base64.StdEncoding.AppendEncode(nil, secret), '\n')
}

// createKeyFile creates a file at path with data as its content. If path exists, createKeyFile
// leaves it unchanged and returns an error, which wraps fs.ErrExist unless writing data failed
// first.
func createKeyFile(path string, data []byte, mode fs.FileMode) error {
	return writeKeyFile(path, data, mode, nil, os.Link)
}

// writeKeyFile writes data to a temporary file in path's directory and syncs it. Then it gives the
// file the name path by calling linkOrRename, which is os.Link or os.Rename. So path never names a
// partly written file. If ownerFrom is not nil, the new file gets the owner and group of the file
// that ownerFrom describes.
func writeKeyFile(path string, data []byte, mode fs.FileMode, ownerFrom fs.FileInfo, linkOrRename func(from, to string) error) error {
	dir := filepath.Dir(path)
	f, err := os.CreateTemp(dir, "."+filepath.Base(path)+".*") // CreateTemp sets mode 0600; Chmod below sets the mode that the caller wants
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	if ownerFrom != nil {
		if st, ok := ownerFrom.Sys().(*syscall.Stat_t); ok {
			err = f.Chown(int(st.Uid), int(st.Gid))
		}
	}
	// Chmod sets the mode that the caller wants, whatever the umask is. cmp.Or returns the first
	// error. Go evaluates all arguments of cmp.Or, so that the file is closed even after an error.
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
