package main

// Tests of sealing and of the replay window: which packets and messages open, and that a
// window never accepts a counter twice. testKeys is also used by the tests of gossip.

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"slices"
	"testing"
)

func testSealer(tb testing.TB, seed byte, ring string, secrets ...byte) *PacketSealer {
	tb.Helper()
	s, err := NewPacketSealer(testKeys(tb, secrets...), ring, rand.NewChaCha8([32]byte{seed}))
	if err != nil {
		tb.Fatal(err)
	}
	return s
}

// otherVersion returns sealed with the first byte of another version.
func otherVersion(sealed []byte, version byte) []byte {
	return append([]byte{version}, sealed[1:]...)
}

// A message opens only with its purpose and context, under a key of its ring, and when it is
// of this version.
func TestSealMessage(t *testing.T) {
	box := func(ring string, secrets ...byte) *MessageSealer {
		s, err := NewMessageSealer(testKeys(t, secrets...), ring)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	a := box("c", 1)
	plain := bytes.Repeat([]byte("x"), 5000)
	sealed := a.Seal(nil, plain, "p", []byte("context"), 0)
	rotated := box("c", 2, 1)
	for _, c := range []struct {
		about            string
		opener           *MessageSealer
		message          []byte
		purpose, context string
		want             error
	}{
		{"same key", box("c", 1), sealed, "p", "context", nil},
		{"the old key below a new one", rotated, sealed, "p", "context", nil},
		{"under the key that its receiver holds", a, rotated.Seal(nil, plain, "p", []byte("context"), SealedKeyID(sealed)), "p", "context", nil},
		{"under a key that its receiver does not hold", a, rotated.Seal(nil, plain, "p", []byte("context"), 0), "p", "context", ErrUnknownKey},
		{"another ring", box("d", 1), sealed, "p", "context", ErrForged},
		{"another purpose", a, sealed, "q", "context", ErrForged},
		{"another context", a, sealed, "p", "contex", ErrForged},
		{"purpose and context cut elsewhere", a, sealed, "pc", "ontext", ErrForged},
		{"empty", a, nil, "p", "context", ErrNotSealed},
		{"truncated", a, sealed[:len(sealed)-1], "p", "context", ErrForged},
		{"of another version", a, otherVersion(sealed, sealVersion+1), "p", "context", ErrSealVersion},
		{"of another version, short", a, []byte{sealVersion + 1}, "p", "context", ErrSealVersion},
	} {
		got, err := c.opener.Open(nil, c.message, c.purpose, []byte(c.context))
		if !errors.Is(err, c.want) || err == nil && !bytes.Equal(got, plain) {
			t.Errorf("%s: got %d bytes, %v, want %v", c.about, len(got), err, c.want)
		}
	}
}

// The refusal of another version says which version came, and which is known.
func TestSealVersionInWords(t *testing.T) {
	a := testSealer(t, 1, "c", 1)
	_, _, err := a.Open(nil, otherVersion(a.Seal(nil, nil, 0), 7))
	if want := "sealed by another version of telemeter: it has version 7; this program knows version 2"; err == nil || err.Error() != want {
		t.Errorf("the error is %v", err)
	}
}

func TestSeal(t *testing.T) {
	a := testSealer(t, 1, "c", 1)
	plain := bytes.Repeat([]byte("x"), 100)
	sealed := a.Seal(nil, plain, 0)
	if len(sealed) != len(plain)+SealOverhead {
		t.Errorf("overhead is %d", len(sealed)-len(plain))
	}
	again := a.Seal(nil, plain, 0)
	if bytes.Equal(sealed, again) {
		t.Error("a nonce was used twice")
	}
	rotated := testSealer(t, 2, "c", 2, 1)
	for _, c := range []struct {
		about  string
		opener *PacketSealer
		packet []byte
		want   error
	}{
		{"same key", testSealer(t, 3, "c", 1), sealed, nil},
		{"the old key below a new one", rotated, sealed, nil},
		{"under the new key, to one that has only the old", a, rotated.Seal(nil, plain, 0), ErrUnknownKey},
		{"under the old key because its receiver has no other", a, rotated.Seal(nil, plain, a.KeyIDs()[0]), nil},
		{"foreign key", testSealer(t, 4, "c", 3), sealed, ErrUnknownKey},
		{"another ring", testSealer(t, 5, "d", 1), sealed, ErrForged},
		{"empty", a, nil, ErrNotSealed},
		{"of another version", a, otherVersion(sealed, sealVersion+1), ErrSealVersion},
		{"of another version, under a foreign key", testSealer(t, 4, "c", 3), otherVersion(sealed, 0), ErrSealVersion},
		{"of another version, short", a, []byte{sealVersion + 1}, ErrSealVersion},
		{"no room for a tag", a, sealed[:SealOverhead-1], ErrNotSealed},
		{"truncated", a, sealed[:len(sealed)-1], ErrForged},
		{"longer", a, append(slices.Clone(sealed), 0), ErrForged},
	} {
		got, count, err := c.opener.Open(nil, c.packet)
		if !errors.Is(err, c.want) || err == nil && (!bytes.Equal(got, plain) || count == 0) {
			t.Errorf("%s: got %q, counter %d, %v, want %v", c.about, got, count, err, c.want)
		}
	}
	for i := range sealed {
		bad := slices.Clone(sealed)
		bad[i] ^= 1
		if _, _, err := a.Open(nil, bad); err == nil {
			t.Errorf("opens with byte %d changed", i)
		}
	}
	if a.SetKeys(Keys{}) == nil || a.KeyIDs()[0] == 0 {
		t.Error("no key is taken for a key")
	}
	if _, err := NewPacketSealer(testKeys(t, 1), "c", bytes.NewReader(nil)); err == nil {
		t.Error("seals without randomness")
	}
}

// One key file gives tokens and gossip different subkeys, and each key's own.
func TestGossipSubkeys(t *testing.T) {
	keys := testKeys(t, 1, 2)
	a, err := keys.Subkeys("a")
	b, err2 := keys.Subkeys("b")
	if err := errors.Join(err, err2); err != nil {
		t.Fatal(err)
	}
	all := append(a, b...)
	for i, k := range all {
		if len(k) != 32 || slices.IndexFunc(all, func(o []byte) bool { return bytes.Equal(k, o) }) != i {
			t.Errorf("subkey %d is like another, or %d bytes", i, len(k))
		}
	}
}

// The window against a set that forgets nothing.
func TestWindow(t *testing.T) {
	seed := rand.Uint64()
	rng := rand.New(rand.NewPCG(seed, 0))
	for range 200 {
		start := rng.Uint64N(1 << 40)
		if rng.IntN(10) == 0 {
			start = ^uint64(0) - rng.Uint64N(3000)
		}
		var w ReplayWindow
		w.StartAfter(start)
		seen, top := map[uint64]bool{}, start
		for range 2000 {
			count := top + rng.Uint64N(300) - 100
			switch rng.IntN(50) {
			case 0:
				count = top + rng.Uint64N(5000)
			case 1:
				count = rng.Uint64()
			case 2:
				count = start - rng.Uint64N(2000)
			}
			if count > start && count-start > 1<<62 { // a sender never gets there
				continue
			}
			want := count > start && !seen[count] && (count >= top || top-count <= windowSize)
			if got := w.Accept(count); got != want {
				t.Fatalf("seed %d: started at %d, top %d: Accept(%d) is %v", seed, start, top, count, got)
			}
			if want {
				seen[count] = true
				top = max(top, count)
			}
		}
	}
}

func BenchmarkSeal(b *testing.B) {
	s := testSealer(b, 1, "telemeter", 1, 2)
	plain, buf := make([]byte, 100), make([]byte, 0, MaxPacket)
	b.ReportAllocs()
	for b.Loop() {
		s.Seal(buf, plain, 0)
	}
}

func BenchmarkOpen(b *testing.B) {
	s := testSealer(b, 1, "telemeter", 1, 2)
	sealed, buf := s.Seal(nil, make([]byte, 100), 0), make([]byte, 0, MaxPacket)
	b.ReportAllocs()
	for b.Loop() {
		if _, _, err := s.Open(buf, sealed); err != nil {
			b.Fatal(err)
		}
	}
}

func TestSealAllocates(t *testing.T) {
	s := testSealer(t, 1, "telemeter", 1)
	plain, sealed, opened := make([]byte, 100), make([]byte, 0, MaxPacket), make([]byte, 0, MaxPacket)
	if n := testing.AllocsPerRun(100, func() {
		packet := s.Seal(sealed, plain, 0)
		if _, _, err := s.Open(opened, packet); err != nil {
			t.Fatal(err)
		}
	}); n != 0 {
		t.Errorf("sealing and opening allocates %v times", n)
	}
}

func FuzzOpenPacket(f *testing.F) {
	s := testSealer(f, 1, "c", 1, 2)
	sealed := s.Seal(nil, []byte("hello"), 0)
	f.Add(sealed)
	f.Add(sealed[:SealOverhead])
	f.Add([]byte{sealVersion})
	f.Fuzz(func(t *testing.T, b []byte) {
		if plain, _, err := s.Open(nil, b); err == nil && !bytes.Equal(b, sealed) {
			t.Errorf("opened %q, which nobody sealed", plain)
		}
	})
}
