package main

// Tests of rings whose members are server processes: each site has one owner; members die, return
// and leave; cluster keys are rotated or bad; flags of the ring are faulty.

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
)

// memberProcess is a server process that is a member of a ring. external and internal are the base
// URLs of its two listeners. ringAddr is the address of its listener for other members, which
// --join takes.
type memberProcess struct {
	*process
	name, external, internal, ringAddr string
}

const memberAddr = `msg="started as member of the ring" .*listen=(\S+)`

// startMember starts a server process with the given member name in dir, and waits until it has
// opened its listeners. Without --join in args it is the first member of a new ring. dir must
// contain the directory keys.
func startMember(t *testing.T, dir, name string, args ...string) *memberProcess {
	t.Helper()
	p := start(t, dir, append([]string{"--mode", "server", "--keys", "keys", "--name", name, "--listen", "127.0.0.1:0",
		"--listen-internal", "127.0.0.1:0", "--listen-cluster", "127.0.0.1:0", "--storage-dir", "data-" + name,
		"--gossip-interval", "200ms"}, args...)...)
	return &memberProcess{p, name, "http://" + p.await(externalAddr), "http://" + p.await(internalAddr), p.await(memberAddr)}
}

// debugRing is a decoded answer of /debug/ring, with only the fields that the tests use.
type debugRing struct {
	Members []struct {
		Name, State, Internal string
		Slot                  *int
		Session               uint64
		Share                 float64
	}
	Ring struct{ Version string }
}

func (m *memberProcess) debug() (d debugRing) {
	m.t.Helper()
	if err := json.Unmarshal([]byte(get(m.t, m.internal+"/debug/ring")), &d); err != nil {
		m.t.Fatal(err)
	}
	return d
}

// slots returns the slot of each live member that has a slot, by member name. Suspected members
// count as live.
func (d debugRing) slots() map[string]int {
	s := map[string]int{}
	for _, m := range d.Members {
		if m.Slot != nil && (m.State == "alive" || m.State == "suspect") {
			s[m.Name] = *m.Slot
		}
	}
	return s
}

// session returns the session of the named member, or 0 if /debug/ring does not list the member.
func (d debugRing) session(name string) uint64 {
	for _, m := range d.Members {
		if m.Name == name {
			return m.Session
		}
	}
	return 0
}

// state returns the state of the named member, such as "left", or "" if /debug/ring does not list
// the member.
func (d debugRing) state(name string) string {
	for _, m := range d.Members {
		if m.Name == name {
			return m.State
		}
	}
	return ""
}

// agree waits until each of members is ready, sees n live members with slots, and has the same
// version of the ring as the others.
func agree(t *testing.T, n int, members ...*memberProcess) {
	t.Helper()
	eventually(t, fmt.Sprintf("%d members agree", n), func() bool {
		version := members[0].debug().Ring.Version
		for _, m := range members {
			if d := m.debug(); len(d.slots()) != n || d.Ring.Version != version {
				return false
			}
			resp, err := http.Get(m.internal + "/healthz/ready")
			if err != nil {
				t.Fatal(err)
			}
			resp.Body.Close()
			if resp.StatusCode != http.StatusOK {
				return false
			}
		}
		return true
	})
}

// push pushes body to the external listener of m, and returns the status code of the answer. header
// alternates names and values of headers.
func (m *memberProcess) push(token, body string, header ...string) int {
	m.t.Helper()
	req, err := http.NewRequest("POST", m.external+"/upload", strings.NewReader(body))
	if err != nil {
		m.t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+strings.TrimSpace(token))
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		m.t.Fatal(err)
	}
	resp.Body.Close()
	return resp.StatusCode
}

// shows scrapes the metric named m from each of members, without a consumer's name. It returns how
// many of the members serve a sample of the site with this cluster ID, and the last of these
// members.
func shows(t *testing.T, id string, members ...*memberProcess) (n int, last *memberProcess) {
	t.Helper()
	for _, m := range members {
		if strings.Contains(get(t, m.internal+"/federate?match[]=m"), `_id="`+id+`"`) {
			n, last = n+1, m
		}
	}
	return n, last
}

// ringOfThree is a ring of the three member processes a, b and c, to which 12 sites have pushed.
type ringOfThree struct {
	t      *testing.T
	dir    string
	all    []*memberProcess
	tokens map[string]string // client tokens of the sites, by cluster ID
}

// startRingOfThree starts the three members and waits until they have the same ring. Then it pushes
// once to each member for each of 12 sites.
func startRingOfThree(t *testing.T) *ringOfThree {
	t.Helper()
	r := &ringOfThree{t: t, dir: t.TempDir(), tokens: map[string]string{}}
	mustTool(t, r.dir, "--mode", "keygen", "--keys", "keys")
	a := startMember(t, r.dir, "a")
	r.all = []*memberProcess{a, startMember(t, r.dir, "b", "--join", a.ringAddr), startMember(t, r.dir, "c", "--join", a.ringAddr)}
	agree(t, 3, r.all...)
	for i := range 12 {
		id := fmt.Sprint("site", i)
		r.tokens[id] = mustTool(t, r.dir, "--mode", "token", "--keys", "keys", "--id", id, "--ttl", "1h")
		for k := range 3 {
			if code := r.all[(i+k)%3].push(r.tokens[id], fmt.Sprintf("m %d\n", k)); code != http.StatusOK {
				t.Fatalf("the push of %s to %s got %d, want 200", id, r.all[(i+k)%3].name, code)
			}
		}
	}
	return r
}

// siteNotOwnedBy returns the cluster ID of a site that m does not own, and the owner of this site.
func (r *ringOfThree) siteNotOwnedBy(m *memberProcess) (id string, owner *memberProcess) {
	r.t.Helper()
	for _, id := range slices.Sorted(maps.Keys(r.tokens)) {
		if _, owner := shows(r.t, id, r.all...); owner != nil && owner != m {
			return id, owner
		}
	}
	r.t.Fatalf("%s owns all sites", m.name)
	return "", nil
}

func (r *ringOfThree) without(m *memberProcess) []*memberProcess {
	return slices.DeleteFunc(slices.Clone(r.all), func(other *memberProcess) bool { return other == m })
}

// /sd of each member lists all members of the ring. The internal listener answers 200 at each path
// that it lists at /.
func TestRingLists(t *testing.T) {
	r := startRingOfThree(t)
	for _, m := range r.all {
		if body := get(t, m.internal+"/sd"); strings.Count(body, "127.0.0.1:") != 3 || !strings.HasPrefix(body, `[{"targets":[`) {
			t.Errorf("/sd of %s does not list three servers: %s", m.name, body)
		}
	}
	a := r.all[0]
	var index struct{ Paths []string }
	if err := json.Unmarshal([]byte(get(t, a.internal+"/")), &index); err != nil || !slices.Contains(index.Paths, "/sd") || !slices.Contains(index.Paths, "/debug/ring") {
		t.Errorf("/ lists %q, want /sd and /debug/ring in it (%v)", index.Paths, err)
	}
	for _, path := range index.Paths {
		get(t, a.internal+path)
	}
}

// /sd lists an internal listener with TLS in a group with the label __scheme__, apart from an internal
// listener with plain HTTP.
func TestRingListsScheme(t *testing.T) {
	dir := t.TempDir()
	mustTool(t, dir, "--mode", "keygen", "--keys", "keys", "--host", "localhost")
	a := startMember(t, dir, "a")
	startMember(t, dir, "b", "--join", a.ringAddr, "--listen-internal", "0.0.0.0:0", "--internal-open")
	const want = `[{"targets":["127.0.0.1:0"]},{"targets":["127.0.0.1:0"],"labels":{"__scheme__":"https"}}]`
	eventually(t, "/sd lists both members by scheme", func() bool { return strings.TrimSpace(get(t, a.internal+"/sd")) == want })
}

// Exactly one server, the owner, serves a site to a scraper without a consumer's name, although the
// site has pushed to all three servers. Each server owns some of the 12 sites.
func TestRingOneOwner(t *testing.T) {
	r := startRingOfThree(t)
	owners := map[*memberProcess]bool{}
	for id := range r.tokens {
		n, owner := shows(t, id, r.all...)
		if n != 1 {
			t.Fatalf("%d servers serve %s, want 1", n, id)
		}
		owners[owner] = true
	}
	if len(owners) != 3 {
		t.Errorf("the 12 sites have %d owners, want 3", len(owners))
	}
}

// The series that a server makes for a site have the server's own name in the label server. Each
// server to which a site has pushed shows the site's token expiry, because it has authenticated the
// site. Only the owner shows push_time_seconds.
func TestRingSiteMetrics(t *testing.T) {
	r := startRingOfThree(t)
	for name, want := range map[string]int{"telemeter_cluster_token_expiry_seconds": 36, "push_time_seconds": 12} {
		n := 0
		for _, m := range r.all {
			body := get(t, m.internal+"/federate?match[]="+name)
			n += strings.Count(body, "_id=")
			if strings.Count(body, "_id=") != strings.Count(body, `server="`+m.name+`"`) {
				t.Errorf("%s exposes %s with the name of another server:\n%s", m.name, name, body)
			}
		}
		if n != want {
			t.Errorf("the servers expose %d series %s, want %d", n, name, want)
		}
	}
}

// When the owner of a site dies, pushes of the site to other servers are still answered 200 right
// after its death. A consumer gets all samples of these pushes, and another server becomes the
// owner. When the dead server returns with a new address, all members have their old slots again,
// so the server owns its sites again.
func TestRingOwnerDies(t *testing.T) {
	r := startRingOfThree(t)
	a := r.all[0]
	id, victim := r.siteNotOwnedBy(a)
	left := r.without(victim)
	session, slots := a.debug().session(victim.name), a.debug().slots()
	victim.end(syscall.SIGKILL)
	for k := range 3 {
		if code := a.push(r.tokens[id], fmt.Sprintf("m{k=\"%d\"} 9\n", k)); code != http.StatusOK {
			t.Errorf("a push right after its owner died got %d, want 200", code)
		}
	}
	agree(t, 2, left...)
	served := 0
	for _, m := range left {
		served += strings.Count(get(t, m.internal+"/federate?consumer=x"), `m{_id="`+id+`",instance="",job="",k=`)
	}
	if served != 3 {
		t.Errorf("a consumer got %d of 3 samples whose pushes were answered 200", served)
	}
	if code := a.push(r.tokens[id], "m 10\n"); code != http.StatusOK {
		t.Errorf("a push to the new owner got %d, want 200", code)
	}
	if n, _ := shows(t, id, left...); n != 1 {
		t.Errorf("%d servers serve %s after its owner died, want 1", n, id)
	}

	back := startMember(t, r.dir, victim.name, "--join", a.ringAddr) // the same member as before, but with other ports
	agree(t, 3, append(left, back)...)
	if n, owner := shows(t, id, append(left, back)...); n != 1 || owner != back {
		t.Errorf("%d servers serve %s after its owner returned, want only the owner", n, id)
	}
	if got := a.debug().session(victim.name); got <= session {
		t.Errorf("the session of %s after its return is %d, want more than %d", victim.name, got, session)
	}
	for name, slot := range slots {
		if got := a.debug().slots()[name]; got != slot {
			t.Errorf("the slot of %s changed from %d to %d when %s returned", name, slot, got, victim.name)
		}
	}
}

// A member that is stopped with SIGTERM leaves the ring. Then each of the 12 sites has one owner
// among the other members, and another member shows its state as "left", not as "dead".
func TestRingMemberLeaves(t *testing.T) {
	r := startRingOfThree(t)
	a := r.all[0]
	_, leaver := r.siteNotOwnedBy(a)
	left := r.without(leaver)
	if code := leaver.end(syscall.SIGTERM); code != exitOK {
		t.Errorf("%s exited with %d after SIGTERM, want %d", leaver.name, code, exitOK)
	}
	agree(t, 2, left...)
	for id, token := range r.tokens {
		if code := a.push(token, "m 9\n"); code != http.StatusOK {
			t.Errorf("a push of %s after %s left got %d, want 200", id, leaver.name, code)
		}
		if n, _ := shows(t, id, left...); n != 1 {
			t.Errorf("%d servers serve %s after %s left, want 1", n, id, leaver.name)
		}
	}
	eventually(t, leaver.name+" is shown as left", func() bool { return a.debug().state(leaver.name) == "left" })
}

// An operator can rotate the cluster key on one server after the other. A server that has the new
// key still forwards pushes to an owner that has only the old key.
func TestClusterKeyRotation(t *testing.T) {
	dirs := []string{t.TempDir(), t.TempDir()}
	mustTool(t, dirs[0], "--mode", "keygen", "--keys", "keys")
	if err := os.Mkdir(filepath.Join(dirs[1], "keys"), 0o700); err != nil {
		t.Fatal(err)
	}
	copyKeys := func() {
		t.Helper()
		for _, name := range []string{ClusterKeyFile, TokenKeyFile} {
			writeIn(t, dirs[1], "keys/"+name, readIn(t, dirs[0], "keys/"+name))
		}
	}
	copyKeys()
	a := startMember(t, dirs[0], "a")
	b := startMember(t, dirs[1], "b", "--join", a.ringAddr)
	agree(t, 2, a, b)
	token := ""
	// This loop pushes to b for one new site after the other, until it finds a site that a owns.
	for i := 0; ; i++ {
		id := fmt.Sprint("site", i)
		token = mustTool(t, dirs[0], "--mode", "token", "--keys", "keys", "--id", id)
		if b.push(token, "m 1\n") != http.StatusOK {
			t.Fatalf("the push of %s was refused", id)
		}
		if _, owner := shows(t, id, a, b); owner == a {
			break
		}
	}
	mustTool(t, dirs[0], "--mode", "keygen", "--keys", "keys", "--rotate", "cluster")
	reload := func(m *memberProcess) {
		t.Helper()
		n := strings.Count(m.text(), "msg=reloaded")
		m.cmd.Process.Signal(syscall.SIGHUP)
		eventually(t, m.name+" has reloaded", func() bool { return strings.Count(m.text(), "msg=reloaded") > n })
	}
	copyKeys()
	reload(b)
	for i := range 3 {
		if code := b.push(token, fmt.Sprintf("m %d\n", i)); code != http.StatusOK {
			t.Errorf("a push while only one server has the new key got %d, want 200", code)
		}
	}
	reload(a)
	agree(t, 2, a, b)
	if code := b.push(token, "m 9\n"); code != http.StatusOK {
		t.Errorf("a push after both servers have the new key got %d, want 200", code)
	}
	if body := get(t, b.internal+"/metrics"); !strings.Contains(body, `telemeter_forwards_sent_total{result="kept"} 0`) {
		t.Error("a push was not forwarded to its owner while keys were rotated")
	}
}

// If the file cluster.key is bad, a reload fails and does not use the new file of revoked IDs
// either: a site whose cluster ID was added to that file can still push.
func TestClusterKeyBad(t *testing.T) {
	dir := t.TempDir()
	mustTool(t, dir, "--mode", "keygen", "--keys", "keys")
	writeIn(t, dir, "revoked", "")
	good := readIn(t, dir, "keys/"+ClusterKeyFile)
	a := startMember(t, dir, "a", "--revoked-file", "revoked")
	agree(t, 1, a)
	token := mustTool(t, dir, "--mode", "token", "--keys", "keys", "--id", "s")
	writeIn(t, dir, "revoked", "s\n")
	writeIn(t, dir, "keys/"+ClusterKeyFile, "nonsense\n")
	a.cmd.Process.Signal(syscall.SIGHUP)
	a.await("reload failed")
	if code := a.push(token, "m 1\n"); code != http.StatusOK {
		t.Errorf("a push after the failed reload got %d, want 200", code)
	}
	writeIn(t, dir, "keys/"+ClusterKeyFile, good)
	a.cmd.Process.Signal(syscall.SIGHUP)
	a.await("msg=reloaded")
	if code := a.push(token, "m 2\n"); code != http.StatusUnauthorized {
		t.Errorf("a push after the reload got %d, want 401", code)
	}
}

// If two servers with the same name are in one ring, one of them exits with 1 and reports once that
// the name is taken. Both log what to do.
func TestRingNameTaken(t *testing.T) {
	dir := t.TempDir()
	mustTool(t, dir, "--mode", "keygen", "--keys", "keys")
	a := startMember(t, dir, "a")
	b := start(t, dir, "--mode", "server", "--keys", "keys", "--name", "a", "--listen", "127.0.0.1:0", "--listen-internal", "127.0.0.1:0",
		"--listen-cluster", "127.0.0.1:0", "--storage-dir", "data-b", "--gossip-interval", "200ms", "--join", a.ringAddr)
	var p *process
	eventually(t, "one of the servers reports an error", func() bool {
		for _, p = range []*process{a.process, b} {
			if strings.Contains(p.text(), "\ntelemeter: ") {
				return true
			}
		}
		return false
	})
	other := a.process
	if p == a.process {
		other = b
	}
	other.await(`level=WARN msg="` + regexp.QuoteMeta(EventNameConflict) + `" member=a address=`)
	p.await(`level=ERROR msg="` + regexp.QuoteMeta(EventStoodDown) + `" member=a address=`)
	if code := p.end(syscall.SIGTERM); code != exitFailure || strings.Count(p.text(), ErrNameTaken.Error()) != 1 {
		t.Errorf("exit %d, want %d and one report that the name is taken:\n%s", code, exitFailure, p.text())
	}
}

// runMember runs a ring member in the test process until the end of the test, with a short gossip
// interval. It returns the member's log, and the address of its listener for other members. dir must
// contain the directory keys.
func runMember(t *testing.T, dir, name string, args ...string) (log *logBuffer, internal, ringAddr string) {
	t.Helper()
	log = startMode(t, append([]string{"--mode", "server", "--keys", filepath.Join(dir, "keys"), "--name", name, "--listen", "127.0.0.1:0",
		"--listen-internal", "127.0.0.1:0", "--listen-cluster", "127.0.0.1:0", "--storage-dir", filepath.Join(dir, "data-"+name),
		"--gossip-interval", "100ms"}, args...)...)
	return log, "http://" + awaitLog(t, log, internalAddr), awaitLog(t, log, memberAddr)
}

// awaitLog waits until log matches pattern, and returns the text of the pattern's last group.
func awaitLog(t *testing.T, log *logBuffer, pattern string) string {
	t.Helper()
	re := regexp.MustCompile(pattern)
	var m []string
	eventually(t, "the log has "+pattern, func() bool { m = re.FindStringSubmatch(log.String()); return m != nil })
	return m[len(m)-1]
}

// keygenIn creates the directory keys in dir.
func keygenIn(t *testing.T, dir string) {
	t.Helper()
	if status, _, stderr := runMode(t, "--mode", "keygen", "--keys", filepath.Join(dir, "keys")); status != exitOK {
		t.Fatal(stderr)
	}
}

// A server whose --join reaches the ring at once reports that, and no failure, in its log and its
// metrics.
func TestRingTellsJoined(t *testing.T) {
	dir := t.TempDir()
	keygenIn(t, dir)
	_, _, ringAddr := runMember(t, dir, "a")
	b, internal, _ := runMember(t, dir, "b", "--join", ringAddr)
	awaitLog(t, b, `level=INFO msg="`+regexp.QuoteMeta(EventJoined)+`" join=`+regexp.QuoteMeta(ringAddr))
	if body := get(t, internal+"/metrics"); !strings.Contains(body, "\ntelemeter_ring_join_unreached 0\n") {
		t.Error("/metrics shows that --join is not reached")
	}
	if text := b.String(); strings.Contains(text, EventJoinFails) {
		t.Errorf("a server that reaches the ring at once reports a failure:\n%s", text)
	}
}

// A server that advertises a loopback address warns if --join names another host.
func TestRingTellsLoopbackAdvertised(t *testing.T) {
	dir := t.TempDir()
	keygenIn(t, dir)
	const text = "this server advertises a loopback address"
	// No packet leaves this host, because the socket of far is bound to a loopback address.
	far, _, _ := runMember(t, dir, "far", "--join", "192.0.2.1:9006")
	near, _, _ := runMember(t, dir, "near", "--join", "localhost:1")
	if !strings.Contains(far.String(), text) || strings.Contains(near.String(), text) {
		t.Errorf("the warning is not in the log of far, or is in the log of near:\n%s\n%s", far, near)
	}
}

// If a flag of the ring has a faulty value, or a flag that it needs is missing, the server exits
// with 2 and reports the problem.
func TestRingFlagConflicts(t *testing.T) {
	dir := t.TempDir()
	for args, want := range map[string]string{
		"--join x:1":                              "--listen-cluster",
		"--listen-cluster nope":                   "--listen-cluster: ",
		"--listen-cluster :0 --join x":            "--join: ",
		"--listen-cluster :0 --name":              "--name needs a value",
		"--listen-cluster :0 --gossip-interval 1": "gossip-interval",
	} {
		_, stderr, code := tool(t, dir, append([]string{"--mode", "server", "--keys", "keys"}, strings.Fields(args)...)...)
		if code != exitUsage || !strings.Contains(stderr, want) {
			t.Errorf("%s: exit %d, want %d and %q:\n%s", args, code, exitUsage, want, stderr)
		}
	}
}
