package main

import (
	"bytes"
	"slices"
	"testing"
	"time"
)

// If both the spool's record and a server list a consumer, mergedWith keeps the smaller age. It
// forgets consumers that have not scraped for more than a day, and keeps at most the MaxConsumers
// consumers that scraped last.
func TestSpoolMetaMerge(t *testing.T) {
	at := Moment{Wall: 1000, Boot: 1000, BootID: "b"}
	later := func(d time.Duration) Moment {
		return Moment{Wall: 1000 + d.Milliseconds(), Boot: 1000 + d.Milliseconds(), BootID: "b"}
	}
	var many []ConsumerAge
	for i := range uint64(MaxConsumers) {
		many = append(many, ConsumerAge{i, time.Duration(i) * time.Second})
	}
	for name, tt := range map[string]struct {
		have  []ConsumerAge // the consumers in the spool's record
		after time.Duration // time between the record and the merge
		told  []ConsumerAge // the consumers that a server reports
		want  string        // the consumers after the merge, as FormatConsumers formats them
	}{
		"no consumer":                  {nil, time.Hour, nil, ""},
		"ages grow":                    {[]ConsumerAge{{1, time.Second}}, time.Minute, nil, "0000000000000001:61"},
		"forgotten after a day":        {[]ConsumerAge{{1, time.Hour}, {2, time.Hour + time.Second}}, 23 * time.Hour, nil, "0000000000000001:86400"},
		"the smaller age":              {[]ConsumerAge{{1, time.Second}, {2, time.Hour}}, 0, []ConsumerAge{{1, time.Hour}, {2, time.Second}}, "0000000000000001:1,0000000000000002:1"},
		"a new consumer":               {[]ConsumerAge{{2, 0}}, 0, []ConsumerAge{{1, 0}}, "0000000000000001:0,0000000000000002:0"},
		"reported as older than a day": {nil, 0, []ConsumerAge{{1, 25 * time.Hour}}, ""},
		"reported twice":               {nil, 0, []ConsumerAge{{1, time.Hour}, {1, time.Second}}, "0000000000000001:1"},
		"at most 64":                   {many, 0, []ConsumerAge{{1000, 0}}, FormatConsumers(append(slices.Clone(many[:MaxConsumers-1]), ConsumerAge{1000, 0}))},
	} {
		l := spoolMeta{ID: 1, At: at, Consumers: tt.have}
		got := l.mergedWith(later(tt.after), tt.told)
		if text := FormatConsumers(got.Consumers); text != tt.want || got.ID != 1 || got.At != later(tt.after) {
			t.Errorf("%s: got the consumers %s, want %s", name, text, tt.want)
		}
	}
}

// If decodeSpoolMeta accepts a payload, encoding the result gives the same bytes. The result has a
// spool ID and at most MaxConsumers consumers.
func FuzzDecodeSpoolMeta(f *testing.F) {
	at := Moment{1_700_000_000_000, 5, "boot-1"}
	f.Add(appendSpoolMeta(nil, &spoolMeta{ID: 1, At: at}))
	f.Add(appendSpoolMeta(nil, &spoolMeta{ID: 1 << 63, At: at, Consumers: []ConsumerAge{{1, 0}, {1 << 63, consumerMaxAge}}}))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, data []byte) {
		l, err := decodeSpoolMeta(data)
		if err != nil {
			return
		}
		if l.ID == 0 || len(l.Consumers) > MaxConsumers {
			t.Fatalf("decoded %+v, want an ID and at most %d consumers", l, MaxConsumers)
		}
		if again := appendSpoolMeta(nil, &l); !bytes.Equal(again, data) {
			t.Fatalf("the payload %q encodes to %q after decoding", data, again)
		}
	})
}
