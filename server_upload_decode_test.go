package main

// Tests of how the server shares its processors among sites: the slots for decoding, the order of
// the sites that wait, what a push costs its site, and pushes that repeat samples.

import (
	"bytes"
	"context"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// decodeRig is a server in virtual time for one processor, so that it has one bulk slot. A push that
// decodes to more than 1 MiB needs that slot.
type decodeRig struct {
	*srvRig
	disk *crashFS
}

func newDecodeRig(t *testing.T, rateInterval time.Duration) *decodeRig {
	disk := newStoreFS(1)
	r := &decodeRig{newVirtualRig(t), disk}
	store, err := OpenStore(StoreConfig{FS: disk, Dir: "/s", Retention: 2 * time.Hour, Now: time.Now, OnError: func(err error) { t.Error(err) }})
	if err != nil {
		t.Fatal(err)
	}
	r.store, r.server.cfg.Store = store, store
	r.server.decoding = newDecodeLanes(1)
	r.server.sites = NewSitePushLimiter(rateInterval, 1<<20)
	return r
}

// pushInBackground pushes text, compressed, for the site id, and sends the result to the channel
// that it returns.
func (r *decodeRig) pushInBackground(id, text string) chan error {
	done := make(chan error, 1)
	go func() {
		push := &pushRequest{ClusterID: id, Arrival: time.Now().UnixMilli(), Encoding: "gzip"}
		_, err := r.server.acquireAndStorePush(context.Background(), push, gzipped([]byte(text)))
		done <- err
	}()
	synctest.Wait()
	return done
}

// distinctSamples returns n lines of text exposition with samples of different series or times, at
// most 26 samples of a time. The text compresses well.
func distinctSamples(n int) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, "%c 1 %d\n", 'a'+i%26, 10+i/26)
	}
	return b.String()
}

// bigPush returns the body of a push that decodes to more than 1 MiB, but has one sample.
func bigPush() string { return "up 1\n" + strings.Repeat("# a comment counts too\n", 50_000) }

func checkStored(t *testing.T, what string, done chan error, want bool) {
	t.Helper()
	synctest.Wait()
	select {
	case err := <-done:
		if err != nil || !want {
			t.Errorf("%s: ended with %v, want stored: %t", what, err, want)
		}
	default:
		if want {
			t.Errorf("%s: still waits", what)
		}
	}
}

// While one push of a site is decoded or stored, the next push of the site waits. Pushes of other
// sites do not wait.
func TestOneSiteDecodesOnePush(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newDecodeRig(t, 0)
		r.hold("a", "up 1\n")
		lock := r.server.sites.DecodeLock("a")
		lock.TryAcquire() // as if a push of the site were being decoded
		waits := r.pushInBackground("a", "up 1\n")
		checkStored(t, "another site", r.pushInBackground("b", "up 1\n"), true)
		checkStored(t, "the same site", waits, false)
		lock.Release()
		checkStored(t, "the same site, after its first push", waits, true)
	})
}

// A push that decodes to many bytes waits while every bulk slot is taken. Small pushes do not wait,
// not even small pushes of the same size before decompression.
func TestBulkSlots(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newDecodeRig(t, 0)
		r.server.decoding.bulk.slots.TryAcquire() // as if a large push were being decoded
		waits := r.pushInBackground("a", bigPush())
		for i := range 20 {
			checkStored(t, "a small push", r.pushInBackground(fmt.Sprint("b", i), "up 1\n"), true)
		}
		checkStored(t, "a large push", waits, false)
		r.server.decoding.bulk.slots.Release()
		checkStored(t, "a large push, after the other one", waits, true)
		if n := r.server.decoding.InUse(); n != 0 {
			t.Errorf("%d slots are in use after all pushes", n)
		}
	})
}

// A large push gives up its slot after each error, and after storeTimeout without a slot it is
// refused as overloaded.
func TestBulkSlotErrors(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newDecodeRig(t, 0)
		for _, body := range []string{bigPush() + "malformed", strings.Repeat("#\n", 4<<20+1), "malformed"} {
			if err := <-r.pushInBackground("a", body); err == nil {
				t.Errorf("a malformed push of %d bytes was stored", len(body))
			}
			if n := r.server.decoding.InUse(); n != 0 {
				t.Errorf("%d slots are in use after a malformed push of %d bytes", n, len(body))
			}
		}
		r.server.decoding.bulk.slots.TryAcquire()
		begin := time.Now()
		err := <-r.pushInBackground("a", bigPush())
		if refused := refusalResponse(err); refused.Status != 503 || time.Since(begin) != storeTimeout {
			t.Errorf("without a slot: status %d after %v, want 503 after %v", refused.Status, time.Since(begin), storeTimeout)
		}
	})
}

// A site that has pushed so much that it is more than eight pushes ahead of its rate limit waits for
// a bulk slot even with a small push. A site that pushes little does not.
func TestSiteAheadOfPace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newDecodeRig(t, time.Second)
		r.server.decoding.bulk.slots.TryAcquire()
		for range aheadOfPace {
			checkStored(t, "a push", r.pushInBackground("a", "up 1\n"), true)
		}
		waits := r.pushInBackground("a", "up 1\n")
		checkStored(t, "the ninth push", waits, false)
		checkStored(t, "another site", r.pushInBackground("b", "up 1\n"), true)
		r.server.decoding.bulk.slots.Release()
		checkStored(t, "the ninth push, with a slot", waits, true)
		time.Sleep(2 * time.Second)
		r.server.decoding.bulk.slots.TryAcquire()
		checkStored(t, "a push after a pause", r.pushInBackground("a", "up 1\n"), true)
	})
}

// Sites that wait for a slot take turns: however many pushes one site sends, the next push of every
// other site comes before the second push of that site.
func TestSitesTakeTurns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newDecodeRig(t, 0)
		site := map[string]string{} // path of the log → cluster ID
		for _, id := range []string{"a", "b", "c"} {
			r.hold(id, "up 1\n")
			hash := ClusterIDHash(id)
			site[fmt.Sprintf("/s/%x/%x.log", hash[:1], hash[:16])] = id
		}
		var order string
		r.disk.hook = func(_ int, op, name string) fault {
			if op == "sync" {
				order += site[name]
			}
			return fault{}
		}
		r.server.decoding.bulk.slots.TryAcquire()
		for i, id := range []string{"a", "a", "a", "a", "b", "c", "b"} {
			r.pushInBackground(id, fmt.Sprintf("x%d 1\n", i)+bigPush())
		}
		r.server.decoding.bulk.slots.Release()
		// The order of the last four pushes depends on how fast each one decompresses its body.
		if synctest.Wait(); !strings.HasPrefix(order, "abc") || len(order) != 7 {
			t.Errorf("the pushes were stored in the order %s, want one push of a, b and c and then the other four", order)
		}
	})
}

// A push counts towards the rate limit of its site once for each MiB that it decodes to, whether
// the push is accepted, malformed or too large.
func TestDecodedBytesAreCharged(t *testing.T) {
	megabytes := func(n int) string { return strings.Repeat("#"+strings.Repeat(" ", 1022)+"\n", n<<10) }
	for _, c := range []struct {
		name, body string
		counts     int // pushes that the push counts as
	}{
		{"small", "up 1\n", 1},
		{"one MiB", megabytes(1), 1},
		{"one MiB and a line", megabytes(1) + "up 1\n", 2},
		{"eight MiB", megabytes(8), 8},
		{"too large", megabytes(9), 8},
		{"malformed at the end", megabytes(7) + "malformed", 8},
		{"gzip that ends in a wrong checksum", "", 8},
	} {
		r := newAnswerRig(t)
		r.server.cfg.LimitBytes = 1 << 20
		r.server.sites = NewSitePushLimiter(time.Second, 1<<20)
		body := gzipped([]byte(c.body))
		if c.body == "" {
			body = gzippedWithWrongChecksum(megabytes(7))
		}
		accepted := 0
		for {
			a := r.upload(r.uploadToken, body, "Content-Encoding", "gzip")
			if a.status == 429 {
				if !strings.Contains(a.body, "1048576 bytes") {
					t.Errorf("%s: the answer does not name the size that counts as a push: %s", c.name, a.body)
				}
				break
			}
			accepted++
		}
		if want := (rateBurst + c.counts - 1) / c.counts; accepted != want {
			t.Errorf("%s: %d pushes were handled before the rate limit, want %d", c.name, accepted, want)
		}
	}
}

func gzippedWithWrongChecksum(text string) []byte {
	body := gzipped([]byte(text))
	body[len(body)-8] ^= 1 // the last eight bytes are the checksum and the length
	return body
}

// A push whose decoding panics leaves no slot taken, because net/http goes on after a panic.
func TestPanicReleasesSlot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newDecodeRig(t, 0)
		r.server.Reload(ReloadableServerConfig{}) // without a Normalizer, which makes decodePush panic
		for _, body := range []string{"up 1\n", bigPush()} {
			func() {
				defer func() {
					if recover() == nil {
						t.Error("the push did not panic")
					}
				}()
				r.server.acquireAndStorePush(t.Context(), &pushRequest{ClusterID: "a", Encoding: "gzip"}, gzipped([]byte(body)))
			}()
			if n := r.server.decoding.InUse(); n != 0 {
				t.Errorf("%d slots are in use after a push of %d bytes that panicked", n, len(body))
			}
		}
	})
}

// A push may repeat a sample half a million times. The server stores the first sample with a series
// and a time, and counts the others: as duplicates if the values are equal, else as conflicts.
func TestRepeatedSamples(t *testing.T) {
	r := newSrvRig(t, func(_ *StoreConfig, c *ServerConfig) { c.LimitBytes = 1 << 20 })
	for _, c := range []struct {
		name, body           string
		accepted, duplicates int
		conflicts            int
	}{
		{"equal lines", strings.Repeat("a 1\n", 520_000), 1, 519_999, 0},
		{"labels in another order", "b{x=\"1\",y=\"2\"} 1\nb{y=\"2\",x=\"1\"} 1\n", 1, 1, 0},
		{"other values", "c 1\nc 2\nc 1\nc 3\n", 1, 1, 2},
		{"NaN", "d NaN\nd NaN\nd 1\n", 1, 1, 1},
		{"other times", fmt.Sprintf("e 1 %d\ne 1 %d\ne 1 %d\n", testNow.UnixMilli()-2, testNow.UnixMilli()-1, testNow.UnixMilli()-2), 2, 1, 0},
	} {
		got := r.accepted(r.upload(r.token(KindUpload, "site-a"), gzipped([]byte(c.body)), "Content-Encoding", "gzip"))
		if got.Accepted != c.accepted || got.Duplicates != c.duplicates || got.Dropped[dropConflict] != c.conflicts {
			t.Errorf("%s: answered %+v, want %d accepted, %d duplicates, %d conflicts", c.name, got, c.accepted, c.duplicates, c.conflicts)
		}
	}
}

// A client may push a backlog of 60 scrapes of a source whose samples have not changed. The server
// stores each sample once, and holds all 60 scrapes, even if the samples of all scrapes together
// are more than a push may have.
func TestBacklogOfUnchangedSource(t *testing.T) {
	r := newSrvRig(t, func(_ *StoreConfig, c *ServerConfig) { c.LimitBytes = 16 << 10 })
	var body []byte
	const scrapes, perScrape = 60, 100
	for range scrapes {
		var scrape bytes.Buffer
		for i := range perScrape {
			fmt.Fprintf(&scrape, "a%d 1 %d\n", i, testNow.UnixMilli()-60_000)
		}
		body = append(body, gzipped(scrape.Bytes())...)
	}
	got := r.accepted(r.upload(r.token(KindUpload, "site-a"), body, "Content-Encoding", "gzip", SpoolHeader, "00000000000000ab 1-60"))
	if got.Accepted != perScrape || got.Duplicates != (scrapes-1)*perScrape || *got.Held != "1-60" {
		t.Errorf("answered %+v with held %q, want %d accepted, %d duplicates and 1-60 held", got, *got.Held, perScrape, (scrapes-1)*perScrape)
	}
}
