package main

// The spool's own record has the ID under which servers know the spool, and the known consumers.
// The client sends the list of consumers with each question and each push that names its scrapes,
// so that a server that lost its disk learns which consumers must read the scrapes. The list is
// limited to MaxConsumers and omits consumers that have not scraped for a day. Pure: no I/O, and
// callers pass the time.

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"slices"
	"time"
)

const (
	spoolMetaName  = "spool" + LogSuffix
	spoolMetaKind  = 1              // kind of the record, which is also the version of its payload
	consumerSize   = 2 * 8          // bytes of a consumer in the record
	consumerMaxAge = 24 * time.Hour // a consumer that has not scraped for longer is forgotten
	consumerLag    = time.Hour      // the record is written again when the time of a consumer's newest scrape has moved by more than this
)

// spoolMeta is the content of the spool's own record.
type spoolMeta struct {
	ID        uint64        // not 0 once the spool is open
	At        Moment        // the moment to which the ages in Consumers refer
	Consumers []ConsumerAge // in ascending order of their keys
}

// appendSpoolMeta appends the payload of a record of spoolMetaKind:
//
//	uint64 ID; moment; then for each consumer uint64 key, uint64 age in ms
func appendSpoolMeta(b []byte, m *spoolMeta) []byte {
	b = binary.LittleEndian.AppendUint64(b, m.ID)
	b = appendMoment(b, m.At)
	for _, c := range m.Consumers {
		b = binary.LittleEndian.AppendUint64(b, c.Key)
		b = binary.LittleEndian.AppendUint64(b, uint64(c.Age.Milliseconds()))
	}
	return b
}

// decodeSpoolMeta decodes a payload strictly: every payload that it accepts is one that
// appendSpoolMeta can write.
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
		return spoolMeta{}, fmt.Errorf("malformed spool record: %w", err)
	}
	return m, nil
}

// mergedWith returns m with the ages as of now, merged with the consumers that a server reported.
// If both m and the server list a consumer, the smaller age wins. A consumer that has not scraped
// for a day is omitted. If there are more than MaxConsumers consumers, the consumers that scraped
// last stay.
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

// needsSaving reports whether m must be written. That is so if the ID or the set of consumers
// differs from saved, or if the time of a consumer's newest scrape has moved by more than
// consumerLag. Smaller changes are not written, because each write needs several syncs of the disk.
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
