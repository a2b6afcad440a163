package main

// The servers of the delivery model. Each server has a real Store in memory and a simulated disk.
// Faults cut or damage the logs on the disk, lose the disk, or replace it by an older copy. The
// checks: a server lists as held only scrapes that it stored, and as read only scrapes that every
// consumer that counts has received (see counts). Expired and evicted samples are excepted.

import (
	"context"
	"encoding/binary"
	"slices"
	"time"
)

// modelServer is a server of the model with its disk.
type modelServer struct {
	at       int // number of the server
	name     string
	up       bool
	ahead    int64 // how far the server's clock is ahead of the right time, in ms
	untimely bool  // the server's clock is ahead, and the server dropped all samples of its last request because of their times
	store    *Store
	scraper  *AllSitesReader
	disk     *modelDisk
	copy     *modelDisk                         // earlier copy of the disk; nil: there is no copy
	lo       [modelConsumers]int64              // by consumer: ms; the server knows that the consumer scraped it at this time or later; 0: no known scrape
	reported [modelSites][modelConsumers]int64  // by site and consumer: ms; since this server's start the site reported that the consumer scraped a server at this time or later; 0: no report
	read     [modelSites]map[[2]uint64]struct{} // by site: spool ID and number of each scrape that was listed as read and not stored again since
	taken    [modelSites]ScrapeNames            // by site: scrapes that the last answer to the site listed as held or read; empty after a fault that may lose scrapes
	evicted  map[int]bool                       // IDs of the samples that this server evicted
}

// modelRecord is one record of a site log or of the file of cursors on a simulated disk.
type modelRecord struct {
	kind     byte
	payload  []byte
	samples  []int // IDs of the samples, in a record of a batch
	consumer int   // number of the consumer, in a record of cursors
	lo       int64 // modelServer.lo of the consumer when the record was written, in a record of cursors
}

// modelDisk is the content of a server's disk.
type modelDisk struct {
	logs    [modelSites][]modelRecord
	known   []KnownConsumer       // consumers in the state file
	seen    [modelConsumers]int64 // modelServer.lo when the state file was written
	cursors []modelRecord
	block   uint64 // block of batch numbers that the newest start uses, in the state file
	stored  []bool // by sample ID: the sample was stored on this disk, and neither a fault nor the repair of a damaged log has removed it since
}

// clone returns a copy of the disk. Later changes of the disk do not change the copy.
func (d *modelDisk) clone() *modelDisk {
	k := *d
	for i := range k.logs {
		k.logs[i] = slices.Clone(k.logs[i])
	}
	k.known, k.cursors, k.stored = slices.Clone(k.known), slices.Clone(k.cursors), slices.Clone(k.stored)
	return &k
}

// handle has server s process a request of site c as the upload handler does. The server stores the
// scrapes that push lists; push is empty for a question. reported is the header that lists the
// consumers that the site knows. handle checks the answer and returns it as the client parses it.
func (m *deliveryModel) handle(s *modelServer, c *modelSite, names ScrapeNames, push []*modelScrape, reported string) (a SpoolAnswer) {
	got, err := ParseScrapeNames(names.String())
	consumers, cerr := ParseConsumers(reported)
	if err != nil || cerr != nil {
		m.fail("a request cannot be parsed: %v, %v", err, cerr)
	}
	s.store.Consumers.AddClientReportedConsumers(c.ring, consumers, m.timeAt(s))
	for i, at := range c.lo {
		s.reported[c.at][i] = max(s.reported[c.at][i], at)
	}
	s.untimely = false
	if len(push) > 0 {
		p := &SampleList{}
		for _, sc := range push {
			for _, id := range sc.samples {
				line := c.lines[m.samples[id].series]
				p.Samples = append(p.Samples, Sample{Off: uint32(len(p.Arena)), Len: uint32(len(line)), T: m.samples[id].t, V: float64(id)})
				p.Arena = append(p.Arena, line...)
			}
		}
		m.append(s, c, p, got)
	}
	st := s.store.RefreshSpoolStatus(c.name, names.SpoolID)
	if m.tracing {
		m.say("%s to %s: scrapes %s, consumers %q; answer: held %v, read %v, has consumers %t", c.name, s.name, names, reported, st.Held, st.Read, st.HasConsumers)
	}
	m.check(s, c, names.SpoolID, &st)
	a = SpoolAnswer{KnowsSpools: true, DoneWhenHeld: !st.HasConsumers}
	a.Held, err = ParseRanges(st.Held.String(), MaxRanges)
	if st.HasConsumers && err == nil {
		a.Read, err = ParseRanges(st.Read.String(), MaxRanges)
	}
	if err == nil {
		a.Consumers, err = ParseConsumers(FormatConsumers(st.Consumers))
	}
	if err != nil {
		m.fail("an answer cannot be parsed: %v", err)
	}
	return a
}

// append stores a push in the server's store and on its simulated disk. It checks that no sample is
// stored twice. An evicted sample may be stored again if the push has a scrape that the server's
// last answer did not list as held or read.
func (m *deliveryModel) append(s *modelServer, c *modelSite, p *SampleList, names ScrapeNames) {
	series, seq := 0, uint64(0)
	var known Ranges
	if s.taken[c.at].SpoolID == names.SpoolID {
		known = s.taken[c.at].Numbers
	}
	s.store.ViewSite(c.name, func(held *SiteSamples) {
		series = held.Table.Len()
		if n := len(held.Batches); n > 0 {
			seq = held.Batches[n-1].Seq
		}
	})
	res, err := s.store.Append(context.Background(), c.name, p, names, false)
	if err != nil {
		m.fail("a push fails: %v", err)
	}
	s.untimely = res.IsAllUntimely() && s.ahead > 0
	s.store.ViewSite(c.name, func(held *SiteSamples) {
		n := len(held.Batches)
		if n == 0 || held.Batches[n-1].Seq == seq {
			return
		}
		b := held.Batches[n-1]
		if held.Table.Len() > series {
			payload := EncodeSeriesPayload(nil, uint32(series), func(yield func([]byte) bool) {
				for id := series; id < held.Table.Len() && yield(held.Table.Line(uint32(id))); id++ {
				}
			})
			s.disk.logs[c.at] = append(s.disk.logs[c.at], modelRecord{kind: RecordSeries, payload: payload})
		}
		r := modelRecord{kind: RecordBatch, payload: EncodeBatchPayload(nil, b), samples: samplesOf(b)}
		s.disk.logs[c.at] = append(s.disk.logs[c.at], r)
		for _, part := range names.Numbers {
			for n := part.From; n <= part.To; n++ {
				if slices.ContainsFunc(m.named(c, n).samples, func(id int) bool { return slices.Contains(r.samples, id) }) {
					delete(s.read[c.at], [2]uint64{names.SpoolID, n})
				}
			}
		}
		for _, id := range r.samples {
			if s.disk.stored[id] && (!s.evicted[id] || len(names.Numbers.Without(known)) == 0) {
				m.fail("%s stores sample %d twice", s.name, id)
			}
			s.disk.stored[id] = true
		}
	})
}

// samplesOf returns the IDs of the samples of a batch.
func samplesOf(b *Batch) (ids []int) {
	for _, v := range b.V {
		ids = append(ids, int(v))
	}
	return ids
}

// counts returns the consumers that must have received a sample before s may evict the sample or
// list its scrape as read: all[i] is true for consumer i. They are consumers that scraped s within
// retention, and consumers that scraped any server within retention as reported by site c. With a
// nil c, reports do not count. If no consumer scraped within retention, the limit is consumerIdle
// instead. counts leaves out a consumer if the decision depends on a few seconds, or on times that
// s may have lost at a restart. If anyKnown is true, s must know a consumer.
func (m *deliveryModel) counts(s *modelServer, c *modelSite) (all [modelConsumers]bool, anyKnown bool) {
	recent, maybe := false, false // recent: a consumer surely scraped within retention; maybe: a consumer may have
	retention, slack := deliveryRetention.Milliseconds(), deliverySlack.Milliseconds()
	var lo [modelConsumers]int64
	for i := range lo {
		lo[i] = s.lo[i]
		if c != nil {
			lo[i] = max(lo[i], s.reported[c.at][i])
		}
		recent = recent || lo[i] > 0 && m.now-lo[i] <= retention-slack
		maybe = maybe || m.hi[i] > 0 && m.now-m.hi[i] <= retention+slack
	}
	for i := range lo {
		switch {
		case lo[i] == 0:
		case recent:
			all[i] = m.now-lo[i] <= retention-slack
		case !maybe:
			all[i] = m.now-lo[i] < consumerIdle.Milliseconds()-slack
		}
		anyKnown = anyKnown || lo[i] > 0 && m.now-lo[i] < consumerIdle.Milliseconds()-slack
	}
	return all, anyKnown
}

// check checks a spool's status as s answers it: whether s knows consumers, and whether the held
// and the read scrapes are right. If the last answer of s to the site was about the same spool, and
// no fault may have lost scrapes since, s must still list every scrape of that answer.
func (m *deliveryModel) check(s *modelServer, c *modelSite, spool uint64, st *SpoolStatus) {
	all, anyKnown := m.counts(s, c)
	if anyKnown && !st.HasConsumers {
		m.fail("%s knows no consumer, and should know one", s.name)
	}
	if st.HasConsumers && !slices.ContainsFunc(m.hi[:], func(at int64) bool { return at > 0 && m.now-at <= (consumerIdle+deliverySlack).Milliseconds() }) {
		m.fail("%s knows a consumer, and none has scraped for a day", s.name)
	}
	lists := slices.Clone(st.Held).AddAll(st.Read)
	if old := s.taken[c.at]; old.SpoolID == spool && len(old.Numbers.Without(lists)) > 0 {
		m.fail("%s no longer lists scrapes %v of %s as held or read", s.name, old.Numbers.Without(lists), c.name)
	}
	s.taken[c.at] = ScrapeNames{spool, lists}
	m.checkHeld(s, c, st.Held)
	if st.HasConsumers {
		m.checkRead(s, c, spool, st.Read, all)
	}
}

// checkHeld checks that s has stored all samples of each scrape that it lists as held, except for
// expired samples.
func (m *deliveryModel) checkHeld(s *modelServer, c *modelSite, held Ranges) {
	for _, r := range held {
		for n := r.From; n <= r.To; n++ {
			ids := m.named(c, n).samples
			// A server whose clock is ahead may have dropped some samples of a held scrape as too
			// old, but not all of them.
			partly := s.ahead > 0 && slices.ContainsFunc(ids, func(id int) bool { return s.disk.stored[id] })
			for _, id := range ids {
				if !s.disk.stored[id] && !partly && m.samples[id].t >= m.now-deliveryRetention.Milliseconds() {
					m.fail("%s lists scrape %d of %s as held, and has not stored sample %d", s.name, n, c.name, id)
				}
			}
		}
	}
}

// checkRead checks the scrapes that s lists as read for the first time: each consumer i for which
// all[i] is set must have received the samples of these scrapes, except for samples that expired or
// were evicted.
func (m *deliveryModel) checkRead(s *modelServer, c *modelSite, spool uint64, read Ranges, all [modelConsumers]bool) {
	for _, r := range read {
		for n := r.From; n <= r.To; n++ {
			key := [2]uint64{spool, n}
			if _, old := s.read[c.at][key]; old {
				continue
			}
			s.read[c.at][key] = struct{}{}
			for _, id := range m.named(c, n).samples {
				for x, counts := range all {
					if counts && !m.consumers[x].received[id] && !s.evicted[id] && m.samples[id].t >= m.now+s.ahead-deliveryRetention.Milliseconds() {
						m.fail("%s lists scrape %d of %s as read, and %s has not received sample %d", s.name, n, c.name, m.consumers[x].name, id)
					}
				}
			}
		}
	}
}

// saveConsumers saves the consumers and their cursors to the server's simulated disk, as
// Consumers.Save does.
func (m *deliveryModel) saveConsumers(s *modelServer) {
	cs := s.store.Consumers
	stale := cs.isListUnsaved()
	cs.listSaved.Store(cs.listChanges.Load())
	frames := cs.takeChanges().frames
	if stale {
		s.disk.known, s.disk.seen, s.disk.cursors, frames = cs.knownConsumers(), s.lo, nil, cs.encodeAll()
	}
	for len(frames) > 0 {
		end := recordHead + int(binary.LittleEndian.Uint32(frames))
		r := modelRecord{kind: frames[recordHead], payload: frames[recordHead+1 : end]}
		for _, x := range m.consumers {
			if x.key == binary.LittleEndian.Uint64(r.payload) {
				r.consumer, r.lo = x.at, s.lo[x.at]
			}
		}
		s.disk.cursors, frames = append(s.disk.cursors, r), frames[end:]
	}
}

// open opens a server's store from its simulated disk, as Store.recover does. hurt says for each
// site whether the site's log is damaged.
func (m *deliveryModel) open(s *modelServer, hurt [modelSites]bool) {
	cfg := StoreConfig{Retention: deliveryRetention, MaxSampleAge: 10 * time.Minute, Now: func() time.Time { return m.timeAt(s) }, OnError: func(error) {}}
	st, err := OpenStore(cfg)
	if err != nil {
		m.fail("opening a store: %v", err)
	}
	state := &StoreMeta{Consumers: s.disk.known, block: s.disk.block}
	st.Consumers, _ = OpenConsumers(nil, "", state, deliveryRetention, m.timeAt(s))
	s.lo, s.reported = [modelConsumers]int64{}, [modelSites][modelConsumers]int64{}
	for _, k := range s.disk.known {
		for _, x := range m.consumers {
			if x.key == k.Key {
				s.lo[x.at] = s.disk.seen[x.at]
			}
		}
	}
	var recorded [modelConsumers]bool
	for _, r := range s.disk.cursors {
		if err := st.Consumers.restoreRecord(r.kind, r.payload, m.timeAt(s)); err != nil {
			m.fail("restoring cursors: %v", err)
		}
		s.lo[r.consumer], recorded[r.consumer] = r.lo, true
	}
	for i := range s.lo {
		if s.lo[i] > 0 && !recorded[i] {
			m.hi[i] = m.now // a consumer without a record of its last scrape counts as having scraped at the server's start
		}
	}
	for i, c := range m.sites {
		if len(s.disk.logs[i]) == 0 {
			continue
		}
		r := recoveredLog{store: st, path: st.logPathOf(c.name), data: NewSiteSamples("", st.seed)}
		if hurt[i] {
			r.decodeRecord(0, nil)
		}
		for _, rec := range s.disk.logs[i] {
			err := r.decodeRecord(rec.kind, rec.payload)
			if err != nil && !hurt[i] {
				m.fail("restoring an undamaged log: %v", err)
			}
		}
		if r.data.Seq == 0 {
			s.disk.logs[i] = nil
			continue
		}
		r.data.ID = c.name
		r.data.RestoreSpools(r.spools, hurt[i])
		r.data.DropExpiredUncounted(min(st.KeptSince(), r.data.LastPush-deliveryRetention.Milliseconds()))
		st.sites[c.name] = NewSite(r.data, nil, st)
	}
	st.dropExpiredWhileDown()
	highest := max(st.Consumers.HighestCursor(), st.totals.NewestSeq.Load())
	st.lowerCursorsToLogEnds(newLogLosses())
	first := state.TakeSeqBlock(highest)
	for _, c := range st.sitesByID() {
		c.raiseSeq(first)
	}
	st.totals.RaiseNewest(first)
	s.disk.block = state.block
	s.store, s.up = st, true
	s.scraper = &AllSitesReader{Store: st, MaxSampleAge: 10 * time.Minute, Now: cfg.Now, Owned: func(hash uint64) bool {
		return m.sites[0].ring == hash && m.owner[0] == s.at || m.sites[1].ring == hash && m.owner[1] == s.at
	}}
	st.Consumers.listChanges.Add(1)
	m.saveConsumers(s)
	for i, c := range m.sites {
		if hurt[i] {
			m.mended(s, c)
		}
	}
}

// mended rewrites a damaged log after its recovery. Samples of the site that the recovered store
// does not hold no longer count as stored. Expired samples may be among them.
func (m *deliveryModel) mended(s *modelServer, c *modelSite) {
	kept := map[int]bool{}
	s.store.ViewSite(c.name, func(held *SiteSamples) {
		for _, b := range held.Batches {
			for _, id := range samplesOf(b) {
				kept[id] = true
			}
		}
	})
	for id := range s.disk.stored {
		if m.samples[id].site == c.at && !kept[id] {
			s.disk.stored[id] = false
		}
	}
	m.rewrite(s, c)
}

// rewrite rewrites the log of a site without expired samples, in the store and on the simulated
// disk.
func (m *deliveryModel) rewrite(s *modelServer, c *modelSite) {
	site := s.store.sites[c.name]
	if site == nil {
		return
	}
	if err := site.RewriteLog(nil, s.store.KeptSince()); err != nil {
		m.fail("rewriting a log: %v", err)
	}
	var log []modelRecord
	site.View(func(held *SiteSamples) {
		for frames := range held.Records {
			for len(frames) > 0 {
				end := recordHead + int(binary.LittleEndian.Uint32(frames))
				r := modelRecord{kind: frames[recordHead], payload: slices.Clone(frames[recordHead+1 : end])}
				if r.kind == RecordBatch {
					b, err := DecodeBatch(r.payload)
					if err != nil {
						m.fail("decoding a batch of a rewritten log: %v", err)
					}
					r.samples = samplesOf(b)
				}
				log, frames = append(log, r), frames[end:]
			}
		}
	})
	s.disk.logs[c.at] = log
}

// down ends a server's process, sometimes with a fault of its disk. The server starts again at once
// if a log is damaged, and otherwise with a chance of 40%.
func (m *deliveryModel) down(s *modelServer) {
	var hurt [modelSites]bool
	s.up = false
	what, logsChange := "killed", false
	d := s.disk
	switch n := m.rng.IntN(20); {
	case n < 3:
		what = "stopped"
		m.saveConsumers(s)
	case n < 8:
	case n < 11:
		what, logsChange = "killed by a power cut, and the ends of its files are cut", true
		for i := range d.logs {
			cut := m.rng.IntN(4)
			if m.chance(25) {
				cut = m.rng.IntN(len(d.logs[i]) + 1)
			}
			m.lose(d, i, max(0, len(d.logs[i])-cut), len(d.logs[i]))
		}
		if m.chance(50) { // otherwise the file of cursors was flushed after the logs
			break
		}
		d.cursors = d.cursors[:max(0, len(d.cursors)-m.rng.IntN(3))]
	case n < 13:
		what, logsChange = "killed, and its logs are damaged", true
		for i := range d.logs {
			if n := len(d.logs[i]); n > 1 {
				at := m.rng.IntN(n - 1)
				m.lose(d, i, at, min(n-1, at+1+m.rng.IntN(2)))
				hurt[i] = true
			}
		}
	case n < 14:
		what, logsChange = "killed, and its disk is lost", true
		s.disk = &modelDisk{stored: make([]bool, len(m.samples))}
	case n < 15:
		what = "killed, and its cursors are lost"
		d.cursors = nil
	case n < 16:
		what, logsChange = "killed, and a log is lost", true
		i := m.rng.IntN(modelSites)
		m.lose(d, i, 0, len(d.logs[i]))
	default:
		if s.copy == nil {
			break
		}
		old := s.copy.clone()
		old.stored = append(old.stored, make([]bool, len(m.samples)-len(old.stored))...)
		switch m.rng.IntN(3) {
		case 0:
			what = "killed, and its disk is replaced by its copy"
		case 1:
			what = "killed, and its disk is replaced by its copy without the cursors"
			old.cursors = nil
		case 2:
			what = "killed, and its logs are replaced by their copies"
			old.known, old.seen, old.cursors, old.block = d.known, d.seen, d.cursors, d.block
		}
		s.disk, logsChange = old, true
	}
	if m.tracing {
		m.say("%s is down: %s", s.name, what)
	}
	if logsChange { // the server need no longer list the scrapes that it listed before
		s.taken = [modelSites]ScrapeNames{}
	}
	for _, x := range m.consumers {
		x.conns[s.at] = new(int)
	}
	if slices.Contains(hurt[:], true) || m.chance(40) {
		m.reopenServer(s, hurt)
	}
}

// up starts a server whose logs are not damaged.
func (m *deliveryModel) up(s *modelServer) { m.reopenServer(s, [modelSites]bool{}) }

// reopenServer starts a server from its simulated disk. hurt says for each site whether the site's
// log is damaged.
func (m *deliveryModel) reopenServer(s *modelServer, hurt [modelSites]bool) {
	m.open(s, hurt)
	if m.tracing {
		m.say("%s is up; damaged logs by site: %v", s.name, hurt)
	}
}

// lose removes the records [from:to] from a site's log. Their samples no longer count as stored,
// unless another record of the log has them.
func (m *deliveryModel) lose(d *modelDisk, site, from, to int) {
	for _, r := range d.logs[site][from:to] {
		for _, id := range r.samples {
			d.stored[id] = false
		}
	}
	d.logs[site] = slices.Delete(slices.Clone(d.logs[site]), from, to)
	for _, r := range d.logs[site] {
		for _, id := range r.samples {
			d.stored[id] = true
		}
	}
}

// maintain rewrites the logs of all sites and forgets idle consumers, as the maintenance of a
// server may do.
func (m *deliveryModel) maintain(s *modelServer) {
	if m.tracing {
		m.say("%s rewrites its logs", s.name)
	}
	for _, c := range m.sites {
		m.rewrite(s, c)
	}
	s.store.Consumers.DropIdle(m.timeAt(s))
}

// evict evicts batches of a site, oldest first, until the store refuses to. It checks that every
// consumer that counts has received the evicted samples, except for samples that have expired or
// that were evicted before.
func (m *deliveryModel) evict(s *modelServer, c *modelSite) {
	site := s.store.sites[c.name]
	if site == nil {
		return
	}
	shown := m.now + s.ahead - (10 * time.Minute).Milliseconds()
	all, _ := m.counts(s, nil)
	for {
		var ids []int
		site.View(func(held *SiteSamples) {
			if len(held.Batches) > 0 {
				ids = samplesOf(held.Batches[0])
			}
		})
		if _, ok := site.TryEvictOldestBatch(shown); !ok {
			return
		}
		if m.tracing {
			m.say("%s evicts samples %v of %s", s.name, ids, c.name)
		}
		for _, id := range ids {
			if s.evicted[id] { // the sample was evicted before, and a restart or another push brought it back
				continue
			}
			s.evicted[id] = true
			for x, counts := range all {
				if counts && !m.consumers[x].received[id] && m.samples[id].t >= m.now+s.ahead-deliveryRetention.Milliseconds() {
					m.fail("%s evicts sample %d, which %s has not received", s.name, id, m.consumers[x].name)
				}
			}
		}
	}
}
