#!/bin/sh
# dist.sh: builds static binaries for Linux in dist/, prints their sizes, and writes dist/SHA256SUMS last.
# It replaces dist/. It fails if the binary for amd64 is not below the limit. The same commit, tags and Go
# give the same bytes on every machine. In a git worktree, the version is "devel". Environment: GO, the go
# command; ARCHS, some of amd64, arm64 and armv7.
set -eu
cd "$(dirname "$0")/.."
go=${GO:-go}
limit=14000000

# These settings would change the binaries. GOFLAGS is not empty, because "go env -w" fills an empty one.
export CGO_ENABLED=0 GOOS=linux GOFLAGS=-trimpath GOWORK=off GOFIPS140=off GOAMD64=v1 GOARM64=v8.0 GOARM=7
# An archive has no .git, and a worktree has a file of this name, which Go does not read. For both, Go
# would take the version of a repository around this directory.
vcs=false
if [ -d .git ]; then vcs=true; fi

rm -rf dist
mkdir dist
printf '%-64s %12s\n' file bytes
for arch in ${ARCHS:-amd64 arm64 armv7}; do
	goarch=$arch
	if [ "$arch" = armv7 ]; then goarch=arm; fi
	GOARCH=$goarch $go build -buildvcs=$vcs -ldflags '-s -w' -o dist/new .
	# The name of the file has the version that the binary prints.
	version=$($go version -m dist/new | awk '$1 == "mod" { print $3 }' | tr -d '()')
	file=telemeter-${version:-devel}-linux-$arch
	mv dist/new "dist/$file"
	size=$(($(wc -c <"dist/$file")))
	printf '%-64s %12d\n' "$file" "$size"
	if [ "$arch" = amd64 ] && [ "$size" -ge "$limit" ]; then
		echo "dist/$file has $size bytes; it must have less than $limit" >&2
		exit 1
	fi
done
cd dist
if command -v sha256sum >/dev/null; then sha256sum telemeter-*; else shasum -a 256 telemeter-*; fi >SHA256SUMS
