package main

// This file implements the spare TLS key. Tokens pin the servers' TLS key and the spare key, so that
// the spare key can replace a lost or leaked TLS key without new tokens. The private spare key is in
// a directory of its own, because the directory of the keys is copied to the servers. A rotation
// that was interrupted at any point is completed by running it again: the private key of a
// certificate is always written before the certificate.

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"time"
)

// Names of the spare files. The certificate is in the directory of the keys. The private key and the
// pair that a rotation replaced are in the directory of the spare key.
const (
	SpareCertFile = "tls-spare.crt"
	SpareKeyFile  = "tls-spare.key"

	oldSuffix = ".old" // of tls.crt and tls.key that a rotation replaced
)

// createSpare creates a spare key in spareDir and its certificate in dir, unless the certificate
// exists. The certificate has the host names of dir's tls.crt. If spareDir has a spare key already,
// createSpare makes the certificate for that key, because tokens may pin it. created and kept list
// files as those of Keygen do.
func createSpare(dir, spareDir string, now time.Time) (created, kept []string, err error) {
	crtPath, keyPath := filepath.Join(dir, SpareCertFile), filepath.Join(spareDir, SpareKeyFile)
	if _, err := os.Lstat(crtPath); err == nil {
		return nil, []string{crtPath}, nil
	} else if !errors.Is(err, fs.ErrNotExist) {
		return nil, nil, err
	}
	inUse, _, err := readCert(filepath.Join(dir, TLSCertFile))
	if err != nil {
		return nil, nil, err
	}
	keyPEM, err := newTLSKey()
	if err != nil {
		return nil, nil, err
	}
	if err := os.MkdirAll(spareDir, 0o700); err != nil {
		return nil, nil, fmt.Errorf("creating the directory of the spare key: %w", err)
	}
	switch err := createKeyFile(keyPath, keyPEM, 0o600); {
	case err == nil:
		created = append(created, keyPath)
	case errors.Is(err, fs.ErrExist):
		kept = append(kept, keyPath)
		if keyPEM, err = readPEM(keyPath); err != nil {
			return created, kept, err
		}
	default:
		return created, kept, err
	}
	crtPEM, err := certForKey(keyPEM, inUse.DNSNames, inUse.IPAddresses, now)
	if err != nil {
		return created, kept, fmt.Errorf("%s: %w", keyPath, err)
	}
	pin, err := PinFromPEM(crtPEM)
	if err != nil {
		return created, kept, err
	}
	if pin == CertPin(inUse) {
		return created, kept, fmt.Errorf("%s is the key in use, so it is no spare key: delete %s and run keygen again", keyPath, keyPath)
	}
	switch err := createKeyFile(crtPath, crtPEM, 0o644); {
	case err == nil:
		return append(created, crtPath), kept, nil
	case errors.Is(err, fs.ErrExist):
		return created, append(kept, crtPath), nil
	default:
		return created, kept, err
	}
}

// RotateTLSKey replaces dir's tls.key and tls.crt by the spare key in spareDir and its certificate,
// and makes a new spare key. Both certificates get the host names of the replaced tls.crt. It copies
// the replaced pair to spareDir first, for clients whose tokens do not pin the spare key. The files
// are replaced one by one, each atomically; a server that reloads in between finds a pair that does
// not match, and keeps the certificate that it has. If two rotations run at once, the new spare key
// may be lost, which the next rotation reports.
func RotateTLSKey(dir, spareDir string, now time.Time) error {
	crtPath, keyPath := filepath.Join(dir, TLSCertFile), filepath.Join(dir, TLSKeyFile)
	spareCrtPath, spareKeyPath := filepath.Join(dir, SpareCertFile), filepath.Join(spareDir, SpareKeyFile)
	spare, sparePEM, err := readCert(spareCrtPath)
	if existing, existErr := existingFiles(crtPath, keyPath); errors.Is(err, fs.ErrNotExist) && existing == nil && existErr == nil {
		return fmt.Errorf("%s has no TLS key to rotate: create a TLS key and a spare key with telemeter --mode keygen --keys %s --host NAME", dir, dir)
	}
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("there is no spare key, because %s is missing: create a spare key with telemeter --mode keygen --keys %s; only tokens that are made after that accept it", spareCrtPath, dir)
	}
	if err != nil {
		return err
	}
	inUse, inUsePEM, err := readCert(crtPath)
	if err != nil && !errors.Is(err, fs.ErrNotExist) { // a lost certificate is replaced
		return err
	}
	hosts := spare // the certificate with the host names of the servers
	if inUse != nil {
		hosts = inUse // it may have been made again with more names than the spare certificate has
	}
	// If both certificates are of the same key, a rotation was interrupted before it made a new
	// spare key.
	if inUse == nil || CertPin(inUse) != CertPin(spare) {
		spareKey, err := readSpareKey(spareKeyPath, spareCrtPath, sparePEM)
		if err != nil {
			return err
		}
		if !slices.Equal(spare.DNSNames, hosts.DNSNames) || !slices.EqualFunc(spare.IPAddresses, hosts.IPAddresses, net.IP.Equal) {
			if sparePEM, err = certForKey(spareKey, hosts.DNSNames, hosts.IPAddresses, now); err != nil {
				return fmt.Errorf("%s: %w", spareKeyPath, err)
			}
		}
		oldKey, err := readPEM(keyPath)
		if err != nil && !errors.Is(err, fs.ErrNotExist) { // a lost key is replaced
			return err
		}
		// If the key is the spare key, a rotation was interrupted after it had copied the old pair.
		if inUse != nil && err == nil && !bytes.Equal(oldKey, spareKey) {
			if err := replaceKeyFile(filepath.Join(spareDir, TLSKeyFile+oldSuffix), oldKey, 0o600); err != nil {
				return err
			}
			if err := replaceKeyFile(filepath.Join(spareDir, TLSCertFile+oldSuffix), inUsePEM, 0o644); err != nil {
				return err
			}
		}
		if err := replaceKeyFile(keyPath, spareKey, 0o600); err != nil {
			return err
		}
		if err := replaceKeyFile(crtPath, sparePEM, 0o644); err != nil {
			return err
		}
	}
	newKey, err := newTLSKey()
	if err != nil {
		return err
	}
	newCert, err := certForKey(newKey, hosts.DNSNames, hosts.IPAddresses, now)
	if err != nil {
		return err
	}
	if err := replaceKeyFile(spareKeyPath, newKey, 0o600); err != nil {
		return fmt.Errorf("the spare key is in use now, but no new spare key was written; run the rotation again: %w", err)
	}
	return replaceKeyFile(spareCrtPath, newCert, 0o644)
}

// readSpareKey returns the spare key at keyPath. The error states what to do if the key is missing,
// or if it is not the key of the certificate in crtPEM, the content of the file at crtPath.
func readSpareKey(keyPath, crtPath string, crtPEM []byte) ([]byte, error) {
	key, err := readPEM(keyPath)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("the spare key %s is missing: name the directory where it is with --spare DIR; if it is lost, delete %s and run keygen for a new spare key, which only tokens that are made after that accept", keyPath, crtPath)
	}
	if err != nil {
		return nil, fmt.Errorf("reading the spare key: %w", err)
	}
	if _, err := tls.X509KeyPair(crtPEM, key); err != nil {
		return nil, fmt.Errorf("%s is not the key of %s: name the directory of the right spare key with --spare DIR; if it is lost, delete both files and run keygen for a new spare key, which only tokens that are made after that accept", keyPath, crtPath)
	}
	return key, nil
}

// replaceKeyFile replaces the file at path atomically. The new file has the mode and the owner of the
// old file, or the given mode if there is no old file.
func replaceKeyFile(path string, data []byte, mode fs.FileMode) error {
	info, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return writeKeyFile(path, data, mode, nil, os.Rename)
	}
	if err != nil {
		return err
	}
	return writeKeyFile(path, data, info.Mode().Perm(), info, os.Rename)
}

// readCert returns the first certificate in the PEM file at path, and the contents of the file.
func readCert(path string) (*x509.Certificate, []byte, error) {
	b, err := readPEM(path)
	if err != nil {
		return nil, nil, err
	}
	cert, err := firstCert(b)
	if err != nil {
		return nil, nil, fmt.Errorf("%s: %w", path, err)
	}
	return cert, b, nil
}

// readPEM returns the content of the PEM file at path, with one line end after it.
func readPEM(path string) ([]byte, error) {
	b, err := ReadSecret(path, MaxKeyFile)
	return append(b, '\n'), err
}
