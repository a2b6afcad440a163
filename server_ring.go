package main

// This file reports the state of the ring: in /sd for Prometheus's HTTP service discovery, in
// /debug/ring for operators, and in metrics. It decides nothing about members.

import (
	"fmt"
	"math/bits"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
)

// ringCollector registers the metrics of the ring and of gossip. It returns a function that updates
// the metrics from the current state. The fields Gossip and Member of the server's configuration
// must be set.
func (s *Server) ringCollector(m *Metrics) func() {
	members := m.Gauge("telemeter_members", "Members of the ring, including this server, by state.", "state")
	share := m.Gauge("telemeter_ring_share_ratio", "Share of all sites that this server owns, from 0 to 1.")
	health := m.Gauge("telemeter_gossip_local_health", "Local health score of gossip. 0 is healthy; each point makes this server wait longer before it suspects others.")
	sent := m.Counter("telemeter_gossip_sent_packets_total", "Gossip packets sent.")
	sentBytes := m.Counter("telemeter_gossip_sent_bytes_total", "Bytes of gossip packets sent.")
	received := m.Counter("telemeter_gossip_received_packets_total", "Gossip packets received.")
	sendErrors := m.Counter("telemeter_gossip_send_errors_total", "Gossip packets that this host could not send, such as for want of a route.")
	joinUnreached := m.Gauge("telemeter_ring_join_unreached", "Values of --join at which no server of the ring has answered since this server started; each is logged.")
	refused := m.Counter("telemeter_gossip_refused_packets_total", "Gossip packets dropped without an answer, by reason.", "reason")
	return func() {
		count := map[MemberState]int{StateAlive: 0, StateSuspect: 0, StateDead: 0, StateLeft: 0}
		for _, mv := range s.cfg.Gossip.View().Members {
			count[mv.State]++
		}
		for state, n := range count {
			members.Set(float64(n), state.String())
		}
		share.Set(s.cfg.Member.View().Ring.Shares()[s.cfg.Name])
		st := s.cfg.Gossip.Stats()
		health.Set(float64(st.Health))
		sent.RaiseTo(float64(st.Sent))
		sentBytes.RaiseTo(float64(st.SentBytes))
		received.RaiseTo(float64(st.Received))
		sendErrors.RaiseTo(float64(st.SendErrors))
		unreached := 0
		for _, t := range s.cfg.Gossip.JoinTargets() {
			if t.Problem != "" {
				unreached++
			}
		}
		joinUnreached.Set(float64(unreached))
		for i, reason := range RefusedReasonNames() {
			refused.RaiseTo(float64(st.Refused[i]), reason)
		}
	}
}

// SDSchemeTLS precedes the announced address of an internal listener that uses TLS. Without it, the
// listener uses plain HTTP. Members that do not know SDSchemeTLS pass it on in /sd, where Prometheus
// refuses that target.
const SDSchemeTLS = "https://"

// serveSD answers GET /sd in the format of Prometheus's HTTP service discovery. It lists every live
// member that announces the address of its internal listener. Prometheus must scrape all of them,
// because each server exposes only the samples that it holds itself. A server without a ring lists
// itself, under the address in the request: Prometheus has just reached the server there.
func (s *Server) serveSD(w http.ResponseWriter, r *http.Request) {
	var urls []string
	if s.cfg.Gossip == nil {
		own, err := requestedAddr(r, s.cfg.SDScheme == SDSchemeTLS)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		urls = append(urls, s.cfg.SDScheme+own)
	} else {
		for _, mv := range s.cfg.Gossip.View().Members {
			if mv.State.IsLive() && mv.URL != "" {
				urls = append(urls, mv.URL)
			}
		}
	}
	WriteJSON(w, targetGroups(urls))
}

// targetGroup is an element of an answer of /sd.
type targetGroup struct {
	Targets []string          `json:"targets"`
	Labels  map[string]string `json:"labels,omitempty"`
}

// targetGroups returns a group of the targets that use plain HTTP, followed by a group of the
// targets that use TLS. A group without targets is left out. Each of urls is an address, after
// SDSchemeTLS if the target uses TLS. The label __scheme__ overrides the scheme in the scrape
// configuration.
func targetGroups(urls []string) []targetGroup {
	plain, secure := targetGroup{}, targetGroup{Labels: map[string]string{"__scheme__": "https"}}
	for _, target := range urls {
		if address, ok := strings.CutPrefix(target, SDSchemeTLS); ok {
			secure.Targets = append(secure.Targets, address)
		} else {
			plain.Targets = append(plain.Targets, target)
		}
	}
	groups := []targetGroup{} // not nil, because Prometheus refuses the JSON value null
	for _, g := range []targetGroup{plain, secure} {
		if len(g.Targets) > 0 {
			groups = append(groups, g)
		}
	}
	return groups
}

// requestedAddr returns the address to which r was sent, as host:port. The header Host has no port if
// the port is the default port of the scheme, which is https if secure is true, else http.
func requestedAddr(r *http.Request, secure bool) (addr string, err error) {
	port := "80"
	if secure {
		port = "443"
	}
	u, err := url.Parse("http://" + r.Host)
	if err != nil || u.Host != r.Host || u.Hostname() == "" {
		return "", fmt.Errorf("the header Host is %.100q, but must be this server's HOST:PORT", r.Host)
	}
	if given := u.Port(); given != "" {
		port = given
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
		return "", fmt.Errorf("the header Host has the invalid port %.20q", port)
	}
	return net.JoinHostPort(u.Hostname(), port), nil
}

// memberStatus is the entry of one member in the answer of /debug/ring.
type memberStatus struct {
	Name        string  `json:"name"`
	State       string  `json:"state"`
	Address     string  `json:"address"`
	Internal    string  `json:"internal,omitempty"`
	Slot        *uint16 `json:"slot"`
	Claim       uint64  `json:"claim,omitempty"`
	Provisional bool    `json:"provisional,omitempty"`
	Leaving     bool    `json:"leaving,omitempty"`
	Session     uint64  `json:"session"`
	Incarnation uint32  `json:"incarnation"`
	KeyID       string  `json:"key_id"` // as Keys.IDs; packets have its bytes as a little-endian number
	RTT         float64 `json:"round_trip_seconds,omitempty"`
	Share       float64 `json:"share"`
	Gone        uint32  `json:"gone_seconds,omitempty"`
	// Heard is the time since a packet of the member last arrived; nil if none has, and for this server.
	Heard *float64 `json:"heard_seconds_ago,omitempty"`
	// ClockAhead is how far the member's clock was ahead of this server's clock when it last answered
	// a forwarded push; nil if it has not.
	ClockAhead *float64 `json:"clock_ahead_seconds,omitempty"`
}

// joinStatus is the entry of one value of --join in the answer of /debug/ring.
type joinStatus struct {
	Address string `json:"address"`
	Reached bool   `json:"reached"`
	Problem string `json:"problem,omitempty"`
}

func newMemberStatus(mv MemberSnapshot, share float64) memberStatus {
	st := memberStatus{
		Name: mv.Name, State: mv.State.String(), Address: mv.Addr, Internal: mv.URL, Claim: mv.Lamport, Provisional: mv.Provisional, Leaving: mv.Leaving,
		Session: mv.Session, Incarnation: mv.Incarnation, KeyID: fmt.Sprintf("%08x", bits.ReverseBytes32(mv.KeyID)), RTT: mv.RTT.Seconds(), Share: share, Gone: mv.Age,
	}
	if mv.Slot != NoSlot {
		st.Slot = &mv.Slot
	}
	if mv.Heard >= 0 {
		seconds := mv.Heard.Seconds()
		st.Heard = &seconds
	}
	return st
}

// memberStatuses returns the members that this server knows, sorted by name.
func (s *Server) memberStatuses() []memberStatus {
	shares := s.cfg.Member.View().Ring.Shares()
	members := []memberStatus{}
	for _, mv := range s.cfg.Gossip.View().Members {
		st := newMemberStatus(mv, shares[mv.Name])
		if ahead, known := s.cfg.Forwarder.ClockAhead(mv.Name); known {
			seconds := ahead.Seconds()
			st.ClockAhead = &seconds
		}
		members = append(members, st)
	}
	return members
}

// joinStatuses returns the state of each value of --join.
func (s *Server) joinStatuses() []joinStatus {
	join := []joinStatus{}
	for _, t := range s.cfg.Gossip.JoinTargets() {
		join = append(join, joinStatus{t.Address, t.Problem == "", t.Problem})
	}
	return join
}

// serveDebugRing answers GET /debug/ring with the members that this server knows, the state of the
// ring, whether --join has reached it, and the packet counts of gossip.
func (s *Server) serveDebugRing(w http.ResponseWriter, r *http.Request) {
	ring := s.cfg.Member.View().Ring
	st := s.cfg.Gossip.Stats()
	refused := map[string]uint64{}
	for i, reason := range RefusedReasonNames() {
		refused[reason] = st.Refused[i]
	}
	WriteJSON(w, map[string]any{
		"name": s.cfg.Name, "members": s.memberStatuses(), "local_health": st.Health, "joined": s.cfg.Gossip.View().Joined, "join": s.joinStatuses(),
		"ring":   map[string]any{"version": fmt.Sprintf("%016x", ring.Digest()), "buckets": ring.Buckets()},
		"gossip": map[string]any{"sent_packets": st.Sent, "sent_bytes": st.SentBytes, "send_errors": st.SendErrors, "received_packets": st.Received, "refused": refused},
	})
}
