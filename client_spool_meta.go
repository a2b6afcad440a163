package main

// The spool's own record, beside the scrapes: the ID by which servers know the spool, and the
// consumers, so that a server that lost its disk learns which of them have to read. The list
// is bounded, and has no consumer that has not scraped for a day. Pure.

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"time"
)

const (
	spoolLogName  = "spool" + LogSuffix
	spoolLogKind  = 1
	spoolLogHead  = 3*8 + 1 // bytes of a payload before the boot ID
	spoolConsumer = 2 * 8   // bytes of a consumer
	consumerKept  = 24 * time.Hour
	consumerMoved = time.Hour // by which a consumer's newest scrape moves before it is written again
)

var errBadSpoolLog = errors.New("not a spool's record")

// spoolLog is what the file holds. The ages are as of At.
type spoolLog struct {
	ID        uint64 // not 0
	At        Moment
	Consumers []ConsumerAge // by key
}

// appendSpoolLog appends the payload of the record, which is of spoolLogKind:
//
//	uint64 ID; int64 wall, boot; byte length of the boot ID; boot ID; then for each consumer uint64 key, age in ms
func appendSpoolLog(b []byte, l *spoolLog) []byte {
	for _, n := range []uint64{l.ID, uint64(l.At.Wall), uint64(l.At.Boot)} {
		b = binary.LittleEndian.AppendUint64(b, n)
	}
	b = append(append(b, byte(len(l.At.BootID))), l.At.BootID...)
	for _, c := range l.Consumers {
		b = binary.LittleEndian.AppendUint64(b, c.Key)
		b = binary.LittleEndian.AppendUint64(b, uint64(c.Age.Milliseconds()))
	}
	return b
}

// decodeSpoolLog is as strict as decodeScrape.
func decodeSpoolLog(payload []byte) (l spoolLog, err error) {
	if len(payload) < spoolLogHead || len(payload)-spoolLogHead < int(payload[spoolLogHead-1]) {
		return l, fmt.Errorf("%w: %d bytes", errBadSpoolLog, len(payload))
	}
	number := func(at int) uint64 { return binary.LittleEndian.Uint64(payload[at:]) }
	end := spoolLogHead + int(payload[spoolLogHead-1])
	l.ID, l.At = number(0), Moment{Wall: int64(number(8)), Boot: int64(number(16)), BootID: string(payload[spoolLogHead:end])}
	payload = payload[end:]
	if l.ID == 0 || !l.At.IsValid() || len(payload)%spoolConsumer != 0 || len(payload) > MaxConsumers*spoolConsumer {
		return l, fmt.Errorf("%w: ID %x at %+v, %d bytes of consumers", errBadSpoolLog, l.ID, l.At, len(payload))
	}
	for at := 0; at < len(payload); at += spoolConsumer {
		c, ms := ConsumerAge{Key: number(at)}, number(at+8)
		if ms > uint64(consumerKept/time.Millisecond) || at > 0 && c.Key <= l.Consumers[len(l.Consumers)-1].Key {
			return l, fmt.Errorf("%w: consumer %x of %d ms", errBadSpoolLog, c.Key, ms)
		}
		c.Age = time.Duration(ms) * time.Millisecond
		l.Consumers = append(l.Consumers, c)
	}
	return l, nil
}

// merge returns l as of now, with what a server told of its consumers: of a consumer that
// both know the smaller age counts, one that the server does not know stays for a day
// after its last scrape. Above MaxConsumers the ones that scraped last stay.
func (l *spoolLog) merge(now Moment, told []ConsumerAge) spoolLog {
	ages := map[uint64]time.Duration{}
	note := func(key uint64, age time.Duration) {
		if old, ok := ages[key]; age <= consumerKept && (!ok || age < old) {
			ages[key] = age
		}
	}
	passed := now.Since(l.At)
	for _, c := range l.Consumers {
		note(c.Key, c.Age+passed)
	}
	for _, c := range told {
		note(c.Key, max(0, c.Age).Truncate(time.Millisecond))
	}
	out := spoolLog{ID: l.ID, At: now}
	for key, age := range ages {
		out.Consumers = append(out.Consumers, ConsumerAge{key, age})
	}
	slices.SortFunc(out.Consumers, func(a, b ConsumerAge) int { return cmp.Or(cmp.Compare(a.Age, b.Age), cmp.Compare(a.Key, b.Key)) })
	out.Consumers = out.Consumers[:min(len(out.Consumers), MaxConsumers)]
	slices.SortFunc(out.Consumers, func(a, b ConsumerAge) int { return cmp.Compare(a.Key, b.Key) })
	return out
}

// news reports whether l differs from what was saved before by more than the time that
// passed and a bit: each change costs the disk a write.
func (l *spoolLog) news(saved *spoolLog) bool {
	if l.ID != saved.ID || len(l.Consumers) != len(saved.Consumers) {
		return true
	}
	passed := l.At.Since(saved.At)
	for i, c := range l.Consumers {
		if old := saved.Consumers[i]; old.Key != c.Key || old.Age+passed-c.Age > consumerMoved {
			return true
		}
	}
	return false
}
