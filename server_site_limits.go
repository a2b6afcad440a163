package main

// State of each site that authenticated: rate limit, pushes in flight, last failure, token expiry,
// clock offset. Memory is bounded, and forgetting an idle site never lets it push faster. Time
// comes in with each call. This file must not know of HTTP or stores.

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"
)

const (
	rateBurst        = 60
	maxPushesPerSite = 4 // in flight
	maxTrackedSites  = 100_000
	siteIdle         = 24 * time.Hour

	untimelyLogEvery = time.Hour // between log lines on a site whose samples' times are wrong
)

// SitePushLimiter tracks the sites that push. It is safe for concurrent use.
type SitePushLimiter struct {
	interval time.Duration // of the rate limit; 0: none

	mu    sync.Mutex              // guards sites
	sites map[string]*limitedSite // by cluster ID
}

type limitedSite struct {
	// tat is the theoretical arrival time of GCRA (ITU-T I.371): the time of the next push if the
	// pushes before had kept the interval. In the past it says nothing, so an idle site can be
	// forgotten.
	tat            time.Time
	inFlight       int // pushes
	health         siteHealth
	seen           time.Time
	loggedUntimely time.Time // when its samples' times were last logged
}

// siteHealth has the values that /federate shows of a site that pushes to this server.
type siteHealth struct {
	LastFailure   time.Time     // of its newest refused push
	TokenExpiry   int64         // s; of its client token, 0 = never
	ClockOffset   time.Duration // by which the source's clock is behind, as the client says
	ClockOffsetAt time.Time     // when it said so
}

// NewSitePushLimiter allows one push per site and interval, in bursts of 60; 0 does not limit the
// rate.
func NewSitePushLimiter(interval time.Duration) *SitePushLimiter {
	return &SitePushLimiter{interval: interval, sites: map[string]*limitedSite{}}
}

// track returns the site of clusterID, and nil if no more can be tracked. t.mu is held.
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
		site = &limitedSite{}
		t.sites[clusterID] = site
	}
	site.seen = now
	return site
}

// AcquirePush counts a push as begun; ReleasePush ends it. An error says why the push must not
// begin, and wait how long the client should wait before it tries again.
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
		return wait, fmt.Errorf("pushes faster than one every %v, after a burst of %d", t.interval, rateBurst)
	}
	if site.inFlight >= maxPushesPerSite {
		return time.Second, fmt.Errorf("%d pushes of this cluster ID are being handled", site.inFlight)
	}
	site.tat = tat.Add(t.interval)
	site.inFlight++
	return 0, nil
}

// ReleasePush ends a push that AcquirePush began.
func (t *SitePushLimiter) ReleasePush(clusterID string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.sites[clusterID].inFlight--
}

// SetTokenExpiry notes when the client token of clusterID expires: in Unix seconds, 0 for never.
func (t *SitePushLimiter) SetTokenExpiry(clusterID string, expiresUnix int64, now time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if site := t.track(clusterID, now); site != nil {
		site.health.TokenExpiry = expiresUnix
	}
}

// SetClockOffset notes by how much the clock of clusterID's source is behind, as its client says.
func (t *SitePushLimiter) SetClockOffset(clusterID string, offset time.Duration, now time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if site := t.track(clusterID, now); site != nil {
		site.health.ClockOffset, site.health.ClockOffsetAt = offset, now
	}
}

// SetPushFailed notes that a push was refused.
func (t *SitePushLimiter) SetPushFailed(clusterID string, now time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if site := t.track(clusterID, now); site != nil {
		site.health.LastFailure = now
	}
}

// TakeUntimelyWarning reports whether to log that every sample of a push was dropped for its time:
// once in untimelyLogEvery.
func (t *SitePushLimiter) TakeUntimelyWarning(clusterID string, now time.Time) (warn bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	site := t.track(clusterID, now)
	if site == nil || !site.loggedUntimely.IsZero() && now.Sub(site.loggedUntimely) < untimelyLogEvery {
		return false
	}
	site.loggedUntimely = now
	return true
}

// ForEach calls f with the activity of each site, by cluster ID. f must not call t.
func (t *SitePushLimiter) ForEach(f func(id string, activity siteHealth)) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, id := range slices.Sorted(maps.Keys(t.sites)) {
		f(id, t.sites[id].health)
	}
}
