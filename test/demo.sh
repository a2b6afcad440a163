#!/bin/sh
# demo.sh: the set-up in four commands, on this machine. The client's source is the
# server's own /metrics, so that no Prometheus is needed. Ctrl-C ends it; nothing
# is left behind.
set -eu
cd "$(dirname "$0")/.."

dir='' server='' client=''

# Both are waited for: only then may the directory go.
finish() {
	status=$?
	set +e
	trap '' INT TERM HUP PIPE # a second Ctrl-C must not leave processes behind
	for pid in $client $server; do kill "$pid" 2>/dev/null; done
	for pid in $client $server; do wait "$pid"; done
	if [ "$status" != 0 ] && [ -n "$dir" ]; then
		for log in "$dir"/*.log; do
			[ ! -e "$log" ] || {
				echo "--- ${log##*/}, the end"
				tail -n 20 "$log"
			}
		done
	fi
	[ -z "$dir" ] || rm -rf "$dir"
	exit "$status"
}
trap finish EXIT
# TERM as well: SIGINT is ignored where a shell started this in the background.
trap 'echo; echo stopping; exit 0' INT TERM HUP PIPE
# After the traps, so that it never stays behind. Nobody else can look into it, so
# keys and tokens are safe there.
dir=$(mktemp -d)

# saw TEXT PID LOG: waits until the process has logged it; false if it never does.
saw() {
	tries=300 # of 0.1 s
	until grep -qs "$1" "$3"; do
		tries=$((tries - 1))
		if [ "$tries" = 0 ] || ! kill -0 "$2" 2>/dev/null; then
			echo "demo.sh: this did not start, or took too long (are ports 9002 to 9004 in use?)" >&2
			return 1
		fi
		sleep 0.1
	done
}

if [ -z "${MAKELEVEL:-}" ] || [ ! -x telemeter ]; then make; fi # started by make, it is built already

./telemeter --mode keygen --keys "$dir/keys"

./telemeter --mode server --keys "$dir/keys" --storage-dir "$dir/data" \
	--listen localhost:9003 --listen-internal localhost:9004 >"$dir/server.log" 2>&1 &
server=$!
saw msg=serving "$server" "$dir/server.log"

./telemeter --mode token --keys "$dir/keys" --id demo --to http://localhost:9003 >"$dir/demo.token"

./telemeter --mode client --from http://localhost:9004/metrics --token-file "$dir/demo.token" \
	--spool-dir "$dir/spool" --interval 5s >"$dir/client.log" 2>&1 &
client=$!
# A push that was answered is held by the server, so it is also served.
saw msg=pushed "$client" "$dir/client.log"

cat <<END

A client pushes a server's own metrics to it every 5s, as cluster ID "demo".

Open:
  http://localhost:9004/federate   what a central Prometheus scrapes
  http://localhost:9004/metrics    the server's own metrics
  http://localhost:9002/federate   what the client sent last

Curl:
  curl http://localhost:9004/federate
  curl -G http://localhost:9004/federate --data-urlencode 'match[]={__name__=~"telemeter_store_.*"}'
  echo 'room_celsius 21.5' | curl -H "Authorization: Bearer \$(cat $dir/demo.token)" \\
    -H 'Content-Type: text/plain' --data-binary @- http://localhost:9003/upload

Logs are in $dir. Ctrl-C ends it.
END
# Returns when one of them ends by itself, which neither should.
while kill -0 "$server" 2>/dev/null && kill -0 "$client" 2>/dev/null; do sleep 1; done
echo "demo.sh: the server or the client has ended" >&2
exit 1
