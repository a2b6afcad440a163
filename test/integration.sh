#!/usr/bin/env bash
# integration.sh [FROM [TOKEN]] runs a real Prometheus, two servers and a client as
# processes on loopback. The Prometheus is both source and sink: the client scrapes its
# /federate, and the Prometheus scrapes the servers and the client. The client pushes to
# server A, and server B owns the cluster ID of the client.
#
# Without arguments, the script checks the samples that arrive at the Prometheus, and that
# every query of the dashboard and of the alerts finds data there. Then it kills B, and checks
# that B serves the same samples after a restart. It kills B again, and checks that A takes
# over, and that B takes over again when it returns. At last it restarts A, and checks that
# the Prometheus has no gap. It exits 0 if all checks pass.
#
# With arguments, the client scrapes the URL FROM, such as http://localhost:9005, with the
# bearer token TOKEN. All processes run until Ctrl-C.
#
# PROMETHEUS is the Prometheus program. The default is the one on PATH; if there is none,
# the script installs it. PROMTOOL is the promtool program. The default is the one in the
# directory of the Prometheus program.
set -euo pipefail
cd "$(dirname "$0")/.."

from=${1:-http://localhost:9005}
token=${2:-}
keep=$# # not 0: run until Ctrl-C

patience=120    # seconds for steps that take about ten on an idle machine
export LC_ALL=C # sort and comm must use the same order
passed=0 failed=0
names=() pids=() # the processes that must be running

work=
trap finish EXIT
if ((keep)); then
	trap 'exit 0' INT TERM HUP PIPE # Ctrl-C is the regular end
else
	trap 'exit 130' INT TERM HUP PIPE
fi
# The traps are set before the directory is created, so that it is always removed. Only this
# user can read the directory, so keys and tokens are safe there.
work=$(mktemp -d)

# finish ends all processes, shows the ends of their logs after a failure, and removes the
# directory.
finish() {
	local status=$?
	trap '' INT TERM HUP PIPE # a second Ctrl-C must not leave processes behind
	set +e
	# The job table has every process, even if a signal arrived before its process ID was
	# stored in pids.
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

# die MESSAGE... prints a message and fails the test.
die() {
	failed=$((failed + 1))
	printf 'integration.sh: %s\n' "$*" >&2
	exit 1
}

# debian PACKAGE... installs Debian packages. It fails without apt-get or without root.
debian() {
	if ! command -v apt-get >/dev/null || [ "$(id -u)" != 0 ]; then
		return 1
	fi
	echo "installing $*"
	# The Debian package would also start a Prometheus service, which would use port 9090.
	# RUNLEVEL=1 keeps invoke-rc.d from starting the service. Under systemd the service
	# starts nevertheless, so it is stopped below.
	(
		export DEBIAN_FRONTEND=noninteractive RUNLEVEL=1
		apt-get update -q || exit 1
		apt-get install -qy --no-install-recommends "$@" || exit 1
		if [ -x /etc/init.d/prometheus ]; then service prometheus stop || true; fi
	) >"$work/apt.log" 2>&1
}

# find_prometheus sets prometheus and promtool, installing Prometheus if there is none. If
# that fails, it ends the test with a hint.
find_prometheus() {
	if [ -n "${PROMETHEUS:-}" ]; then
		prometheus=$PROMETHEUS
		[ -n "$(type -P "$prometheus")" ] || die "PROMETHEUS=$prometheus is not a program that can be run"
	else
		prometheus=prometheus
		type -P prometheus >/dev/null || debian prometheus ||
			die "there is no prometheus on PATH, and it could not be installed: install it, or run PROMETHEUS=/path/to/prometheus $0"
	fi
	# By default, use the promtool in the directory of the Prometheus program.
	promtool=${PROMTOOL:-$(dirname "$(type -P "$prometheus")")/promtool}
	"$prometheus" --version >"$work/version" 2>&1 || die "$prometheus --version failed: $(cat "$work/version")"
	sed -n '1s/ (.*//p' "$work/version"
}

# free PORT... fails the test if a process listens on one of the ports. Otherwise the test
# could mistake a process of an earlier run for one of its own.
free() {
	local port
	for port; do
		if (exec 3<>"/dev/tcp/localhost/$port") 2>/dev/null; then
			die "port $port of localhost is in use; this test needs 9002 to 9006, 9013, 9014 and 9016"
		fi
	done
}

# start NAME COMMAND... runs the command in the background, with its output in NAME.log.
start() {
	local name=$1
	shift
	"$@" >>"$work/$name.log" 2>&1 &
	names+=("$name") pids+=($!)
}

# stop SIGNAL NAME ends one process, and returns when it has ended. Unless SIGNAL is KILL, the
# process must exit with status 0.
stop() {
	local i status=0
	for i in "${!names[@]}"; do
		[ "${names[i]}" = "$2" ] || continue
		kill "-$1" "${pids[i]}"
		# The redirection hides the shell's report of a killed process.
		wait "${pids[i]}" 2>/dev/null || status=$?
		[ "$1" = KILL ] || [ "$status" = 0 ] || die "$2 ended with status $status after SIG$1"
		unset "names[i]" "pids[i]"
	done
}

# alive fails if a process has ended by itself, and stores the name of the process in seen.
alive() {
	local i
	for i in "${!pids[@]}"; do
		kill -0 "${pids[i]}" 2>/dev/null && continue
		seen="${names[i]} has ended"
		return 1
	done
}

# check WHAT COMMAND... repeats the command until it succeeds, a process ends, or SECONDS
# reaches deadline, and prints and counts the result. The command describes in seen what it
# has found.
check() {
	local what=$1
	shift
	seen=
	until "$@"; do
		if ! alive || ((SECONDS >= deadline)); then
			failed=$((failed + 1))
			printf 'FAIL %s: %s\n' "$what" "${seen:-nothing found}"
			return
		fi
		sleep 0.2
	done
	passed=$((passed + 1))
	printf 'ok   %s: %s\n' "$what" "$seen"
}

# get URL [ARGUMENT...] gets a URL with curl and further arguments for curl. It ignores the
# user's settings and uses no proxy.
get() {
	curl -q --silent --fail --noproxy '*' --max-time 10 "$@"
}

# ready URL succeeds if the health check at the URL does.
ready() {
	seen=$(get "$1") || {
		seen="no answer from $1"
		return 1
	}
}

# query PROMQL prints the JSON answer to a query, and fails if the query fails.
query() {
	get http://localhost:9005/api/v1/query --get --data-urlencode "query=$1" | grep -F '"status":"success"'
}

# value PROMQL prints the value of a vector with one element, and nothing if it has none.
value() {
	query "$1" | sed -n 's/.*"value":\[[^,]*,"\([^"]*\)"\].*/\1/p'
}

# samples PROMQL prints the samples of a range vector, sorted, as one [time,"value"] per
# line. The regular expression matches nothing else in the answer.
samples() {
	query "$1" | grep -o '\[[0-9.]*,"[^"]*"\]' | sort
}

# found PROMQL succeeds if the query has a value above 0.
found() {
	seen=$(value "$1") && [ -n "$seen" ] && [ "$seen" != 0 ]
}

# lint_free succeeds if promtool accepts the own metrics of client and servers.
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

# no_original succeeds if no series of "test" has an original value of instance, and there
# are exactly three pseudonyms, because the Prometheus has three target addresses. There would
# be more if the client pushed the servers' series back to them.
no_original() {
	local originals pseudonyms
	originals=$(value 'count({_id="test",instance=~"localhost:.*|127[.].*|.*:90[01][0-9]"})') &&
		pseudonyms=$(value 'count(count by (instance) ({_id="test",instance!=""}))') || return 1
	seen="${originals:-0} series with an original, ${pseudonyms:-0} pseudonyms"
	[ -z "$originals" ] && [ "$pseudonyms" = 3 ]
}

# same_samples JOB succeeds if every pushed sample of the job equals a sample of the source,
# with the same time in milliseconds. The source may have newer samples, so samples that
# have not arrived yet are not compared.
same_samples() {
	local strange
	samples "scraped{_id=\"test\",job=\"$1\"}[10m]" >"$work/pushed" || return 1
	samples "scrape_samples_scraped{_id=\"\",job=\"$1\"}[10m]" >"$work/source" || return 1
	strange=$(comm -23 "$work/pushed" "$work/source")
	seen="$(grep -c . "$work/pushed") of the source's $(grep -c . "$work/source")"
	if [ -n "$strange" ]; then
		seen="$seen; not in the source: $(echo "$strange" | tr '\n' ' ')"
		return 1
	fi
	# One sample could match by chance, and would not prove that later times are right too.
	[ "$(grep -c . "$work/pushed")" -ge 2 ]
}

# own_up succeeds if each of the Prometheus's five targets, the client and two per job from
# /sd, has exactly one series "up", with the value 1. Served samples with a wrong job or
# instance would replace this series or add another one. So would a target that both servers
# list, if Prometheus used it twice.
own_up() {
	local all good
	all=$(value 'count(up{_id=""})') && good=$(value 'count(up{_id="",job=~"federate|telemeter",instance=~"localhost:90[01]4"} == 1 or up{_id="",job="client",instance="localhost:9002"} == 1)') || return 1
	seen="${good:-0} of ${all:-0} are 1 and of localhost:9002, localhost:9004 and localhost:9014"
	[ "$all" = 5 ] && [ "$good" = 5 ]
}

# refused succeeds if server A refuses a push of "test" that has no samples. Without a refused
# push there is no push_failure_time_seconds.
refused() {
	seen="status $(curl -q --silent --noproxy '*' --max-time 10 --output /dev/null --write-out '%{http_code}' \
		--header "Authorization: Bearer $(cat "$work/token")" --data-binary 'not a sample' http://localhost:9003/upload)"
	[ "$seen" = "status 400" ]
}

# queries_find_data succeeds if every query of the dashboard and of the alerts finds data. The
# test waits for up to a minute itself.
queries_find_data() {
	local begin=$SECONDS
	if ! "$work/queries.test" -test.count=1 -test.run '^TestQueriesReturnData$' -prometheus http://localhost:9005 >"$work/queries.log" 2>&1; then
		seen=$(grep -v '^FAIL' "$work/queries.log")
		return 1
	fi
	seen="$(sed -n 's/ queries$/ in/p' "$work/queries.log") $((SECONDS - begin)) s"
}

# members PORT prints the ring as the server at the port sees it: the ring's version, then
# one line per member with name, state, slot and session.
members() {
	get "http://localhost:$1/debug/ring" >"$work/ring" || return 1
	grep -o '"version":"[^"]*"' "$work/ring" &&
		grep -o '{"name":"[^}]*}' "$work/ring" |
		sed -n 's/^{"name":"\([^"]*\)","state":"\([^"]*\)",.*"slot":\([^,]*\),.*"session":\([0-9]*\),.*/\1 \2 slot \3 session \4/p'
}

# b_owns succeeds if both servers see both members alive with the same sessions, and B has
# the slot that owns "test".
b_owns() {
	local a b
	if ! a=$(members 9004) || ! b=$(members 9014); then
		seen="no answer from /debug/ring"
		return 1
	fi
	seen=$(echo "$a" | sed -n 's/ session.*//p' | sort | paste -sd,)
	if [ "$a" != "$b" ]; then
		seen="A sees $seen, but B sees $(echo "$b" | sed -n 's/ session.*//p' | sort | paste -sd,)"
		return 1
	fi
	# In a ring of two slots, the cluster ID "test" belongs to slot 0.
	[ "$seen" = "A alive slot 1,B alive slot 0" ]
}

# on_b_alone succeeds if B serves samples of "test" and A does not. The metrics that each
# server adds for a site, with its own name in the label server, are not counted.
on_b_alone() {
	get http://localhost:9004/federate >"$work/on-a" && get http://localhost:9014/federate >"$work/on-b" || return 1
	local a b
	a=$(grep '_id="test"' "$work/on-a" | grep -vc 'server="A"' || true)
	b=$(grep -c '_id="test"' "$work/on-b" || true)
	seen="$b lines on B, $a on A"
	[ "$a" = 0 ] && [ "$b" != 0 ]
}

# after MS reads an exposition from stdin, and prints how many series "scraped" of "test"
# have a sample later than the time MS.
after() {
	awk -v t="$1" '/^#/ || !/_id="test"/ || !/^scraped/ { next } $NF > t { n++ } END { print n + 0 }'
}

# on_b_since MS succeeds if B serves samples of "test" later than the time MS.
on_b_since() {
	get http://localhost:9014/federate >"$work/on-b" || return 1
	seen="$(after "$1" <"$work/on-b") series have newer samples"
	[ "$seen" != "0 series have newer samples" ]
}

# goes_on MS succeeds if both A and the Prometheus have samples of "test" later than the time
# MS. All samples that B held when it was killed are older.
goes_on() {
	local here there
	get http://localhost:9004/federate >"$work/on-a" || return 1
	here=$(after "$1" <"$work/on-a")
	there=$(value "count(timestamp(scraped{_id=\"test\"}) > $1 / 1000)") || return 1
	seen="$here series have newer samples at A, ${there:-0} at the Prometheus"
	[ "$here" != 0 ] && [ -n "$there" ]
}

# no_gap FROM TO succeeds if every sample of the alert AlwaysFiring between the times FROM and
# TO, in ms, has arrived through the servers, and also at least one later sample. The
# Prometheus evaluates the alert continuously.
no_gap() {
	local alert='alertname="AlwaysFiring",alertstate="firing"' missing
	samples "ALERTS{_id=\"\",$alert}[30m]" >"$work/source" && samples "alerts{_id=\"test\",$alert}[30m]" >"$work/pushed" || return 1
	missing=$(comm -23 "$work/source" "$work/pushed" | awk -F'[][,]' -v from="$1" -v to="$2" '$2 * 1000 >= from && $2 * 1000 <= to { n++ } END { print n + 0 }')
	seen="$missing of the source's $(grep -c . "$work/source") are missing"
	[ "$missing" = 0 ] && awk -F'[][,]' -v to="$2" '$2 * 1000 > to { later = 1 } END { exit !later }' "$work/pushed"
}

# shows PORT succeeds if the server at the port serves samples of "test".
shows() { get "http://localhost:$1/federate?match[]=scraped" --globoff | grep -q '_id="test"'; }

# watch runs until it is killed, and notes whether both servers serve "test" at the same time.
# It asks A, then B, then A again: if A serves "test" both times, it also did when B was asked.
watch() {
	while true; do
		if shows 9004 && shows 9014 && shows 9004; then echo twice; else echo once; fi
		sleep 0.2
	done >"$work/watched" 2>/dev/null
}

# one_exposer succeeds if watch never found both servers serving "test".
one_exposer() {
	local twice
	twice=$(grep -c twice "$work/watched" || true)
	seen="both served it in $twice of $(grep -c . "$work/watched") tries"
	[ "$twice" = 0 ] && grep -q once "$work/watched"
}

# quiet_log succeeds if the Prometheus has logged no sample that it could not store.
quiet_log() {
	seen=$(grep -Eic 'append failed|parse error|same timestamp|duplicate sample|commit failed' "$work/prometheus.log" || true)
	[ "$seen" = 0 ]
}

# now_ms prints the time in milliseconds.
now_ms() { date +%s%3N; }

# served prints the samples of B's /federate, without the metrics that B adds for each site.
served() {
	get http://localhost:9014/federate >"$work/answer" || return 1
	grep -Ev '^(# TYPE )?(push_time_seconds|push_failure_time_seconds|telemeter_cluster_)' "$work/answer" | sort
}

# served_before stores the samples that B serves, for served_again.
served_before() {
	served >"$work/before" || return 1
	seen="$(grep -c '_id="test"' "$work/before") samples"
	[ "$seen" != "0 samples" ]
}

# served_again succeeds if B serves the same samples as at served_before.
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

if [ -z "${MAKELEVEL:-}" ] || [ ! -x telemeter ]; then make; fi # make has built it already
find_prometheus
type -P curl >/dev/null || debian curl || die "there is no curl, and it could not be installed"
free 9002 9003 9004 9005 9006 9013 9014 9016
# The test is built before any process runs, because building takes the whole machine.
((keep)) || "${GO:-go}" test -c -o "$work/queries.test" . || die "the test of the queries could not be built"

a=(./telemeter --mode server --name A --keys "$work/keys" --storage-dir "$work/a"
	--listen localhost:9003 --listen-internal localhost:9004
	--listen-cluster localhost:9006 --join localhost:9016)
b=(./telemeter --mode server --name B --keys "$work/keys" --storage-dir "$work/b"
	--listen localhost:9013 --listen-internal localhost:9014
	--listen-cluster localhost:9016)
join_a=(--join localhost:9006) # for B, when A runs already
# The matcher _id="" excludes series that came from the servers. Otherwise the client would
# push copies of its own pushes without end.
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
# With --ttl there is an expiry, which the dashboard and an alert ask for.
./telemeter --mode token --keys "$work/keys" --id test --to http://localhost:9003 --ttl 8760h >"$work/token" 2>>"$work/keys.log"

# The Prometheus is also that of the site, and there it scrapes the client.
cp testdata/rules.yml testdata/alerts.yml "$work"
{
	# Shorter intervals, and an alert that always fires.
	sed -e 's/scrape_interval: 30s/scrape_interval: 5s\n  evaluation_interval: 5s/' -e 's/\[alerts.yml\]/[rules.yml, alerts.yml]/' \
		-e 's|- url: \([^ ]*/sd\).*|- url: \1\n        refresh_interval: 5s|' testdata/prometheus.yml
	printf '  - job_name: client\n    static_configs: [{targets: ["localhost:9002"]}]\n'
} >"$work/prometheus.yml"

deadline=$((SECONDS + patience))
# B starts first and claims slot 0 before A claims a slot, so B owns "test".
start B "${b[@]}"
check "server B is ready" ready http://localhost:9014/healthz/ready
start A "${a[@]}"
check "server A is ready" ready http://localhost:9004/healthz/ready
check "both servers agree, and B owns the cluster ID" b_owns
((failed == 0)) || exit 1
start prometheus "$prometheus" --config.file="$work/prometheus.yml" \
	--storage.tsdb.path="$work/prometheus" --web.listen-address=localhost:9005
check "prometheus is ready" ready http://localhost:9005/-/ready
check "a push without samples is refused" refused
((failed == 0)) || exit 1
start client "${client[@]}"

deadline=$((SECONDS + patience))
check 'count({_id="test"})' found 'count({_id="test"})'
if ((keep)); then
	alive || die "$seen"
	((failed == 0)) || tail -n 1 "$work/client.log" # FROM may become reachable later, so everything stays up
	cat <<-END

		The samples of $from in the central Prometheus:
		  http://localhost:9005/graph?g0.expr=count%20by%20(__name__)({_id%3D%22test%22})&g0.tab=1
		The samples that it scrapes, and the samples that the client sent last:
		  http://localhost:9014/federate  http://localhost:9002/federate
		The ring as server A (to which the client pushes) and server B (the owner) see it:
		  http://localhost:9004/debug/ring  http://localhost:9014/debug/ring
		The logs are in $work. Ctrl-C ends all processes.
	END
	while alive; do sleep 1; done
	die "$seen"
fi

check 'scraped{_id="test"}' found 'count(scraped{_id="test"})'
check 'alerts{_id="test"}' found 'count(alerts{_id="test",alertname="AlwaysFiring",alertstate="firing"})'
check "job federate has the source's times and values" same_samples federate
check "job telemeter has the source's times and values" same_samples telemeter
check "promtool accepts all own metrics" lint_free
check "instance is anonymized" no_original
check "each target of the Prometheus has one up" own_up
check "only B serves the samples that were pushed to A" on_b_alone
deadline=0 check "every query of the dashboard and of the alerts finds data" queries_find_data

# The client is stopped first, so that no new samples arrive between the two answers.
stop TERM client
deadline=$((SECONDS + patience))
check "B serves samples before SIGKILL" served_before
stop KILL B
start B "${b[@]}" "${join_a[@]}"
check "server B is ready after SIGKILL" ready http://localhost:9014/healthz/ready
check "B serves the same samples after SIGKILL" served_again
check "both servers agree again" b_owns

# B is killed while the client pushes, and stays away.
deadline=$((SECONDS + patience))
restarted=$(now_ms)
start client "${client[@]}"
check "B gets the next pushes" on_b_since "$restarted"
check "only B serves them" on_b_alone
stop KILL B
later=$(($(now_ms) + 10000)) # two pushes later, when no push that was in flight at the kill is left
deadline=$((SECONDS + patience))
check "A takes over when B is killed" goes_on "$later"
check "job telemeter still has the source's times and values" same_samples telemeter
check "server A is still ready" ready http://localhost:9004/healthz/ready

# B returns with its old slot.
watch &
start B "${b[@]}" "${join_a[@]}"
deadline=$((SECONDS + patience))
check "B returns: both servers agree, and B owns the cluster ID" b_owns
check "A no longer serves the samples that it held meanwhile" on_b_alone
later=$(now_ms)
check "B gets the next pushes" on_b_since "$later"

# A is restarted, as for an update. The client has no other server, so it waits for A.
stop TERM A
start A "${a[@]}"
deadline=$((SECONDS + patience))
check "server A is ready after SIGTERM" ready http://localhost:9004/healthz/ready
check "both servers agree after that" b_owns
later=$(now_ms)
check "B gets the next pushes" on_b_since "$later"
check "only B serves the samples that were pushed to A, still" on_b_alone
check "the Prometheus has no gap since the client was started" no_gap $((restarted + 10000)) "$later"
check "only one server at a time served the samples" one_exposer
deadline=0 check "the Prometheus logged no parse error and no duplicate sample" quiet_log

((failed == 0))
