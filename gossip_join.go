package main

// This file tells whether this member has reached the servers that --join names, and why not. A
// value of --join is reached once a member of the ring has answered at one of its addresses. It
// stays reached from then on: if that member dies later, gossip reports the death. While a value is
// not reached, Run reports it again and again. This file must not decide which address to contact,
// or when.

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"
)

const (
	joinAnswerIntervals = 5           // time after the start at which a --join that reached nobody is first reported, in gossip intervals
	joinReportEvery     = time.Minute // time between two reports of the values of --join that are not reached
)

// A JoinTarget is one value of --join, and whether this member has reached a server there.
type JoinTarget struct {
	Address string // the value of --join
	Problem string // why no server is reached, and what to check; empty if one is or was reached
}

// joinState is what Gossip remembers about the values of --join.
type joinState struct {
	reached    map[string]bool          // by value of --join; true for ever once a server was reached there
	sendErrors map[netip.AddrPort]error // latest failures to send to seeds since the last report; bounded by maxSeeds
	reportAt   time.Duration            // when joinEvents may report the values that are not reached
	reported   bool                     // joinEvents has reported the values that are not reached, or left out its first report
	done       bool                     // all values are reached, and joinEvents has reported EventJoined
}

// JoinTargets returns all values of --join, in their order.
func (g *Gossip) JoinTargets() []JoinTarget {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.joinTargets()
}

// joinTargets does the same as JoinTargets. The caller must hold g.mu.
func (g *Gossip) joinTargets() []JoinTarget {
	var targets []JoinTarget
	for _, v := range g.conf.Seeds {
		problem := ""
		if !g.join.reached[v] {
			problem = g.joinProblem(g.hosts[v])
			g.join.reached[v] = problem == ""
		}
		targets = append(targets, JoinTarget{v, problem})
	}
	return targets
}

// joinProblem returns why no server is reached at the addresses of h, or "" if one is. It also
// returns "" if h has only this member's own address and another member is live, because this
// member then needs no other. The caller must hold g.mu.
func (g *Gossip) joinProblem(h *lookedUpHost) string {
	var problems, silent []string
	own := false
	for _, a := range h.addrs {
		switch sd := g.swim.seedAt(a); {
		case g.swim.isOwnAddress(a):
			own = true
		case sd == nil:
			problems = append(problems, fmt.Sprintf("%v is not tried, because --join stands for more than %d addresses", a, maxSeeds))
		case sd.name != "":
			return ""
		case g.join.sendErrors[a] != nil:
			problems = append(problems, fmt.Sprintf("sending to %v fails: %v: check the route and the firewall of this host", a, g.join.sendErrors[a]))
		case errors.Is(sd.refused, ErrSealVersion):
			problems = append(problems, fmt.Sprintf("gossip of %v is %v: run the same version on both servers", a, sd.refused))
		case sd.refused != nil:
			problems = append(problems, fmt.Sprintf("gossip of %v is sealed with another key: copy the same cluster.key to both servers", a))
		default:
			silent = append(silent, a.String())
		}
	}
	if len(silent) > 0 {
		problems = append(problems, "no answer from "+strings.Join(silent, ", ")+
			": is the server running with --listen-cluster, is its UDP port open in both directions, and do both servers have the same cluster.key?")
	}
	switch {
	case h.err != nil:
		problems = append(problems, fmt.Sprintf("lookup failed: %v: check the name, or give an IP address", h.err))
	case len(problems) == 0 && !own:
		return "the address is being looked up"
	case len(problems) == 0 && g.swim.table.Live == 1:
		return "this is the address of this server itself: name another server, or correct --advertise"
	}
	return strings.Join(problems, "; ")
}

// joinEvents returns the events that are due at the time now: one for each value of --join that is
// not reached, or one when all are reached. If some values are not reached but the ring has another
// live member, the first report is left out, because a member contacts its seeds one by one then.
// The caller must hold g.mu.
func (g *Gossip) joinEvents(now time.Duration) (events []GossipEvent) {
	j := &g.join
	if len(g.conf.Seeds) == 0 || j.done {
		return nil
	}
	unreached := slices.DeleteFunc(g.joinTargets(), func(t JoinTarget) bool { return t.Problem == "" })
	if len(unreached) == 0 {
		j.done = true
		return []GossipEvent{{What: EventJoined, Join: strings.Join(g.conf.Seeds, ", ")}}
	}
	if now < j.reportAt {
		return nil
	}
	alone := g.swim.table.Live == 1
	if alone || j.reported {
		what := EventJoinPartly
		if alone {
			what = EventJoinFails
		}
		for _, t := range unreached {
			events = append(events, GossipEvent{What: what, Join: t.Address, Detail: t.Problem})
		}
	}
	j.reportAt, j.reported = now+joinReportEvery, true
	clear(j.sendErrors)
	return events
}

// noteSendErrors remembers the failures of sends to seeds. The caller must hold g.mu.
func (g *Gossip) noteSendErrors(failed map[netip.AddrPort]error) {
	for to, err := range failed {
		if g.swim.seedAt(to) != nil && len(g.join.sendErrors) < maxSeeds {
			g.join.sendErrors[to] = err
		}
	}
}
