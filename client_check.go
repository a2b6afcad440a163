package main

// This file implements the checks of telemeter --mode client --check that need the client's
// internals. It tries a server with the request with which the client begins to push, so that a
// check and a push have the same errors, and reads a spool. It pushes nothing and writes no file.

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
)

// TryServer exchanges the client token for an upload token at the server with this URL, and pushes
// nothing. hostBehindMs is the server's clock minus the wall clock of this host, in ms. clockKnown is
// false if the server did not state its time. TryServer needs no spool.
func (c *Client) TryServer(ctx context.Context, server string) (hostBehindMs int64, clockKnown bool, err error) {
	clock := NewSourceClockTracker(0)
	p := &Pusher{cfg: PusherConfig{
		To: []string{server}, ToClient: c.cfg.ToClient, ClusterID: c.cfg.ClusterID, Token: func() string { return c.state.Load().Token },
		SourceClock: clock, Moment: c.moment, Now: c.cfg.Now, Metrics: c.cfg.Metrics, Log: c.cfg.Log,
	}}
	if _, err := p.ensureUploadToken(ctx); err != nil {
		return 0, false, err
	}
	now := c.moment()
	hostBehindMs, clockKnown = clock.Offset(now, now.Wall)
	return hostBehindMs, clockKnown, nil
}

// ExternalLabels returns the labels that the /federate of the source adds to series. It asks the query
// API of the source. The error says why that API does not answer. got is a scrape of the source.
func (c *Client) ExternalLabels(ctx context.Context, got *CleanedScrape) (map[string]string, error) {
	api := c.newSourceAPI()
	selectors, err := api.selectors()
	if err != nil {
		return nil, err
	}
	return api.externalLabels(ctx, selectors, got.SourceTime)
}

// CheckSpoolSite returns an error if the spool in dir has scrapes of another cluster ID, or if its
// scrapes cannot be read. It reads only one scrape, because all scrapes of a spool are of one site.
// A client may be using the spool.
func CheckSpoolSite(dir, clusterID string) error {
	entries, err := DiskFS{}.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("reading spool: %w", err)
	}
	for _, e := range entries {
		if _, rest, ok := parseScrapeFileName(e.Name()); !ok || rest != "" {
			continue
		}
		log, found, err := OpenLog(readOnlyFS{}, filepath.Join(dir, e.Name()), func(byte, []byte) error { return nil })
		switch {
		case errors.Is(err, fs.ErrNotExist) || err == nil && found.HeaderDamaged:
			continue // a running client removed the scrape, or a start sets it aside
		case err != nil:
			return fmt.Errorf("reading spool: %w", err)
		case string(log.Identity()) != clusterID:
			return otherSiteError(dir, string(log.Identity()), clusterID)
		}
		return nil
	}
	return nil
}

// readOnlyFS is the disk without the operations that change it.
type readOnlyFS struct{ DiskFS }

func (readOnlyFS) OpenFile(string, int, fs.FileMode) (File, error) { return nil, fs.ErrPermission }
func (readOnlyFS) Mkdir(string, fs.FileMode) error                 { return fs.ErrPermission }
func (readOnlyFS) Rename(string, string) error                     { return fs.ErrPermission }
func (readOnlyFS) Remove(string) error                             { return fs.ErrPermission }
func (readOnlyFS) SyncDir(string) error                            { return fs.ErrPermission }
