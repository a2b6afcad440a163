package main

// What a push tells of time: the clock of its source, by its headers, and what is
// wrong with the times of its samples when none of them is taken. Pure: all times
// come in. This file must not know of senders, stores or answers.

import (
	"hash/fnv"
	"io"
	"net/http"
	"slices"
	"strconv"
	"time"
)

// PushClock reads the headers of a push's clock, and returns what a sample without a
// time gets: the source's time if it is known, else that of arrival. What no clock can
// say is not known, which costs less than the samples.
func PushClock(h http.Header, arrival time.Time) (clock ScrapeClock, now int64) {
	now = arrival.UnixMilli()
	var ms [3]int64
	for i, name := range []string{SourceClockHeader, BootClockHeader, ScrapeAgeHeader} {
		v, err := strconv.ParseInt(h.Get(name), 10, 64)
		if err != nil {
			return ScrapeClock{}, now
		}
		ms[i] = v
	}
	var boot uint64
	if id := h.Get(BootIDHeader); id != "" {
		sum := fnv.New64a()
		io.WriteString(sum, id)
		boot = sum.Sum64()
	}
	clock, ok := NewScrapeClock(ms[0], ms[1], boot, ms[2], now)
	if !ok {
		return ScrapeClock{}, now
	}
	return clock, ms[0]
}

// TimesHint says what is wrong with the times of a push of which all samples are too
// old or of the future; oldest is the least time that is taken, in ms as now is.
// Seconds of these days, read as milliseconds, are in January 1970, where no sample is
// from: a single one tells. A day more on either side allows for a clock or a time zone
// that is wrong.
func TimesHint(p *Push, tooOld, future int, oldest, now int64) string {
	const day = 24 * 60 * 60 // s
	switch {
	case slices.ContainsFunc(p.Samples, func(s Sample) bool { return s.T >= oldest/1000-day && s.T <= now/1000+day }):
		return "the times look like seconds; they have to be milliseconds"
	case future == 0:
		return "all samples are older than --retention"
	case tooOld == 0:
		return "all samples are ahead of the server's clock"
	}
	return "all samples are older than --retention or ahead of the server's clock"
}
