#!/bin/sh
# unit.sh [go test flags]: runs the unit tests once. It prints a progress line every 15 s, the tests
# that were left out because a program is missing, and the output of the tests that did not pass.
# Environment: GO, the go command.
set -eu
cd "$(dirname "$0")/.."
go=${GO:-go}

log=$(mktemp)
job= ticker=
stop() {
	for pid in $job $ticker; do kill "$pid" 2>/dev/null || true; done
	rm -f "$log"
}
trap stop EXIT
trap 'exit 1' INT TERM

# Fuzz targets run their seeds as tests.
all=$(cat ./*_test.go | grep -c '^func \(Test\|Fuzz\).*\*testing\.[TF])')
begin=$(date +%s)
# -v says which test is running. The command is not in a pipe, because its status counts.
$go test -v "$@" . >"$log" 2>&1 &
job=$!
(
	# sleep must not hold the output open when the loop is killed.
	while sleep 15 >/dev/null 2>&1; do
		ended=$(grep -c '^--- ' "$log" || true)
		now=$(sed -n 's/^=== RUN  *\([^/]*\)$/\1/p' "$log" | tail -n 1)
		echo "  $ended of $all tests have ended after $(($(date +%s) - begin)) s; ${now:-compiling}"
	done
) &
ticker=$!
status=0
wait "$job" || status=$?
job=
kill "$ticker" 2>/dev/null || true
wait "$ticker" 2>/dev/null || true
ticker=

sed -n 's/^ *[a-z0-9_]*_test\.go:[0-9]*: \(left out: .*\)/  \1/p' "$log" | sort -u
if [ "$status" = 0 ]; then
	grep -E '^(ok|\?) ' "$log"
	exit 0
fi
# The output of a test follows its "=== RUN", "=== CONT" or "=== NAME" line.
awk '
	/^=== (RUN|CONT|NAME|PAUSE) / { test = $3; sub("/.*", "", test); next }
	/^--- (PASS|SKIP): / { passed[$3] = 1; next }
	/^ *--- (PASS|SKIP): / { next }
	/^--- FAIL: / { test = $3 }
	/^(FAIL|ok|panic: |exit status|# |SIGQUIT)/ { test = "" }
	{ if (!(test in text)) order[++n] = test; text[test] = text[test] $0 "\n" }
	END { for (i = 1; i <= n; i++) if (!(order[i] in passed)) printf "%s", text[order[i]] }
' "$log"
exit "$status"
