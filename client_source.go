package main

// The client scrapes one source at a time. Several sources are replicas of one Prometheus: the client
// stays on one until its scrape fails, or until its samples lag behind those of another one. It then
// goes on with the next one. A sample of a series is dropped if it is not newer than a sample that
// another source gave, so that the times of a series never run backwards. The backfiller fetches
// the missing samples from the new source.

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"hash/maphash"
	"io"
	"maps"
	"net/url"
	"sync/atomic"
	"time"
)

const (
	minLag        = time.Minute     // a source whose newest sample is older than this, and than two scrape intervals, is compared with the others
	lagCheckEvery = time.Minute     // least time between two such comparisons
	maxLagTime    = 5 * time.Minute // a source that lags for this long is left; /federate returns only samples of this time
	staleGiven    = time.Hour       // series without a newer sample for this long are forgotten; /federate returns samples of the last five minutes
)

// source is one source of a client.
type source struct {
	url  *url.URL
	skew atomic.Int64 // ms by which the source's clock is ahead of this machine's clock; see skewByDateOrZero
}

// sourceID returns the number that identifies a source in scrapeProgress.
func sourceID(u *url.URL) int64 {
	h := fnv.New64a()
	io.WriteString(h, u.String())
	return int64(h.Sum64())
}

// givenSample is the newest sample of a series that was given to the spool.
type givenSample struct {
	src *source
	t   int64 // ms, by the servers' clock
}

// sources are the sources of a client, one of which is in use. The goroutine that scrapes changes
// them; others may read which one is in use.
type sources struct {
	all     []*source
	current atomic.Int32 // index of the source in use

	// The next fields are used only by the goroutine that scrapes.
	given      *source                // whose samples were given last; nil if there were none
	seed       maphash.Seed           // of the keys of samples
	samples    map[uint64]givenSample // by the hash of the line of the series; empty if there is only one source
	earlier    givenSample            // by an earlier process; no series that is not in samples has a newer one
	lagChecked time.Time              // when the sources were last compared
	lagsSince  time.Time              // since when each comparison found that the source in use lags; zero if the last one did not
}

func newSources(urls []*url.URL) *sources {
	s := &sources{seed: maphash.MakeSeed(), samples: map[uint64]givenSample{}}
	for _, u := range urls {
		s.all = append(s.all, &source{url: u})
	}
	return s
}

// resume goes on with the source that an earlier process used last. shiftMs is what that process added
// to sample times.
func (s *sources) resume(p scrapeProgress, shiftMs int64) {
	s.earlier = givenSample{t: p.Newest + shiftMs}
	for i, src := range s.all {
		if sourceID(src.url) == p.Source {
			s.current.Store(int32(i))
			s.given, s.earlier.src = src, src
		}
	}
}

// DropReplica is the reason for dropping samples of a source that are not newer than those of the
// source that was in use before. They repeat what was given.
const DropReplica = "replica"

// isOld reports whether src must not give a sample of the series of line with the time t, by the
// servers' clock in ms. If it may give the sample, isOld notes the sample in got.
func (s *sources) isOld(got *CleanedScrape, src *source, line []byte, t int64) bool {
	if len(s.all) == 1 {
		return false
	}
	key := maphash.Bytes(s.seed, line)
	g, known := s.samples[key]
	if known {
		got.known++
	} else {
		g = s.earlier
	}
	if g.src != src && t <= g.t {
		return true
	}
	if got.given == nil {
		got.given = map[uint64]givenSample{}
	}
	got.given[key] = givenSample{src, t}
	return false
}

// setGiven records that the samples of a scrape of the source in use were given. It returns by how many ms
// the clock of that source is ahead of that of the source before, and whether both have no series in
// common.
func (s *sources) setGiven(got *CleanedScrape) (aheadMs int64, isStranger bool) {
	src := s.inUse()
	if s.given != nil && s.given != src {
		aheadMs = src.skew.Load() - s.given.skew.Load()
		isStranger = got.Samples > 0 && got.known == 0 && len(s.samples) > 0
	}
	s.given = src
	maps.Copy(s.samples, got.given)
	if len(s.samples) > 2*len(got.given) {
		oldest := got.SourceTime + got.Pieces[0].Shift - staleGiven.Milliseconds()
		maps.DeleteFunc(s.samples, func(_ uint64, g givenSample) bool { return g.t < oldest })
	}
	return aheadMs, isStranger
}

func (s *sources) inUse() *source { return s.all[s.current.Load()] }

// scrapeAny scrapes the source in use. If that fails or gives no samples, or if its samples lag, it
// scrapes the others. The error has the failures of all sources. The spool must be open, because the
// backfiller hears of a change.
func (c *Client) scrapeAny(ctx context.Context) (*CleanedScrape, error) {
	var failures []error
	var empty *CleanedScrape // of the source in use, which answered without samples
	first := int(c.sources.current.Load())
	for i := range c.sources.all {
		at := (first + i) % len(c.sources.all)
		got, err := c.scrapeWithin(ctx, at)
		switch {
		case err != nil:
			if len(c.sources.all) > 1 {
				err = fmt.Errorf("%s: %w", c.sources.all[at].url.Redacted(), err)
			}
			failures = append(failures, err)
		case got.Newest == 0 && len(c.sources.all) > 1:
			if i == 0 {
				empty = got
			}
		case at != first:
			reason := "the previous one has no samples"
			if empty == nil {
				reason = "the previous one failed: " + failures[0].Error()
			}
			c.useSource(at, reason)
			c.give(got)
			return got, nil
		default:
			got = c.orLessLagging(ctx, got)
			c.give(got)
			return got, nil
		}
	}
	if empty != nil {
		return empty, nil
	}
	return nil, errors.Join(failures...)
}

// give records that the samples of a scrape of the source in use are given.
func (c *Client) give(got *CleanedScrape) {
	ahead, isStranger := c.sources.setGiven(got)
	if isStranger {
		c.cfg.Log.Warn("no series of the source is one of the previous source, so consumers see all series twice: pass the external label that tells the replicas apart as --elide-label")
	}
	if max(ahead, -ahead) > skewTolerance.Milliseconds() {
		c.backfiller.clockChanged(ahead)
	}
}

// scrapeWithin scrapes a source within its share of the time for a scrape.
func (c *Client) scrapeWithin(ctx context.Context, at int) (*CleanedScrape, error) {
	limit := min(max(c.cfg.ScrapeInterval, minScrapeTimeout), maxScrapeTimeout)
	limited, cancel := context.WithTimeout(ctx, limit/time.Duration(len(c.sources.all)))
	defer cancel()
	return c.scrapeSource(limited, c.sources.all[at])
}

// orLessLagging returns the scrape of another source, and uses that source, if got lags behind it and
// has done so for maxLagTime. Otherwise it returns got. Replicas scrape a slow target at different
// times, so that each is ahead of the other for a part of the time.
func (c *Client) orLessLagging(ctx context.Context, got *CleanedScrape) *CleanedScrape {
	s, now, least := c.sources, c.cfg.Now(), max(minLag, 2*c.cfg.ScrapeInterval)
	switch {
	case len(s.all) == 1:
		return got
	case got.lag() <= least:
		s.lagsSince = time.Time{}
		return got
	case now.Sub(s.lagChecked) < lagCheckEvery:
		return got
	}
	s.lagChecked = now
	inUse := int(s.current.Load())
	for at := range s.all {
		if at == inUse {
			continue
		}
		other, err := c.scrapeWithin(ctx, at)
		switch {
		case err != nil || other.Newest == 0 || other.lag()+least >= got.lag():
		case s.lagsSince.IsZero():
			s.lagsSince = now
			return got
		case now.Sub(s.lagsSince) < maxLagTime:
			return got
		default:
			c.useSource(at, fmt.Sprintf("the newest sample of the previous one is %v old", got.lag().Round(time.Second)))
			return other
		}
	}
	s.lagsSince = time.Time{}
	return got
}

// lag returns how old the newest sample of a scrape is.
func (sr *CleanedScrape) lag() time.Duration {
	return time.Duration(sr.SourceTime-sr.Newest) * time.Millisecond
}

// useSource makes a source the one in use.
func (c *Client) useSource(at int, reason string) {
	if old := c.sources.inUse(); old != c.sources.all[at] {
		c.cfg.Log.Warn("source changed", "from", c.sources.all[at].url.Redacted(), "before", old.url.Redacted(), "reason", reason)
		c.sources.current.Store(int32(at))
		c.sourceChanges.Inc()
		c.sources.lagsSince = time.Time{}
		notify(c.backfiller.sourceChanged)
	}
}
