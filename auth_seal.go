package main

// Packets and messages between servers are sealed with XChaCha20-Poly1305 under subkeys of the
// cluster keys. No nonce is used twice under one key. The header and the name of the ring are
// authenticated with everything that is sealed. Sealing and opening a packet allocate nothing.
// This file must not know the meaning of a message or its sender.

import (
	"crypto/cipher"
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"sync/atomic"

	"golang.org/x/crypto/chacha20poly1305"
)

// A sealed packet or message is
//
//	byte      version
//	4 bytes   key ID: the first of Keys.IDs
//	24 bytes  nonce
//	the rest  ciphertext and tag; additional data: version, key ID, ring name, context
//
// Numbers are little endian.
const (
	SealOverhead = sealHeader + sealNonce + chacha20poly1305.Overhead // bytes

	sealVersion = 2     // of the seal and of all that is sealed: gossip's packets and records, forwarded pushes
	sealHeader  = 1 + 4 // bytes of version and key ID
	sealNonce   = chacha20poly1305.NonceSizeX

	labelPacket  = "telemeter packet seal v1"
	labelMessage = "telemeter message seal v1"
)

// Reasons for which Open refuses.
var (
	ErrNotSealed   = errors.New("shorter than anything sealed")
	ErrSealVersion = errors.New("sealed by another version of telemeter")
	ErrUnknownKey  = errors.New("sealed under an unknown key")
	ErrForged      = errors.New("sealed under another key or for another ring, or damaged")
)

// sealKeys seal with the first key, and open with any. Immutable.
type sealKeys []sealKey

type sealKey struct {
	id     uint32
	aead   cipher.AEAD
	header []byte // version and key ID
	bound  []byte // additional data: the header and the name of the ring
}

// newSealKeys derives the keys for a purpose, in the order of keys. It is an error if there is
// none.
func newSealKeys(keys Keys, purpose, ringName string) (sealKeys, error) {
	subkeys, err := keys.Subkeys(purpose)
	if err != nil {
		return nil, fmt.Errorf("deriving keys: %w", err)
	}
	if len(subkeys) == 0 {
		return nil, errors.New("no cluster key")
	}
	var ks sealKeys
	for i, id := range keys.IDs() {
		raw, err := hex.DecodeString(id)
		if err != nil {
			return nil, fmt.Errorf("key ID %s: %w", id, err)
		}
		aead, err := chacha20poly1305.NewX(subkeys[i])
		if err != nil {
			return nil, fmt.Errorf("key %s: %w", id, err)
		}
		bound := append(append([]byte{sealVersion}, raw...), ringName...)
		ks = append(ks, sealKey{id: binary.LittleEndian.Uint32(raw), aead: aead, header: bound[:sealHeader], bound: bound})
	}
	return ks, nil
}

// withIDOrFirst returns the key with that ID, or the first if there is none.
func (ks sealKeys) withIDOrFirst(keyID uint32) *sealKey {
	for i := range ks {
		if ks[i].id == keyID {
			return &ks[i]
		}
	}
	return &ks[0]
}

// open appends what is in sealed to dst. dst and sealed must not overlap. The errors are
// ErrNotSealed, ErrUnknownKey and ErrForged, bare, and ErrSealVersion, wrapped.
func (ks sealKeys) open(dst, sealed, boundTo []byte) ([]byte, error) {
	if len(sealed) > 0 && sealed[0] != sealVersion {
		return nil, fmt.Errorf("%w: it has version %d; this program knows version %d", ErrSealVersion, sealed[0], sealVersion)
	}
	if len(sealed) < SealOverhead {
		return nil, ErrNotSealed
	}
	id, nonce, ciphertext := SealedKeyID(sealed), sealed[sealHeader:sealHeader+sealNonce], sealed[sealHeader+sealNonce:]
	err := ErrUnknownKey
	for i := range ks { // two keys may share an ID
		if k := &ks[i]; k.id == id {
			plain, openErr := k.aead.Open(dst, nonce, ciphertext, k.additionalData(boundTo))
			if openErr == nil {
				return plain, nil
			}
			err = ErrForged
		}
	}
	return nil, err
}

// seal appends plain, sealed, to dst.
func (k *sealKey) seal(dst, nonce, plain, boundTo []byte) []byte {
	dst = append(append(dst, k.header...), nonce...)
	return k.aead.Seal(dst, nonce, plain, k.additionalData(boundTo))
}

// additionalData returns what is authenticated beside the plaintext.
func (k *sealKey) additionalData(boundTo []byte) []byte {
	return append(k.bound[:len(k.bound):len(k.bound)], boundTo...) // copies bound, unless context is empty
}

// SealedKeyID returns the ID of the key in the header of sealed.
func SealedKeyID(sealed []byte) uint32 { return binary.LittleEndian.Uint32(sealed[1:]) }

// A PacketSealer seals and opens packets of one ring. It is not safe for concurrent use.
//
// Its nonces are 16 random bytes of the sealer and a uint64 that counts its packets. The
// counter is also what a ReplayWindow goes by. XChaCha20's long nonce lets every member choose
// its 16 bytes by itself: two sealers share them as rarely as a key of 128 bits is guessed.
type PacketSealer struct {
	ring    string
	nonce   [sealNonce]byte // counter is its last 8 bytes
	counter uint64
	keys    sealKeys
}

const sealRandom = 16 // bytes of a packet's nonce before the counter

// NewPacketSealer reads 16 bytes of random, which must be unpredictable. Errors: no key, or
// random's.
func NewPacketSealer(keys Keys, ringName string, random io.Reader) (*PacketSealer, error) {
	s := &PacketSealer{ring: ringName}
	if _, err := io.ReadFull(random, s.nonce[:sealRandom]); err != nil {
		return nil, fmt.Errorf("starting the nonce: %w", err)
	}
	return s, s.SetKeys(keys)
}

// SetKeys replaces the keys. The counter goes on, so that a key which comes back never sees a
// nonce twice. After an error the old keys stay.
func (s *PacketSealer) SetKeys(keys Keys) error {
	ks, err := newSealKeys(keys, labelPacket, s.ring)
	if err == nil {
		s.keys = ks
	}
	return err
}

// KeyIDs returns the IDs of the keys. The first key is the one that seals.
func (s *PacketSealer) KeyIDs() []uint32 {
	ids := make([]uint32, len(s.keys))
	for i, k := range s.keys {
		ids[i] = k.id
	}
	return ids
}

// Seal appends plain, sealed, to dst. It uses the key with that ID, which the receiver is
// known to hold, or the first if there is none.
func (s *PacketSealer) Seal(dst, plain []byte, preferredKeyID uint32) []byte {
	s.counter++
	binary.LittleEndian.PutUint64(s.nonce[sealRandom:], s.counter)
	return s.keys.withIDOrFirst(preferredKeyID).seal(dst, s.nonce[:], plain, nil)
}

// Open appends what is in packet to dst and returns it with the sender's counter. dst and
// packet must not overlap. The errors are ErrNotSealed, ErrUnknownKey and ErrForged, bare, and
// ErrSealVersion, wrapped.
func (s *PacketSealer) Open(dst, packet []byte) (plain []byte, counter uint64, err error) {
	if plain, err = s.keys.open(dst, packet, nil); err != nil {
		return nil, 0, err
	}
	return plain, binary.LittleEndian.Uint64(packet[sealHeader+sealRandom:]), nil
}

// A MessageSealer seals messages of any size, each under a random nonce of 24 bytes, of which
// some 2^80 may be used with one key. It is safe for concurrent use.
type MessageSealer struct {
	ring string
	keys atomic.Pointer[sealKeys]
}

// NewMessageSealer returns a sealer of the messages of the named ring. It is an error if there is
// no key.
func NewMessageSealer(keys Keys, ringName string) (*MessageSealer, error) {
	s := &MessageSealer{ring: ringName}
	return s, s.SetKeys(keys)
}

// SetKeys replaces the keys. After an error the old keys stay.
func (s *MessageSealer) SetKeys(keys Keys) error {
	ks, err := newSealKeys(keys, labelMessage, s.ring)
	if err == nil {
		s.keys.Store(&ks)
	}
	return err
}

// Seal appends plain, sealed, to dst. Only an Open with the same purpose (at most 255 bytes)
// and boundTo opens it. It uses the key with that ID, which the receiver is known to hold, or
// the first if there is none.
func (s *MessageSealer) Seal(dst, plain []byte, purpose string, boundTo []byte, preferredKeyID uint32) []byte {
	var nonce [sealNonce]byte
	rand.Read(nonce[:]) // never fails since Go 1.24
	return s.keys.Load().withIDOrFirst(preferredKeyID).seal(dst, nonce[:], plain, messageContext(purpose, boundTo))
}

// Open appends what is in message to dst. The errors are those of PacketSealer.Open.
func (s *MessageSealer) Open(dst, message []byte, purpose string, boundTo []byte) ([]byte, error) {
	return s.keys.Load().open(dst, message, messageContext(purpose, boundTo))
}

// messageContext binds a message to its purpose, and to what it belongs to.
func messageContext(purpose string, boundTo []byte) []byte {
	return append(AppendShortString(nil, purpose), boundTo...)
}
