package main

import (
	"bytes"
	"testing"
)

// If decodeScrape accepts a payload together with its text, encoding the result gives the same
// bytes. The sizes that the payload states are then within their limits.
func FuzzDecodeScrape(f *testing.F) {
	r := spoolRig{now: Moment{1_700_000_000_000, 5, "boot-1"}}
	for _, lines := range []int{0, 1, 20} {
		sc := r.scrape(1, lines)
		f.Add(appendScrapePayload(nil, &sc))
		sc.Corrected, sc.Shift = true, -77
		f.Add(appendScrapePayload(nil, &sc))
		sc.Samples++
		f.Add(appendScrapePayload(nil, &sc))
	}
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, data []byte) {
		head, headErr := decodeScrape(data, false)
		sc, err := decodeScrape(data, true)
		if err == nil && headErr != nil {
			t.Fatalf("decodes with its text, but without it fails: %v", headErr)
		}
		if err != nil {
			return
		}
		if head.Samples > head.Size/shortestLine || head.Size > MaxPieceText || len(head.At.BootID) > MaxBootID {
			t.Fatalf("the header %+v exceeds a limit", head)
		}
		if again := appendScrapePayload(nil, &sc); !bytes.Equal(again, data) {
			t.Fatalf("the payload %q encodes to %q after decoding", data, again)
		}
	})
}
