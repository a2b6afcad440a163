#!/usr/bin/env bash
# netns.sh [--possible] runs five servers in five network namespaces, which a bridge in a
# sixth namespace connects. It cuts the network into two and three servers, and heals it.
# It checks that both sides keep working during the cut, and that they merge by themselves.
# The duration of each step is printed but not checked, because the machine may be busy.
#
# With --possible, the script only exits 0 if the test can run here, and 1 if not. The test
# needs root and network namespaces. It changes nothing outside its own namespaces.
set -euo pipefail
cd "$(dirname "$0")/.."

quiet=0
[ "${1:-}" != --possible ] || quiet=1

patience=60 # seconds for each step; a step takes about five on an idle machine
export LC_ALL=C
passed=0 failed=0
id=tm$$           # prefix of the names of this run's namespaces
spaces=()         # the namespaces that were created
prefix=10.99.0    # prefix of the servers' IP addresses
majority="1 2 3"  # servers that stay on the first bridge
minority="4 5"    # servers that are cut off
servers="$majority $minority"

work=
trap finish EXIT
trap 'exit 130' INT TERM HUP PIPE

# finish ends all processes, shows the ends of their logs after a failure, and removes the
# namespaces and the directory.
finish() {
	local status=$? space log
	trap '' INT TERM HUP PIPE
	set +e
	# shellcheck disable=SC2046
	[ -z "$(jobs -rp)" ] || kill -KILL $(jobs -rp) 2>/dev/null
	wait 2>/dev/null
	# Deleting a namespace deletes its devices, but only when no process is left in it. A
	# curl may still run there, so all processes are killed first.
	for space in "${spaces[@]}"; do
		# shellcheck disable=SC2046
		kill -KILL $(ip netns pids "$space" 2>/dev/null) 2>/dev/null
		ip netns delete "$space" 2>/dev/null
	done
	if ((status != 0 && status != 130)) && [ -n "$work" ]; then
		for log in apt keys n1 n2 n3 n4 n5; do
			[ -e "$work/$log.log" ] || continue
			echo "--- the end of what $log logged"
			tail -n 30 "$work/$log.log"
		done
	fi
	[ -z "$work" ] || rm -rf "$work"
	((quiet)) || echo "$passed passed, $failed failed"
	exit "$status"
}

# die MESSAGE... prints a message and fails the test.
die() {
	failed=$((failed + 1))
	printf 'netns.sh: %s\n' "$*" >&2
	exit 1
}

# space NAME creates a network namespace.
space() {
	spaces+=("$1") # noted before it exists, so that finish always deletes it
	ip netns add "$1"
}

# possible succeeds if the test can run here. It needs root, ip and curl, which it installs if
# they are missing, and the right to create devices in network namespaces.
possible() {
	[ "$(id -u)" = 0 ] || return 1
	local missing=()
	type -P ip >/dev/null || missing+=(iproute2)
	type -P curl >/dev/null || missing+=(curl)
	if ((${#missing[@]})); then
		type -P apt-get >/dev/null || return 1
		(
			export DEBIAN_FRONTEND=noninteractive
			apt-get update -q && apt-get install -qy --no-install-recommends "${missing[@]}"
		) >"$work/apt.log" 2>&1 || return 1
	fi
	space "$id-0" 2>/dev/null && ip netns exec "$id-0" true 2>/dev/null &&
		ip -n "$id-0" link add one type bridge 2>/dev/null &&
		ip -n "$id-0" link add two type bridge 2>/dev/null &&
		ip -n "$id-0" link add probe type veth peer name eborp 2>/dev/null &&
		ip -n "$id-0" link delete probe
}

work=$(mktemp -d)
if ! possible; then
	((quiet)) && exit 1
	die "this needs root, and network namespaces with bridges and veth devices"
fi
((quiet)) && exit 0

if [ -z "${MAKELEVEL:-}" ] || [ ! -x telemeter ]; then make; fi # make has built it already

# get N PATH [ARGUMENT...] gets http://SERVER:PATH from server N with curl and further
# arguments for curl. PATH begins with the port. curl runs in the server's namespace.
get() {
	local n=$1 path=$2
	shift 2
	ip netns exec "$id-$n" curl -q --silent --noproxy '*' --max-time 40 "$@" "http://$prefix.$n:$path"
}

# view N prints two lines: the state of all members as server N sees them, such as
# "1=alive 2=dead …", and the version of its ring.
view() {
	get "$1" 9004/debug/ring --fail --max-time 5 >"$work/view" || return 1
	grep -o '{"name":"n[0-9]*","state":"[a-z]*"' "$work/view" |
		sed 's/.*"n\([0-9]*\)".*:"\([a-z]*\)"/\1=\2/' | sort | paste -sd' '
	grep -o '"version":"[^"]*"' "$work/view"
}

# all_see WANT N... succeeds if every server N is ready, which means that it has claimed a
# slot, sees the members as in WANT, and has the same ring as the others.
all_see() {
	local want=$1 n got ring='' this
	shift
	for n; do
		get "$n" 9004/healthz/ready --fail --max-time 5 --output "$work/ready" || {
			seen="$n is not ready"
			return 1
		}
		got=$(view "$n") || {
			seen="no answer from $n"
			return 1
		}
		this=${got#*$'\n'} got=${got%%$'\n'*}
		if [ "$got" != "$want" ]; then
			seen="$n sees $got"
			return 1
		fi
		if [ -n "$ring" ] && [ "$this" != "$ring" ]; then
			seen="$n has another ring than $1"
			return 1
		fi
		ring=$this
	done
	seen="$want, ring ${ring#*:}"
}

# one_whole succeeds if all five servers see all five alive, and each has its own slot.
whole="1=alive 2=alive 3=alive 4=alive 5=alive"
one_whole() {
	local claimed
	# shellcheck disable=SC2086
	all_see "$whole" $servers || return 1
	# If two servers have claimed the same slot, they have not settled yet.
	get 1 9004/debug/ring --fail --max-time 5 >"$work/view" || return 1
	claimed=$(grep -o '"slot":[0-9]*,"claim"' "$work/view" | sort -u | wc -l)
	if [ "$claimed" != 5 ]; then
		seen="5 servers have $claimed slots"
		return 1
	fi
}

# parted succeeds if each side sees its own servers alive and the others dead.
parted() {
	# shellcheck disable=SC2086
	all_see "1=alive 2=alive 3=alive 4=dead 5=dead" $majority && local of_three=$seen &&
		all_see "1=dead 2=dead 3=dead 4=alive 5=alive" $minority && seen="$of_three; $seen"
}

# told succeeds if /sd of the last server lists all five.
told() {
	seen=$(get 5 9004/sd --fail | grep -o "$prefix"'[.][0-9]:9004' | sort | paste -sd' ')
	[ "$seen" = "$prefix.1:9004 $prefix.2:9004 $prefix.3:9004 $prefix.4:9004 $prefix.5:9004" ]
}

# check WHAT COMMAND... repeats the command until it succeeds, a server ends, or patience
# seconds have passed, and prints and counts the result. The command describes in seen what
# it has found.
check() {
	local what=$1 begin limit=$((SECONDS + patience)) n
	begin=$(date +%s%N)
	shift
	seen=
	until "$@"; do
		for n in $servers; do
			kill -0 "${pids[n]}" 2>/dev/null || die "$what: server $n has ended"
		done
		if ((SECONDS >= limit)); then
			failed=$((failed + 1))
			printf 'FAIL %s: %s\n' "$what" "${seen:-nothing found}"
			return
		fi
		sleep 0.1
	done
	passed=$((passed + 1))
	local took=$((($(date +%s%N) - begin) / 100000000))
	printf 'ok   %s: %d.%d s: %s\n' "$what" $((took / 10)) $((took % 10)) "$seen"
}

# plug BRIDGE N... connects the servers to the bridge, and disconnects them from any other.
plug() {
	local bridge=$1 n
	shift
	for n; do ip -n "$id-0" link set "to$n" master "$bridge"; done
}

# push N ID pushes one sample of the cluster ID to server N. It writes the status of the
# answer and the duration in seconds to ID.code, and the answer to ID.answer.
push() {
	get "$1" 9003/upload --output "$work/$2.answer" --write-out '%{http_code} %{time_total}' \
		--header "Authorization: Bearer $(cat "$work/$2.token")" --header 'Content-Type: text/plain' \
		--data-binary @"$work/sample" >"$work/$2.code" || true
}

# pushed KIND succeeds if the pushes of all IDs from KIND-1 to KIND-8 were answered 200, and
# the minority serves their samples. Each server serves the samples that it holds, even if
# another server owns the ID.
pushed() {
	local i code slowest=0 held=0
	: >"$work/federate"
	for i in $minority; do
		get "$i" 9004/federate?consumer=test --fail >>"$work/federate" || return 1
	done
	for i in 1 2 3 4 5 6 7 8; do
		code=$(cat "$work/$1-$i.code")
		if [ "${code% *}" != 200 ]; then
			seen="$1-$i was answered ${code% *}: $(cat "$work/$1-$i.answer" 2>/dev/null)"
			return 1
		fi
		slowest=$(printf '%s\n%s\n' "$slowest" "${code#* }" | sort -n | sed -n '$p')
		if grep -q "^up{_id=\"$1-$i\"," "$work/federate"; then held=$((held + 1)); fi
	done
	seen="8 answered 200, the slowest after $slowest s; the minority serves $held"
	[ "$held" = 8 ]
}

echo 'up 1' >"$work/sample"
./telemeter --mode keygen --keys "$work/keys" 2>"$work/keys.log"
for kind in cut parted; do
	for i in 1 2 3 4 5 6 7 8; do
		./telemeter --mode token --keys "$work/keys" --id "$kind-$i" --to "http://$prefix.4:9003" >"$work/$kind-$i.token" 2>>"$work/keys.log"
	done
done

for bridge in one two; do ip -n "$id-0" link set "$bridge" up; done
for n in $servers; do
	space "$id-$n"
	ip -n "$id-0" link add "to$n" type veth peer name eth0 netns "$id-$n"
	ip -n "$id-$n" address add "$prefix.$n/24" dev eth0
	ip -n "$id-$n" link set lo up
	ip -n "$id-$n" link set eth0 up
	ip -n "$id-0" link set "to$n" up
done
# shellcheck disable=SC2086
plug one $servers

pids=()
for n in $servers; do
	join=(--join "$prefix.1:9006")
	[ "$n" != 1 ] || join=()
	ip netns exec "$id-$n" ./telemeter --mode server --name "n$n" --keys "$work/keys" --storage-dir "$work/n$n" \
		--listen "$prefix.$n:9003" --listen-internal "$prefix.$n:9004" --internal-open \
		--listen-cluster "$prefix.$n:9006" "${join[@]}" >"$work/n$n.log" 2>&1 &
	pids[n]=$!
done
check "all five servers form one ring" one_whole
ring=$seen
check "/sd of the fifth server lists all five" told
((failed == 0)) || exit 1

# shellcheck disable=SC2086
plug two $minority
# The minority still sees the majority alive. Pushes for owners in the majority are
# forwarded in vain, and then held by the receiver or by the next owner.
pushes=()
for i in 1 2 3 4 5 6 7 8; do
	push 4 "cut-$i" &
	pushes+=($!)
done
check "cut: each side sees only itself alive" parted
for i in 1 2 3 4 5 6 7 8; do push 4 "parted-$i"; done
check "pushes to the minority succeed" pushed parted
wait "${pushes[@]}"
check "pushes to the minority right after the cut succeed" pushed cut

# shellcheck disable=SC2086
plug one $minority
check "healed: all five servers form one ring again" one_whole
healed=$seen
# same_ring succeeds if the ring after the cut is the ring before it.
same_ring() {
	seen=${healed##* }
	[ "$healed" = "$ring" ]
}
patience=0 check "the ring is the same as before the cut" same_ring

((failed == 0))
