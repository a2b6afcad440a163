package main

// The spool's own record, beside the scrapes: the ID by which servers know the spool, and the
// consumers, so that a server that lost its disk learns which of them have to read. The list
// is bounded, and has no consumer that has not scraped for a day. Pure.

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"slices"
	"time"
)

const (
	spoolMetaName  = "spool" + LogSuffix
	spoolMetaKind  = 1     // kind of the record, and version of its payload
	consumerSize   = 2 * 8 // bytes of a consumer
	consumerMaxAge = 24 * time.Hour
	consumerLag    = time.Hour // by which a consumer's newest scrape moves before it is written again
)

// spoolMeta is the content of the spool's own record.
type spoolMeta struct {
	ID        uint64        // not 0
	At        Moment        // when the ages were as in Consumers
	Consumers []ConsumerAge // by key
}

// appendSpoolMeta appends the payload of a record of spoolMetaKind:
//
//	uint64 ID; moment; then for each consumer uint64 key, age in ms
func appendSpoolMeta(b []byte, m *spoolMeta) []byte {
	b = binary.LittleEndian.AppendUint64(b, m.ID)
	b = appendMoment(b, m.At)
	for _, c := range m.Consumers {
		b = binary.LittleEndian.AppendUint64(b, c.Key)
		b = binary.LittleEndian.AppendUint64(b, uint64(c.Age.Milliseconds()))
	}
	return b
}

// decodeSpoolMeta is as strict as decodeScrape.
func decodeSpoolMeta(payload []byte) (m spoolMeta, err error) {
	r := NewWireReader(payload)
	m.ID = r.Uint64()
	m.At = readMoment(&r)
	r.Require(m.ID != 0 && r.Len() <= MaxConsumers*consumerSize)
	for r.Len() > 0 {
		key, ms := r.Uint64(), r.Uint64()
		n := len(m.Consumers)
		r.Require(ms <= uint64(consumerMaxAge.Milliseconds()) && (n == 0 || key > m.Consumers[n-1].Key))
		m.Consumers = append(m.Consumers, ConsumerAge{key, time.Duration(ms) * time.Millisecond})
	}
	if err := r.Done(); err != nil {
		return spoolMeta{}, fmt.Errorf("malformed record of a spool: %w", err)
	}
	return m, nil
}

// mergedWith returns m as of now, with the consumers that a server reported. Of a consumer that both
// know the smaller age counts. A consumer stays until it has not scraped for a day. Above
// MaxConsumers the ones that scraped last stay.
func (m *spoolMeta) mergedWith(now Moment, reported []ConsumerAge) spoolMeta {
	ages := map[uint64]time.Duration{}
	add := func(key uint64, age time.Duration) {
		if old, ok := ages[key]; age <= consumerMaxAge && (!ok || age < old) {
			ages[key] = age
		}
	}
	passed := now.Since(m.At)
	for _, c := range m.Consumers {
		add(c.Key, c.Age+passed)
	}
	for _, c := range reported {
		add(c.Key, max(0, c.Age).Truncate(time.Millisecond))
	}
	out := spoolMeta{ID: m.ID, At: now}
	for key, age := range ages {
		out.Consumers = append(out.Consumers, ConsumerAge{key, age})
	}
	slices.SortFunc(out.Consumers, func(a, b ConsumerAge) int { return cmp.Or(cmp.Compare(a.Age, b.Age), cmp.Compare(a.Key, b.Key)) })
	out.Consumers = out.Consumers[:min(len(out.Consumers), MaxConsumers)]
	slices.SortFunc(out.Consumers, func(a, b ConsumerAge) int { return cmp.Compare(a.Key, b.Key) })
	return out
}

// needsSaving reports whether m has to be written, because saved does not say the same: another
// ID, other consumers, or a consumer whose newest scrape is later by more than consumerLag. Not
// every scrape is written, because each change costs the disk a write.
func (m *spoolMeta) needsSaving(saved *spoolMeta) bool {
	if m.ID != saved.ID || len(m.Consumers) != len(saved.Consumers) {
		return true
	}
	passed := m.At.Since(saved.At)
	for i, c := range m.Consumers {
		if old := saved.Consumers[i]; old.Key != c.Key || old.Age+passed-c.Age > consumerLag {
			return true
		}
	}
	return false
}
