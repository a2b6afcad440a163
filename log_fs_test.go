package main

// Files set aside: their names, that a crash keeps them, and what errors leave.

import (
	"errors"
	"maps"
	"testing"
	"testing/synctest"
)

func TestSetAside(t *testing.T) {
	const path = "/d/x.log"
	c := newCrashFS(1, "/d")
	for _, tt := range []struct{ data, reason, want string }{
		{"one", "refused", "x.log.refused"},
		{"one", "damaged", "x.log.damaged"},
		{"two", "refused", "x.log.refused-2"},
		{"one", "refused", "x.log.refused"}, // the same bytes lie there already
		{"three", "refused", "x.log.refused-3"},
		{"four", "refused", "x.log.refused-3"},
		{"two", "refused", "x.log.refused-2"},
	} {
		c.put(path, []byte(tt.data))
		if name, err := SetAside(c, path, tt.reason); name != tt.want || err != nil {
			t.Errorf("%s, %s: set aside as %q, %v; want %q", tt.data, tt.reason, name, err, tt.want)
		}
		c.crash()
		if data, err := c.ReadFile("/d/" + tt.want); string(data) != tt.data || err != nil {
			t.Errorf("%s, %s: after a crash %q, %v", tt.data, tt.reason, data, err)
		}
	}
	want := map[string]string{path + ".refused": "one", path + ".refused-2": "two", path + ".refused-3": "four", path + ".damaged": "one"}
	if got := c.contents(); !maps.Equal(got, want) {
		t.Errorf("files %q, want %q", got, want)
	}
}

func TestSetAsideFails(t *testing.T) {
	const path = "/d/x.log"
	for _, tt := range []struct{ op, file, want string }{
		{"read", path, ""},
		{"read", path + ".refused", ""},
		{"rename", path, ""},
		{"syncdir", "/d", "x.log.refused-2"}, // renamed, but a crash may undo it
	} {
		synctest.Test(t, func(t *testing.T) {
			c := newCrashFS(1, "/d")
			c.put(path, []byte("new"))
			c.put(path+".refused", []byte("old"))
			before := c.contents()
			c.hook = failOn(tt.op, tt.file, 0, errDisk)
			if name, err := SetAside(c, path, "refused"); name != tt.want || !errors.Is(err, errDisk) {
				t.Errorf("%s of %s fails: %q, %v; want %q", tt.op, tt.file, name, err, tt.want)
			}
			if tt.want == "" && !maps.Equal(c.contents(), before) {
				t.Errorf("%s of %s fails: files %q", tt.op, tt.file, c.contents())
			}
		})
	}
}
