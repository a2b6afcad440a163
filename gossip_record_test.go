package main

// Tests of the rules for names and addresses of members.

import (
	"strings"
	"testing"
)

// CheckMemberName accepts 1 to MaxMemberName visible ASCII characters.
func TestCheckMemberName(t *testing.T) {
	for name, ok := range map[string]bool{"a": true, "site-7.example:9": true, "": false, "a b": false, "é": false,
		strings.Repeat("x", MaxMemberName): true, strings.Repeat("x", MaxMemberName+1): false} {
		if err := CheckMemberName(name); (err == nil) != ok {
			t.Errorf("CheckMemberName(%q): got error %v, want accepted: %v", name, err, ok)
		}
	}
}

// CheckMemberAddrText accepts a host:port, and refuses an address that is empty or too long.
func TestCheckMemberAddrText(t *testing.T) {
	for addr, ok := range map[string]bool{"host:1": true, "": false, strings.Repeat("x", MaxMemberAddr+1): false} {
		if err := CheckMemberAddrText(addr); (err == nil) != ok {
			t.Errorf("CheckMemberAddrText(%q): got error %v, want accepted: %v", addr, err, ok)
		}
	}
}
