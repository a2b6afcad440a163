package main

// scrapeSlots bounds the scrapes that a server answers at a time, and so their memory and processor
// time. A consumer that confirmed a scrape before, and whose selectors are cheap, uses slots that
// no other scraper can take. Scrapes wait for a slot in the order of their arrival, until their
// timeout.

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"runtime"
	"strconv"
	"sync"
	"time"
)

const (
	establishedScrapes = 8                // scrapes of established consumers at a time
	cheapSelectors     = 2000             // steps; costlier selectors do not get a slot for established consumers
	defaultScrapeTime  = 30 * time.Second // timeout of a scrape that announces none
	maxScrapeTime      = time.Minute      // longest timeout of a scrape, whatever it announces
)

// errScrapesBusy means that a scrape got no slot before its timeout.
var errScrapesBusy = errors.New("too many other scrapes are being answered")

// scrapeSlots is safe for concurrent use.
type scrapeSlots struct {
	established semaphore // one slot for each scrape of an established consumer
	others      semaphore // one slot for each other scrape; if there are several processors, fewer slots than processors, so that pushes get processor time, too

	mu       sync.Mutex      // guards scraping
	scraping map[uint64]bool // keys of the consumers that have, or wait for, a slot of established
}

func newScrapeSlots() *scrapeSlots {
	return &scrapeSlots{
		established: newSemaphore(establishedScrapes), others: newSemaphore(max(1, runtime.GOMAXPROCS(0)-1)), scraping: map[uint64]bool{},
	}
}

// acquire waits for a slot and then parses the selectors in texts. If the error is nil, the caller
// must call release at the end of the scrape. A scrape of an established consumer gets a slot for
// established consumers, unless its selectors are costly, or another scrape of the consumer has such
// a slot or waits for one. So scrapers that use the name of one consumer do not delay other
// consumers. The error is errScrapesBusy if ctx ends first; otherwise it is the reason why the
// selectors are refused.
func (s *scrapeSlots) acquire(ctx context.Context, consumerKey uint64, isEstablished bool, texts []string) (match Selectors, release func(), err error) {
	if isEstablished && s.beginEstablished(consumerKey) {
		release = func() { s.established.Release(); s.endEstablished(consumerKey) }
		if s.established.Acquire(ctx) != nil {
			s.endEstablished(consumerKey)
			return nil, nil, errScrapesBusy
		}
		if match, err = ParseSelectorsWithin(texts, cheapSelectors); err == nil {
			return match, release, nil
		}
		release() // the selectors are costly or malformed
	}
	if s.others.Acquire(ctx) != nil {
		return nil, nil, errScrapesBusy
	}
	if match, err = ParseSelectorsWithin(texts, MaxPattern); err != nil {
		s.others.Release()
		return nil, nil, fmt.Errorf("match[]: %w", err)
	}
	return match, s.others.Release, nil
}

// beginEstablished notes that a scrape of the consumer waits for a slot for established consumers.
// It returns false if another scrape of the consumer has such a slot or waits for one.
func (s *scrapeSlots) beginEstablished(key uint64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.scraping[key] {
		return false
	}
	s.scraping[key] = true
	return true
}

func (s *scrapeSlots) endEstablished(key uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.scraping, key)
}

// scrapeTime returns how long a scrape may take, including the wait for a slot and the writing of
// the answer: the timeout that the scraper announces in its headers, but at most maxScrapeTime.
// If the scraper announces no timeout, or an invalid timeout, the result is defaultScrapeTime.
func scrapeTime(h http.Header) time.Duration {
	s, err := strconv.ParseFloat(h.Get("X-Prometheus-Scrape-Timeout-Seconds"), 64)
	if err != nil || !(s > 0) { // this form of the condition is also true for NaN
		return defaultScrapeTime
	}
	return time.Duration(min(s, maxScrapeTime.Seconds()) * float64(time.Second))
}
