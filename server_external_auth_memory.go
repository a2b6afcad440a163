package main

// This file remembers for a short time what the authorization service answered, and for longer
// which senders it permitted. Keys are hashes, so that no token stays in memory. Permissions and
// refusals are kept apart, so that strangers with random tokens cannot push out a permission. Both
// are bounded. This file must not know of HTTP.

import (
	"crypto/sha256"
	"strings"
	"sync"
	"time"
)

const (
	permissionMemory = 30 * time.Second // how long a permission is remembered
	refusalMemory    = 10 * time.Second // how long a refusal is remembered; short, because an operator who permits a site expects it to push soon
	maxRefusals      = 10_000           // refusals remembered
)

// authorizeKey is the hash of a credential or of an address. A credential is a cluster ID together
// with a client token.
type authorizeKey [sha256.Size]byte

// newAuthorizeKey returns the hash of parts, none of which may contain a NUL byte.
func newAuthorizeKey(parts ...string) authorizeKey {
	return sha256.Sum256([]byte(strings.Join(parts, "\x00")))
}

// authorizeMemory is safe for concurrent use.
type authorizeMemory struct {
	mu        sync.Mutex                        // guards the fields below
	sites     map[string]permittedSite          // by cluster ID; at most maxTrackedSites
	addresses map[authorizeKey]permittedAddress // the addresses of sites; each site has one address
	refusals  map[authorizeKey]refusedQuestion  // by credential
}

// permittedSite is the newest permission for one cluster ID.
type permittedSite struct {
	credential, address authorizeKey
	labels              map[string]string
	at                  time.Time // when the service permitted it
}

// permittedAddress is the address of the newest permission of at least one site.
type permittedAddress struct {
	sites int       // sites that have this address
	at    time.Time // when the service last permitted a question from there
}

type refusedQuestion struct {
	err error
	at  time.Time
}

func newAuthorizeMemory() *authorizeMemory {
	return &authorizeMemory{sites: map[string]permittedSite{}, addresses: map[authorizeKey]permittedAddress{}, refusals: map[authorizeKey]refusedQuestion{}}
}

// verdict returns the service's answer to a question, labels or an error. It returns false if no
// answer is remembered.
func (m *authorizeMemory) verdict(q *authorizeQuestion, now time.Time) (labels map[string]string, err error, ok bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if s := m.sites[q.clusterID]; s.credential == q.credential && now.Sub(s.at) < permissionMemory {
		return s.labels, nil, true
	}
	r, ok := m.refusals[q.credential]
	return nil, r.err, ok && now.Sub(r.at) < refusalMemory
}

// sender returns the key under which a question is counted, and whether the service has permitted a
// question of this sender within siteIdle. The sender is the credential if the service has
// permitted it. So strangers behind the same address cannot use up the share of the site. Otherwise
// the sender is the address.
func (m *authorizeMemory) sender(q *authorizeQuestion, now time.Time) (sender authorizeKey, known bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if s := m.sites[q.clusterID]; s.credential == q.credential && now.Sub(s.at) < siteIdle {
		return q.credential, true
	}
	return q.address, now.Sub(m.addresses[q.address].at) < siteIdle
}

// remember remembers the service's answer to a question: a permission if q.err is nil, else a
// refusal.
func (m *authorizeMemory) remember(q *authorizeQuestion, now time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if q.err == nil {
		delete(m.refusals, q.credential)
		m.rememberPermission(q, now)
		return
	}
	if m.sites[q.clusterID].credential == q.credential {
		m.forget(q.clusterID)
	}
	if len(m.refusals) >= maxRefusals {
		clear(m.refusals) // costs only that the service is asked again
	}
	m.refusals[q.credential] = refusedQuestion{q.err, now}
}

// rememberPermission replaces the earlier permission and address of the cluster ID. So one site
// cannot fill the memory. If maxTrackedSites other cluster IDs are remembered and none of them is
// idle, it remembers nothing. The caller must hold m.mu.
func (m *authorizeMemory) rememberPermission(q *authorizeQuestion, now time.Time) {
	m.forget(q.clusterID)
	if len(m.sites) >= maxTrackedSites {
		for id, s := range m.sites {
			if now.Sub(s.at) >= siteIdle {
				m.forget(id)
			}
		}
	}
	if len(m.sites) < maxTrackedSites {
		m.sites[q.clusterID] = permittedSite{q.credential, q.address, q.labels, now}
		m.addresses[q.address] = permittedAddress{m.addresses[q.address].sites + 1, now}
	}
}

// forget removes the permission of a cluster ID. The caller must hold m.mu.
func (m *authorizeMemory) forget(clusterID string) {
	s, ok := m.sites[clusterID]
	if !ok {
		return
	}
	delete(m.sites, clusterID)
	a := m.addresses[s.address]
	if a.sites--; a.sites == 0 {
		delete(m.addresses, s.address)
		return
	}
	m.addresses[s.address] = a
}
