package main

// The test of an upgrade and of the way back: two servers in a ring, a client and a real Prometheus,
// first with the binary of an earlier commit, then process by process with this version, and back.
// "make test-upgrade" runs it. Tests of messages and files of other versions are TestLogVersion,
// TestLogVersionOfEveryFile, and those of seals, forwarded pushes, spools and tokens.

import (
	"bytes"
	"flag"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

var upgradeFlag = flag.String("upgrade", "", "run TestUpgrade with the binary of this commit as the earlier version")

// buildRevision builds telemeter at a commit of this repository and returns the path of the binary. It
// fails the test if the clone does not have the commit.
func buildRevision(t *testing.T, revision string) string {
	t.Helper()
	archive := exec.Command("git", "archive", "--format=tar", revision)
	var tar, stderr bytes.Buffer
	archive.Stdout, archive.Stderr = &tar, &stderr
	if err := archive.Run(); err != nil {
		t.Fatalf("this directory has no commit %s (in a shallow clone, run git fetch --unshallow): %v\n%s", revision, err, &stderr)
	}
	dir := t.TempDir()
	unpack := exec.Command("tar", "-x", "-C", dir)
	unpack.Stdin = &tar
	if out, err := unpack.CombinedOutput(); err != nil {
		t.Fatalf("unpacking commit %s: %v\n%s", revision, err, out)
	}
	runIn(t, dir, []string{"CGO_ENABLED=0"}, "go", "build", "-buildvcs=false", "-o", "telemeter", ".")
	return filepath.Join(dir, "telemeter")
}

// upgradeMember is a server whose addresses and storage directory stay the same at each restart.
type upgradeMember struct {
	*memberProcess
	args []string
	old  bool // runs the earlier version
}

// upgradeRig is a ring of two servers and one client, each of which runs the earlier version or this
// one. The embedded rig has the source, and compares its samples with those of the central Prometheus.
type upgradeRig struct {
	outageRig
	program    string // binary of the earlier version
	members    []*upgradeMember
	clientArgs []string
	clientURL  string // base URL of the client's listener
	clientOld  bool
	keys       Keys
	rounds     int // number of calls of checkForwarding
}

// run starts telemeter, of the earlier version if old is true.
func (r *upgradeRig) run(old bool, args ...string) *process {
	r.t.Helper()
	cmd := telemeterCommand(r.t, r.dir, args...)
	if old {
		cmd.Path = r.program
	}
	return startCommand(r.t, cmd)
}

// startMember starts a server, and waits until all servers that run see each other. The first server of
// a ring also has --join, and tries the address until the second server runs.
func (r *upgradeRig) startMember(m *upgradeMember, old bool) {
	r.t.Helper()
	m.process, m.old = r.run(old, m.args...), old
	m.await("msg=serving")
	var running []*memberProcess
	for _, m := range r.members {
		if m.process != nil {
			running = append(running, m.memberProcess)
		}
	}
	agree(r.t, len(running), running...)
}

// replaceMember ends a server with SIGTERM and starts the other version on its storage directory.
func (r *upgradeRig) replaceMember(m *upgradeMember, old bool) {
	r.t.Helper()
	if code := m.end(syscall.SIGTERM); code != exitOK {
		r.t.Errorf("server %s: exit %d at SIGTERM, want %d", m.name, code, exitOK)
	}
	r.startMember(m, old)
}

// startClient starts the client on its spool.
func (r *upgradeRig) startClient(old bool) {
	r.t.Helper()
	r.client, r.clientOld = r.run(old, r.clientArgs...), old
	r.client.await("msg=pushed")
}

// replaceClient ends the client with SIGTERM and starts the other version on its spool.
func (r *upgradeRig) replaceClient(old bool) {
	r.t.Helper()
	if code := r.client.end(syscall.SIGTERM); code != exitOK {
		r.t.Errorf("the client: exit %d at SIGTERM, want %d", code, exitOK)
	}
	r.startClient(old)
}

// newUpgradeRig starts two servers, a client and a Prometheus. The servers and the client run the
// earlier version, which also makes the keys and the token.
func newUpgradeRig(t *testing.T, revision string) *upgradeRig {
	r := &upgradeRig{outageRig: outageRig{t: t, dir: t.TempDir()}, program: buildRevision(t, revision)}
	r.source = newOutageSource(t, 20)
	ring := []string{freeAddr(t), freeAddr(t)}
	for i, name := range []string{"a", "b"} {
		external, internal := freeAddr(t), freeAddr(t)
		r.members = append(r.members, &upgradeMember{
			memberProcess: &memberProcess{name: name, external: "http://" + external, internal: "http://" + internal, ringAddr: ring[i]},
			args: []string{"--mode", "server", "--keys", "keys", "--name", name, "--listen", external, "--listen-internal", internal,
				"--listen-cluster", ring[i], "--join", ring[1-i], "--storage-dir", "data-" + name, "--gossip-interval", "200ms", "--ratelimit", "0"},
		})
	}
	a, b := r.members[0], r.members[1]
	runIn(t, r.dir, nil, r.program, "--mode", "keygen", "--keys", "keys")
	token := exec.Command(r.program, "--mode", "token", "--keys", "keys", "--id", "x", "--to", a.external, "--to", b.external)
	token.Dir = r.dir
	out, err := token.Output()
	if err != nil {
		t.Fatalf("making a token with the earlier version: %v", err)
	}
	writeIn(t, r.dir, "token", string(out))
	if r.keys, err = readKeyFile(filepath.Join(r.dir, "keys"), TokenKeyFile); err != nil {
		t.Fatal(err)
	}
	r.startMember(a, true)
	r.startMember(b, true)
	job := `- {job_name: b, metrics_path: /federate, honor_labels: true, params: {consumer: [central]}, static_configs: [{targets: ['%s']}]}`
	r.prometheus = newOutagePrometheus(t, strings.TrimPrefix(a.internal, "http://"), "central", outageWindow, outageTimeout,
		fmt.Sprintf(job, strings.TrimPrefix(b.internal, "http://")))
	r.prometheus.start()
	listen := freeAddr(t)
	r.clientURL = "http://" + listen
	r.clientArgs = []string{"--mode", "client", "--from", "http://" + r.source.addr + "/metrics", "--token-file", "token",
		"--scrape-interval", "1s", "--interval", "2s", "--spool-dir", "spool", "--listen", listen}
	r.startClient(true)
	return r
}

// checkForwarding pushes for 24 new sites, in turn to each server. It reports an error unless each
// site has one owner, and each server has forwarded a push to the other.
func (r *upgradeRig) checkForwarding(step string) {
	r.t.Helper()
	r.rounds++
	forwarded := map[string]int{}
	for i := range 24 {
		id, to := fmt.Sprintf("round-%d-site-%d", r.rounds, i), r.members[i%2]
		(&outagePusher{r.t, to.external, r.keys}).push(id, []byte("m 1\n"))
		n, owner := 0, (*memberProcess)(nil)
		eventually(r.t, step+": a server has the samples of "+id, func() bool {
			n, owner = shows(r.t, id, r.members[0].memberProcess, r.members[1].memberProcess)
			return n > 0
		})
		if n != 1 {
			r.t.Errorf("%s: %d servers serve %s, want 1", step, n, id)
		}
		if owner != to.memberProcess {
			forwarded[to.name]++
		}
	}
	if forwarded["a"] == 0 || forwarded["b"] == 0 {
		r.t.Errorf("%s: pushes that a and b forwarded: %v, want some of each", step, forwarded)
	}
}

// checkStatus runs --mode status of this version with each server and with the client. A process of a
// version without a status must make it say so and exit with 1.
func (r *upgradeRig) checkStatus(step string) {
	r.t.Helper()
	for _, at := range []struct {
		name, url string
		old       bool
	}{{"server a", r.members[0].internal, r.members[0].old}, {"server b", r.members[1].internal, r.members[1].old}, {"the client", r.clientURL, r.clientOld}} {
		resp, err := http.Get(at.url + "/api/status")
		if err != nil {
			r.t.Fatal(err)
		}
		resp.Body.Close()
		stdout, stderr, code := tool(r.t, r.dir, "--mode", "status", "--from", at.url)
		switch {
		case at.old && resp.StatusCode == http.StatusNotFound:
			if code != exitFailure || stdout != "" || !strings.Contains(stderr, "404 Not Found: it is no listener of this version of telemeter that has a status") {
				r.t.Errorf("%s: --mode status of %s: exit %d, stdout %q, stderr %q; want a failure that says that it has no status", step, at.name, code, stdout, stderr)
			}
		case resp.StatusCode != http.StatusOK || stdout == "":
			r.t.Errorf("%s: /api/status of %s: %s; --mode status: exit %d, stdout %q, stderr %q; want a status", step, at.name, resp.Status, code, stdout, stderr)
		}
	}
}

// An upgrade of two servers and a client, one after the other, and the downgrade in reverse order,
// leave no gap and no duplicate in Prometheus. After each step the servers have one ring, and forward
// pushes to each other.
func TestUpgrade(t *testing.T) {
	if *upgradeFlag == "" {
		t.Skip("run by make test-upgrade")
	}
	if _, err := os.Stat(".git"); err != nil {
		t.Fatalf("the earlier version is built from the git history, which this directory lacks: %v", err)
	}
	r := newUpgradeRig(t, *upgradeFlag)
	a, b := r.members[0], r.members[1]
	for _, step := range []struct {
		name string
		do   func()
	}{
		{"earlier version", func() {}},
		{"upgrade of server a", func() { r.replaceMember(a, false) }},
		{"upgrade of server b", func() { r.replaceMember(b, false) }},
		{"upgrade of the client", func() { r.replaceClient(false) }},
		{"downgrade of the client", func() { r.replaceClient(true) }},
		{"downgrade of server b", func() { r.replaceMember(b, true) }},
		{"downgrade of server a", func() { r.replaceMember(a, true) }},
	} {
		begin, before := time.Now(), len(r.source.all())
		step.do()
		r.checkForwarding(step.name)
		r.checkStatus(step.name)
		eventually(t, step.name+": three more scrapes", func() bool { return len(r.source.all()) >= before+3 })
		r.settled(step.name, r.prometheus, begin)
	}
}
