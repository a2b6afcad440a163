#!/usr/bin/env bash
# Runs every command of the README's sh blocks, in their order, as they are but
# for addresses: hub.example is this machine, the site's Prometheus is the server's
# own /metrics, and paths are below a temporary directory. A server or client goes
# on in the background until the end, once it says that it serves or has pushed.
set -euo pipefail
cd "$(dirname "$0")/.."
top=$PWD
dir=$(mktemp -d)
pids=()
stop() {
	status=$?
	for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done
	wait
	[ $status = 0 ] || tail -n 20 "$dir"/*.log 2>/dev/null || true
	rm -rf "$dir"
}
trap stop EXIT
trap 'exit 130' INT TERM

await() { # await FILE TEXT: until a log says it
	for _ in $(seq 600); do
		if grep -q "$2" "$1" 2>/dev/null; then return; fi
		sleep 0.05 # between looks; the deadline is 30 s
	done
	echo "FAIL: no '$2' in $1 within 30 s"
	exit 1
}

ln -s "$top/telemeter" "$dir/telemeter"
PATH=$dir:$PATH
commands=$(sed -n '/^ *```sh$/,/^ *```$/p' README.md | grep -v '```' | sed -e 's/^ *//' \
	-e 's/hub\.example/localhost/g' -e 's/\(--listen[a-z-]*\) :/\1 localhost:/g' \
	-e 's#http://localhost:9090#http://localhost:9004/metrics#' -e "s#/var/lib/telemeter#data#")
cd "$dir"
passed=0
while IFS= read -r command; do
	echo "\$ $command"
	case $command in
	*"--mode server"*)
		bash -c "exec $command" 2>"server$passed.log" &
		pids+=($!)
		await "server$passed.log" msg=serving
		case $command in *--join*) await "server$passed.log" members=2 ;; esac
		;;
	*"--mode client"*--dry-run*) bash -c "$command" >dry-run.txt ;;
	*"--mode client"*)
		bash -c "exec $command" 2>client.log &
		pids+=($!)
		await client.log msg=pushed
		;;
	*) bash -c "set -o pipefail; $command" </dev/null ;;
	esac
	passed=$((passed + 1))
done <<<"$commands"
# To files first: a grep that has found what it looks for stops reading.
curl -sS --fail --cacert keys/tls.crt -H "Authorization: Bearer $(cat site-7.token)" \
	-H 'Content-Type: text/plain' --data-binary 'readme_done 1
' https://localhost:9003/upload >answer.txt
grep -q '"accepted":1,' answer.txt
curl -sS --fail http://localhost:9004/federate >federate.txt
grep -q '^readme_done{_id="site-7",instance="",job=""} 1 ' federate.txt
echo "$passed passed, 0 failed"
