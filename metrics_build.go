package main

// The version of this binary, as the build recorded it.
// It needs no variable that a build script sets.

import (
	"cmp"
	"runtime/debug"
	"strings"
)

// ProgramVersion returns the module version and the commit that the binary was built
// from: "devel" and "unknown" when the build did not record them, and "-dirty"
// behind a commit with uncommitted changes.
func ProgramVersion() (version, revision string) {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		info = &debug.BuildInfo{}
	}
	return buildVersion(info)
}

func buildVersion(info *debug.BuildInfo) (version, revision string) {
	version, revision = cmp.Or(strings.Trim(info.Main.Version, "()"), "devel"), "unknown"
	dirty := ""
	for _, s := range info.Settings {
		switch {
		case s.Key == "vcs.revision":
			revision = s.Value
		case s.Key == "vcs.modified" && s.Value == "true":
			dirty = "-dirty"
		}
	}
	return version, revision + dirty
}
