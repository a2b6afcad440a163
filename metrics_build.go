package main

// This file reports the version of this binary. The Go toolchain records the version in the binary
// during the build, so no build script has to set a variable.

import (
	"cmp"
	"runtime/debug"
	"strings"
)

// ProgramVersion returns the module version and the commit from which the binary was built. If the
// build did not record the version, it is "devel"; if the build did not record the commit, it is
// "unknown". The commit has the suffix "-dirty" if the source had uncommitted changes.
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
