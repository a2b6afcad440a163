package main

// Opening a spool: files are listed and checked, leftovers of a crash removed, and damaged
// files set aside. Scrapes of another cluster ID are an error, because they must not be sent
// under this one.

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
)

// OpenSpool opens the spool in cfg.Dir, and makes the directory if need be.
// A damaged file is set aside and told to OnError. A file that cannot be read is an error,
// and so are scrapes of another cluster ID: they must not be sent under this one.
func OpenSpool(cfg SpoolConfig) (*Spool, error) {
	s := &Spool{cfg: cfg, next: 1, unlock: func() error { return nil }}
	if cfg.Dir == "" {
		s.number()
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
	s.number()
	s.saveLog()
	return s, nil
}

// openLog reads the spool's record. Without one, or when it is damaged or of another
// cluster ID, the spool gets a new ID, under which nothing was sent yet.
func (s *Spool) openLog(scrapes int) error {
	file, rec, err := OpenLog(s.cfg.FS, s.path(spoolLogName), func(kind byte, payload []byte) error {
		l, err := decodeSpoolLog(payload)
		if kind != spoolLogKind || err != nil {
			return cmp.Or(err, errBadSpoolLog)
		}
		s.saved = l
		return nil
	})
	if errors.Is(err, fs.ErrNotExist) {
		if scrapes > 0 {
			s.cfg.OnError(fmt.Errorf("%s is missing: servers are sent all scrapes again, and which consumers have to read is not known", s.path(spoolLogName)))
		}
		return nil
	}
	if err != nil {
		return err
	}
	if rec.Records != 1 || rec.Damaged > 0 || rec.HeaderDamaged || rec.TornBytes > 0 {
		s.saved = spoolLog{}
		s.cfg.OnError(fmt.Errorf("%w: %s is damaged%s", errBadSpoolLog, s.path(spoolLogName), rec.KeptAs()))
	} else if string(file.Identity()) != s.cfg.Cluster {
		s.saved = spoolLog{}
	}
	s.log = s.saved
	return nil
}

func (s *Spool) recover() error {
	// Syncs the directory too: what a killed process renamed is durable from here on.
	if _, _, err := ListLogs(s.cfg.FS, s.cfg.Dir); err != nil {
		return err
	}
	list, err := ReadAgain(func() ([]fs.DirEntry, error) { return s.cfg.FS.ReadDir(s.cfg.Dir) })
	if err != nil {
		return err
	}
	var seqs []uint64
	for _, e := range list {
		name := e.Name()
		seq, rest, ok := parseSpoolName(name)
		if !ok || !e.Type().IsRegular() {
			continue
		}
		s.next = max(s.next, seq+1)
		switch {
		case rest == "":
			seqs = append(seqs, seq)
		case strings.HasSuffix(rest, spoolTemp): // a crash cut its writing short
			if err := s.cfg.FS.Remove(s.path(name)); err != nil {
				s.cfg.OnError(fmt.Errorf("removing leftover: %w", err))
			}
		case strings.HasPrefix(rest, spoolRefused), strings.HasPrefix(rest, spoolDamaged):
			s.aside = append(s.aside, name)
		}
	}
	if err := s.openLog(len(seqs)); err != nil {
		return err
	}
	slices.Sort(s.aside)
	slices.Sort(seqs)
	for _, seq := range seqs {
		e, identity, err := s.read(seq, false)
		if err == nil && identity != s.cfg.Cluster {
			return fmt.Errorf("%s holds scrapes of cluster ID %q, not of %q: give each its own --spool-dir, or move the scrapes away",
				s.cfg.Dir, identity, s.cfg.Cluster)
		}
		if isLost(err) {
			s.cfg.OnError(err)
			s.setAside(seq, spoolDamaged)
			continue
		}
		if err != nil {
			return err
		}
		e.Gzip, e.unsure = nil, true
		s.plan.add(e)
	}
	return nil
}
