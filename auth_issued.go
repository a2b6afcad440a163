package main

// This file implements the list of issued tokens, a file in the directory --keys. Each line is the
// JSON payload of a client token, without the signature, so that nobody can make a token from a
// line. A token is recorded and synced before it is printed. Lines are only appended. The last line
// may be torn, because the process or the host can stop in the middle of an append, or because the
// file is being copied: readers skip a torn last line, and the next append removes it.

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"time"
)

// IssuedTokens is a list of issued client tokens, sorted by cluster ID, then by issue time, then by
// token ID. The zero value is an empty list. IssuedTokens is immutable and safe for concurrent use.
type IssuedTokens struct{ tokens []Token }

// Tokens returns the tokens of the list. The caller must not change them.
func (l IssuedTokens) Tokens() []Token { return l.tokens }

// ValidSites yields, in order, the cluster IDs with at least one token that has not expired at the
// time now and is not revoked, each with the time at which the oldest such token was issued.
func (l IssuedTokens) ValidSites(now time.Time, revoked RevokedIDs) iter.Seq2[string, time.Time] {
	return func(yield func(id string, issued time.Time) bool) {
		last := ""
		for _, t := range l.tokens {
			if t.ClusterID == last || t.IsExpired(now) || revoked.IsRevoked(t) {
				continue
			}
			if last = t.ClusterID; !yield(last, time.Unix(t.Issued, 0)) {
				return
			}
		}
	}
}

// ParseIssuedTokens parses a list of issued tokens. It skips blank lines, repeated lines and a torn
// last line. An error gives the number of the first line that is no record of a token.
func ParseIssuedTokens(data []byte) (IssuedTokens, error) {
	if len(data) > MaxIssuedFile {
		return IssuedTokens{}, fmt.Errorf("larger than %d bytes: delete lines of tokens that have expired", MaxIssuedFile)
	}
	var l IssuedTokens
	n := 0
	for line := range bytes.Lines(data) {
		n++
		record, complete := bytes.CutSuffix(line, []byte("\n"))
		if record = bytes.TrimSpace(record); len(record) == 0 {
			continue
		}
		t, err := decodeIssued(record)
		switch {
		case err == nil:
			l.tokens = append(l.tokens, t)
		case complete:
			return IssuedTokens{}, fmt.Errorf("line %d is not the record of a token: correct or delete the line", n)
		}
	}
	slices.SortFunc(l.tokens, func(a, b Token) int {
		return cmp.Or(cmp.Compare(a.ClusterID, b.ClusterID), cmp.Compare(a.Issued, b.Issued), cmp.Compare(a.ID, b.ID))
	})
	l.tokens = slices.CompactFunc(l.tokens, func(a, b Token) bool { return a.ClusterID == b.ClusterID && a.ID == b.ID })
	return l, nil
}

// decodeIssued parses one record of a list of issued tokens, which has at most MaxToken bytes.
func decodeIssued(record []byte) (Token, error) {
	if len(record) > MaxToken {
		return Token{}, fmt.Errorf("longer than %d bytes", MaxToken)
	}
	t, err := decodeToken(record)
	if err == nil && t.Kind != KindClient {
		err = errors.New("not a client token")
	}
	return t, err
}

// RecordIssuedToken appends the client token with the given text to the list of issued tokens in
// dir, and syncs the list. It creates the list if dir has none; every user may read the list, but
// normally not dir. Concurrent calls, also of several processes, wait for each other. After an
// error, the list may have a record of the token, or a torn last line.
func RecordIssuedToken(dir, text string) (err error) {
	t, err := ParseUnverifiedToken(text)
	if err != nil {
		return err
	}
	line, err := json.Marshal(t)
	if err != nil {
		return err
	}
	path := filepath.Join(dir, IssuedFile)
	f, err := os.OpenFile(path, os.O_RDWR|os.O_APPEND, 0)
	if errors.Is(err, fs.ErrNotExist) {
		if err := createKeyFile(path, nil, 0o644); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
		f, err = os.OpenFile(path, os.O_RDWR|os.O_APPEND, 0)
	}
	if err != nil {
		return err
	}
	defer func() { err = cmp.Or(err, f.Close()) }() // closing the file also unlocks it
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX); err != nil {
		return fmt.Errorf("locking %s: %w", path, err)
	}
	size, lacksLineEnd, err := removeTornLine(f)
	if err != nil {
		return err
	}
	if lacksLineEnd {
		line = append([]byte("\n"), line...)
	}
	line = append(line, '\n')
	if size+int64(len(line)) > MaxIssuedFile {
		return fmt.Errorf("%s is full (the limit is %d bytes): delete lines of tokens that have expired", path, MaxIssuedFile)
	}
	if _, err := f.Write(line); err != nil {
		return err
	}
	return f.Sync()
}

// removeTornLine removes the text after the last line end of the list f, unless that text is the
// whole record of a token. It returns the size of f, and whether the line end is missing after a
// whole record.
func removeTornLine(f *os.File) (size int64, lacksLineEnd bool, err error) {
	info, err := f.Stat()
	if err != nil {
		return 0, false, err
	}
	size = info.Size()
	begin := max(0, size-MaxToken-1)
	end := make([]byte, size-begin)
	if _, err := f.ReadAt(end, begin); err != nil {
		return 0, false, err
	}
	i := bytes.LastIndexByte(end, '\n')
	if i < 0 && begin > 0 {
		return 0, false, fmt.Errorf("%s ends with a line that is not the record of a token: correct or delete the line", f.Name())
	}
	last := end[i+1:]
	if len(last) == 0 {
		return size, false, nil
	}
	if _, err := decodeIssued(last); err == nil {
		return size, true, nil
	}
	size -= int64(len(last))
	return size, false, f.Truncate(size)
}
