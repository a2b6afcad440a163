package main

// This file keeps for each site what the server needs to store its next push without parsing the
// series that the site has: the known series, and for which rules, labels and series table they are
// valid. If one of these changes, the next push of the site is decoded as if it were the first. The
// answer to a push does not depend on which series are known, with one exception: a push of known
// series may be accepted although its rendered lines exceed the limit for a push that is decoded.
// This file must not know of HTTP.

import (
	"errors"
	"maps"
)

const (
	maxKnownDropped = 1000 // known series of a site that the rules drop, besides one for each series of its table
	maxKnownPause   = 31   // pushes for which the known series of a site are not used, at most; see knownSiteSeries.pause
)

// knownSiteSeries has the known series of one site. Only the holder of the site's siteDecodeLock may
// use it.
type knownSiteSeries struct {
	known      KnownSeries
	rules      *ServerNormalizer // the rules that the known series were normalized by
	token      map[string]string // the labels of the token that they were pushed with
	forced     []Label           // the forced labels that follow from rules and token
	use        NormalizerUse     // rules that match the known series, and perhaps others that matched since forget
	generation uint64            // of the series table with the IDs of the known series

	// pause is the number of pushes that are yet to be decoded without the known series. nextPause is
	// the number for the next push that has to be decoded again. It grows while no push is decoded
	// with the known series at once, so that a site whose pushes repeat series in a way that the
	// known series do not support is not decoded twice each time.
	pause, nextPause int

	isRetry bool // whether the push that is being decoded was decoded before
}

// prepare prepares k for a push with these rules and labels of the token. If they differ from those
// of the push before, it forgets the known series.
func (k *knownSiteSeries) prepare(rules *ServerNormalizer, push *pushRequest) {
	if k.rules != rules || !maps.Equal(k.token, push.Labels) {
		k.forced = rules.ForcedLabels(push.ClusterID, push.Labels)
		k.rules, k.token = rules, maps.Clone(push.Labels)
		k.forget()
	}
}

// forget forgets the known series.
func (k *knownSiteSeries) forget() {
	k.known.Forget()
	k.use = k.rules.NewUse()
}

// begin returns the known series for decoding the next push, or nil if they must not be used.
func (k *knownSiteSeries) begin() *KnownSeries {
	if k.pause > 0 {
		k.pause--
		return nil
	}
	return &k.known
}

// decodeAgain prepares k for decoding a push again after err, which wraps ErrDecodeAgain. It forgets
// the known series. If they were only stale, the push makes its series known. Otherwise the known
// series are not used for this push and some of the next.
func (k *knownSiteSeries) decodeAgain(err error) {
	k.isRetry = true
	k.forget()
	if errors.Is(err, ErrStaleSeriesIDs) {
		return
	}
	k.pause, k.nextPause = k.nextPause+1, min(2*k.nextPause+1, maxKnownPause)
}

// finish makes the series of a decoded push known, which was stored with the result res.
func (k *knownSiteSeries) finish(decoded *KnownPush, res AppendResult) {
	if decoded.Received > 0 {
		k.nextPause = 0
	}
	if !decoded.CanLearn() || res.Generation == 0 {
		return
	}
	if k.generation != res.Generation {
		k.known.Forget() // but keep k.use: it has the rules that match the series of this push
		k.generation = res.Generation
	}
	decoded.Learn(res.TableLen + maxKnownDropped)
}
