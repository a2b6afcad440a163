package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
)

// memberProcess is one server process of a ring.
type memberProcess struct {
	*process
	name, external, internal, ringAddr string
}

const memberAddr = `msg=member .*listen=(\S+)`

// startMember starts a server as a member of a ring, with keys in dir/keys.
func startMember(t *testing.T, dir, name string, args ...string) *memberProcess {
	t.Helper()
	p := start(t, dir, append([]string{"--mode", "server", "--keys", "keys", "--name", name, "--listen", "127.0.0.1:0",
		"--listen-internal", "127.0.0.1:0", "--listen-cluster", "127.0.0.1:0", "--storage-dir", "data-" + name,
		"--gossip-interval", "200ms"}, args...)...)
	return &memberProcess{p, name, "http://" + p.await(externalAddr), "http://" + p.await(internalAddr), p.await(memberAddr)}
}

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

// slots returns the slots of live members, by name.
func (d debugRing) slots() map[string]int {
	s := map[string]int{}
	for _, m := range d.Members {
		if m.Slot != nil && (m.State == "alive" || m.State == "suspect") {
			s[m.Name] = *m.Slot
		}
	}
	return s
}

// agree waits until all have n live slots and one ring, and take pushes.
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

// push pushes, with headers that are names and values.
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

// shows counts the servers that show a cluster ID, and returns the last one.
func shows(t *testing.T, id string, members ...*memberProcess) (n int, which *memberProcess) {
	t.Helper()
	for _, m := range members {
		if strings.Contains(get(t, m.internal+"/federate?match[]=m"), `_id="`+id+`"`) {
			n, which = n+1, m
		}
	}
	return n, which
}

// Any number of servers with the same keys and one --join behave as one.
func TestRingOfServers(t *testing.T) {
	dir := t.TempDir()
	mustTool(t, dir, "--mode", "keygen", "--keys", "keys")
	a := startMember(t, dir, "a")
	b := startMember(t, dir, "b", "--join", a.ringAddr)
	c := startMember(t, dir, "c", "--join", a.ringAddr)
	all := []*memberProcess{a, b, c}
	agree(t, 3, all...)
	for _, m := range all {
		if body := get(t, m.internal+"/sd"); strings.Count(body, "127.0.0.1:") != 3 || !strings.HasPrefix(body, `[{"targets":[`) {
			t.Errorf("/sd says %s", body)
		}
	}
	var index struct{ Paths []string }
	if err := json.Unmarshal([]byte(get(t, a.internal+"/")), &index); err != nil || !slices.Contains(index.Paths, "/sd") || !slices.Contains(index.Paths, "/debug/ring") {
		t.Errorf("/ lists %q (%v)", index.Paths, err)
	}
	for _, path := range index.Paths {
		get(t, a.internal+path) // what is listed is there
	}
	// Wherever it is pushed, a cluster ID is shown by one server, always the same.
	tokens := map[string]string{}
	owned := map[*memberProcess]int{}
	for i := range 12 {
		id := fmt.Sprint("site", i)
		tokens[id] = mustTool(t, dir, "--mode", "token", "--keys", "keys", "--id", id, "--ttl", "1h")
		for k := range 3 {
			if code := all[(i+k)%3].push(tokens[id], fmt.Sprintf("m %d\n", k)); code != http.StatusOK {
				t.Fatalf("%s: %d", id, code)
			}
		}
		n, owner := shows(t, id, all...)
		if n != 1 {
			t.Fatalf("%s is shown by %d servers", id, n)
		}
		owned[owner]++
	}
	if len(owned) != 3 {
		t.Errorf("12 cluster IDs have %d owners", len(owned))
	}
	// Each server shows what it saw of a site itself: all saw the tokens, the owner alone
	// has the samples.
	for name, want := range map[string]int{"telemeter_cluster_token_expiry_seconds": 36, "push_time_seconds": 12} {
		n := 0
		for _, m := range all {
			body := get(t, m.internal+"/federate?match[]="+name)
			n += strings.Count(body, "_id=")
			if strings.Count(body, "_id=") != strings.Count(body, `server="`+m.name+`"`) {
				t.Errorf("%s shows of another server:\n%s", m.name, body)
			}
		}
		if n != want {
			t.Errorf("%s is shown %d times, want %d", name, n, want)
		}
	}

	// The owner dies: its cluster IDs go on at once, at another server.
	var victim *memberProcess
	var id string
	for i := range 12 {
		id = fmt.Sprint("site", i)
		if _, victim = shows(t, id, all...); victim != a {
			break
		}
	}
	var left []*memberProcess
	for _, m := range all {
		if m != victim {
			left = append(left, m)
		}
	}
	victim.end(syscall.SIGKILL)
	for k := range 3 {
		if code := a.push(tokens[id], fmt.Sprintf("m{k=\"%d\"} 9\n", k)); code != http.StatusOK {
			t.Errorf("after its owner died: %d", code)
		}
	}
	agree(t, 2, left...)
	// A consumer is served what was answered 200, whichever server holds it.
	served := 0
	for _, m := range left {
		served += strings.Count(get(t, m.internal+"/federate?consumer=x"), `m{_id="`+id+`",instance="",job="",k=`)
	}
	if served != 3 {
		t.Errorf("a consumer is served %d of 3 samples that were answered 200", served)
	}
	if code := a.push(tokens[id], "m 10\n"); code != http.StatusOK {
		t.Errorf("with another owner: %d", code)
	}
	if n, _ := shows(t, id, left...); n != 1 {
		t.Errorf("%s is shown by %d servers after its owner died", id, n)
	}

	// It returns at another address with what it kept: its slot, and a higher session.
	name, before := "b", uint64(0)
	if victim == c {
		name = "c"
	}
	for _, m := range a.debug().Members {
		if m.Name == name {
			before = m.Session
		}
	}
	slot := a.debug().slots()
	back := startMember(t, dir, name, "--join", a.ringAddr)
	agree(t, 3, append(left, back)...)
	for _, m := range a.debug().Members {
		if m.Name == name && m.Session <= before {
			t.Errorf("session %d after %d", m.Session, before)
		}
	}
	for other, s := range slot {
		if got := a.debug().slots()[other]; got != s {
			t.Errorf("the slot of %s went from %d to %d", other, s, got)
		}
	}

	if n, which := shows(t, id, append(left, back)...); n != 1 || which != back {
		t.Errorf("%s is shown by %d servers after its owner returned", id, n)
	}

	// A graceful stop is known before anyone could have suspected it, and the sites go on at
	// once, at the servers that are left.
	if code := back.end(syscall.SIGTERM); code != exitOK {
		t.Errorf("exit %d", code)
	}
	agree(t, 2, left...)
	for i := range 12 {
		id := fmt.Sprint("site", i)
		if code := a.push(tokens[id], "m 9\n"); code != http.StatusOK {
			t.Errorf("%s after one left: %d", id, code)
		}
		if n, _ := shows(t, id, left...); n != 1 {
			t.Errorf("%s is shown by %d servers after one left", id, n)
		}
	}
	eventually(t, "the leave is known", func() bool {
		for _, m := range a.debug().Members {
			if m.Name == name {
				return m.State == "left"
			}
		}
		return false
	})
}

// Cluster keys rotate live, one server after the other.
func TestClusterKeyRotation(t *testing.T) {
	dirs := []string{t.TempDir(), t.TempDir()}
	mustTool(t, dirs[0], "--mode", "keygen", "--keys", "keys")
	copyKeys := func() {
		t.Helper()
		for _, name := range []string{ClusterKeyFile, TokenKeyFile} {
			b, err := os.ReadFile(filepath.Join(dirs[0], "keys", name))
			if err == nil {
				err = os.MkdirAll(filepath.Join(dirs[1], "keys"), 0o700)
			}
			if err == nil {
				err = os.WriteFile(filepath.Join(dirs[1], "keys", name), b, 0o600)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	copyKeys()
	a := startMember(t, dirs[0], "a")
	b := startMember(t, dirs[1], "b", "--join", a.ringAddr)
	agree(t, 2, a, b)
	token := ""
	for i := 0; ; i++ { // of a cluster ID that a owns, pushed to b
		id := fmt.Sprint("site", i)
		token = mustTool(t, dirs[0], "--mode", "token", "--keys", "keys", "--id", id)
		if b.push(token, "m 1\n") != http.StatusOK {
			t.Fatal("push refused")
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
		eventually(t, "reloaded", func() bool { return strings.Count(m.text(), "msg=reloaded") > n })
	}
	copyKeys()
	reload(b)
	for i := range 3 {
		if code := b.push(token, fmt.Sprintf("m %d\n", i)); code != http.StatusOK {
			t.Errorf("while one server has the new key: %d", code)
		}
	}
	reload(a)
	agree(t, 2, a, b)
	if code := b.push(token, "m 9\n"); code != http.StatusOK {
		t.Errorf("after both have the new key: %d", code)
	}
	if body := get(t, b.internal+"/metrics"); !strings.Contains(body, `telemeter_forwards_sent_total{result="kept"} 0`) {
		t.Error("a push was kept from its owner while keys rotated")
	}
}

// The metrics that the README names, and those that the alerts go by, are there, with
// the labels and the values that are named: an alert on anything else never fires.
func TestMetricsNamed(t *testing.T) {
	dir := t.TempDir()
	mustTool(t, dir, "--mode", "keygen", "--keys", "keys")
	a := startMember(t, dir, "a")
	agree(t, 1, a)
	token := mustTool(t, dir, "--mode", "token", "--keys", "keys", "--id", "site-7", "--to", a.external, "--ttl", "1h")
	if err := os.WriteFile(filepath.Join(dir, "token"), []byte(token), 0o600); err != nil {
		t.Fatal(err)
	}
	if code := a.push(token, "not a sample\n", ClockOffsetHeader, "1500"); code != http.StatusBadRequest {
		t.Fatalf("a bad push: %d", code)
	}
	client := start(t, dir, "--mode", "client", "--token-file", "token", "--from", a.internal+"/metrics", "--listen", "127.0.0.1:0")
	address := client.await(`msg=listening address=(\S+)`)
	client.await("msg=pushed")
	get(t, a.internal+"/federate?consumer=central") // from here on there is a backlog to tell of
	shown := strings.Join([]string{get(t, a.internal+"/metrics"), get(t, a.internal+"/federate?consumer=central"), get(t, "http://"+address+"/metrics")}, "\n")

	has := func(name string, labels ...string) bool {
		for line := range strings.SplitSeq(shown, "\n") {
			rest, ok := strings.CutPrefix(line, name)
			all := ok && (rest[0] == '{' || rest[0] == ' ')
			for _, l := range labels {
				all = all && (strings.Contains(rest, "{"+l) || strings.Contains(rest, ","+l))
			}
			if all {
				return true
			}
		}
		return false
	}
	metric := regexp.MustCompile(`\b((?:telemeter|push|process)_[a-z_]+)(?:\{([^}]*)\})?`)
	sourceFile := regexp.MustCompile(`\b\w+\.go\b`)
	label := regexp.MustCompile(`([a-z_]+)(?:=~?"([^"]*)")?`)
	n := 0
	for _, file := range []string{"README.md", filepath.Join("testdata", "alerts.yml")} {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range metric.FindAllStringSubmatch(sourceFile.ReplaceAllString(string(text), ""), -1) {
			n++
			if !has(m[1]) {
				t.Errorf("%s names %s, which nothing shows", file, m[1])
			}
			for _, l := range label.FindAllStringSubmatch(m[2], -1) {
				if l[0] == `_id=""` { // no site's
					continue
				}
				for value := range strings.SplitSeq(l[2], "|") {
					want := l[1] + `="` + value
					if l[2] != "" {
						want += `"`
					}
					if !has(m[1], want) {
						t.Errorf("%s names %s, which nothing shows with %s", file, m[0], want)
					}
				}
			}
		}
	}
	if n < 30 {
		t.Errorf("only %d names found", n)
	}
}

// A cluster.key that cannot be read keeps all of the old state, not its own part.
func TestClusterKeyBad(t *testing.T) {
	dir := t.TempDir()
	mustTool(t, dir, "--mode", "keygen", "--keys", "keys")
	revoked, key := filepath.Join(dir, "revoked"), filepath.Join(dir, "keys", ClusterKeyFile)
	write := func(path, text string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(revoked, "")
	good, err := os.ReadFile(key)
	if err != nil {
		t.Fatal(err)
	}
	a := startMember(t, dir, "a", "--revoked-file", "revoked")
	agree(t, 1, a)
	token := mustTool(t, dir, "--mode", "token", "--keys", "keys", "--id", "s")
	write(revoked, "s\n")
	write(key, "nonsense\n")
	a.cmd.Process.Signal(syscall.SIGHUP)
	a.await("reload failed")
	if code := a.push(token, "m 1\n"); code != http.StatusOK {
		t.Errorf("after a reload that failed: %d, want 200", code)
	}
	write(key, string(good))
	a.cmd.Process.Signal(syscall.SIGHUP)
	a.await("msg=reloaded")
	if code := a.push(token, "m 2\n"); code != http.StatusUnauthorized {
		t.Errorf("after a reload: %d, want 401", code)
	}
}

// Two servers of one name do not both go on; the one that ends says why, once.
func TestRingNameTaken(t *testing.T) {
	dir := t.TempDir()
	mustTool(t, dir, "--mode", "keygen", "--keys", "keys")
	a := startMember(t, dir, "a")
	b := start(t, dir, "--mode", "server", "--keys", "keys", "--name", "a", "--listen", "127.0.0.1:0", "--listen-internal", "127.0.0.1:0",
		"--listen-cluster", "127.0.0.1:0", "--storage-dir", "data-b", "--gossip-interval", "200ms", "--join", a.ringAddr)
	var p *process
	eventually(t, "one of them says so", func() bool {
		for _, p = range []*process{a.process, b} {
			if strings.Contains(p.text(), "\ntelemeter: ") {
				return true
			}
		}
		return false
	})
	if code := p.end(syscall.SIGTERM); code != exitFailure || strings.Count(p.text(), ErrNameTaken.Error()) != 1 {
		t.Errorf("exit %d:\n%s", code, p.text())
	}
}

// A stranger with other keys is not heard, and hears nothing.
func TestRingStranger(t *testing.T) {
	dir, other := t.TempDir(), t.TempDir()
	mustTool(t, dir, "--mode", "keygen", "--keys", "keys")
	mustTool(t, other, "--mode", "keygen", "--keys", "keys")
	a := startMember(t, dir, "a")
	s := startMember(t, other, "s", "--join", a.ringAddr)
	eventually(t, "packets of a stranger are refused", func() bool {
		return strings.Contains(get(t, a.internal+"/metrics"), `telemeter_gossip_refused_packets_total{reason="key"} `) &&
			!strings.Contains(get(t, a.internal+"/metrics"), `telemeter_gossip_refused_packets_total{reason="key"} 0`)
	})
	for _, m := range []*memberProcess{a, s} {
		if d := m.debug(); len(d.Members) != 1 {
			t.Errorf("members are %+v", d.Members)
		}
	}
}

func TestMemberState(t *testing.T) {
	dir := t.TempDir()
	if st, err := LoadRestartState(DiskFS{}, dir); err != nil || st != (RestartState{}) {
		t.Errorf("of nothing: %+v %v", st, err)
	}
	want := RestartState{Session: 7, Slot: 3, Lamport: 9, Provisional: true, MaxLamport: 11, Buckets: 5}
	for range 2 {
		if err := SaveRestartState(DiskFS{}, dir, want); err != nil {
			t.Fatal(err)
		}
		if got, err := LoadRestartState(DiskFS{}, dir); err != nil || got != want {
			t.Errorf("got %+v %v", got, err)
		}
		want.Session++
	}
	// Damage costs what was kept, which the others tell again, and not the start.
	if err := os.WriteFile(filepath.Join(dir, memberFile), []byte("nonsense"), 0o600); err != nil {
		t.Fatal(err)
	}
	if st, err := LoadRestartState(DiskFS{}, dir); err != nil || st != (RestartState{}) {
		t.Errorf("of a damaged file: %+v %v", st, err)
	}
}

// An error of reading is not a member without past.
func TestMemberStateReadFails(t *testing.T) {
	want := RestartState{Session: 7, Slot: 3, Lamport: 9}
	for _, f := range readFaults {
		synctest.Test(t, func(t *testing.T) {
			fsys := newStoreFS(1)
			if err := SaveRestartState(fsys, "/s", want); err != nil {
				t.Fatal(err)
			}
			fsys.hook = f.hook("read", "")
			got, err := LoadRestartState(fsys, "/s")
			if ok := err == nil && got == want; ok != (f.n > 0) || !ok && !errors.Is(err, f.err) {
				t.Errorf("%v: got %+v, %v", f, got, err)
			}
		})
	}
}

// A server whose disk is full starts all the same, and keeps its state when there is
// room. One whose directory cannot be written does not.
func TestMemberStartsOnFullDisk(t *testing.T) {
	gossip := startGossip(t, GossipConfig{Name: "a"}, "127.0.0.1:0").Gossip
	fsys := newStoreFS(1)
	var failures []error
	start := func() (*RingKeeper, error) {
		return NewRingKeeper(RingKeeperConfig{Name: "a", Gossip: gossip, FS: fsys, Dir: "/s", Log: slog.New(slog.DiscardHandler), OnError: func(err error) { failures = append(failures, err) }})
	}
	fsys.hook = failOn("write", "", 0, syscall.EACCES)
	if _, err := start(); !errors.Is(err, syscall.EACCES) {
		t.Errorf("it starts with %v", err)
	}
	fsys.hook = failOn("write", "", 0, syscall.ENOSPC)
	m, err := start()
	if err != nil {
		t.Fatal(err)
	}
	m.claimSlot(gossip.View())
	if len(failures) != 2 || !errors.Is(failures[1], syscall.ENOSPC) {
		t.Errorf("OnError got %v", failures)
	}
	if v := gossip.View(); v.Members[0].Slot != NoSlot {
		t.Errorf("slot %d was claimed, and is not kept", v.Members[0].Slot)
	}
	fsys.hook = nil
	m.claimSlot(gossip.View())
	eventually(t, "with room a slot is claimed", func() bool { return gossip.View().Members[0].Slot == 0 })
	want := gossip.RestartState()
	if got, err := LoadRestartState(fsys, "/s"); err != nil || got.Session != want.Session || got.Slot != 0 {
		t.Errorf("kept %+v, want %+v: %v", got, want, err)
	}
}

func TestRingFlagConflicts(t *testing.T) {
	dir := t.TempDir()
	for args, want := range map[string]string{
		"--join x:1":                              "--listen-cluster",
		"--listen-cluster nope":                   "--listen-cluster: ",
		"--listen-cluster :0 --join x":            "--join: ",
		"--listen-cluster :0 --name":              "flag needs an argument",
		"--listen-cluster :0 --gossip-interval 1": "gossip-interval",
	} {
		_, stderr, code := tool(t, dir, append([]string{"--mode", "server", "--keys", "keys"}, strings.Fields(args)...)...)
		if code != exitUsage || !strings.Contains(stderr, want) {
			t.Errorf("%s: exit %d\n%s", args, code, stderr)
		}
	}
}
