#!/usr/bin/env bash
# integration.sh [FROM [TOKEN]]: a real Prometheus, two servers and a client, as
# processes on loopback. The Prometheus is both source and sink: the client
# federates from it, and it scrapes what the servers then hold. The client pushes
# to server A what server B owns.
#
# Without arguments: checks what comes out at the end, kills B, checks that it still
# serves the same, kills it again, checks that A goes on, and that B takes over when it
# returns, restarts A, and exits 0 if all was right and the Prometheus has no gap.
# With arguments: the client scrapes FROM (a URL, such as http://localhost:9005)
# instead, with the bearer token TOKEN, and all stays up until Ctrl-C.
#
# PROMETHEUS names the program; else it is looked for on PATH, else installed. PROMTOOL
# names its promtool, which is beside it otherwise.
set -euo pipefail
cd "$(dirname "$0")/.."

from=${1:-http://localhost:9005}
token=${2:-}
keep=$# # with arguments, everything stays up

patience=120    # seconds for what takes some ten on an idle machine
export LC_ALL=C # sort and comm have to agree
passed=0 failed=0
names=() pids=() # of the processes that have to be running

work=
trap finish EXIT
if ((keep)); then
	trap 'exit 0' INT TERM HUP PIPE # the way to end it
else
	trap 'exit 130' INT TERM HUP PIPE
fi
# After the traps, so that it never stays behind. Nobody else can look into it, so
# keys and tokens are safe there.
work=$(mktemp -d)

# finish ends what was started, shows why if something failed, and leaves nothing.
finish() {
	local status=$?
	trap '' INT TERM HUP PIPE # a second Ctrl-C must not leave processes behind
	set +e
	# Of the job table, so that one is found even if a signal came before its
	# process ID was noted.
	# shellcheck disable=SC2046
	[ -z "$(jobs -rp)" ] || kill $(jobs -rp) 2>/dev/null
	local limit=$((SECONDS + 30))
	while [ -n "$(jobs -rp)" ] && ((SECONDS < limit)); do sleep 0.1; done
	# shellcheck disable=SC2046
	[ -z "$(jobs -rp)" ] || kill -KILL $(jobs -rp) 2>/dev/null
	wait 2>/dev/null
	if ((status != 0 && status != 130)) && [ -n "$work" ]; then
		local log
		for log in apt keys prometheus A B client; do
			[ -e "$work/$log.log" ] || continue
			echo "--- the end of what $log logged"
			tail -n 60 "$work/$log.log"
		done
	fi
	[ -z "$work" ] || rm -rf "$work"
	((keep)) || echo "$passed passed, $failed failed"
	exit "$status"
}

die() {
	failed=$((failed + 1))
	printf 'integration.sh: %s\n' "$*" >&2
	exit 1
}

# debian PACKAGE...: installs them, where that is possible.
debian() {
	if ! command -v apt-get >/dev/null || [ "$(id -u)" != 0 ]; then
		return 1
	fi
	echo "installing $*"
	# Wanted is the program, not Debian's service of it, which would hold port 9090.
	# RUNLEVEL=1 is what keeps invoke-rc.d from starting it; it may start all the
	# same under systemd, hence the stop.
	(
		export DEBIAN_FRONTEND=noninteractive RUNLEVEL=1
		apt-get update -q || exit 1
		apt-get install -qy --no-install-recommends "$@" || exit 1
		if [ -x /etc/init.d/prometheus ]; then service prometheus stop || true; fi
	) >"$work/apt.log" 2>&1
}

# find_prometheus sets prometheus, or says what to do.
find_prometheus() {
	if [ -n "${PROMETHEUS:-}" ]; then
		prometheus=$PROMETHEUS
		[ -n "$(type -P "$prometheus")" ] || die "PROMETHEUS=$prometheus is not a program that can be run"
	else
		prometheus=prometheus
		type -P prometheus >/dev/null || debian prometheus ||
			die "there is no prometheus on PATH, and it could not be installed: install it, or run PROMETHEUS=/path/to/prometheus $0"
	fi
	# The one that came with it, if there is no other.
	promtool=${PROMTOOL:-$(dirname "$(type -P "$prometheus")")/promtool}
	"$prometheus" --version >"$work/version" 2>&1 || die "$prometheus --version failed: $(cat "$work/version")"
	sed -n '1s/ (.*//p' "$work/version"
}

# free PORT...: nobody else answers there. Otherwise an earlier run's process could
# be taken for one of this run.
free() {
	local port
	for port; do
		if (exec 3<>"/dev/tcp/localhost/$port") 2>/dev/null; then
			die "port $port of localhost is in use; this test needs 9002 to 9006, 9013, 9014 and 9016"
		fi
	done
}

# start NAME COMMAND...: in the background, with its output in NAME.log.
start() {
	local name=$1
	shift
	"$@" >>"$work/$name.log" 2>&1 &
	names+=("$name") pids+=($!)
}

# stop SIGNAL NAME: ends one process, and returns when it has ended.
stop() {
	local i status=0
	for i in "${!names[@]}"; do
		[ "${names[i]}" = "$2" ] || continue
		kill "-$1" "${pids[i]}"
		# Not to be reported by the shell; and what is asked to end ends well.
		wait "${pids[i]}" 2>/dev/null || status=$?
		[ "$1" = KILL ] || [ "$status" = 0 ] || die "$2 ended with status $status after SIG$1"
		unset "names[i]" "pids[i]"
	done
}

# alive is false, and says who in seen, when a process has ended by itself.
alive() {
	local i
	for i in "${!pids[@]}"; do
		kill -0 "${pids[i]}" 2>/dev/null && continue
		seen="${names[i]} has ended"
		return 1
	done
}

# check WHAT COMMAND...: tries until the command succeeds, a process ends, or the
# patience of this part of the test is over. The command leaves in seen what it saw.
check() {
	local what=$1
	shift
	seen=
	until "$@"; do
		if ! alive || ((SECONDS >= deadline)); then
			failed=$((failed + 1))
			printf 'FAIL %s: %s\n' "$what" "${seen:-nothing seen}"
			return
		fi
		sleep 0.2
	done
	passed=$((passed + 1))
	printf 'ok   %s: %s\n' "$what" "$seen"
}

# get URL [CURL'S ARGUMENT...]: without the user's settings, and without a proxy.
get() {
	curl -q --silent --fail --noproxy '*' --max-time 10 "$@"
}

ready() {
	seen=$(get "$1") || {
		seen="no answer from $1"
		return 1
	}
}

# query PROMQL: the JSON of the answer.
query() {
	get http://localhost:9005/api/v1/query --get --data-urlencode "query=$1" | grep -F '"status":"success"'
}

# value PROMQL: the value of a vector's one element; empty if it has none.
value() {
	query "$1" | sed -n 's/.*"value":\[[^,]*,"\([^"]*\)"\].*/\1/p'
}

# samples PROMQL: of a range, one [time,"value"] a line, sorted. The regular
# expression fits nothing else of the answer.
samples() {
	query "$1" | grep -o '\[[0-9.]*,"[^"]*"\]' | sort
}

# found PROMQL: it has a value, above 0.
found() {
	seen=$(value "$1") && [ -n "$seen" ] && [ "$seen" != 0 ]
}

# lint_free: own metrics of client and servers are as promtool wants them.
lint_free() {
	local port
	seen=
	for port in 9002 9004 9014; do
		get "http://localhost:$port/metrics" >"$work/metrics" || {
			seen="no answer from port $port"
			return 1
		}
		"$promtool" check metrics <"$work/metrics" >"$work/lint" 2>&1 || {
			seen="port $port: $(head -n 5 "$work/lint" | paste -sd' ')"
			return 1
		}
		seen="$seen$(grep -c '^# TYPE' "$work/metrics") on port $port "
	done
}

# no_original: only pseudonyms, and two, since there are two originals: the targets
# of this Prometheus. More would come of a client that pushes the servers' own series
# back to them.
no_original() {
	local originals pseudonyms
	originals=$(value 'count({_id="test",instance=~"localhost:.*|127[.].*|.*:90[01][0-9]"})') &&
		pseudonyms=$(value 'count(count by (instance) ({_id="test",instance!=""}))') || return 1
	seen="${originals:-0} series with an original, ${pseudonyms:-0} pseudonyms"
	[ -z "$originals" ] && [ "$pseudonyms" = 2 ]
}

# same_samples JOB: every sample that came through is, to the millisecond, one that
# the source has. The source may be ahead: only what came through is compared.
same_samples() {
	local strange
	samples "scraped{_id=\"test\",job=\"$1\"}[10m]" >"$work/pushed" || return 1
	samples "scrape_samples_scraped{_id=\"\",job=\"$1\"}[10m]" >"$work/source" || return 1
	strange=$(comm -23 "$work/pushed" "$work/source")
	seen="$(grep -c . "$work/pushed") of the source's $(grep -c . "$work/source")"
	if [ -n "$strange" ]; then
		seen="$seen; not the source's: $(echo "$strange" | tr '\n' ' ')"
		return 1
	fi
	# One could be chance, and would say nothing of how time goes on.
	[ "$(grep -c . "$work/pushed")" -ge 2 ]
}

# own_up: the targets of this Prometheus, two of each job as /sd told it, have one up
# each, and it is 1. Served samples with a wrong job or instance would take its place,
# or stand beside it; and so would a target that both servers tell of, if it counted
# twice.
own_up() {
	local all good
	all=$(value 'count(up{_id=""})') && good=$(value 'count(up{_id="",job=~"federate|telemeter",instance=~"localhost:90[01]4"} == 1)') || return 1
	seen="${good:-0} of ${all:-0} are 1 and of localhost:9004 and localhost:9014"
	[ "$all" = 4 ] && [ "$good" = 4 ]
}

# members PORT: what the server there takes for the cluster: the ring's version, and
# of each member a line of name, state, slot and session.
members() {
	get "http://localhost:$1/debug/ring" >"$work/cluster" || return 1
	grep -o '"version":"[^"]*"' "$work/cluster" &&
		grep -o '{"name":"[^}]*}' "$work/cluster" |
		sed -n 's/^{"name":"\([^"]*\)","state":"\([^"]*\)",.*"slot":\([^,]*\),.*"session":\([0-9]*\),.*/\1 \2 slot \3 session \4/p'
}

# b_owns: both servers take both for alive, of the same sessions, and B for the owner.
b_owns() {
	local a b
	if ! a=$(members 9004) || ! b=$(members 9014); then
		seen="no answer from /debug/ring"
		return 1
	fi
	seen=$(echo "$a" | sed -n 's/ session.*//p' | sort | paste -sd,)
	if [ "$a" != "$b" ]; then
		seen="$seen to A, but $(echo "$b" | sed -n 's/ session.*//p' | sort | paste -sd,) to B"
		return 1
	fi
	# Of two slots it is the first that the ID "test" falls to.
	[ "$seen" = "A alive slot 1,B alive slot 0" ]
}

# on_b_alone: the owner shows samples, and no other server does. Each server says with its
# own name what it saw of a site itself, whichever server owns the site.
on_b_alone() {
	get http://localhost:9004/federate >"$work/on-a" && get http://localhost:9014/federate >"$work/on-b" || return 1
	local a b
	a=$(grep '_id="test"' "$work/on-a" | grep -vc 'server="A"' || true)
	b=$(grep -c '_id="test"' "$work/on-b" || true)
	seen="$b lines on B, $a on A"
	[ "$a" = 0 ] && [ "$b" != 0 ]
}

# after MS: reads an exposition, and prints how many samples of "test" are of a time
# after that.
after() {
	awk -v t="$1" '/^#/ || !/_id="test"/ || !/^scraped/ { next } $NF > t { n++ } END { print n + 0 }'
}

# on_b_since MS: what was sent after that time has come to B.
on_b_since() {
	get http://localhost:9014/federate >"$work/on-b" || return 1
	seen="$(after "$1" <"$work/on-b") series go on"
	[ "$seen" != "0 series go on" ]
}

# goes_on MS: samples of a time after that are on A, and have come to the Prometheus.
# What B held when it was killed is older.
goes_on() {
	local here there
	get http://localhost:9004/federate >"$work/on-a" || return 1
	here=$(after "$1" <"$work/on-a")
	there=$(value "count(timestamp(scraped{_id=\"test\"}) > $1 / 1000)") || return 1
	seen="$here series go on at A, ${there:-0} at the Prometheus"
	[ "$here" != 0 ] && [ -n "$there" ]
}

# no_gap FROM TO: of the alert that this Prometheus evaluates all the time, every
# sample of a time between, in ms, came through, and so did one from after that.
no_gap() {
	local alert='alertname="AlwaysFiring",alertstate="firing"' missing
	samples "ALERTS{_id=\"\",$alert}[30m]" >"$work/source" && samples "alerts{_id=\"test\",$alert}[30m]" >"$work/pushed" || return 1
	missing=$(comm -23 "$work/source" "$work/pushed" | awk -F'[][,]' -v from="$1" -v to="$2" '$2 * 1000 >= from && $2 * 1000 <= to { n++ } END { print n + 0 }')
	seen="$missing of the source's $(grep -c . "$work/source") are missing"
	[ "$missing" = 0 ] && awk -F'[][,]' -v to="$2" '$2 * 1000 > to { later = 1 } END { exit !later }' "$work/pushed"
}

# shows PORT: the server there shows samples of "test".
shows() { get "http://localhost:$1/federate?match[]=scraped" --globoff | grep -q '_id="test"'; }

# watch: looks all the time whether both servers show "test" at once. One that shows it
# before and after the other did has shown it meanwhile.
watch() {
	while true; do
		if shows 9004 && shows 9014 && shows 9004; then echo twice; else echo once; fi
		sleep 0.2
	done >"$work/watched" 2>/dev/null
}

one_exposer() {
	local twice
	twice=$(grep -c twice "$work/watched" || true)
	seen="both showed it $twice times of $(grep -c . "$work/watched")"
	[ "$twice" = 0 ] && grep -q once "$work/watched"
}

# quiet_log: this Prometheus never met samples that it could not take.
quiet_log() {
	seen=$(grep -Eic 'append failed|parse error|same timestamp|duplicate sample|commit failed' "$work/prometheus.log" || true)
	[ "$seen" = 0 ]
}

now_ms() { date +%s%3N; }

# served: the samples of B's /federate, without what it says itself of pushes.
served() {
	get http://localhost:9014/federate >"$work/answer" || return 1
	grep -Ev '^(# TYPE )?(push_time_seconds|push_failure_time_seconds|telemeter_cluster_)' "$work/answer" | sort
}

served_before() {
	served >"$work/before" || return 1
	seen="$(grep -c '_id="test"' "$work/before") samples"
	[ "$seen" != "0 samples" ]
}

served_again() {
	local differing
	served >"$work/after" || {
		seen="no samples"
		return 1
	}
	differing=$(comm -3 "$work/before" "$work/after")
	seen="$(grep -c '_id="test"' "$work/after") samples"
	[ -z "$differing" ] || {
		seen="$seen; $(echo "$differing" | wc -l) lines differ, such as $(echo "$differing" | sed -n 1p)"
		return 1
	}
}

if [ -z "${MAKELEVEL:-}" ] || [ ! -x telemeter ]; then make; fi # started by make, it is built already
find_prometheus
type -P curl >/dev/null || debian curl || die "there is no curl, and it could not be installed"
free 9002 9003 9004 9005 9006 9013 9014 9016

a=(./telemeter --mode server --name A --keys "$work/keys" --storage-dir "$work/a"
	--listen localhost:9003 --listen-internal localhost:9004
	--listen-cluster localhost:9006 --join localhost:9016)
b=(./telemeter --mode server --name B --keys "$work/keys" --storage-dir "$work/b"
	--listen localhost:9013 --listen-internal localhost:9014
	--listen-cluster localhost:9016)
join_a=(--join localhost:9006) # for B, once there is an A
# _id="" leaves out what came from the servers: this Prometheus would otherwise push
# its own copies of copies, without end.
client=(./telemeter --mode client --from "$from" --token-file "$work/token"
	--spool-dir "$work/spool" --interval 5s --scrape-interval 1s --match '{__name__=~".+",_id=""}'
	--anonymize-labels instance --anonymize-salt-file "$work/salt"
	--rename ALERTS=alerts --rename scrape_samples_scraped=scraped)
if [ -n "$token" ]; then
	printf '%s\n' "$token" >"$work/from.token"
	client+=(--from-token-file "$work/from.token")
fi

head -c 32 /dev/urandom | base64 >"$work/salt"
./telemeter --mode keygen --keys "$work/keys" 2>>"$work/keys.log"
./telemeter --mode token --keys "$work/keys" --id test --to http://localhost:9003 >"$work/token" 2>>"$work/keys.log"

deadline=$((SECONDS + patience))
# B is the first, and has its slot before A chooses one: so it is B that owns "test".
start B "${b[@]}"
check "server B is ready" ready http://localhost:9014/healthz/ready
start A "${a[@]}"
check "server A is ready" ready http://localhost:9004/healthz/ready
check "both agree, and B owns the cluster ID" b_owns
((failed == 0)) || exit 1
start prometheus "$prometheus" --config.file=testdata/prometheus.yml \
	--storage.tsdb.path="$work/prometheus" --web.listen-address=localhost:9005
check "prometheus is ready" ready http://localhost:9005/-/ready
((failed == 0)) || exit 1
start client "${client[@]}"

deadline=$((SECONDS + patience))
check 'count({_id="test"})' found 'count({_id="test"})'
if ((keep)); then
	alive || die "$seen"
	((failed == 0)) || tail -n 1 "$work/client.log" # FROM may come back: all stays up
	cat <<-END

		What the central Prometheus has of $from:
		  http://localhost:9005/graph?g0.expr=count%20by%20(__name__)({_id%3D%22test%22})&g0.tab=1
		What it scrapes, and what the client sent last:
		  http://localhost:9014/federate  http://localhost:9002/federate
		What server A, to which it pushes, and server B, which holds it, know of each other:
		  http://localhost:9004/debug/ring  http://localhost:9014/debug/ring
		Logs are in $work. Ctrl-C ends it.
	END
	while alive; do sleep 1; done
	die "$seen"
fi

check 'scraped{_id="test"}' found 'count(scraped{_id="test"})'
check 'alerts{_id="test"}' found 'count(alerts{_id="test",alertname="AlwaysFiring",alertstate="firing"})'
check "times and values of job federate are the source's" same_samples federate
check "times and values of job telemeter are the source's" same_samples telemeter
check "own metrics are lint-free by promtool" lint_free
check "instance is anonymized" no_original
check "up of the servers' own targets" own_up
check "B alone shows what was pushed to A" on_b_alone

# The client goes first, so that nothing new comes between the two answers.
stop TERM client
deadline=$((SECONDS + patience))
check "served before SIGKILL" served_before
stop KILL B
start B "${b[@]}" "${join_a[@]}"
check "server B is ready after SIGKILL" ready http://localhost:9014/healthz/ready
check "the same is served after SIGKILL" served_again
check "both agree again" b_owns

# Now the client is in the middle of its pushes when their owner goes, for good.
deadline=$((SECONDS + patience))
restarted=$(now_ms)
start client "${client[@]}"
check "B holds what is pushed next" on_b_since "$restarted"
check "B alone shows it" on_b_alone
stop KILL B
later=$(($(now_ms) + 10000)) # two pushes: more than what was under way
deadline=$((SECONDS + patience))
check "A goes on when B is killed" goes_on "$later"
check "times and values are still the source's" same_samples telemeter
check "A still takes pushes, and is ready" ready http://localhost:9004/healthz/ready

# B returns, with the slot that it had.
watch &
start B "${b[@]}" "${join_a[@]}"
deadline=$((SECONDS + patience))
check "B returns: both agree, and B owns the cluster ID" b_owns
check "what A held meanwhile it shows no more" on_b_alone
later=$(now_ms)
check "B holds what is pushed next" on_b_since "$later"

# A is restarted as for an update. The client has no other server, and waits.
stop TERM A
start A "${a[@]}"
deadline=$((SECONDS + patience))
check "server A is ready after SIGTERM" ready http://localhost:9004/healthz/ready
check "both agree after it" b_owns
later=$(now_ms)
check "B holds what is pushed next" on_b_since "$later"
check "B alone shows what was pushed to A, still" on_b_alone
check "no gap since the client was started" no_gap $((restarted + 10000)) "$later"
check "one server at a time showed it" one_exposer
deadline=0 check "no parse error, no duplicate sample in the Prometheus's log" quiet_log

((failed == 0))
