package main

// This file keeps the state of each site that has authenticated: rate limit, pushes in flight, last
// failure, token expiry and clock offset. The number of sites in memory is bounded. The state of an
// idle site may be forgotten, which never lets the site push faster. Callers pass the current time.
// This file must not know of HTTP or stores.

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"
)

const (
	rateBurst        = 60             // pushes that a site may send at once after a pause, if each counts once
	aheadOfPace      = 8              // pushes by which a site may be ahead of its rate limit and still count as a site that pushes little
	maxPushesPerSite = 4              // pushes of one site in flight at a time
	maxTrackedSites  = 100_000        // sites whose state is kept in memory
	siteIdle         = 24 * time.Hour // after this time without a request, a site may be forgotten to make room for a new site

	// knownIdle is the time after which the known series of a site that sends no request are freed.
	// The next push of the site is then decoded in full.
	knownIdle = 2 * time.Hour

	maxSiteRefusals = 4 // refusals of a site that are remembered, equal ones as one

	siteLogEvery = time.Hour // shortest time between two lines with the same cause about one site
)

// SitePushLimiter limits and tracks the pushes of each site. It is safe for concurrent use.
type SitePushLimiter struct {
	interval  time.Duration // shortest average time between the pushes of one site; 0 = no rate limit
	pushBytes int           // a push counts once for each pushBytes bytes that it decodes to; a smaller push counts once

	mu    sync.Mutex              // guards the fields below and the state of each site
	sites map[string]*limitedSite // by cluster ID
	freed time.Time               // when freeIdleSeries was last called
}

type limitedSite struct {
	// tat is the theoretical arrival time of GCRA (ITU-T I.371): the time of the next push if all
	// earlier pushes had been exactly one interval apart. A tat in the past counts as the current
	// time. So forgetting a site whose tat is in the past does not change when the site may push.
	tat        time.Time
	inFlight   int
	decodeLock siteDecodeLock
	health     siteHealth
	seen       time.Time                 // when the state of this site was last used; see track
	logged     map[string]LimitedMessage // by cause; see TakeSiteLog; nil if nothing was logged
	refusalLog LimitedMessage
	refusals   []Refusal // the newest maxSiteRefusals refusals, oldest first
}

// siteDecodeLock has one slot. The site's push that is being decoded or stored holds it, and it alone
// uses series.
type siteDecodeLock struct {
	semaphore
	series knownSiteSeries
}

// siteHealth has the values that /federate shows for a site that pushes to this server.
type siteHealth struct {
	LastError     string        // text of the newest refusal of a request; "" if none is known
	LastFailure   time.Time     // when a push of the site last failed; zero if no failure is known
	FailureText   string        // text of the refusal of that push
	LastSuccess   time.Time     // when a push of the site that this server received was last accepted, here or by the site's owner; zero if none is known
	TokenExpiry   int64         // when the site's client token expires, in Unix seconds; 0 = never, or not known
	ClockOffset   time.Duration // how far the clock of the site's source is behind the servers' clocks, as the client reports it
	ClockOffsetAt time.Time     // when the client reported ClockOffset
}

// NewSitePushLimiter returns a SitePushLimiter that allows each site on average one push per
// interval, in bursts of at most rateBurst. A push counts once for each pushBytes bytes that it
// decodes to, because the work for a push grows with these bytes. With interval 0 the rate is not
// limited.
func NewSitePushLimiter(interval time.Duration, pushBytes int) *SitePushLimiter {
	return &SitePushLimiter{interval: interval, pushBytes: pushBytes, sites: map[string]*limitedSite{}}
}

// track returns the state of a site, which it creates if needed. If the site is new and
// maxTrackedSites sites are in memory, it first forgets the idle ones. It returns nil if there is
// still no room. Every knownIdle it also frees the known series of idle sites. The caller must hold
// t.mu.
func (t *SitePushLimiter) track(clusterID string, now time.Time) *limitedSite {
	site := t.sites[clusterID]
	if site == nil {
		if len(t.sites) >= maxTrackedSites {
			maps.DeleteFunc(t.sites, func(_ string, site *limitedSite) bool {
				return site.inFlight == 0 && now.Sub(site.seen) > siteIdle && site.tat.Before(now)
			})
		}
		if len(t.sites) >= maxTrackedSites {
			return nil
		}
		site = &limitedSite{decodeLock: siteDecodeLock{semaphore: newSemaphore(1)}}
		t.sites[clusterID] = site
	}
	site.seen = now
	if now.Sub(t.freed) >= knownIdle {
		t.freeIdleSeries(now)
	}
	return site
}

// freeIdleSeries frees the known series of the sites that have sent no request for knownIdle. Nobody
// uses them, because only a push that is in flight can hold the siteDecodeLock. The caller must hold
// t.mu.
func (t *SitePushLimiter) freeIdleSeries(now time.Time) {
	t.freed = now
	for _, site := range t.sites {
		if site.inFlight == 0 && now.Sub(site.seen) >= knownIdle {
			site.decodeLock.series = knownSiteSeries{}
		}
	}
}

// pay moves the time of the site's next push by a number of intervals.
func (s *limitedSite) pay(pushes int, interval time.Duration, now time.Time) {
	if s.tat.Before(now) {
		s.tat = now
	}
	s.tat = s.tat.Add(time.Duration(pushes) * interval)
}

// AcquirePush lets a push of a site begin, and returns a nil error. The caller must then call
// ReleasePush at the end of the push. If the push must not begin, the error says why, and wait is
// the time after which the client should try again.
func (t *SitePushLimiter) AcquirePush(clusterID string, now time.Time) (wait time.Duration, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	site := t.track(clusterID, now)
	if site == nil {
		return time.Minute, errors.New("too many cluster IDs are pushing")
	}
	tat := site.tat
	if tat.Before(now) {
		tat = now
	}
	if wait := tat.Sub(now) - (rateBurst-1)*t.interval; t.interval > 0 && wait > 0 {
		return wait, fmt.Errorf("pushes faster than one every %v, after a burst of %d; a push counts once for each %d bytes that it decodes to", t.interval, rateBurst, t.pushBytes)
	}
	if site.inFlight >= maxPushesPerSite {
		return time.Second, fmt.Errorf("%d pushes of this cluster ID are being handled", site.inFlight)
	}
	site.pay(1, t.interval, now)
	site.inFlight++
	return 0, nil
}

// ReleasePush ends a push that AcquirePush let begin.
func (t *SitePushLimiter) ReleasePush(clusterID string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.sites[clusterID].inFlight--
}

// ChargeDecoded counts a push of a site again for each pushBytes bytes, after the first pushBytes,
// of its decompressed body. AcquirePush has counted the push once, before its size was known. The
// push must be in flight.
func (t *SitePushLimiter) ChargeDecoded(clusterID string, bodyBytes int, now time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if more := (bodyBytes - 1) / t.pushBytes; more > 0 {
		t.sites[clusterID].pay(more, t.interval, now)
	}
}

// IsAheadOfPace reports whether a site has lately pushed so much that it is more than aheadOfPace
// pushes ahead of its rate limit. It returns false if the rate is not limited. A push of the site
// must be in flight.
func (t *SitePushLimiter) IsAheadOfPace(clusterID string, now time.Time) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.sites[clusterID].tat.Sub(now) > aheadOfPace*t.interval
}

// DecodeLock returns the siteDecodeLock that a push of the site holds while it is decoded and stored.
// The push must be in flight.
func (t *SitePushLimiter) DecodeLock(clusterID string) *siteDecodeLock {
	t.mu.Lock()
	defer t.mu.Unlock()
	return &t.sites[clusterID].decodeLock
}

// SetTokenExpiry records when the client token of a site expires, in Unix seconds; 0 means never.
func (t *SitePushLimiter) SetTokenExpiry(clusterID string, expiresUnix int64, now time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if site := t.track(clusterID, now); site != nil {
		site.health.TokenExpiry = expiresUnix
	}
}

// SetClockOffset records how far the clock of a site's source is behind the servers' clocks, as the
// site's client reports it.
func (t *SitePushLimiter) SetClockOffset(clusterID string, offset time.Duration, now time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if site := t.track(clusterID, now); site != nil {
		site.health.ClockOffset, site.health.ClockOffsetAt = offset, now
	}
}

// SetPushAccepted records that a push of a site was accepted at the time now.
func (t *SitePushLimiter) SetPushAccepted(clusterID string, now time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if site := t.track(clusterID, now); site != nil {
		site.health.LastSuccess = now
	}
}

// AddRefusal remembers that a request of a site was refused. If isFailure is true, a push has failed
// for a reason that the site's alerts must see.
func (t *SitePushLimiter) AddRefusal(r Refusal, isFailure bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	site := t.track(r.ClusterID, r.At)
	if site == nil {
		return
	}
	if site.health.LastError = r.Text; isFailure {
		site.health.LastFailure, site.health.FailureText = r.At, r.Text
	}
	if i := slices.IndexFunc(site.refusals, func(old Refusal) bool { return old.Reason == r.Reason && old.Text == r.Text }); i >= 0 {
		r.Count += site.refusals[i].Count
		site.refusals = slices.Delete(site.refusals, i, i+1)
	} else if len(site.refusals) >= maxSiteRefusals {
		site.refusals = slices.Delete(site.refusals, 0, 1)
	}
	site.refusals = append(site.refusals, r)
}

// Refusals returns the newest refusals of a site, newest first.
func (t *SitePushLimiter) Refusals(clusterID string) []Refusal {
	t.mu.Lock()
	defer t.mu.Unlock()
	site := t.sites[clusterID]
	if site == nil {
		return []Refusal{}
	}
	all := append([]Refusal{}, site.refusals...)
	slices.Reverse(all)
	return all
}

// TakeSiteLog reports whether the caller should log a line about a site, and how many lines with the
// same cause were left out before. For each site and cause it returns true at most once in
// siteLogEvery. The cause must be a constant of the program, because a site keeps all of its causes.
func (t *SitePushLimiter) TakeSiteLog(clusterID, cause string, now time.Time) (suppressed int, ok bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	site := t.track(clusterID, now)
	if site == nil {
		return 0, false
	}
	if site.logged == nil {
		site.logged = map[string]LimitedMessage{}
	}
	m := site.logged[cause]
	suppressed, ok = m.Take(now, siteLogEvery)
	site.logged[cause] = m
	return suppressed, ok
}

// TakeRefusalLog reports whether the caller should log that a push of a site is refused, and how
// many refusals of the site were not logged before. For each site it returns true at most once in
// LimitedLogEvery.
func (t *SitePushLimiter) TakeRefusalLog(clusterID string, now time.Time) (suppressed int, ok bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	site := t.track(clusterID, now)
	if site == nil {
		return 0, false
	}
	return site.refusalLog.Take(now, LimitedLogEvery)
}

// ForEach calls f with the health of each tracked site, in the order of cluster IDs. It calls f
// without holding t.mu, so that pushes do not wait for a slow f.
func (t *SitePushLimiter) ForEach(f func(id string, activity siteHealth)) {
	type siteWithHealth struct {
		id     string
		health siteHealth
	}
	t.mu.Lock()
	all := make([]siteWithHealth, 0, len(t.sites))
	for id, site := range t.sites {
		all = append(all, siteWithHealth{id, site.health})
	}
	t.mu.Unlock()
	slices.SortFunc(all, func(a, b siteWithHealth) int { return strings.Compare(a.id, b.id) })
	for _, site := range all {
		f(site.id, site.health)
	}
}
