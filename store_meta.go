package main

// StoreMeta is server state that must survive the loss of a log or of the cursors: the block of
// sequence numbers in use, and the list of consumers. A site's new batch does not get the number of
// an earlier batch, even if damage to the log destroyed the earlier batch, because each start of
// the server uses a new block of numbers. A consumer stays known even if its cursors are lost, so
// that the store does not evict samples that the consumer has not read.

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
	recordConsumer = 1 // kind of record: a consumer without its cursors
	recordBlock    = 2 // kind of record: the block number of the newest start

	maxAddress = 128 // maximum bytes of a consumer's address

	blockBits = 32 // number of low bits of a sequence number that count batches; the bits above are the block number
	// maxBlock is the highest block number. It is so low that a damaged block number cannot use up
	// all sequence numbers.
	maxBlock = 1 << 24
)

// KnownConsumer is a consumer without its cursors. Name and Address are empty if only the key is
// known.
type KnownConsumer struct {
	Key           uint64
	Name, Address string
}

// StoreMeta is the server state and its file. It is not safe for concurrent use.
type StoreMeta struct {
	Consumers []KnownConsumer // consumers in the file when it was opened; at most MaxConsumers
	Damage    error           // damage that OpenStoreMeta found in the file, or nil
	log       *Log            // nil in memory-only mode
	block     uint64          // block of the newest start; 0 if none is known
	found     bool            // OpenStoreMeta found the state file
}

// OpenStoreMeta reads the state file in dir. dir "" means memory-only mode. If the file is damaged,
// OpenStoreMeta returns the readable part and sets Damage. The error is a failure to read the file.
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
	// An unfinished write counts as damage here, because Write replaces the whole file atomically
	// and a crash therefore cannot leave one.
	if rec.HeaderDamaged || rec.Damaged > 0 || rec.TornBytes > 0 {
		s.Damage = fmt.Errorf("%s was damaged: the server may not know consumers that are not in %s%s", path, ConsumersFile, rec.KeptCopyNote())
	}
	return s, nil
}

// decodeRecord adds one record of the file to s.
func (s *StoreMeta) decodeRecord(kind byte, payload []byte) error {
	r := NewWireReader(payload)
	switch kind {
	case recordConsumer:
		k := decodeConsumer(&r)
		if err := r.Done(); err != nil {
			return fmt.Errorf("decoding consumer record: %w", err)
		}
		if len(s.Consumers) >= MaxConsumers {
			return ErrConsumers
		}
		s.Consumers = append(s.Consumers, k)
		return nil
	case recordBlock:
		block := r.Uvarint(maxBlock)
		if err := r.Done(); err != nil {
			return fmt.Errorf("decoding record of the block number: %w", err)
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

// decodeConsumer reads a consumer that appendConsumer wrote. An invalid name or address makes r
// fail.
func decodeConsumer(r *WireReader) KnownConsumer {
	k := KnownConsumer{r.Uint64(), r.ShortString(maxConsumerName), r.ShortString(maxAddress)}
	r.Require(k.Name == "" || CheckConsumerName(k.Name) == nil)
	r.Require(utf8.ValidString(k.Address))
	return k
}

// TakeSeqBlock chooses the block of sequence numbers for this start of the server. The block lies
// above highestSeq and above the blocks of all earlier starts that the state file knows. After
// block maxBlock there is no further block: numbers then continue above highestSeq. The result is
// the number before the first number of the block. The block is durable only after Write.
func (s *StoreMeta) TakeSeqBlock(highestSeq uint64) (startAfter uint64) {
	s.block = min(max(s.block, highestSeq>>blockBits)+1, maxBlock)
	return max(highestSeq, s.block<<blockBits)
}

// UsedSeqBound returns a number above every sequence number that was used so far. A higher number
// in a log is the result of damage. highestSeq is the highest number that recovery found in other
// files.
func (s *StoreMeta) UsedSeqBound(highestSeq uint64) uint64 {
	if s.block == 0 {
		return maxBlock << blockBits
	}
	return (max(s.block, highestSeq>>blockBits) + 1) << blockBits
}

// IsSameSeqBlock reports whether two sequence numbers were used by the same start of the server. If
// they were, and both belong to one site that the store did not forget in between, their difference
// is the number of the site's batches between them, the later batch included.
func IsSameSeqBlock(seqA, seqB uint64) bool { return seqA>>blockBits == seqB>>blockBits }

// Write replaces the state file by a new file with the block number of this start and the given
// consumers. If it returns nil, the new file is durable.
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
