#!/usr/bin/env bash
# docs.sh runs every command of the sh blocks in README.md and docs/operating.md, in order. It
# changes only the addresses: hub.example becomes localhost, the site's Prometheus becomes the
# server's own /metrics, and paths are below a temporary directory. Servers and clients run in
# the background until the end. The next command runs when a server has logged that it serves,
# or a client that it has pushed. A command with --mode status must print a status. It may exit
# with 1 because of a problem, such as that no Prometheus scrapes the servers.
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

# await FILE TEXT waits until TEXT appears in FILE. After 30 s it fails the test.
await() {
	for _ in $(seq 600); do
		if grep -q "$2" "$1" 2>/dev/null; then return; fi
		sleep 0.05
	done
	echo "FAIL: no '$2' in $1 within 30 s"
	exit 1
}

ln -s "$top/telemeter" "$dir/telemeter"
PATH=$dir:$PATH
commands=$(cat README.md docs/operating.md | sed -n '/^ *```sh$/,/^ *```$/p' | grep -v '```' | sed -e 's/^ *//' \
	-e 's/hub\.example/localhost/g' -e 's/\(--listen[a-z-]*\) :/\1 localhost:/g' \
	-e 's#http://localhost:9090#http://localhost:9004/metrics#' -e "s#/var/lib/telemeter#data#" \
	-e 's#/etc/systemd/system/##')
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
	*"--mode status"*)
		bash -c "$command" >status.txt || true
		grep -Eq '^(server|client) |^\{"kind":"server"' status.txt || { echo "FAIL: no status"; exit 1; }
		;;
	*) bash -c "set -o pipefail; $command" </dev/null ;;
	esac
	passed=$((passed + 1))
done <<<"$commands"
# The commands have replaced the TLS key, so the first server reads the new one.
kill -HUP "${pids[0]}"
await "$(ls "$dir"/server*.log | sort -V | head -n 1)" msg=reloaded
# The answers go to files first, because grep -q stops reading at its first match, and curl
# would then fail to write to the pipe.
curl -sS --fail --cacert keys/tls.crt -H "Authorization: Bearer $(cat site-7.token)" \
	-H 'Content-Type: text/plain' --data-binary 'docs_done 1
' https://localhost:9003/upload >answer.txt
grep -q '"accepted":1,' answer.txt
curl -sS --fail http://localhost:9004/federate >federate.txt
grep -q '^docs_done{_id="site-7",instance="",job=""} 1 ' federate.txt
echo "$passed passed, 0 failed"
