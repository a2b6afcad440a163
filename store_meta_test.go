package main

// Tests of reading a server's state from its file, damaged files included.

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"slices"
	"strings"
	"testing"
)

const statePath = "/s/" + stateFile

// consumerFrame is a record of kind recordConsumer.
func consumerFrame(key uint64, name, address string) []byte {
	return AppendRecord(nil, recordConsumer, appendConsumer(nil, KnownConsumer{key, name, address}))
}

// blockFrame is a record of kind recordBlock.
func blockFrame(block uint64) []byte {
	return AppendRecord(nil, recordBlock, binary.AppendUvarint(nil, block))
}

func stateOf(frames ...[]byte) []byte {
	return slices.Concat(append([][]byte{appendLogHeader(nil, []byte("state"))}, frames...)...)
}

// The records of a state file, good ones and malformed ones. The good ones are kept, and
// Write mends the file.
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
		{"nothing", stateOf(), false, 0, nil},
		{"block and consumer", stateOf(blockFrame(7), one), false, 7, []KnownConsumer{c1}},
		{"the highest block counts", stateOf(blockFrame(7), blockFrame(9), blockFrame(8)), false, 9, nil},
		{"the highest block there is", stateOf(blockFrame(maxBlock)), false, maxBlock, nil},
		{"a consumer whose name is lost", stateOf(consumerFrame(2, "", "")), false, 0, []KnownConsumer{{Key: 2}}},
		{"a block beyond all", stateOf(blockFrame(maxBlock+1), one), true, 0, []KnownConsumer{c1}},
		{"more behind the block", stateOf(AppendRecord(nil, recordBlock, []byte{7, 7}), one), true, 0, []KnownConsumer{c1}},
		{"no block", stateOf(AppendRecord(nil, recordBlock, nil), one), true, 0, []KnownConsumer{c1}},
		{"no key", stateOf(AppendRecord(nil, recordConsumer, []byte("1234567")), one), true, 0, []KnownConsumer{c1}},
		{"no address", stateOf(AppendRecord(nil, recordConsumer, []byte("12345678\x04name")), one), true, 0, []KnownConsumer{c1}},
		{"a name that is no text", stateOf(consumerFrame(2, "\xff", "::1"), one), true, 0, []KnownConsumer{c1}},
		{"a name with a NUL", stateOf(consumerFrame(2, "a\x00b", "::1"), one), true, 0, []KnownConsumer{c1}},
		{"more behind the address", stateOf(AppendRecord(nil, recordConsumer, []byte("12345678\x01n\x01a.")), one), true, 0, []KnownConsumer{c1}},
		{"an address that is no text", stateOf(consumerFrame(2, "n", "\xff"), one), true, 0, []KnownConsumer{c1}},
		{"a long name", stateOf(consumerFrame(2, long, "::1"), one), true, 0, []KnownConsumer{c1}},
		{"a long address", stateOf(consumerFrame(2, "n", strings.Repeat("1", maxAddress+1)), one), true, 0, []KnownConsumer{c1}},
		{"too many consumers", stateOf(many...), true, 0, all[:MaxConsumers]},
		{"unknown kind", stateOf(AppendRecord(nil, 9, []byte("x")), one), true, 0, []KnownConsumer{c1}},
		{"cut short", stateOf(blockFrame(7), one[:len(one)-3]), true, 7, nil},
		{"no header", blockFrame(7), true, 7, nil},
		{"empty", []byte{}, true, 0, nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			fsys := newStoreFS(1)
			fsys.put(statePath, test.data)
			s, err := OpenStoreMeta(fsys, "/s")
			if err != nil || (s.Damage != nil) != test.damaged || !s.found || s.block != test.block || !slices.Equal(s.Consumers, test.consumers) {
				t.Fatalf("read %+v, %v; want block %d, %v", s, err, test.block, test.consumers)
			}
			if err := s.Write(s.Consumers); err != nil {
				t.Fatal(err)
			}
			if again, err := OpenStoreMeta(fsys, "/s"); err != nil || again.Damage != nil || again.block != test.block || !slices.Equal(again.Consumers, test.consumers) {
				t.Errorf("mended: %+v, %v", again, err)
			}
		})
	}
}

// The numbers of each start are above all that is known, and IsSameSeqBlock tells starts apart.
func TestStoreStateNumbers(t *testing.T) {
	for _, test := range []struct{ block, highest, first, beyond uint64 }{
		{0, 0, 1 << blockBits, maxBlock << blockBits},
		{0, 12, 1 << blockBits, maxBlock << blockBits},
		{3, 12, 4 << blockBits, 4 << blockBits},
		{3, 3<<blockBits + 9, 4 << blockBits, 4 << blockBits},
		{3, 7<<blockBits + 9, 8 << blockBits, 8 << blockBits},
		{maxBlock, 5, maxBlock << blockBits, (maxBlock + 1) << blockBits},
		{3, maxBlock<<blockBits + 9, maxBlock<<blockBits + 9, (maxBlock + 1) << blockBits},
	} {
		s := StoreMeta{block: test.block}
		if beyond := s.UsedSeqBound(test.highest); beyond != test.beyond {
			t.Errorf("%+v: beyond %d", test, beyond)
		}
		first := s.TakeSeqBlock(test.highest)
		if first != test.first || first < test.highest || test.highest>>blockBits < maxBlock && IsSameSeqBlock(first, test.highest) {
			t.Errorf("%+v: first %d", test, first)
		}
	}
}

// Any file is read without a panic and within the limits, and Write mends it.
func FuzzStoreState(f *testing.F) {
	f.Add(stateOf(blockFrame(7), consumerFrame(1, "c1", "::1"))[len(stateOf()):])
	f.Add(append(bytes.Repeat([]byte{7}, 20), consumerFrame(1, "c1", "::1")...))
	f.Add(AppendRecord(nil, 9, nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		fsys := newStoreFS(1)
		fsys.put(statePath, stateOf(b))
		s, _ := OpenStoreMeta(fsys, "/s")
		if s == nil || len(s.Consumers) > MaxConsumers || s.block > maxBlock {
			t.Fatalf("read %+v", s)
		}
		if err := s.Write(s.Consumers); err != nil {
			t.Fatal(err)
		}
		again, err := OpenStoreMeta(fsys, "/s")
		if err != nil || again.Damage != nil || again.block != s.block || !slices.Equal(again.Consumers, s.Consumers) {
			t.Fatalf("read %+v, and mended %+v, %v", s, again, err)
		}
	})
}
