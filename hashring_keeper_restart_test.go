package main

// Tests of the restart state of a ring member: saving, loading, damage and disk errors.

import (
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"testing/synctest"
)

// LoadRestartState returns the state that was saved last, and the zero state if the file is missing
// or damaged.
func TestMemberState(t *testing.T) {
	dir := t.TempDir()
	if st, err := LoadRestartState(DiskFS{}, dir); err != nil || st != (RestartState{}) {
		t.Errorf("without a file: state %+v, %v; want the zero state", st, err)
	}
	want := RestartState{Session: 7, Slot: 3, Lamport: 9, Provisional: true, MaxLamport: 11, Buckets: 5}
	for range 2 {
		if err := SaveRestartState(DiskFS{}, dir, want); err != nil {
			t.Fatal(err)
		}
		if got, err := LoadRestartState(DiskFS{}, dir); err != nil || got != want {
			t.Errorf("state %+v, %v; want %+v", got, err, want)
		}
		want.Session++
	}
	// A damaged file must not keep the server from starting. The other members know the session and
	// the slot too.
	if err := os.WriteFile(filepath.Join(dir, memberFile), []byte("nonsense"), 0o600); err != nil {
		t.Fatal(err)
	}
	if st, err := LoadRestartState(DiskFS{}, dir); err != nil || st != (RestartState{}) {
		t.Errorf("with a damaged file: state %+v, %v; want the zero state", st, err)
	}
}

// If reading the file fails every time, LoadRestartState returns the error. If reading fails only
// once or twice, LoadRestartState tries again and returns the state.
func TestMemberStateReadFails(t *testing.T) {
	want := RestartState{Session: 7, Slot: 3, Lamport: 9}
	for _, f := range readFaults {
		synctest.Test(t, func(t *testing.T) {
			fsys := newStoreFS(1)
			if err := SaveRestartState(fsys, "/s", want); err != nil {
				t.Fatal(err)
			}
			fsys.hook = f.hook("read", "")
			got, err := LoadRestartState(fsys, "/s")
			if ok := err == nil && got == want; ok != (f.n > 0) || !ok && !errors.Is(err, f.err) {
				t.Errorf("with the fault %v: state %+v, %v", f, got, err)
			}
		})
	}
}

// A member on a full disk starts. It claims a slot only once it can save its state. A member
// without permission to write its directory does not start.
func TestMemberStartsOnFullDisk(t *testing.T) {
	gossip := startGossip(t, GossipConfig{Name: "a"}, "127.0.0.1:0").Gossip
	fsys := newStoreFS(1)
	var failures []error
	start := func() (*RingKeeper, error) {
		return NewRingKeeper(RingKeeperConfig{Name: "a", Gossip: gossip, FS: fsys, Dir: "/s", Log: slog.New(slog.DiscardHandler), OnError: func(err error) { failures = append(failures, err) }})
	}
	fsys.hook = failOn("write", "", 0, syscall.EACCES)
	if _, err := start(); !errors.Is(err, syscall.EACCES) {
		t.Errorf("NewRingKeeper without write permission returned %v, want EACCES", err)
	}
	fsys.hook = failOn("write", "", 0, syscall.ENOSPC)
	m, err := start()
	if err != nil {
		t.Fatal(err)
	}
	m.claimSlot(gossip.View())
	if len(failures) != 2 || !errors.Is(failures[1], syscall.ENOSPC) {
		t.Errorf("OnError got %v, want two errors, the last ENOSPC", failures)
	}
	if v := gossip.View(); v.Members[0].Slot != NoSlot {
		t.Errorf("slot %d was claimed although it cannot be saved", v.Members[0].Slot)
	}
	fsys.hook = nil
	m.claimSlot(gossip.View())
	eventually(t, "a slot is claimed when there is room on the disk", func() bool { return gossip.View().Members[0].Slot == 0 })
	want := gossip.RestartState()
	if got, err := LoadRestartState(fsys, "/s"); err != nil || got.Session != want.Session || got.Slot != 0 {
		t.Errorf("the saved state is %+v, want %+v: %v", got, want, err)
	}
}
