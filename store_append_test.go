package main

// Append stores the new samples of a push durably, or refuses the whole push. The cases are
// duplicates, samples outside of retention, the limits on series, and a disk that fails or is
// full.

import (
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"maps"
	"math"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// StageNewSamples counts each sample of a push as accepted, duplicate, conflict, too old or
// future.
func TestStageNewSamplesCounts(t *testing.T) {
	clock := newStoreClock()
	at := clock.ms
	nan := math.NaN()
	type result = AppendResult
	for _, test := range []struct {
		name   string
		pushes [][]point
		want   result
	}{
		{"new series", [][]point{{{"m", 1, at(5), 1}, {"m", 2, at(5), 2}}}, result{Accepted: 2}},
		{"same time and value", [][]point{{{"m", 1, at(5), 1}}, {{"m", 1, at(5), 1}}}, result{Duplicates: 1}},
		{"same time, other value", [][]point{{{"m", 1, at(5), 1}}, {{"m", 1, at(5), 2}}}, result{Conflicts: 1}},
		{"NaN again", [][]point{{{"m", 1, at(5), nan}}, {{"m", 1, at(5), nan}}}, result{Duplicates: 1}},
		{"minus zero differs from zero", [][]point{{{"m", 1, at(5), 0}}, {{"m", 1, at(5), math.Copysign(0, -1)}}}, result{Conflicts: 1}},
		{"duplicates within a push", [][]point{{{"m", 1, at(5), 1}, {"m", 1, at(5), 1}, {"m", 1, at(5), 1}}}, result{Accepted: 1, Duplicates: 2}},
		{"conflict within a push: the first value wins", [][]point{{{"m", 1, at(5), 1}, {"m", 1, at(5), 2}}}, result{Accepted: 1, Conflicts: 1}},
		{"three times of one series", [][]point{{{"m", 1, at(5), 1}, {"m", 1, at(9), 2}, {"m", 1, at(7), 3}}}, result{Accepted: 3}},
		{"late sample", [][]point{{{"m", 1, at(5), 1}}, {{"m", 1, at(9), 2}}}, result{Accepted: 1}},
		{"late sample again", [][]point{{{"m", 1, at(5), 1}}, {{"m", 1, at(9), 2}}, {{"m", 1, at(9), 2}}}, result{Duplicates: 1}},
		{"late sample with another value", [][]point{{{"m", 1, at(5), 1}}, {{"m", 1, at(9), 2}}, {{"m", 1, at(9), 3}}}, result{Conflicts: 1}},
		{"late sample twice in a push", [][]point{{{"m", 1, at(5), 1}}, {{"m", 1, at(9), 2}, {"m", 1, at(9), 2}}}, result{Accepted: 1, Duplicates: 1}},
		{"later time, same value", [][]point{{{"m", 1, at(9), 1}}, {{"m", 1, at(5), 1}}}, result{Accepted: 1}},
		{"other series, same time and value", [][]point{{{"m", 1, at(5), 1}}, {{"m", 2, at(5), 1}}}, result{Accepted: 1}},
		{"whole push again in another order", [][]point{
			{{"m", 1, at(5), 1}, {"m", 2, at(6), 2}, {"m", 1, at(9), 3}},
			{{"m", 1, at(9), 3}, {"m", 2, at(6), 2}, {"m", 1, at(5), 1}},
		}, result{Duplicates: 3}},
		{"bounds of time", [][]point{{
			{"m", 1, at(-60), 1}, {"m", 2, at(-60) + 1, 2}, {"m", 3, at(7200), 3}, {"m", 4, at(7200) - 1, 4},
			{"m", 5, math.MaxInt64, 5}, {"m", 6, math.MinInt64, 6},
		}}, result{Accepted: 2, Future: 2, TooOld: 2}},
		{"empty push", [][]point{{}}, result{}},
	} {
		c := NewSiteSamples("a", maphash.MakeSeed())
		var got result
		for _, points := range test.pushes {
			var err error
			if _, got, err = pushPoints(&c, clock.Now(), points...); err != nil {
				t.Fatal(err)
			}
		}
		if got != test.want {
			t.Errorf("%s: got %+v, want %+v", test.name, got, test.want)
		}
	}
}

// StageNewSamples orders the samples of a batch: the first sample of every series, sorted by series
// ID so that the IDs form runs, then the second sample of every series, and so on. The times of
// each series ascend.
func TestStageNewSamplesOrder(t *testing.T) {
	clock := newStoreClock()
	c := NewSiteSamples("a", maphash.MakeSeed())
	pushPoints(&c, clock.Now(), point{"m", 0, clock.ms(100), 0}, point{"m", 1, clock.ms(100), 0}, point{"m", 2, clock.ms(100), 0})
	b, _, _ := pushPoints(&c, clock.Now(),
		point{"m", 2, clock.ms(7), 1}, point{"m", 0, clock.ms(8), 2}, point{"m", 1, clock.ms(9), 3}, point{"m", 0, clock.ms(9), 4}, point{"m", 2, clock.ms(5), 5},
		point{"m", 0, clock.ms(6), 6})
	if want := []uint32{0, 1, 2, 0, 2, 0}; !slices.Equal(b.IDs, want) {
		t.Errorf("got IDs %v, want %v", b.IDs, want)
	}
	if want := []float64{4, 3, 1, 2, 5, 6}; !slices.Equal(b.V, want) {
		t.Errorf("got values %v, want %v", b.V, want)
	}
	last := map[uint32]int64{}
	for i, id := range b.IDs {
		if b.Time(i) <= last[id] {
			t.Errorf("the times of series %d do not ascend: %d follows %d", id, b.Time(i), last[id])
		}
		last[id] = b.Time(i)
	}
}

// At the limit on series, a push inserts new series in the order of the push as long as they fit. It
// drops and counts all samples of the other new series, and keeps the samples of the series that the
// site has.
func TestStageNewSamplesSeriesLimit(t *testing.T) {
	clock := newStoreClock()
	c := NewSiteSamples("a", maphash.MakeSeed())
	pushPoints(&c, clock.Now(), point{"m", 0, clock.ms(5), 0})
	staged, err := c.StageNewSamples(storePush("a",
		point{"m", 3, clock.ms(0), 1}, point{"m", 2, clock.ms(0), 1}, point{"m", 2, clock.ms(1), 1}, point{"m", 3, clock.ms(1), 2}, point{"m", 0, clock.ms(0), 1},
	), ScrapeNames{}, testLimits(clock.Now(), 2))
	if err != nil || staged.Result != (AppendResult{Accepted: 3, NoRoom: 2}) || c.Table.Len() != 2 {
		t.Errorf("got %+v, %v and %d series; want 3 accepted, 2 without room and 2 series", staged.Result, err, c.Table.Len())
	}
}

// A push that names a scrape is held even if the limit on series leaves no room for any of its
// samples, so that the client does not send it again and again.
func TestStageNewSamplesSeriesLimitHoldsScrape(t *testing.T) {
	clock := newStoreClock()
	c := NewSiteSamples("a", maphash.MakeSeed())
	pushPoints(&c, clock.Now(), point{"m", 0, clock.ms(5), 0})
	for _, test := range []struct {
		name   string
		points []point
		want   AppendResult
	}{
		{"no room", []point{{"m", 1, clock.ms(0), 1}}, AppendResult{NoRoom: 1}},
		{"no room and too old", []point{{"m", 1, clock.ms(0), 1}, {"m", 0, clock.ms(7201), 1}}, AppendResult{NoRoom: 1, TooOld: 1}},
	} {
		staged, err := c.StageNewSamples(storePush("a", test.points...), names1(7), testLimits(clock.Now(), 1))
		if err != nil || staged.Result != test.want || staged.Batch == nil || !staged.Batch.Names.IsSingle() {
			t.Errorf("%s: got %+v, %v; want %+v and a batch that names the scrape", test.name, staged, err, test.want)
		}
	}
}

// The text of a site's series may have at most seriesBytes bytes for each series that the limit on
// series allows, or minTextLimit bytes if that is more. So long lines can reach the limit on text
// before the site has too many series.
func TestStageNewSamplesTextLimit(t *testing.T) {
	clock := newStoreClock()
	c := NewSiteSamples("a", maphash.MakeSeed())
	pushPoints(&c, clock.Now(), point{"m", 0, clock.ms(0), 0})
	const limit = 2000
	pushLongLine := func(n int) (StagedBatch, error) {
		return c.StageNewSamples(storePush("a", point{strings.Repeat("m", 60_000), n, clock.ms(0), 1}), ScrapeNames{}, testLimits(clock.Now(), limit))
	}
	for n := range seriesBytes * limit / 60_100 {
		staged, err := pushLongLine(n)
		if err != nil {
			t.Fatalf("long line %d: %v", n, err)
		}
		c.Commit(staged.Batch)
	}
	n := c.Table.Len()
	if staged, err := pushLongLine(n); err != nil || staged.Batch != nil || staged.Result != (AppendResult{NoRoom: 1}) || c.Table.Len() != n {
		t.Errorf("text over the limit: got %+v, %v and %d series; want 1 sample without room and %d series", staged, err, c.Table.Len(), n)
	}
}

// A push of more than maxBatch samples is refused.
func TestStageNewSamplesTooLarge(t *testing.T) {
	clock := newStoreClock()
	c := NewSiteSamples("a", maphash.MakeSeed())
	many := &SampleList{Samples: make([]Sample, maxBatch+1)}
	if _, err := c.StageNewSamples(many, ScrapeNames{}, testLimits(clock.Now(), 0)); !errors.Is(err, ErrTooLarge) {
		t.Errorf("got %v, want ErrTooLarge", err)
	}
}

// Rollback removes the series that a staged but not committed push inserted.
func TestStagedBatchRollback(t *testing.T) {
	clock := newStoreClock()
	c := NewSiteSamples("a", maphash.MakeSeed())
	pushPoints(&c, clock.Now(), point{"m", 0, clock.ms(0), 0})
	staged, err := c.StageNewSamples(storePush("a", point{"m", 3, clock.ms(0), 1}), ScrapeNames{}, testLimits(clock.Now(), 2))
	if err != nil || len(staged.Batch.V) != 1 || c.Table.Len() != 2 || len(c.Batches) != 1 || c.Seq != 1 {
		t.Errorf("staged: %+v, %v; %d series, %d batches, newest batch %d", staged, err, c.Table.Len(), len(c.Batches), c.Seq)
	}
	c.Rollback(staged)
	if _, _, ok := c.Table.Find([]byte(storePush("a", point{"m", 3, 0, 0}).Arena)); ok || c.Table.Len() != 1 {
		t.Errorf("after Rollback the series is found: %t; %d series, want 1", ok, c.Table.Len())
	}
}

// An acknowledged push survives a crash right after it, whether it is the first push of its
// site or a later push.
func TestStoreAppendIsDurable(t *testing.T) {
	for seed := range testSeeds(t, 20) {
		fsys := newStoreFS(seed)
		k := newStoreKit(t, fsys)
		want := map[heldSample]float64{}
		for i := range 6 {
			s := k.open()
			id := fmt.Sprint(i % 3)
			pt := point{"m", i, k.clock.ms(6 - i), float64(i)}
			k.push(s, id, pt)
			maps.Copy(want, pushed(id, pt))
			fsys.crash()
		}
		wantHeld(t, fmt.Sprint("seed ", seed), allHeld(t, k.open()), want)
		k.wantNoErrors(fmt.Sprint("seed ", seed))
	}
}

// A push during which the disk fails is refused. No acknowledged sample is lost, not even if the
// machine crashes afterwards. Once the disk works, the next push is accepted.
func TestStoreAppendDiskFails(t *testing.T) {
	first := testSeed(t, 1)
	for _, op := range []string{"open", "write", "sync", "truncate", "rename", "syncdir", "mkdir"} {
		for _, diskErr := range []error{errDisk, errFull} {
			for _, isFirst := range []bool{true, false} {
				for i := range uint64(4) {
					seed := first + i
					name := fmt.Sprintf("%s fails with %v, first push of the site %t, seed %d", op, diskErr, isFirst, seed)
					appendWhileDiskFails(t, name, op, diskErr, isFirst, seed, i%2 == 0)
				}
			}
		}
	}
}

// appendWhileDiskFails pushes to a store while every file operation op fails with diskErr, and then
// crashes the machine. If pushAgain is true, it makes another push on a working disk before the
// crash.
func appendWhileDiskFails(t *testing.T, name, op string, diskErr error, isFirst bool, seed uint64, pushAgain bool) {
	t.Helper()
	fsys := newStoreFS(seed)
	k := newStoreKit(t, fsys)
	s := k.open()
	want := map[heldSample]float64{}
	add := func(pt point) { maps.Copy(want, pushed("a", pt)) }
	before, during, after := point{"m", 1, k.clock.ms(60), 1}, point{"m", 2, k.clock.ms(50), 2}, point{"m", 3, k.clock.ms(40), 3}
	if !isFirst {
		k.push(s, "a", before)
		add(before)
	}
	failed := false
	fsys.hook = func(_ int, o, _ string) fault {
		if o == op || op == "truncate" && o == "write" { // writes must fail too, because the store truncates a log only after a failed write
			failed = true
			return fault{Err: diskErr}
		}
		return fault{}
	}
	_, err := k.tryPush(s, "a", during)
	if failed != (err != nil) || failed && errors.Is(err, ErrFull) != (diskErr == errFull) {
		t.Fatalf("%s: an operation failed: %t; the push returned %v", name, failed, err)
	}
	if err == nil {
		add(during)
	}
	wantHeld(t, name, allHeld(t, s), want)
	if isFirst && err != nil && len(s.sites) > 0 {
		t.Errorf("%s: the refused first push left its site behind", name)
	}
	fsys.restart()
	if pushAgain {
		k.push(s, "a", after)
		add(after)
		wantHeld(t, name+", after the next push", allHeld(t, s), want)
	}
	fsys.crash()
	got := allHeld(t, k.open())
	for key, v := range pushed("a", during) {
		if _, onDisk := got[key]; onDisk {
			want[key] = v // samples of a refused push may be on the disk nevertheless
		}
	}
	wantHeld(t, name+", after a crash", got, want)
	if t.Failed() {
		t.FailNow()
	}
}

// While the disk is full, the store refuses pushes with ErrFull and keeps all samples that it has
// accepted. When the disk has room again, the store accepts pushes without a restart.
func TestStoreAppendDiskFull(t *testing.T) {
	fsys := newStoreFS(3)
	k := newStoreKit(t, fsys)
	s := k.open()
	want := map[heldSample]float64{}
	for i := range 30 {
		full := i%10 >= 5
		fsys.mu.Lock()
		fsys.hook = nil
		if full {
			fsys.hook = failOn("write", "", 0, errFull)
		}
		fsys.mu.Unlock()
		id, pt := fmt.Sprint(i%2), point{"m", i, k.clock.ms(0), 1}
		_, err := k.tryPush(s, id, pt)
		if full != errors.Is(err, ErrFull) || !full && err != nil {
			t.Fatalf("push %d, disk full %t: got %v", i, full, err)
		}
		if !full {
			maps.Copy(want, pushed(id, pt))
		}
		wantHeld(t, fmt.Sprint("after push ", i), allHeld(t, s), want)
		k.clock.Add(time.Second)
	}
	fsys.crash()
	wantHeld(t, "after a crash", allHeld(t, k.open()), want)
}

// An exceeded disk quota (EDQUOT) refuses a push with ErrFull, as a full disk does.
func TestStoreAppendDiskQuota(t *testing.T) {
	fsys := newStoreFS(1)
	k := newStoreKit(t, fsys)
	s := k.open()
	fsys.hook = failOn("write", "", 0, syscall.EDQUOT)
	if _, err := k.tryPush(s, "a", point{"m", 1, k.clock.ms(0), 1}); !errors.Is(err, ErrFull) {
		t.Errorf("got %v, want ErrFull", err)
	}
}

// wantSeriesLimit pushes points for site a, and fails the test unless the store accepts exactly the
// first points, as many as accepted says, and drops the others because of the limit on series.
func wantSeriesLimit(t *testing.T, k *storeKit, s *Store, accepted int, points ...point) {
	t.Helper()
	want := allHeld(t, s)
	res, err := k.tryPush(s, "a", points...)
	if err != nil || res.Accepted != accepted || res.NoRoom != len(points)-accepted {
		t.Errorf("got %+v, %v; want %d samples accepted and the others without room", res, err, accepted)
	}
	maps.Copy(want, pushed("a", points[:accepted]...))
	wantHeld(t, "after a push at the limit on series", allHeld(t, s), want)
}

// A push over the limit on series adds as many new series as fit, and never loses a sample of a
// series that the site has. It causes no rewrite of a log while all series have samples in
// retention. After a restart the same series are accepted.
func TestStoreAppendSeriesLimit(t *testing.T) {
	k := newStoreKit(t, newStoreFS(1))
	k.cfg.LimitSeries = 3
	s := k.open()
	at := func(n int) point { return point{"m", n, k.clock.ms(0), float64(n)} }
	wantSeriesLimit(t, k, s, 3, at(1), at(2), at(3), at(4))
	k.clock.Add(time.Second)
	wantSeriesLimit(t, k, s, 2, at(2), at(3), at(4), at(5))
	k.push(s, "b", at(4), at(5), at(6)) // each site has the full limit on series
	wantSeriesLimit(t, k, s, 0, at(4))
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = k.open()
	k.clock.Add(time.Second)
	wantSeriesLimit(t, k, s, 3, at(1), at(2), at(3), at(4))
	if n := s.Stats().Compactions; n != 0 {
		t.Errorf("%d rewrites of logs, although no series could be dropped", n)
	}
}

// At the limit on series, a push makes room by a rewrite that drops the series without a sample
// in retention.
func TestStoreAppendDropsExpiredSeries(t *testing.T) {
	k := newStoreKit(t, newStoreFS(1))
	k.cfg.LimitSeries = 3
	s := k.open()
	at := func(n int) point { return point{"m", n, k.clock.ms(0), float64(n)} }
	k.push(s, "a", at(1), at(2))
	k.clock.Add(time.Second)
	k.push(s, "a", at(1), at(3))
	k.clock.Add(2 * time.Hour) // series 2 now has no sample in retention
	k.push(s, "a", at(4))
	k.clock.Add(time.Second) // series 1 and 3 now have no sample in retention either
	k.push(s, "a", at(5), at(6))
	wantSeriesLimit(t, k, s, 0, at(7))
	if n := s.Stats().Compactions; n != 2 {
		t.Errorf("%d rewrites of logs, want 2", n)
	}
}

// At the limit on series, an expired series makes room even if its last batch also has a sample of
// another series that has not expired.
func TestStoreAppendDropsExpiredSeriesOfMixedBatch(t *testing.T) {
	k := newStoreKit(t, newStoreFS(1))
	k.cfg.LimitSeries = 2
	s := k.open()
	k.push(s, "a", point{"m", 1, k.clock.ms(7199), 1}, point{"m", 2, k.clock.ms(0), 2})
	k.clock.Add(2 * time.Second)
	k.push(s, "a", point{"m", 3, k.clock.ms(0), 3})
	if n := s.Stats().Compactions; n != 1 {
		t.Errorf("%d rewrites of logs, want 1", n)
	}
	if got := allHeld(t, s); len(got) != 2 {
		t.Errorf("held: %v; want 2 samples", got)
	}
}

// BenchmarkStoreAppend measures pushes of 230 samples to one site on a real disk, with
// maintenance in between.
func BenchmarkStoreAppend(b *testing.B) {
	k := newStoreKit(b, DiskFS{})
	k.cfg.Dir = b.TempDir()
	s := k.open()
	defer s.Close()
	p, set := sitePush("site-7")
	b.ReportAllocs()
	before, n := processCPU(b), 0
	for b.Loop() {
		k.clock.Add(15 * time.Second)
		set(k.clock.ms(0))
		if res, err := s.Append(context.Background(), "site-7", p, ScrapeNames{}, false); err != nil || res.Accepted != len(p.Samples) {
			b.Fatalf("%+v, %v", res, err)
		}
		if n++; n%100 == 0 {
			s.expireAndCompact(context.Background(), false)
		}
	}
	b.ReportMetric(float64(b.N*len(p.Samples))/(processCPU(b)-before).Seconds(), "samples/cpu-s")
}
