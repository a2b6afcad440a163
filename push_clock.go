package main

// The times of a push: the source's clock, which the headers tell, and the hint for a
// sender whose samples all have a time that is not accepted. Pure: all times come in. This
// file must not know of senders, stores or answers.

import (
	"hash/fnv"
	"io"
	"net/http"
	"slices"
	"strconv"
	"time"
)

// PushClock reads the headers that tell the source's clock. now is the time, in ms, that a
// sample without a time gets: the source's, if the headers tell it, else the arrival's. An
// impossible value counts as not told, because refusing the push would cost its samples.
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

// TimesHint says what is wrong with the times of a push whose samples are all too old or of
// the future. oldest is the least time that is accepted, in ms, as is now. A present time
// in seconds, read as milliseconds, is in January 1970, and no sample is that old, so a
// single one tells. A day more on either side allows for a wrong clock or time zone.
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
