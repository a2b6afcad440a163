package main

// Messages between servers are sealed with XChaCha20-Poly1305 under subkeys of the cluster
// keys. No nonce is used twice under one key. The header and the name of the ring are
// authenticated with every message. Sealing and opening a packet allocate nothing. This file
// must not know the meaning of a message or its sender.

import (
	"bytes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync/atomic"

	"golang.org/x/crypto/chacha20poly1305"
)

// A sealed packet is
//
//	byte      version
//	4 bytes   key ID: the first of Keys.IDs
//	24 bytes  nonce: 16 bytes random per sealer, uint64 counter
//	the rest  ciphertext and tag; additional data: version, key ID, cluster name
//
// The counter of the nonce is also what the replay window goes by. XChaCha20's
// long nonce lets every member pick its 16 bytes blindly: that two sealers ever
// share them is as likely as guessing a key of 128 bits.
const (
	SealOverhead = sealHead + chacha20poly1305.NonceSizeX + chacha20poly1305.Overhead // bytes

	sealVersion = 1
	sealHead    = 1 + 4
	labelGossip = "telemeter gossip seal v1"
)

// Why Open refuses.
var (
	ErrNotSealed  = errors.New("not a sealed packet of this version")
	ErrUnknownKey = errors.New("sealed under an unknown key")
	ErrForged     = errors.New("sealed under another key or for another cluster, or damaged")
)

// A Sealer seals and opens packets of one cluster. It is not safe for
// concurrent use.
type Sealer struct {
	cluster string
	nonce   [chacha20poly1305.NonceSizeX]byte // its last 8 bytes count
	count   uint64
	keys    []sealKey // the first is the one to seal with
}

type sealKey struct {
	id   uint32
	aead cipher.AEAD
	data []byte // version, key ID, cluster: the header and additional data
}

// NewSealer takes 16 bytes of random, which must be unpredictable. Errors: no
// key, or random's.
func NewSealer(keys Keys, cluster string, random io.Reader) (*Sealer, error) {
	s := &Sealer{cluster: cluster}
	if _, err := io.ReadFull(random, s.nonce[:16]); err != nil {
		return nil, fmt.Errorf("starting the nonce: %w", err)
	}
	return s, s.SetKeys(keys)
}

// SetKeys replaces the keys. The nonce goes on, so that a key which comes back
// never sees one twice. On an error nothing changed.
func (s *Sealer) SetKeys(keys Keys) error {
	fresh, err := sealKeys(keys, labelGossip, s.cluster)
	if err != nil {
		return err
	}
	s.keys = fresh
	return nil
}

// sealKeys derives the keys for one purpose, in their order.
func sealKeys(keys Keys, label, cluster string) ([]sealKey, error) {
	subkeys, err := keys.Subkeys(label)
	if err != nil {
		return nil, fmt.Errorf("deriving keys: %w", err)
	}
	var fresh []sealKey
	for i, id := range keys.IDs() {
		raw, err := hex.DecodeString(id)
		if err != nil {
			return nil, fmt.Errorf("key ID %s: %w", id, err)
		}
		aead, err := chacha20poly1305.NewX(subkeys[i])
		if err != nil {
			return nil, fmt.Errorf("key %s: %w", id, err)
		}
		data := append(append([]byte{sealVersion}, raw...), cluster...)
		fresh = append(fresh, sealKey{id: binary.BigEndian.Uint32(raw), aead: aead, data: data})
	}
	if len(fresh) == 0 {
		return nil, errors.New("no cluster key")
	}
	return fresh, nil
}

// KeyIDs returns the IDs of the keys, the sealing one's first.
func (s *Sealer) KeyIDs() []uint32 {
	ids := make([]uint32, len(s.keys))
	for i, k := range s.keys {
		ids[i] = k.id
	}
	return ids
}

// Seal appends plain, sealed, to dst. It uses the key with that ID, which the
// receiver is known to hold, and the first if there is none such.
func (s *Sealer) Seal(dst, plain []byte, keyID uint32) []byte {
	k := &s.keys[0]
	for i := range s.keys {
		if s.keys[i].id == keyID {
			k = &s.keys[i]
			break
		}
	}
	s.count++
	binary.BigEndian.PutUint64(s.nonce[16:], s.count)
	dst = append(dst, k.data[:sealHead]...)
	dst = append(dst, s.nonce[:]...)
	return k.aead.Seal(dst, s.nonce[:], plain, k.data)
}

// Open appends what is in packet to dst and returns it with the sender's
// counter. dst and packet must not overlap. The errors are ErrNotSealed,
// ErrUnknownKey and ErrForged, bare.
func (s *Sealer) Open(dst, packet []byte) (plain []byte, count uint64, err error) {
	if len(packet) < SealOverhead || packet[0] != sealVersion {
		return nil, 0, ErrNotSealed
	}
	id := binary.BigEndian.Uint32(packet[1:])
	nonce := packet[sealHead : sealHead+chacha20poly1305.NonceSizeX]
	err = ErrUnknownKey
	for i := range s.keys { // two keys may share an ID
		if s.keys[i].id != id {
			continue
		}
		plain, e := s.keys[i].aead.Open(dst, nonce, packet[sealHead+len(nonce):], s.keys[i].data)
		if e == nil {
			return plain, binary.BigEndian.Uint64(nonce[16:]), nil
		}
		err = ErrForged
	}
	return nil, 0, err
}

// KeyID returns the ID of the key under which a packet was sealed, that opened.
func (s *Sealer) KeyID(packet []byte) uint32 { return binary.BigEndian.Uint32(packet[1:]) }

// A Box seals messages of any size, each under a random nonce of 24 bytes, of
// which some 2^80 may be used with one key. It is safe for concurrent use.
type Box struct {
	cluster string
	keys    atomic.Pointer[[]sealKey] // the first is the one to seal with
}

const labelBox = "telemeter box v1"

// NewBox returns a Box of the named cluster of servers.
func NewBox(keys Keys, cluster string) (*Box, error) {
	b := &Box{cluster: cluster}
	return b, b.SetKeys(keys)
}

// SetKeys replaces the keys. On an error nothing changed.
func (b *Box) SetKeys(keys Keys) error {
	fresh, err := sealKeys(keys, labelBox, b.cluster)
	if err != nil {
		return err
	}
	b.keys.Store(&fresh)
	return nil
}

// bind is what is authenticated beside the message: the header, what the message
// is for, and what it belongs to, each with its length.
func bind(k *sealKey, purpose string, context []byte) []byte {
	data := append(bytes.Clone(k.data), byte(len(purpose)))
	return append(append(data, purpose...), context...)
}

// Seal appends plain, sealed, to dst. Only an Open with the same purpose (at
// most 255 bytes) and context opens it. It uses the key with that ID, which the
// receiver is known to hold, and the first if there is none such.
func (b *Box) Seal(dst, plain []byte, purpose string, context []byte, keyID uint32) []byte {
	keys := *b.keys.Load()
	k := &keys[max(0, slices.IndexFunc(keys, func(k sealKey) bool { return k.id == keyID }))]
	var nonce [chacha20poly1305.NonceSizeX]byte
	rand.Read(nonce[:])
	dst = append(append(dst, k.data[:sealHead]...), nonce[:]...)
	return k.aead.Seal(dst, nonce[:], plain, bind(k, purpose, context))
}

// KeyID returns the ID of the key under which a message was sealed, that opened.
func (b *Box) KeyID(message []byte) uint32 { return binary.BigEndian.Uint32(message[1:]) }

// Open appends what is in message to dst. The errors are those of Sealer.Open.
func (b *Box) Open(dst, message []byte, purpose string, context []byte) ([]byte, error) {
	if len(message) < SealOverhead || message[0] != sealVersion {
		return nil, ErrNotSealed
	}
	id, err := binary.BigEndian.Uint32(message[1:]), ErrUnknownKey
	keys := *b.keys.Load()
	for i := range keys {
		k := &keys[i]
		if k.id != id {
			continue
		}
		n := sealHead + chacha20poly1305.NonceSizeX
		if plain, e := k.aead.Open(dst, message[sealHead:n], message[n:], bind(k, purpose, context)); e == nil {
			return plain, nil
		}
		err = ErrForged
	}
	return nil, err
}
