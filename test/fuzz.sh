#!/bin/sh
# fuzz.sh [FUZZTIME]: runs every fuzz target of the package for FUZZTIME (a duration, or a count
# such as 10000x; 3s if not given), one after another. It fails at the first target that finds a
# fault; Go leaves the input in testdata/fuzz. Environment: GO, the go command.
#
# The targets share one binary, because linking it takes longer than a short run. Each run begins
# with the seeds alone: a cache of earlier inputs would make the time of a run depend on earlier
# runs.
set -eu
cd "$(dirname "$0")/.."
fuzztime=${1:-3s}
go=${GO:-go}

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
trap 'exit 1' INT TERM

echo "  compiling the fuzz targets"
$go test -c -fuzz=Fuzz -o "$tmp/fuzz.test" .
targets=$("$tmp/fuzz.test" -test.list '^Fuzz')
all=$(echo "$targets" | grep -c .)

n=0
for target in $targets; do
	n=$((n + 1))
	# New inputs are not minimized, because that can take all of the time.
	if "$tmp/fuzz.test" -test.run '^$' -test.fuzz "^$target\$" -test.fuzztime "$fuzztime" \
		-test.fuzzminimizetime 1x -test.fuzzcachedir "$tmp/cache" >"$tmp/log" 2>&1; then
		execs=$(sed -n 's/.*execs: \([0-9]*\).*/\1/p' "$tmp/log" | tail -n 1)
		echo "  $n of $all: $target, ${execs:-no} inputs in $fuzztime"
		continue
	fi
	cat "$tmp/log"
	# Up to Go 1.26, the end of a duration can race with the workers and read as a failure,
	# without any input (go.dev/issue/75804). The log then says nothing else.
	if grep -A1 "^--- FAIL: $target " "$tmp/log" | grep -qx '    context deadline exceeded' &&
		! grep -q 'Failing input written' "$tmp/log"; then
		echo "  $n of $all: $target: only its time was up; this is no failure"
		continue
	fi
	exit 1
done
