package main

// This file implements the texts of errors that end a start. Each text names the flag whose value
// caused the error, and says what a person can do about it. The same texts are logged when a reload
// fails.

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"syscall"
)

// flagError returns err with the flag --name and its value in front, and with advice at the end if
// err comes from the operating system. It returns nil if err is nil.
func flagError(name, value string, err error) error {
	if err == nil {
		return nil
	}
	advice := ""
	switch {
	case errors.Is(err, fs.ErrNotExist):
		advice = ": correct the path, or create it"
		if dir, err := os.Getwd(); err == nil && !filepath.IsAbs(value) {
			advice += "; a relative path begins at " + dir
		}
	case errors.Is(err, fs.ErrPermission):
		advice = fmt.Sprintf(": telemeter runs as user %d, who has no permission: change the owner with chown, or run telemeter as another user", os.Geteuid())
	case errors.Is(err, syscall.EISDIR):
		advice = ": name a file, not a directory"
	case errors.Is(err, syscall.ENOTDIR):
		advice = ": a file is in the place of a directory: correct the path, or move the file away"
	case errors.Is(err, syscall.EROFS):
		advice = ": the file system is read-only: use another directory, or make this one writable (ReadWritePaths= in a systemd unit, a volume of a container)"
	case IsDiskFull(err):
		advice = ": free some space, or use a directory on another disk"
	}
	return fmt.Errorf("--%s %s: %w%s", name, value, err, advice)
}

// listenFlag listens on addr, the value of the flag --name, for TCP.
func listenFlag(name, addr string) (net.Listener, error) {
	ln, err := Listen(addr)
	return ln, listenError(name, addr, err)
}

// listenError returns the error of listening on addr, the value of the flag --name, with advice. It
// returns nil if err is nil.
func listenError(name, addr string, err error) error {
	if err == nil {
		return nil
	}
	advice := "choose another address"
	var resolve *net.DNSError
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		_, port, _ := net.SplitHostPort(addr)
		advice = fmt.Sprintf("another process listens there: stop it, or choose another port (ss -lntup | grep :%s shows the process)", port)
	case errors.Is(err, fs.ErrPermission):
		advice = "ports below 1024 are for root: choose a port from 1024 on, or give the process the capability CAP_NET_BIND_SERVICE"
	case errors.Is(err, syscall.EADDRNOTAVAIL):
		advice = "this host does not have the IP address: use an address of this host, or :PORT for all of them"
	case errors.As(err, &resolve):
		advice = "use an IP address of this host, or :PORT for all of them"
	}
	// The system call's error is the cause. The errors around it repeat the address.
	var call *os.SyscallError
	if errors.As(err, &call) {
		err = call.Err
	}
	return fmt.Errorf("--%s %s: %w: %s", name, addr, err, advice)
}
