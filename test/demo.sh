#!/bin/sh
# demo.sh runs the set-up in four commands on this machine. The client scrapes the
# server's own /metrics, so that no Prometheus is needed. Ctrl-C ends the demo, which
# then removes all its files.
set -eu
cd "$(dirname "$0")/.."

dir='' server='' client=''

# finish ends client and server, shows the ends of their logs after a failure, and removes
# the directory. It waits for both processes first, because they write to the directory.
finish() {
	status=$?
	set +e
	trap '' INT TERM HUP PIPE # a second Ctrl-C must not leave processes behind
	for pid in $client $server; do kill "$pid" 2>/dev/null; done
	for pid in $client $server; do wait "$pid"; done
	if [ "$status" != 0 ] && [ -n "$dir" ]; then
		for log in "$dir"/*.log; do
			[ ! -e "$log" ] || {
				echo "--- the end of ${log##*/}"
				tail -n 20 "$log"
			}
		done
	fi
	[ -z "$dir" ] || rm -rf "$dir"
	exit "$status"
}
trap finish EXIT
# TERM ends the demo too, because a shell that starts a script in the background makes the
# script ignore SIGINT.
trap 'echo; echo stopping; exit 0' INT TERM HUP PIPE
# The traps are set before the directory is created, so that it is always removed. Only this
# user can read the directory, so keys and tokens are safe there.
dir=$(mktemp -d)

# saw TEXT PID LOG waits until TEXT appears in the file LOG. It returns false if process PID
# ends before that, or after 30 seconds.
saw() {
	tries=300 # with 0.1 s between two tries
	until grep -qs "$1" "$3"; do
		tries=$((tries - 1))
		if [ "$tries" = 0 ] || ! kill -0 "$2" 2>/dev/null; then
			echo "demo.sh: no $1 in ${3##*/}: the process ended, or took over 30 s (are ports 9002 to 9004 in use?)" >&2
			return 1
		fi
		sleep 0.1
	done
}

if [ -z "${MAKELEVEL:-}" ] || [ ! -x telemeter ]; then make; fi # make demo has built it already

./telemeter --mode keygen --keys "$dir/keys"

./telemeter --mode server --keys "$dir/keys" --storage-dir "$dir/data" \
	--listen localhost:9003 --listen-internal localhost:9004 >"$dir/server.log" 2>&1 &
server=$!
saw msg=serving "$server" "$dir/server.log"

./telemeter --mode token --keys "$dir/keys" --id demo --to http://localhost:9003 >"$dir/demo.token"

./telemeter --mode client --from http://localhost:9004/metrics --token-file "$dir/demo.token" \
	--spool-dir "$dir/spool" --interval 5s >"$dir/client.log" 2>&1 &
client=$!
# The client logs a push after the server has stored it, so /federate serves its samples now.
saw msg=pushed "$client" "$dir/client.log"

cat <<END

A client pushes a server's own metrics to it every 5s, as cluster ID "demo".

Open:
  http://localhost:9004            the server's status page
  http://localhost:9002            the client's status page
  http://localhost:9004/federate   what a central Prometheus scrapes
  http://localhost:9004/metrics    the server's own metrics
  http://localhost:9002/federate   what the client sent last

Curl:
  curl http://localhost:9004/federate
  curl -G http://localhost:9004/federate --data-urlencode 'match[]={__name__=~"telemeter_store_.*"}'
  echo 'room_celsius 21.5' | curl -H "Authorization: Bearer \$(cat $dir/demo.token)" \\
    -H 'Content-Type: text/plain' --data-binary @- http://localhost:9003/upload

The logs are in $dir. Ctrl-C ends the demo.
END
# Neither process should end by itself. If one does, the demo fails.
while kill -0 "$server" 2>/dev/null && kill -0 "$client" 2>/dev/null; do sleep 1; done
echo "demo.sh: the server or the client has ended" >&2
exit 1
