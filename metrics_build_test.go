package main

// Tests of the version and the commit that buildVersion finds in the build information. The test
// makes the build information of each case.

import (
	"runtime/debug"
	"testing"
)

// buildVersion returns the version and the commit in the build information. If they are missing, it
// returns "devel" and "unknown". It adds "-dirty" to the commit if the work tree was modified.
func TestVersion(t *testing.T) {
	set := func(kv ...string) (s []debug.BuildSetting) {
		for i := 0; i < len(kv); i += 2 {
			s = append(s, debug.BuildSetting{Key: kv[i], Value: kv[i+1]})
		}
		return s
	}
	for _, c := range []struct {
		main              string
		settings          []debug.BuildSetting
		version, revision string
	}{
		{"", nil, "devel", "unknown"},
		{"(devel)", set("GOOS", "linux"), "devel", "unknown"},
		{"v1.2.3", set("vcs", "git", "vcs.revision", "abc", "vcs.modified", "false"), "v1.2.3", "abc"},
		{"v1.2.3+dirty", set("vcs.modified", "true", "vcs.revision", "abc"), "v1.2.3+dirty", "abc-dirty"},
	} {
		info := &debug.BuildInfo{Settings: c.settings}
		info.Main.Version = c.main
		if v, r := buildVersion(info); v != c.version || r != c.revision {
			t.Errorf("build of version %q with settings %v: got %s %s, want %s %s", c.main, c.settings, v, r, c.version, c.revision)
		}
	}
	if v, r := ProgramVersion(); v == "" || r == "" {
		t.Errorf("this binary: got version %q and commit %q, want neither empty", v, r)
	}
}
