package main

// State of the server that survives the loss of a log or of the cursors: where the numbers of
// batches begin, and which consumers there are. No number is used twice, because each start
// takes a new block of numbers. A consumer stays known when its cursors are lost, so that no
// sample is evicted that it has not read.

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"
	"strings"
	"unicode/utf8"
)

const (
	stateFile      = "state" + LogSuffix
	recordConsumer = 1 // 8 bytes of key, name, NUL, address
	recordNumbers  = 2 // uvarint: the block of the newest start

	maxAddress = 256 // bytes

	blockBits = 32      // of a batch's number within its block
	maxBlock  = 1 << 24 // so that no block that comes from damage uses up the numbers
)

var errState = errors.New("malformed record of a server's state")

// KnownConsumer is a consumer without its cursors. Name and Address are empty where only
// its key is known.
type KnownConsumer struct {
	Key           uint64
	Name, Address string
}

// StoreState is that state, and its file. It is not safe for concurrent use.
type StoreState struct {
	log       *Log            // nil in memory-only mode
	Consumers []KnownConsumer // as read; at most MaxConsumers
	block     uint64          // of the newest start; 0 if none is known
	found     bool            // there was a file
}

// OpenStoreState reads the state in dir; dir "" is memory-only mode. If the file is
// damaged, it returns an error and what could be read. If the file cannot be read, the
// result is nil.
func OpenStoreState(fsys FS, dir string) (*StoreState, error) {
	s := &StoreState{}
	if dir == "" {
		return s, nil
	}
	path := filepath.Join(dir, stateFile)
	s.log = NewLog(fsys, path, []byte("state"))
	log, rec, err := OpenLog(fsys, path, s.restore)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return s, nil
	case err != nil:
		return nil, fmt.Errorf("reading the server's state: %w", err)
	case !rec.HeaderDamaged:
		s.log = log
	}
	s.found = true
	if rec.HeaderDamaged || rec.Damaged > 0 || rec.TornBytes > 0 { // Write replaces it whole, so that no crash tears it
		return s, fmt.Errorf("%s was damaged: %d bytes are lost%s", path, rec.LostBytes+rec.TornBytes, rec.KeptAs())
	}
	return s, rec.Err
}

// Found reports whether there was a file.
func (s *StoreState) Found() bool { return s.found }

func (s *StoreState) restore(kind byte, payload []byte) error {
	switch kind {
	case recordConsumer:
		k, err := decodeKnown(payload)
		if err != nil || len(s.Consumers) >= MaxConsumers {
			return errors.Join(errState, err)
		}
		s.Consumers = append(s.Consumers, k)
		return nil
	case recordNumbers:
		block, n := binary.Uvarint(payload)
		if n <= 0 || n != len(payload) || block > maxBlock {
			return errState
		}
		s.block = max(s.block, block)
		return nil
	}
	return fmt.Errorf("unknown kind of record %d", kind)
}

func decodeKnown(b []byte) (k KnownConsumer, err error) {
	if len(b) < 8 {
		return k, errState
	}
	name, address, ok := strings.Cut(string(b[8:]), "\x00")
	if !ok || name != "" && CheckConsumerName(name) != nil || len(address) > maxAddress || !utf8.ValidString(address) {
		return k, errState
	}
	return KnownConsumer{binary.LittleEndian.Uint64(b), name, address}, nil
}

// NewBlock takes a block of numbers for this start, above highest and above the blocks of
// all earlier starts. It returns the number before the first of the block. Write makes the
// block durable.
func (s *StoreState) NewBlock(highest uint64) uint64 {
	s.block = min(max(s.block, highest>>blockBits)+1, maxBlock)
	return max(highest, s.block<<blockBits)
}

// Beyond returns a number above all numbers that were used so far. A higher number in a
// log comes from damage. highest is the highest number found elsewhere.
func (s *StoreState) Beyond(highest uint64) uint64 {
	if s.block == 0 {
		return maxBlock << blockBits
	}
	return (max(s.block, highest>>blockBits) + 1) << blockBits
}

// SameBlock reports whether two numbers were used by the same start. The difference of two
// such numbers of one site is a number of batches.
func SameBlock(a, b uint64) bool { return a>>blockBits == b>>blockBits }

// Write replaces the file by the block of this start and these consumers, durably.
func (s *StoreState) Write(consumers []KnownConsumer) error {
	if s.log == nil {
		return nil
	}
	frames := AppendRecord(nil, recordNumbers, binary.AppendUvarint(nil, s.block))
	for _, k := range consumers {
		b := binary.LittleEndian.AppendUint64(nil, k.Key)
		frames = AppendRecord(frames, recordConsumer, append(b, k.Name+"\x00"+k.Address...))
	}
	err := s.log.Rewrite(func(w io.Writer) error {
		_, err := w.Write(frames)
		return err
	})
	if err != nil {
		return fmt.Errorf("keeping the server's state: %w", err)
	}
	return nil
}
