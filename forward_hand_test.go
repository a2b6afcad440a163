package main

// forward_hand_test.go: handing over on the sealed port: what arrives is what was sent,
// and each answer is told from the others, since what follows from them differs.

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"testing"
)

func TestForwardHand(t *testing.T) {
	keys := clusterKeys(t, testKey(1))
	a, b := newForwardNode(t, "a", keys), newForwardNode(t, "b", keys)
	join(1, a, b)
	var answer error
	var got []HandoffMessage
	b.cfg.Handed = func(_ context.Context, from string, m HandoffMessage) error {
		if from != "a" {
			t.Errorf("from %q", from)
		}
		got = append(got, m)
		return answer
	}
	to := a.View().Peers["b"]
	large := bytes.Repeat([]byte("batches"), 1<<18)
	for name, test := range map[string]struct {
		m       HandoffMessage
		answer  error
		refusal error // that a RefusedByOwner is of; nil: it is none
		err     error
	}{
		"taken":            {HandoffMessage{"x", 7, large}, nil, nil, nil},
		"empty":            {HandoffMessage{"x", 7, nil}, nil, nil, nil},
		"no more":          {HandoffMessage{"", 1 << 63, nil}, nil, nil, nil},
		"not the owner":    {HandoffMessage{"x", 7, large}, fmt.Errorf("no: %w", ErrNotOwner), nil, ErrNotOwner},
		"full":             {HandoffMessage{"x", 7, large}, fmt.Errorf("no: %w", ErrFull), ErrFull, nil},
		"too many series":  {HandoffMessage{"x", 7, large}, ErrSeriesLimit, ErrSeriesLimit, nil},
		"too large":        {HandoffMessage{"x", 7, large}, ErrTooLarge, ErrTooLarge, nil},
		"any other reason": {HandoffMessage{"x", 7, large}, errTransfer, &RefusedByOwner{}, nil},
	} {
		got, answer = nil, test.answer
		err := a.Hand(t.Context(), to, test.m)
		var refusal *RefusedByOwner
		refused := errors.As(err, &refusal)
		switch {
		case test.err != nil && (refused || !errors.Is(err, test.err)), test.answer == nil && err != nil, refused != (test.refusal != nil):
			t.Errorf("%s: %v", name, err)
		case test.answer != nil && test.answer != errTransfer && test.refusal != nil && !errors.Is(err, test.refusal):
			t.Errorf("%s: %v", name, err)
		}
		if len(got) != 1 || got[0].Cluster != test.m.Cluster || got[0].Ring != test.m.Ring || !bytes.Equal(got[0].Batches, test.m.Batches) {
			t.Errorf("%s: %d messages arrived", name, len(got))
		}
	}
	// What is not from there, or not there, is neither a refusal nor a success.
	unreachable := func(what string, to Peer) {
		t.Helper()
		err := a.Hand(t.Context(), to, HandoffMessage{Cluster: "x", Batches: large})
		if refusal := (*RefusedByOwner)(nil); err == nil || errors.As(err, &refusal) || errors.Is(err, ErrNotOwner) {
			t.Errorf("%s: %v", what, err)
		}
	}
	got = nil
	older := to
	older.Session = 0
	unreachable("another session", older)
	other := to
	other.Name = "c"
	unreachable("another server", other)
	b.down.Store(true)
	unreachable("a server that is down", to)
	b.down.Store(false)
	if len(got) > 0 {
		t.Errorf("%d messages arrived", len(got))
	}
	// A later version may say more; it must not be taken for something else.
	for _, h := range []head{{Kind: "more", Cluster: "x"}, {Kind: kindDone, Cluster: "x"}} {
		if a, err := a.ask(t.Context(), to, h, large); err != nil || a.Kind != refusedOther || len(got) > 0 {
			t.Errorf("%+v: %+v, %v, %d messages arrived", h, a, err, len(got))
		}
	}
}
