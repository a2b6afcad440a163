package main

// This file keeps in the spool's directory what was scraped, so that the next process knows which
// scrapes are missing. A record that is too old only causes samples to be fetched again.

import (
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"time"
)

const (
	progressName      = "scraped" + LogSuffix
	progressSaveEvery = 30 * time.Second // least time between two writes, unless a gap changed
)

// Progress returns what the previous process and this one have scraped, as far as it is known.
func (s *Spool) Progress() scrapeProgress { return s.progress }

// loadProgress reads the record. If it is missing, damaged or of another cluster ID, nothing is known.
func (s *Spool) loadProgress() error {
	var p scrapeProgress
	log, err := s.readRecord(progressName, progressKind, func(payload []byte) (err error) {
		p, err = decodeScrapeProgress(payload)
		return err
	})
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case errors.Is(err, errSpoolFileDamaged):
		s.cfg.OnError(err)
	case err != nil:
		return err
	case string(log.Identity()) == s.cfg.ClusterID:
		s.progress = p
	}
	return nil
}

// SaveProgress keeps p, and writes the record if a gap changed, or if this process has not written it for
// progressSaveEvery. If Dir is "", nothing is written. It must be called by the goroutine that calls
// Add.
func (s *Spool) SaveProgress(p scrapeProgress) {
	same := slices.Equal(p.Gaps, s.progress.Gaps)
	s.progress, s.progressUnsaved = p, true
	if !same || s.progressFailing || s.progressSaved == (Moment{}) || s.cfg.Now().Since(s.progressSaved) >= progressSaveEvery {
		s.writeProgress()
	}
}

// writeProgress writes the record, unless it is written already. While scrapes are in memory only, the
// older record stays: if the process ends, their samples are fetched again. Of several failures in a
// row, only the first is reported to OnError.
func (s *Spool) writeProgress() {
	if s.cfg.Dir == "" || !s.progressUnsaved || s.Stats().InMemory > 0 {
		return
	}
	s.progressSaved = s.cfg.Now()
	_, err := s.replaceWithRecord(progressName, progressKind, appendScrapeProgress(nil, s.progress))
	if err != nil && !s.progressFailing {
		s.cfg.OnError(fmt.Errorf("writing the record of the last scrape: %w", err))
	}
	s.progressFailing, s.progressUnsaved = err != nil, err != nil
}
