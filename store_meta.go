package main

// State of the server that survives the loss of a log or of the cursors: where the numbers of
// batches begin, and which consumers there are. No number is used twice, because each start
// takes a new block of numbers. A consumer stays known when its cursors are lost, so that no
// sample is evicted that it has not read.

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"unicode/utf8"
)

const (
	stateFile      = "state" + LogSuffix
	recordConsumer = 1
	recordBlock    = 2 // of the newest start

	maxAddress = 128 // bytes

	blockBits = 32      // of a batch's number within its block
	maxBlock  = 1 << 24 // so that no block that comes from damage uses up the numbers
)

// KnownConsumer is a consumer without its cursors. Name and Address are empty where only
// its key is known.
type KnownConsumer struct {
	Key           uint64
	Name, Address string
}

// StoreMeta is the state, and its file. It is not safe for concurrent use.
type StoreMeta struct {
	Consumers []KnownConsumer // as read; at most MaxConsumers
	Damage    error           // what OpenStoreMeta found damaged; nil: nothing
	log       *Log            // nil in memory-only mode
	block     uint64          // of the newest start; 0 if none is known
	found     bool            // there was a file
}

// OpenStoreMeta reads the state in dir; dir "" is memory-only mode. If the file is damaged, it
// returns what could be read, and Damage says so. The error is that of reading the file.
func OpenStoreMeta(fsys FS, dir string) (*StoreMeta, error) {
	s := &StoreMeta{}
	if dir == "" {
		return s, nil
	}
	path := filepath.Join(dir, stateFile)
	s.log = NewLog(fsys, path, []byte("state"))
	log, rec, err := OpenLog(fsys, path, s.decodeRecord)
	if errors.Is(err, fs.ErrNotExist) {
		return s, nil
	}
	if err != nil {
		return nil, fmt.Errorf("reading the server's state: %w", err)
	}
	if !rec.HeaderDamaged {
		s.log = log
	}
	s.found, s.Damage = true, rec.Err
	if rec.HeaderDamaged || rec.Damaged > 0 || rec.TornBytes > 0 { // Write replaces the whole file, so that no crash tears it
		s.Damage = fmt.Errorf("%s was damaged: %d bytes are lost%s", path, rec.LostBytes+rec.TornBytes, rec.KeptCopyNote())
	}
	return s, nil
}

func (s *StoreMeta) decodeRecord(kind byte, payload []byte) error {
	r := NewWireReader(payload)
	switch kind {
	case recordConsumer:
		k := decodeConsumer(&r)
		if err := r.Done(); err != nil {
			return fmt.Errorf("record of a consumer: %w", err)
		}
		if len(s.Consumers) >= MaxConsumers {
			return ErrConsumers
		}
		s.Consumers = append(s.Consumers, k)
		return nil
	case recordBlock:
		block := r.Uvarint(maxBlock)
		if err := r.Done(); err != nil {
			return fmt.Errorf("record of a block: %w", err)
		}
		s.block = max(s.block, block)
		return nil
	}
	return fmt.Errorf("unknown kind of record %d", kind)
}

func appendConsumer(b []byte, k KnownConsumer) []byte {
	b = binary.LittleEndian.AppendUint64(b, k.Key)
	return AppendShortString(AppendShortString(b, k.Name), k.Address)
}

func decodeConsumer(r *WireReader) KnownConsumer {
	k := KnownConsumer{r.Uint64(), r.ShortString(maxConsumerName), r.ShortString(maxAddress)}
	r.Require(k.Name == "" || CheckConsumerName(k.Name) == nil)
	r.Require(utf8.ValidString(k.Address))
	return k
}

// TakeSeqBlock takes a block of numbers for this start, above highestSeq and above the blocks of
// all earlier starts. It returns the number before the first of the block. Write makes the
// block durable.
func (s *StoreMeta) TakeSeqBlock(highestSeq uint64) (startAfter uint64) {
	s.block = min(max(s.block, highestSeq>>blockBits)+1, maxBlock)
	return max(highestSeq, s.block<<blockBits)
}

// UsedSeqBound returns a number that is above all numbers used so far. A higher number in a log
// comes from damage. highestSeq is the highest number found elsewhere.
func (s *StoreMeta) UsedSeqBound(highestSeq uint64) uint64 {
	if s.block == 0 {
		return maxBlock << blockBits
	}
	return (max(s.block, highestSeq>>blockBits) + 1) << blockBits
}

// IsSameSeqBlock reports whether two numbers were used by the same start. The difference of two
// such numbers of one site is a number of batches.
func IsSameSeqBlock(seqA, seqB uint64) bool { return seqA>>blockBits == seqB>>blockBits }

// Write replaces the file by the block of this start and these consumers, durably.
func (s *StoreMeta) Write(consumers []KnownConsumer) error {
	if s.log == nil {
		return nil
	}
	frames := AppendRecord(nil, recordBlock, binary.AppendUvarint(nil, s.block))
	for _, k := range consumers {
		frames = AppendRecord(frames, recordConsumer, appendConsumer(nil, k))
	}
	if err := s.log.RewriteWith(frames); err != nil {
		return fmt.Errorf("saving the server's state: %w", err)
	}
	return nil
}
