package main

// The server's state file: the consumers that the server knows, and the block of batch numbers.
// Recovery reads as much of a damaged file as possible, and Write repairs the file.

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"slices"
	"strings"
	"testing"
)

func consumerFrame(key uint64, name, address string) []byte {
	return AppendRecord(nil, recordConsumer, appendConsumer(nil, KnownConsumer{key, name, address}))
}

func blockFrame(block uint64) []byte {
	return AppendRecord(nil, recordBlock, binary.AppendUvarint(nil, block))
}

func stateOf(frames ...[]byte) []byte {
	return slices.Concat(append([][]byte{appendLogHeader(nil, []byte("state"))}, frames...)...)
}

// OpenStoreMeta skips the malformed records of a state file and keeps the others. Write repairs the
// file.
func TestStoreStateRestore(t *testing.T) {
	one, long := consumerFrame(1, "c1", "::1"), strings.Repeat("n", maxConsumerName+1)
	c1 := KnownConsumer{1, "c1", "::1"}
	many := make([][]byte, MaxConsumers+1)
	var all []KnownConsumer
	for i := range many {
		name := fmt.Sprint("c", i)
		many[i] = consumerFrame(uint64(i), name, "")
		all = append(all, KnownConsumer{uint64(i), name, ""})
	}
	for _, test := range []struct {
		name      string
		data      []byte
		damaged   bool
		block     uint64
		consumers []KnownConsumer
	}{
		{"no record", stateOf(), false, 0, nil},
		{"block and consumer", stateOf(blockFrame(7), one), false, 7, []KnownConsumer{c1}},
		{"three blocks: the highest counts", stateOf(blockFrame(7), blockFrame(9), blockFrame(8)), false, 9, nil},
		{"block maxBlock", stateOf(blockFrame(maxBlock)), false, maxBlock, nil},
		{"consumer without a name", stateOf(consumerFrame(2, "", "")), false, 0, []KnownConsumer{{Key: 2}}},
		{"block above maxBlock", stateOf(blockFrame(maxBlock+1), one), true, 0, []KnownConsumer{c1}},
		{"bytes after the block", stateOf(AppendRecord(nil, recordBlock, []byte{7, 7}), one), true, 0, []KnownConsumer{c1}},
		{"block record without a block", stateOf(AppendRecord(nil, recordBlock, nil), one), true, 0, []KnownConsumer{c1}},
		{"consumer without a whole key", stateOf(AppendRecord(nil, recordConsumer, []byte("1234567")), one), true, 0, []KnownConsumer{c1}},
		{"consumer without an address", stateOf(AppendRecord(nil, recordConsumer, []byte("12345678\x04name")), one), true, 0, []KnownConsumer{c1}},
		{"name that is not UTF-8", stateOf(consumerFrame(2, "\xff", "::1"), one), true, 0, []KnownConsumer{c1}},
		{"name with a NUL", stateOf(consumerFrame(2, "a\x00b", "::1"), one), true, 0, []KnownConsumer{c1}},
		{"bytes after the address", stateOf(AppendRecord(nil, recordConsumer, []byte("12345678\x01n\x01a.")), one), true, 0, []KnownConsumer{c1}},
		{"address that is not UTF-8", stateOf(consumerFrame(2, "n", "\xff"), one), true, 0, []KnownConsumer{c1}},
		{"name that is too long", stateOf(consumerFrame(2, long, "::1"), one), true, 0, []KnownConsumer{c1}},
		{"address that is too long", stateOf(consumerFrame(2, "n", strings.Repeat("1", maxAddress+1)), one), true, 0, []KnownConsumer{c1}},
		{"too many consumers", stateOf(many...), true, 0, all[:MaxConsumers]},
		{"unknown kind", stateOf(AppendRecord(nil, 9, []byte("x")), one), true, 0, []KnownConsumer{c1}},
		{"last record cut", stateOf(blockFrame(7), one[:len(one)-3]), true, 7, nil},
		{"no header", blockFrame(7), true, 7, nil},
		{"empty", []byte{}, true, 0, nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			fsys := newStoreFS(1)
			fsys.put(statePath, test.data)
			s, err := OpenStoreMeta(fsys, "/s")
			if err != nil || (s.Damage != nil) != test.damaged || !s.found || s.block != test.block || !slices.Equal(s.Consumers, test.consumers) {
				t.Fatalf("got %+v, %v; want damaged %t, block %d, consumers %v", s, err, test.damaged, test.block, test.consumers)
			}
			if err := s.Write(s.Consumers); err != nil {
				t.Fatal(err)
			}
			if again, err := OpenStoreMeta(fsys, "/s"); err != nil || again.Damage != nil || again.block != test.block || !slices.Equal(again.Consumers, test.consumers) {
				t.Errorf("after Write: %+v, %v; want block %d, consumers %v", again, err, test.block, test.consumers)
			}
		})
	}
}

// TakeSeqBlock returns the number before the first batch number of this start of the server. The
// number lies in a new block while blocks are left, and is never below the highest known number.
// UsedSeqBound returns a number above every batch number that was used so far.
func TestStoreStateNumbers(t *testing.T) {
	for _, test := range []struct {
		block, highest uint64 // block in the state file, and highest batch number in logs and cursors
		first, bound   uint64
	}{
		{0, 0, 1 << blockBits, maxBlock << blockBits},
		{0, 12, 1 << blockBits, maxBlock << blockBits},
		{3, 12, 4 << blockBits, 4 << blockBits},
		{3, 3<<blockBits + 9, 4 << blockBits, 4 << blockBits},
		{3, 7<<blockBits + 9, 8 << blockBits, 8 << blockBits},
		{maxBlock, 5, maxBlock << blockBits, (maxBlock + 1) << blockBits},
		{3, maxBlock<<blockBits + 9, maxBlock<<blockBits + 9, (maxBlock + 1) << blockBits},
	} {
		s := StoreMeta{block: test.block}
		if bound := s.UsedSeqBound(test.highest); bound != test.bound {
			t.Errorf("block %d, highest %d: UsedSeqBound is %d, want %d", test.block, test.highest, bound, test.bound)
		}
		first := s.TakeSeqBlock(test.highest)
		if first != test.first || first < test.highest || test.highest>>blockBits < maxBlock && IsSameSeqBlock(first, test.highest) {
			t.Errorf("block %d, highest %d: TakeSeqBlock is %d, want %d", test.block, test.highest, first, test.first)
		}
	}
}

// OpenStoreMeta does not panic on any bytes after the header of the state file, and keeps to the
// limits. Write repairs the file.
func FuzzStoreState(f *testing.F) {
	f.Add(stateOf(blockFrame(7), consumerFrame(1, "c1", "::1"))[len(stateOf()):])
	f.Add(append(bytes.Repeat([]byte{7}, 20), consumerFrame(1, "c1", "::1")...))
	f.Add(AppendRecord(nil, 9, nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		fsys := newStoreFS(1)
		fsys.put(statePath, stateOf(b))
		s, _ := OpenStoreMeta(fsys, "/s")
		if s == nil || len(s.Consumers) > MaxConsumers || s.block > maxBlock {
			t.Fatalf("got %+v, which is over the limits", s)
		}
		if err := s.Write(s.Consumers); err != nil {
			t.Fatal(err)
		}
		again, err := OpenStoreMeta(fsys, "/s")
		if err != nil || again.Damage != nil || again.block != s.block || !slices.Equal(again.Consumers, s.Consumers) {
			t.Fatalf("got %+v, and after Write %+v, %v", s, again, err)
		}
	})
}
