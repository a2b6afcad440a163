package main

// This file reads and writes the files of a spool. Each scrape has its own file, and the spool has
// one record in another file. A file is always replaced as a whole and durably. The damaged file of
// a scrape is set aside and not sent. A file of another version, or a scrape of another cluster ID,
// makes OpenSpool fail and stays unchanged.

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// A scrape's file is a log with one record of scrapeKind. The file name is the scrape's number, and
// the log's identity is the cluster ID. The directory may also have files that SetAside renamed,
// with the reason in their names. The scrapes in files set aside are not sent, unless an operator
// renames such a file back. The next OpenSpool then reads it again.
const (
	spoolDigits    = 16        // digits of the number in a file name
	spoolRefused   = "refused" // reason for setting a file aside: a server refused the scrape as invalid or too large
	spoolDamaged   = "damaged" // reason for setting a file aside: the file does not have exactly one good record
	spoolTemp      = ".tmp"    // suffix of the temporary file of an unfinished write
	maxAsideFiles  = 16        // most files set aside that are kept
	fileBlock      = 4096      // bytes; a file is assumed to occupy a multiple of this on disk
	maxFileHeaders = 128       // most bytes of a file besides the gzip, boot ID and cluster ID
)

// errSpoolFileDamaged is returned for a file that does not have exactly one good record.
var errSpoolFileDamaged = errors.New("damaged spool file")

// isScrapeLost reports whether err means that a scrape's file is missing or damaged. After any
// other error the file may be good.
func isScrapeLost(err error) bool {
	return errors.Is(err, errSpoolFileDamaged) || errors.Is(err, fs.ErrNotExist)
}

func scrapeFileName(number uint64) string {
	return fmt.Sprintf("%0*d%s", spoolDigits, number, LogSuffix)
}

// parseScrapeFileName returns the scrape number in a file name and the part of the name that
// follows LogSuffix. ok is false if the name does not begin with a number of spoolDigits digits and
// LogSuffix.
func parseScrapeFileName(name string) (number uint64, rest string, ok bool) {
	digits, rest, found := strings.Cut(name, LogSuffix)
	number, err := strconv.ParseUint(digits, 10, 64)
	return number, rest, found && err == nil && len(digits) == spoolDigits
}

func (s *Spool) path(name string) string { return filepath.Join(s.cfg.Dir, name) }

// roundToBlocks returns the bytes of disk that a file of size bytes occupies.
func roundToBlocks(size int64) int64 { return (size + fileBlock - 1) / fileBlock * fileBlock }

// maxFileSize returns the most bytes of disk that the file of a scrape can occupy.
func (s *Spool) maxFileSize(sc *Scrape) int64 {
	return roundToBlocks(int64(len(sc.Gzip) + len(sc.At.BootID) + len(s.cfg.ClusterID) + maxFileHeaders))
}

// OpenSpool opens the spool in cfg.Dir, creating the directory if needed. A damaged file is set
// aside and reported to OnError. OpenSpool fails if a file cannot be read or is of another version.
// It also fails if a scrape is of another cluster ID, because the scrape must not be sent under
// cfg.ClusterID.
func OpenSpool(cfg SpoolConfig) (*Spool, error) {
	s := &Spool{cfg: cfg, nextNumber: 1, unlock: func() error { return nil }}
	if cfg.Dir == "" {
		s.initIDAndNumber()
		return s, nil
	}
	if _, real := cfg.FS.(DiskFS); real {
		unlock, err := LockDir(cfg.Dir)
		if err != nil {
			return nil, fmt.Errorf("opening spool: %w", err)
		}
		s.unlock = unlock
	}
	if err := s.recover(); err != nil {
		return nil, errors.Join(fmt.Errorf("opening spool: %w", err), s.unlock())
	}
	s.initIDAndNumber()
	s.saveMetaIfChanged()
	return s, nil
}

// recover reads the directory and adds its scrapes to the index. They are marked as uncertain,
// because a server may hold them.
func (s *Spool) recover() error {
	numbers, err := s.scanAndTidyDir()
	if err != nil {
		return err
	}
	if err := s.loadMeta(len(numbers) > 0); err != nil {
		return err
	}
	if err := s.loadProgress(); err != nil {
		return err
	}
	for _, number := range numbers {
		e, identity, err := s.loadScrape(number, false)
		switch {
		case isScrapeLost(err):
			s.cfg.OnError(err)
			s.setFileAside(number, spoolDamaged)
			s.cfg.OnDrop(DropSpoolDamaged, 1, 1) // the number of samples is unknown
		case err != nil:
			return err
		case identity != s.cfg.ClusterID:
			return otherSiteError(s.cfg.Dir, identity, s.cfg.ClusterID)
		default:
			e.Gzip, e.uncertain = nil, true
			s.index.add(e)
		}
	}
	return nil
}

// otherSiteError is the error for a spool in dir that has scrapes of the cluster ID has, although
// the client pushes for the cluster ID want.
func otherSiteError(dir, has, want string) error {
	return fmt.Errorf("%s has scrapes of cluster ID %q, not of %q: give each cluster ID its own --spool-dir, or move the files away", dir, has, want)
}

// scanAndTidyDir returns the numbers of the scrapes in the directory, in ascending order. It also
// sets nextNumber above all numbers in file names, lists the files set aside, and removes the
// temporary files of scrapes whose writing a crash interrupted.
func (s *Spool) scanAndTidyDir() (numbers []uint64, err error) {
	// ListLogs syncs the directory. If a process was killed after it renamed a file and before it
	// synced the directory, the rename is durable from here on.
	if _, _, err := ListLogs(s.cfg.FS, s.cfg.Dir); err != nil {
		return nil, err
	}
	list, err := RetryRead(func() ([]fs.DirEntry, error) { return s.cfg.FS.ReadDir(s.cfg.Dir) })
	if err != nil {
		return nil, err
	}
	for _, e := range list {
		name := e.Name()
		number, rest, ok := parseScrapeFileName(name)
		if !ok || !e.Type().IsRegular() {
			continue
		}
		s.nextNumber = max(s.nextNumber, number+1)
		switch {
		case rest == "":
			numbers = append(numbers, number)
		case strings.HasSuffix(rest, spoolTemp):
			if err := s.cfg.FS.Remove(s.path(name)); err != nil {
				s.cfg.OnError(fmt.Errorf("removing an unfinished spool file: %w", err))
			}
		case strings.HasPrefix(rest, "."+spoolRefused), strings.HasPrefix(rest, "."+spoolDamaged):
			s.asideFiles = append(s.asideFiles, name)
		}
	}
	slices.Sort(s.asideFiles)
	slices.Sort(numbers)
	return numbers, nil
}

// loadScrape reads the file of a scrape. The returned entry includes the gzip. If checkText is
// true, loadScrape also checks the decompressed text. If isScrapeLost(err) is true, the file is
// damaged or missing.
func (s *Spool) loadScrape(number uint64, checkText bool) (e spoolEntry, clusterID string, err error) {
	log, err := s.readRecord(scrapeFileName(number), scrapeKind, func(payload []byte) error {
		sc, err := decodeScrape(payload, checkText)
		sc.Number, sc.Gzip = number, bytes.Clone(sc.Gzip)
		e = spoolEntry{Scrape: sc, gzipSize: len(sc.Gzip)}
		return err
	})
	if err != nil {
		return spoolEntry{}, "", err
	}
	e.footprint = roundToBlocks(log.Size())
	return e, string(log.Identity()), nil
}

// storeScrape writes the file of a scrape, durably, and returns the bytes of disk that the file
// occupies.
func (s *Spool) storeScrape(sc *Scrape) (footprint int64, err error) {
	log, err := s.replaceWithRecord(scrapeFileName(sc.Number), scrapeKind, appendScrapePayload(nil, sc))
	return roundToBlocks(log.Size()), err
}

// loadMeta reads the spool's record. If the record is missing, damaged or of another cluster ID,
// s.meta.ID stays 0, and initIDAndNumber chooses a new ID, under which no scrape was sent yet. A
// missing record is reported to OnError only if hasScrapes is true, because a new spool has neither
// scrapes nor a record.
func (s *Spool) loadMeta(hasScrapes bool) error {
	var meta spoolMeta
	log, err := s.readRecord(spoolMetaName, spoolMetaKind, func(payload []byte) (err error) {
		meta, err = decodeSpoolMeta(payload)
		return err
	})
	switch {
	case errors.Is(err, fs.ErrNotExist):
		if hasScrapes {
			s.cfg.OnError(fmt.Errorf("%s is missing: all scrapes are sent to the servers again, and the known consumers are lost", s.path(spoolMetaName)))
		}
		s.isNew = !hasScrapes
	case errors.Is(err, errSpoolFileDamaged):
		s.cfg.OnError(err)
	case err != nil:
		return err
	case string(log.Identity()) == s.cfg.ClusterID:
		s.meta, s.savedMeta = meta, meta
	}
	return nil
}

// saveMetaIfChanged writes the spool's record if needsSaving returns true. If several writes fail
// in a row, only the first failure is reported to OnError. The write is tried again after each
// later answer of a server that knows spools.
func (s *Spool) saveMetaIfChanged() {
	if s.cfg.Dir == "" || !s.meta.needsSaving(&s.savedMeta) {
		return
	}
	_, err := s.replaceWithRecord(spoolMetaName, spoolMetaKind, appendSpoolMeta(nil, &s.meta))
	switch {
	case err == nil:
		s.savedMeta = s.meta
	case !s.metaUnsaved:
		s.cfg.OnError(fmt.Errorf("writing the spool's record: %w", err))
	}
	s.metaUnsaved = err != nil
}

// readRecord reads a file and calls decode with the payload of its record. Files are always written
// as a whole, so a file that does not have exactly one good record and nothing else is damaged, and
// the error is errSpoolFileDamaged. A record of another kind is an error too, but does not count as
// damage.
func (s *Spool) readRecord(name string, kind byte, decode func(payload []byte) error) (*Log, error) {
	path := s.path(name)
	var cause, other error
	log, rec, err := OpenLog(s.cfg.FS, path, func(k byte, payload []byte) error {
		if k != kind {
			other = fmt.Errorf("%s has a record of version %d; this program knows version %d: use the program that wrote it, or move the file away", path, k, kind)
			return nil
		}
		err := decode(payload)
		cause = cmp.Or(cause, err)
		return err
	})
	switch {
	case err != nil:
		return nil, err
	case rec.Records != 1 || rec.Damaged > 0 || rec.HeaderDamaged || rec.TornBytes > 0:
		err := fmt.Errorf("%w: %s, %d bytes lost%s", errSpoolFileDamaged, path, rec.LostBytes+rec.TornBytes, rec.KeptCopyNote())
		if cause != nil {
			err = fmt.Errorf("%w: %w", err, cause)
		}
		return nil, err
	case other != nil:
		return nil, other
	}
	if rec.Err != nil {
		s.cfg.OnError(rec.Err) // the record is good, but the file could not be synced
	}
	return log, nil
}

// replaceWithRecord durably replaces a file by a file that has only the given record.
func (s *Spool) replaceWithRecord(name string, kind byte, payload []byte) (*Log, error) {
	log := NewLog(s.cfg.FS, s.path(name), []byte(s.cfg.ClusterID))
	return log, log.RewriteWith(AppendRecord(nil, kind, payload))
}

// setFileAside renames the file of a scrape, so that the scrape is never sent. Of the files set
// aside, it keeps the last maxAsideFiles and deletes the others.
func (s *Spool) setFileAside(number uint64, reason string) {
	name, err := SetAside(s.cfg.FS, s.path(scrapeFileName(number)), reason)
	if name != "" && !slices.Contains(s.asideFiles, name) {
		s.asideFiles = append(s.asideFiles, name)
	}
	for len(s.asideFiles) > maxAsideFiles {
		err = errors.Join(err, s.cfg.FS.Remove(s.path(s.asideFiles[0])))
		s.asideFiles = s.asideFiles[1:]
	}
	if err != nil {
		s.cfg.OnError(err)
	}
}

// removeFiles deletes the files of scrapes. If a file cannot be deleted, or reappears after a
// crash, the next OpenSpool reads its scrape again. The client then sends the scrape again, unless
// a server lists its number as held or read.
func (s *Spool) removeFiles(removed []spoolEntry) {
	if s.cfg.Dir == "" || len(removed) == 0 {
		return
	}
	var errs []error
	for _, e := range removed {
		if err := s.cfg.FS.Remove(s.path(scrapeFileName(e.Number))); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	errs = append(errs, s.cfg.FS.SyncDir(s.cfg.Dir))
	if err := errors.Join(errs...); err != nil {
		s.cfg.OnError(fmt.Errorf("removing from spool: %w", err))
	}
}
