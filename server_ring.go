package main

// What a server tells about the ring: /sd for Prometheus's HTTP service discovery, and
// /debug/ring for operators. This file decides nothing about members.

import (
	"fmt"
	"net/http"
)

// ServeSD answers in the form of Prometheus's HTTP service discovery, with every
// live server: each exposes what it holds.
func (m *RingMember) ServeSD(w http.ResponseWriter, r *http.Request) {
	targets := []string{}
	for _, mv := range m.cfg.Gossip.View().Members {
		if mv.State.IsLive() && mv.URL != "" {
			targets = append(targets, mv.URL)
		}
	}
	WriteJSON(w, []map[string][]string{{"targets": targets}})
}

// ServeDebug tells all that this server knows of the cluster.
func (m *RingMember) ServeDebug(w http.ResponseWriter, r *http.Request) {
	type member struct {
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
		KeyID       string  `json:"key_id"`
		RTT         float64 `json:"round_trip_seconds,omitempty"`
		Share       float64 `json:"share"`
		Gone        uint32  `json:"gone_seconds,omitempty"`
	}
	v := m.cfg.Gossip.View()
	ring := m.cfg.Forward.View().Ring
	shares := ring.Shares()
	members := []member{}
	for _, mv := range v.Members {
		d := member{
			Name: mv.Name, State: mv.State.String(), Address: mv.Addr, Internal: mv.URL, Claim: mv.Lamport, Provisional: mv.Provisional, Leaving: mv.Leaving,
			Session: mv.Session, Incarnation: mv.Incarnation, KeyID: fmt.Sprintf("%08x", mv.KeyID), RTT: mv.RTT.Seconds(),
			Share: shares[mv.Name], Gone: mv.Age,
		}
		if mv.Slot != NoSlot {
			d.Slot = &mv.Slot
		}
		members = append(members, d)
	}
	st := m.cfg.Gossip.Stats()
	refused := map[string]uint64{}
	for i, reason := range RefusedReasons() {
		refused[reason] = st.Refused[i]
	}
	WriteJSON(w, map[string]any{
		"name": m.cfg.Name, "members": members, "local_health": st.Health, "joined": v.Joined,
		"ring":   map[string]any{"version": fmt.Sprintf("%016x", ring.Version()), "buckets": ring.Buckets()},
		"gossip": map[string]any{"sent_packets": st.Sent, "sent_bytes": st.SentBytes, "received_packets": st.Received, "refused": refused},
	})
}
