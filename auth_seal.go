package main

// This file seals gossip packets and the messages between servers: it encrypts and authenticates
// them with XChaCha20-Poly1305 under subkeys of the cluster keys. The chance that a nonce is used
// twice under one key is negligible. The authentication also covers the header and the ring's name.
// Sealing and opening a packet allocate no memory if the caller's buffer is large enough. This file
// must not know the meaning of a message or its sender.

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

// A sealed packet or message has these parts:
//
//	byte      version
//	4 bytes   ID of the key that seals; see Keys.IDs
//	24 bytes  nonce
//	the rest  ciphertext and authentication tag
//
// The additional data, which is authenticated but not encrypted, is the version, the key ID, the
// ring's name and, for a message, its purpose and boundTo. The sealed form contains only the first
// two of these. Numbers are little endian.
const (
	SealOverhead = sealHeader + sealNonce + chacha20poly1305.Overhead // bytes that sealing adds to the plaintext

	// sealVersion is the version of the sealed form and of all content that is sealed: gossip
	// packets, member records, forwarded pushes and the answers to them.
	sealVersion = 2
	sealHeader  = 1 + 4 // bytes of the version and the key ID
	sealNonce   = chacha20poly1305.NonceSizeX

	labelPacket  = "telemeter packet seal v1"  // the purpose for Keys.Subkeys when sealing packets
	labelMessage = "telemeter message seal v1" // the purpose for Keys.Subkeys when sealing messages
)

// Errors of PacketSealer.Open and MessageSealer.Open.
var (
	ErrNotSealed   = errors.New("too short to be sealed")
	ErrSealVersion = errors.New("sealed by another version of telemeter")
	ErrUnknownKey  = errors.New("sealed with an unknown key")
	ErrForged      = errors.New("sealed with another key or for another ring, or damaged")
)

// sealKeys are the sealing keys of one purpose and one ring, in the order of the key file. Each key
// can open what was sealed with it. By default the first key seals; the caller may prefer another
// key by its ID. sealKeys are immutable.
type sealKeys []sealKey

type sealKey struct {
	id     uint32 // ID of the key; the header of a sealed packet or message holds it
	aead   cipher.AEAD
	header []byte // header of everything that this key seals: the version and the key ID
	bound  []byte // start of the additional data: the header and the ring's name
}

// newSealKeys derives the sealing keys for purpose from keys, in the same order. It returns an
// error if keys is empty.
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

// withIDOrFirst returns the key whose ID is keyID, or the first key if no key has that ID.
func (ks sealKeys) withIDOrFirst(keyID uint32) *sealKey {
	for i := range ks {
		if ks[i].id == keyID {
			return &ks[i]
		}
	}
	return &ks[0]
}

// open decrypts and verifies sealed, and appends the plaintext to dst. dst and sealed must not
// overlap. The errors ErrNotSealed, ErrUnknownKey and ErrForged are returned as they are.
// ErrSealVersion is wrapped in an error that names the version in sealed and this program's
// version.
func (ks sealKeys) open(dst, sealed, boundTo []byte) ([]byte, error) {
	if len(sealed) > 0 && sealed[0] != sealVersion {
		return nil, fmt.Errorf("%w: it has version %d; this program knows version %d", ErrSealVersion, sealed[0], sealVersion)
	}
	if len(sealed) < SealOverhead {
		return nil, ErrNotSealed
	}
	id, nonce, ciphertext := SealedKeyID(sealed), sealed[sealHeader:sealHeader+sealNonce], sealed[sealHeader+sealNonce:]
	err := ErrUnknownKey
	for i := range ks { // try each key with this ID, because two keys may have the same 32-bit ID
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

// seal encrypts plain and appends the header, the nonce, the ciphertext and the tag to dst.
func (k *sealKey) seal(dst, nonce, plain, boundTo []byte) []byte {
	dst = append(append(dst, k.header...), nonce...)
	return k.aead.Seal(dst, nonce, plain, k.additionalData(boundTo))
}

// additionalData returns the data that is authenticated in addition to the plaintext: the header,
// the ring's name and boundTo.
func (k *sealKey) additionalData(boundTo []byte) []byte {
	// The limit on the capacity makes append copy k.bound instead of writing behind it. If boundTo
	// is empty, append copies and allocates nothing.
	return append(k.bound[:len(k.bound):len(k.bound)], boundTo...)
}

// SealedKeyID returns the key ID in the header of sealed. It panics if sealed has fewer than 5
// bytes.
func SealedKeyID(sealed []byte) uint32 { return binary.LittleEndian.Uint32(sealed[1:]) }

// A PacketSealer seals and opens the gossip packets of one ring. It is not safe for concurrent use.
//
// A packet's nonce consists of 16 random bytes, chosen once per PacketSealer, and the packet
// counter, a uint64 that counts the packets of this PacketSealer. The receiver's ReplayWindow
// checks the packet counter. The nonce of XChaCha20 is so long that each member can choose its
// random bytes alone: two PacketSealers have the same 16 bytes only with the probability of
// guessing a 128-bit key.
type PacketSealer struct {
	ring    string          // name of the ring
	nonce   [sealNonce]byte // nonce of the last sealed packet; its last 8 bytes are counter
	counter uint64          // number of packets sealed
	keys    sealKeys
}

const sealRandom = 16 // random bytes at the start of a packet's nonce; the packet counter follows them

// NewPacketSealer returns a PacketSealer for the ring ringName. It reads 16 bytes from random,
// which must be unpredictable. It returns an error if keys is empty or if reading random fails.
func NewPacketSealer(keys Keys, ringName string, random io.Reader) (*PacketSealer, error) {
	s := &PacketSealer{ring: ringName}
	if _, err := io.ReadFull(random, s.nonce[:sealRandom]); err != nil {
		return nil, fmt.Errorf("reading random bytes for the nonce: %w", err)
	}
	return s, s.SetKeys(keys)
}

// SetKeys replaces the keys. It does not reset the packet counter. So even a key that is removed
// and later added again never seals two packets with the same nonce. After an error the old keys
// stay in use.
func (s *PacketSealer) SetKeys(keys Keys) error {
	ks, err := newSealKeys(keys, labelPacket, s.ring)
	if err == nil {
		s.keys = ks
	}
	return err
}

// KeyIDs returns the IDs of the keys, in the order of the key file. Seal uses the first key by
// default.
func (s *PacketSealer) KeyIDs() []uint32 {
	ids := make([]uint32, len(s.keys))
	for i, k := range s.keys {
		ids[i] = k.id
	}
	return ids
}

// Seal encrypts plain and appends the sealed packet to dst. It seals with the key whose ID is
// preferredKeyID: if the caller knows a key that the receiver holds, it passes the ID of that key.
// If this PacketSealer has no such key, Seal uses its first key.
func (s *PacketSealer) Seal(dst, plain []byte, preferredKeyID uint32) []byte {
	s.counter++
	binary.LittleEndian.PutUint64(s.nonce[sealRandom:], s.counter)
	return s.keys.withIDOrFirst(preferredKeyID).seal(dst, s.nonce[:], plain, nil)
}

// Open decrypts and verifies packet. It appends the plaintext to dst, and returns the extended dst
// with the packet counter that the sender put into the nonce. dst and packet must not overlap. The
// errors ErrNotSealed, ErrUnknownKey and ErrForged are returned as they are. ErrSealVersion is
// wrapped in an error that names the packet's version and this program's version.
func (s *PacketSealer) Open(dst, packet []byte) (plain []byte, counter uint64, err error) {
	if plain, err = s.keys.open(dst, packet, nil); err != nil {
		return nil, 0, err
	}
	return plain, binary.LittleEndian.Uint64(packet[sealHeader+sealRandom:]), nil
}

// A MessageSealer seals and opens messages of any size between the servers of one ring. Each
// message has a random nonce of 24 bytes, so that one key is safe for about 2^80 messages. A
// MessageSealer is safe for concurrent use.
type MessageSealer struct {
	ring string // name of the ring
	keys atomic.Pointer[sealKeys]
}

// NewMessageSealer returns a MessageSealer for the ring ringName. It returns an error if keys is
// empty.
func NewMessageSealer(keys Keys, ringName string) (*MessageSealer, error) {
	s := &MessageSealer{ring: ringName}
	return s, s.SetKeys(keys)
}

// SetKeys replaces the keys. After an error the old keys stay in use.
func (s *MessageSealer) SetKeys(keys Keys) error {
	ks, err := newSealKeys(keys, labelMessage, s.ring)
	if err == nil {
		s.keys.Store(&ks)
	}
	return err
}

// Seal encrypts plain and appends the sealed message to dst. The message can be opened only by
// calling Open with the same purpose and boundTo. purpose may have at most 255 bytes. Seal uses the
// key whose ID is preferredKeyID: the caller passes the ID of a key that it expects the receiver to
// hold. If this MessageSealer has no such key, Seal uses its first key.
func (s *MessageSealer) Seal(dst, plain []byte, purpose string, boundTo []byte, preferredKeyID uint32) []byte {
	var nonce [sealNonce]byte
	rand.Read(nonce[:]) // crypto/rand.Read never returns an error since Go 1.24
	return s.keys.Load().withIDOrFirst(preferredKeyID).seal(dst, nonce[:], plain, messageContext(purpose, boundTo))
}

// Open decrypts and verifies message, and appends the plaintext to dst. It returns the same errors
// as PacketSealer.Open.
func (s *MessageSealer) Open(dst, message []byte, purpose string, boundTo []byte) ([]byte, error) {
	return s.keys.Load().open(dst, message, messageContext(purpose, boundTo))
}

// messageContext returns purpose, preceded by its length, and boundTo as one text. It is part of
// the additional data of a message, so that the message opens only with the same purpose and
// boundTo.
func messageContext(purpose string, boundTo []byte) []byte {
	return append(AppendShortString(nil, purpose), boundTo...)
}
