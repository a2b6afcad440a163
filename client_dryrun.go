package main

// This file implements a dry run: one scrape whose samples are printed instead of pushed. The
// samples are printed exactly as they would be pushed. A summary then says which part of the scrape
// they are, and what the client changed in them.

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"
)

// DryRun scrapes the source once. It writes the samples that would leave the site to samples, in
// the text format. It then writes a summary for people to summary, and logs the warnings about
// flags that match no series. If missing is not 0, it first writes the samples that would be fetched
// if scrapes had been missing for that time.
func (c *Client) DryRun(ctx context.Context, missing time.Duration, samples, summary io.Writer) error {
	got, err := c.Scrape(ctx)
	if err != nil {
		return fmt.Errorf("source: %w", err)
	}
	fetched, interval := 0, c.cfg.ScrapeInterval.Milliseconds()
	var failure error
	if missing > 0 {
		missed := scrapeProgress{Gaps: []gap{{got.SourceTime - missing.Milliseconds(), got.SourceTime - interval}}}
		b := newBackfiller(c, missing, missed.without(gap{}))
		b.clock = got.Pieces[0]
		for slice, ok := b.nextSlice(); ok; slice, ok = b.nextSlice() {
			filled, err := b.fetch(ctx, slice)
			if err != nil && b.shorten(slice, err) {
				continue
			}
			if err != nil {
				failure = fmt.Errorf("source: fetching the samples of missing scrapes: %w", err)
				break
			}
			if err := filled.scrape.writeTo(samples); err != nil {
				return err
			}
			fetched += filled.scrape.Samples
			b.removeGap(slice)
		}
	}
	if err := got.writeTo(samples); err != nil {
		return err
	}
	if missing > 0 && failure == nil {
		fmt.Fprintf(summary, "dry run: %d samples of the last %s would be fetched for missing scrapes\n", fetched, FormatAge(missing))
	}
	if _, err := summary.Write(c.describeDryRun(got)); err != nil {
		return fmt.Errorf("writing summary: %w", err)
	}
	c.LogUnmatchedFlags(got)
	return failure
}

// writeTo writes the samples of a scrape.
func (sr *CleanedScrape) writeTo(samples io.Writer) error {
	for i := range sr.Pieces {
		text, err := sr.Pieces[i].Text()
		if err == nil {
			_, err = samples.Write(text)
		}
		if err != nil {
			return fmt.Errorf("writing samples: %w", err)
		}
	}
	return nil
}

// describeDryRun returns the summary of a dry run. The counters of the client must have counted only
// the scrape got.
func (c *Client) describeDryRun(got *CleanedScrape) []byte {
	var b bytes.Buffer
	line := func(what, format string, args ...any) {
		fmt.Fprintf(&b, "  %-9s "+format+"\n", append([]any{what}, args...)...)
	}
	fmt.Fprintf(&b, "dry run: nothing was pushed; of %d scraped series, %d would leave the site\n", got.Scraped, got.Samples)
	line("source", "%s", c.cfg.From.Redacted())
	for _, d := range []struct{ reason, why string }{
		{DropNotMatched, "no --match selects them"},
		{DropReserved, "the server uses their names for its own metrics"},
		{DropInvalid, "they are not valid"},
	} {
		if n := c.dropped.Value(d.reason); n > 0 {
			line("dropped", "%v series: %s (%s)", n, d.why, d.reason)
		}
	}
	for _, kind := range slices.Sorted(maps.Keys(UnsupportedParts{}.ByKind())) {
		if n := c.skipped.Value(kind); n > 0 {
			line("left out", "%v parts of series that cannot be pushed (%s)", n, kind)
		}
	}
	for _, old := range slices.Sorted(maps.Keys(got.Use.Renamed)) {
		line("renamed", "%s to %s: %d series", old, c.state.Load().NewCleaner().Rename[old], got.Use.Renamed[old])
	}
	for _, name := range slices.Sorted(maps.Keys(got.Use.Elided)) {
		line("removed", "label %s of %d series", name, got.Use.Elided[name])
	}
	values := distinctValues(got, got.Use.Anonymized)
	for _, name := range slices.Sorted(maps.Keys(got.Use.Anonymized)) {
		line("hashed", "label %s of %d series, %d values", name, got.Use.Anonymized[name], values[name])
	}
	if len(got.Use.Anonymized) == 0 {
		line("hashed", "no label; --anonymize-labels names the labels to hash")
	}
	_, labels := namesIn(got)
	labels = slices.DeleteFunc(labels, func(name string) bool { _, hashed := got.Use.Anonymized[name]; return hashed })
	if len(labels) > 0 {
		line("readable", "labels %s", strings.Join(labels, ", "))
	}
	size, gzipSize := 0, 0
	for _, p := range got.Pieces {
		size, gzipSize = size+p.Size, gzipSize+len(p.Gzip)
	}
	line("size", "%d bytes, %d bytes compressed", size, gzipSize)
	return b.Bytes()
}

// distinctValues returns how many values each label that is a key of names has in a scrape.
func distinctValues(got *CleanedScrape, names map[string]int) map[string]int {
	values := map[string]map[string]bool{}
	for name := range names {
		values[name] = map[string]bool{}
	}
	got.eachSeries(func(_ []byte, labels []Label) {
		for i := range labels {
			if set := values[string(labels[i].Name)]; set != nil {
				addKey(set, labels[i].Value)
			}
		}
	})
	n := map[string]int{}
	for name, set := range values {
		n[name] = len(set)
	}
	return n
}
