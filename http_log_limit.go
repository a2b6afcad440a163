package main

// This file limits how often one message is written to the process log. Strangers and hostile sites
// can cause some messages at any rate. They must not fill the disk with the log, or hide other
// messages in it. The memory for the limits is bounded.

import (
	"context"
	"log/slog"
	"maps"
	"net/netip"
	"sync"
	"time"
)

const (
	LimitedLogEvery = 10 * time.Second // shortest time between two lines with the same message
	peerLogEvery    = time.Hour        // shortest time between two lines with the same message about one peer
	maxLoggedPeers  = 1024             // pairs of message and peer that a LimitedLog remembers
)

// LimitedLog writes at most one line with each message in LimitedLogEvery. The next line with the
// message says how many were left out. So the caller must count the events elsewhere. LimitedLog is
// safe for concurrent use.
type LimitedLog struct {
	log *slog.Logger
	now func() time.Time

	mu       sync.Mutex                // guards the fields below
	messages map[string]LimitedMessage // by message; bounded, because messages are constants
	peers    map[peerMessage]LimitedMessage
}

// peerMessage is a message about a peer.
type peerMessage struct {
	message string
	peer    netip.Addr
}

// LimitedMessage limits the lines with one message. The zero value is ready for use.
type LimitedMessage struct {
	written    time.Time // when the last line with the message was written
	suppressed int       // lines with the message that were left out since then
}

// isDue reports whether no line with the message was written in the given time before now.
func (m *LimitedMessage) isDue(now time.Time, every time.Duration) bool {
	return m.written.IsZero() || now.Sub(m.written) >= every
}

// Take reports whether a line with the message may be written now, and how many were left out
// before. It reports true at most once in the given time.
func (m *LimitedMessage) Take(now time.Time, every time.Duration) (suppressed int, ok bool) {
	if !m.isDue(now, every) {
		m.suppressed++
		return 0, false
	}
	suppressed = m.suppressed
	*m = LimitedMessage{written: now}
	return suppressed, true
}

// NewLimitedLog returns a LimitedLog that writes to log. now is the clock that the limits use.
func NewLimitedLog(log *slog.Logger, now func() time.Time) *LimitedLog {
	return &LimitedLog{log: log, now: now, messages: map[string]LimitedMessage{}, peers: map[peerMessage]LimitedMessage{}}
}

// Log writes a line to the process log, unless it wrote a line with the same message a short time
// before. message must be a constant of the program.
func (l *LimitedLog) Log(level slog.Level, message string, args ...any) {
	l.logIf(level, func(now time.Time) (int, bool) { return l.take(message, now) }, message, args)
}

// LogPeer writes a line about a peer to the process log, as Log does, but at most one line with the
// same message about the same peer in peerLogEvery. remote is the address of the peer, as in
// http.Request. All addresses of a /64 network of IPv6 are one peer. The line gets the attribute
// remote.
func (l *LimitedLog) LogPeer(level slog.Level, message, remote string, args ...any) {
	args = append([]any{"remote", remote}, args...)
	addr, _ := netip.ParseAddrPort(remote) // all remotes without an address are one peer
	key := peerMessage{message, peerNetwork(addr.Addr())}
	l.logIf(level, func(now time.Time) (int, bool) { return l.takePeer(key, now) }, message, args)
}

// logIf writes a line to the process log if take returns true. It adds the number that take returns
// to the line, unless the number is 0.
func (l *LimitedLog) logIf(level slog.Level, take func(now time.Time) (suppressed int, ok bool), message string, args []any) {
	ctx := context.Background()
	if !l.log.Enabled(ctx, level) {
		return
	}
	l.mu.Lock()
	suppressed, ok := take(l.now())
	l.mu.Unlock()
	if !ok {
		return
	}
	if suppressed > 0 {
		args = append(args, "suppressed", suppressed)
	}
	l.log.Log(ctx, level, message, args...)
}

// take reports whether a line with message may be written now, and how many were left out before.
// The caller must hold l.mu.
func (l *LimitedLog) take(message string, now time.Time) (suppressed int, ok bool) {
	m := l.messages[message]
	suppressed, ok = m.Take(now, LimitedLogEvery)
	l.messages[message] = m
	return suppressed, ok
}

// takePeer is take for a message about a peer. If too many peers are remembered, only the limit of
// the message applies. The caller must hold l.mu.
func (l *LimitedLog) takePeer(key peerMessage, now time.Time) (suppressed int, ok bool) {
	m := l.peers[key]
	if m.isDue(now, peerLogEvery) {
		suppressed, ok = l.take(key.message, now)
		if !ok { // the peer may be logged as soon as the message may be written again
			return 0, false
		}
		suppressed += m.suppressed
		m = LimitedMessage{written: now}
	} else {
		m.suppressed++
	}
	_, known := l.peers[key]
	if !known && len(l.peers) >= maxLoggedPeers {
		maps.DeleteFunc(l.peers, func(_ peerMessage, m LimitedMessage) bool { return m.isDue(now, peerLogEvery) })
	}
	if known || len(l.peers) < maxLoggedPeers {
		l.peers[key] = m
	}
	return suppressed, ok
}

// peerNetwork returns the address by which a peer is counted: its IPv4 address, or the /64 network of
// its IPv6 address, because one host may use every address of a /64.
func peerNetwork(addr netip.Addr) netip.Addr {
	addr = addr.Unmap()
	if addr.Is6() {
		prefix, _ := addr.Prefix(64) // fails only if an address has fewer bits
		addr = prefix.Addr()
	}
	return addr
}
