package main

// TestMistakes makes the mistakes that people make at the command line, and checks the answers. A
// message must name what is wrong, which is the flag or its value, and must say what to do.
// TestHabits checks habits from other programs that telemeter understands.

import (
	"encoding/json"
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// A mistake at the command line ends telemeter with the exit status 2. A mistake in a file, or an
// address or a directory that cannot be used, ends it with the exit status 1. In both cases stdout
// is empty, and stderr says what is wrong and what to do. go test -v prints all messages.
func TestMistakes(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	mustRun := func(args ...string) string {
		t.Helper()
		status, stdout, stderr := runMode(t, args...)
		if status != exitOK {
			t.Fatalf("%q: exit status %d: %s", args, status, stderr)
		}
		return stdout
	}
	for _, keys := range []string{"keys", "half", "otherhalf", "bad", "badcrt"} {
		mustRun("--mode", "keygen", "--keys", keys, "--host", "127.0.0.1")
	}
	mustRun("--mode", "keygen", "--keys", "plain")
	must(os.Remove("half/" + TLSCertFile))
	must(os.Remove("otherhalf/" + TLSKeyFile))
	must(os.Mkdir("void", 0o700))
	for name, text := range map[string]string{
		"void/" + TokenKeyFile: "\n",
		"bad/" + TokenKeyFile:  "nonsense\n", "bad/" + ClusterKeyFile: keyLine(1) + "\n" + keyLine(1) + "\n", "badcrt/" + TLSCertFile: "nonsense\n",
		"good.token":  mustRun("--mode", "token", "--keys", "keys", "--id", "site-7", "--to", "https://127.0.0.1:1"),
		"nourl.token": mustRun("--mode", "token", "--keys", "keys", "--id", "site-7"), "far.token": mustRun("--mode", "token", "--keys", "keys", "--id", "site-7", "--to", "http://192.0.2.1:9003"),
		"empty": "\n", "garbage": "<html>login</html>\n", "short": "0123456789\n", "salt": "0123456789abcdef\n", "opaque": "bHVuY2g\n", "two": "a\nb\n", "longsalt": keyLine(1) + "\n",
		"revoked": "site-1\nno such id\n", "selectors": "up\n{job=\n", "comments": "# nothing\n", "file": "",
	} {
		must(os.WriteFile(name, []byte(text), 0o600))
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	must(err)
	defer ln.Close()
	udp, err := net.ListenPacket("udp", "127.0.0.1:0")
	must(err)
	defer udp.Close()
	for _, used := range []string{"used-storage", "used-spool"} {
		unlock, err := LockDir(filepath.Join(dir, used))
		must(err)
		defer unlock()
	}
	must(os.Mkdir("open", 0o700))
	must(os.Chmod("open", 0o777))

	const server = "--mode server --listen 127.0.0.1:0 --listen-internal 127.0.0.1:0 "
	const keyedServer = server + "--keys keys "
	const client = "--mode client --listen= --from http://127.0.0.1:1 "
	const load = "--mode load --keys keys --to https://127.0.0.1:1 "
	const pusher = client + "--token-file good.token "
	for _, row := range []struct {
		args         string // separated by spaces; DIR is the directory of the test
		status       int
		want, advice string // texts of stderr: what is wrong, and what to do
	}{
		// The mode.
		{"", 2, "--mode is missing", "Usage: telemeter --mode MODE"},
		{"--keys keys", 2, "--mode is missing", "Usage: telemeter --mode MODE"},
		{"--keys keys --mode", 2, "--mode is missing", "Usage: telemeter --mode MODE"},
		{"--mode sever", 2, `unknown mode "sever"`, "did you mean --mode server?"},
		{"--mode relay", 2, `unknown mode "relay"`, "The modes are client, keygen, load, server, show, status, token, version"},
		{"klient --from x", 2, `unknown mode "klient"`, "did you mean --mode client?"},
		{"server --keys keys --allow {a=\"it's\"}", 2, "the mode is the value of the flag --mode", `  telemeter --mode server --keys keys --allow '{a="it'\''s"}'` + "\n"},
		{"--client --once", 2, "the mode is the value of the flag --mode", "  telemeter --mode client --once\n"},
		{"--mode server --mode client", 2, "--mode server and --mode client cannot be combined", "choose one mode"},
		{"--mode version now", 2, `unexpected argument "now"`, "every value must follow its flag"},

		// Flags and values of any mode.
		{keyedServer + "--storage-dri x", 2, "unknown flag --storage-dri", "did you mean --storage-dir?"},
		{keyedServer + "-retention_time 1h", 2, "unknown flag --retention_time", "did you mean --retention?"},
		{keyedServer + "--config x", 2, "unknown flag --config", "telemeter --mode server --help lists the flags"},
		{keyedServer + "--listen-intern :1", 2, "unknown flag --listen-intern", "did you mean --listen-internal?"},
		{keyedServer + "--spool-dir x", 2, "unknown flag --spool-dir", "it is a flag of --mode client, not of --mode server"},
		{pusher + "--storage-dir x", 2, "unknown flag --storage-dir", "it is a flag of --mode server"},
		{pusher + "--keys keys", 2, "unknown flag --keys", "it is a flag of --mode keygen and --mode load and --mode server and --mode token, not of --mode client"},
		{"--mode token --keys keys --id a --host hub", 2, "unknown flag --host", "it is a flag of --mode keygen"},
		{server + "--keys", 2, "--keys needs a value", "write --keys DIR"},
		{server + "--keys --storage-dir x", 2, "--keys needs a value", "write --keys DIR"},
		{"--mode keygen --mode", 2, "--mode needs a value", "write --mode MODE"},
		{keyedServer + "extra", 2, `unexpected argument "extra"`, "every value must follow its flag"},
		{pusher + "--once true", 2, `unexpected argument "true"`, "write its value as --once=true or --once=false"},
		{pusher + "--once=maybe", 2, `invalid value "maybe" for --once`, "use --once or --once=false"},
		{keyedServer + "--retention 2", 2, `invalid value "2" for --retention`, "such as 30s, 10m, 2h or 1d12h"},
		{keyedServer + "--retention 9w", 2, "--retention must be", "at most 480h"},
		{keyedServer + "--limit-bytes 1MB", 2, `invalid value "1MB" for --limit-bytes`, "such as 1048576 or 1MiB"},
		{keyedServer + "--limit-series many", 2, `invalid value "many" for --limit-series`, "such as 1000"},
		{keyedServer + "--limit-series 0", 2, "--limit-series", "must be above 0"},
		{keyedServer + "--log-level loud", 2, `--log-level: "loud"`, "use DEBUG, INFO, WARN or ERROR"},
		{pusher + "--log-format xml", 2, `--log-format: "xml"`, "use text or json"},
		{server + "--keys keys --listen 9003", 2, `--listen: "9003"`, "write localhost:9003 for this host only, or :9003"},
		{server + "--keys keys --listen hub", 2, `--listen: "hub"`, "such as localhost:9000 or :9000"},
		{server + "--keys keys --listen :99999", 2, `--listen: ":99999"`, "use a number from 0 to 65535"},
		{keyedServer + "--label region", 2, `--label: label "region" is not NAME=VALUE`, "NAME=VALUE"},
		{keyedServer + "--label a-b=c", 2, `--label: label name "a-b" is invalid`, "use letters, digits and _"},
		{keyedServer + "--label _id=c", 2, `--label: label name "_id" is reserved`, "use another name"},
		{keyedServer + "--allow {job=", 2, "--allow: selector", "write a selector like up or '{job=\"node\"}'"},
		{pusher + "--rename a", 2, `--rename: rename "a"`, "OLD=NEW"},
		{pusher + "--id a/b", 2, "--id: ", "want 1 to"},

		// Flags that need or exclude each other.
		{"--mode server", 2, "--keys DIR is missing", "telemeter --mode keygen --keys keys"},
		{keyedServer + "--listen-internal :9004", 2, "--listen-internal :9004 can be reached from other hosts", "add --federate-token-file"},
		{keyedServer + "--internal-open --federate-token-file x", 2, "exclude each other", "choose one"},
		{keyedServer + "--join 127.0.0.1:1", 2, "--join", "need --listen-cluster ADDRESS, usually :9006"},
		{keyedServer + "--consumer=", 2, "--consumer: ", "must have 1 to 64 bytes"},
		{keyedServer + "--name süd", 2, "--name: ", "visible ASCII"},
		{"--mode client", 2, "--token-file FILE is missing", "telemeter --mode token --id SITE --to https://HUB:9003 > site.token"},
		{pusher + "--anonymize-labels instance", 2, "--anonymize-labels needs --anonymize-salt-file", "head -c 32 /dev/urandom"},
		{pusher + "--anonymize-salt-file salt", 2, "--anonymize-salt-file has no effect", "add --anonymize-labels"},
		{pusher + "--to-crt keys/tls.crt", 2, "--to-crt", "must be given together"},
		{pusher + "--interval 1m --scrape-interval 2m", 2, "--scrape-interval", "at most --interval"},
		{pusher + "--once --dry-run", 2, "--once and --dry-run exclude each other", "choose one"},
		{"--mode keygen --rotate tls2", 2, "--rotate", "must be"},
		{"--mode token --keys keys", 2, "--id ID is missing", "name the site"},
		{"--mode token --keys keys --inspect good.token --id a", 2, "--inspect can be combined only with", "remove the other flags"},

		// Load.
		{"--mode load", 2, "--keys DIR is missing", "or add --token-file FILE to push as one site"},
		{"--mode load --keys keys", 2, "--to URL is missing", "such as --to https://hub.example:9003"},
		{load + "--token-file good.token", 2, "--keys and --token-file exclude each other", "choose one"},
		{"--mode load --token-file good.token --sites 2", 2, "--sites and --prefix have no effect with --token-file", "remove them, or use --keys"},
		{"--mode load --keys keys --to 127.0.0.1:39100", 2, `--to: "127.0.0.1:39100"`, "http:// or https://"},
		{"--mode load --token-file opaque", 1, "--token-file opaque contains no token of telemeter", "make a token on the hub"},
		{"--mode load --token-file opaque --to https://127.0.0.1:1", 1, "--token-file opaque contains no token of telemeter", "make a token on the hub"},
		{"--mode load --token-file empty", 1, "--token-file empty: empty is empty: make a token on the hub", "telemeter --mode token --id SITE"},
		{"--mode load --token-file none", 1, "--token-file none: ", "make a token on the hub"},
		{load + "--duration 0", 2, "--duration 0 needs --pushes N", "ends the run"},
		{load + "--prefix a/b", 2, `--prefix: "a/b" is not the beginning of a cluster ID`, "use letters, digits"},
		{load + "--format json", 2, `--format: "json" is unknown`, "use text or protobuf"},
		{load + "--encoding zstd", 2, `--encoding: "zstd" is unknown`, "use gzip, snappy or identity"},
		{load + "--to-crt keys/tls.crt", 2, "--to-crt", "must be given together"},
		{load + "--in-flight 5000", 2, "--in-flight must be", "at most 4096"},
		{"--mode load --keys keys --to http://192.0.2.1:9003", 2, "over plain HTTP", "use https://, or add --plain-http"},
		{"--mode load --keys none --to https://127.0.0.1:1", 1, "--keys none: ", "correct --keys"},
		{"--mode load --token-file nourl.token", 2, "the token names no server", "pass --to https://HUB:9003"},
		{load + "--to-ca-file garbage", 1, "--to-ca-file garbage contains no PEM certificate", "-----BEGIN CERTIFICATE-----"},

		// URLs.
		{pusher + "--from localhost:9090", 2, `--from: "localhost:9090"`, "http:// or https://"},
		{pusher + "--from ftp://localhost:9090", 2, `--from: "ftp://localhost:9090" has the scheme ftp`, "use http:// or https://"},
		{pusher + "--from http://:9090", 2, `--from: "http://:9090" has no host`, "write the host after http://"},
		{pusher + "--from http://localhost:9090/#x", 2, "has a fragment", "remove the part from # on"},
		{pusher + "--from http://localhost:9090/metrics?", 2, "has an empty query", "remove the ?"},
		{pusher + "--listen localhost:9002 --from http://localhost:9002", 2, "--from is this client's own --listen: localhost:9002", "pass the URL of the Prometheus to scrape, or another --listen"},
		{pusher + "--from http://localhost:9090 --from http://localhost:9090/", 2, "--from http://localhost:9090/federate is given twice", "remove one"},
		{"--mode client --from http://localhost:9090/metrics --dry-run --backfill 1h", 2, "--backfill has no effect with --from http://localhost:9090/metrics, which is no /federate", "remove it"},
		{pusher + "--from http://a:9090 --from http://b:9090/metrics", 2, "cannot be replicas of one Prometheus", "correct them"},
		{pusher + "--from http://me:secret@localhost:9090", 2, "contains credentials", "remove them"},
		{pusher + "--to hub.example:9003", 2, `--to: "hub.example:9003"`, "http:// or https://"},
		{pusher + "--to https://hub.example:9003/upload", 2, `--to: "https://hub.example:9003/upload"`, "use https://hub.example:9003\n"},
		{pusher + "--to https://me:secret@hub.example:9003", 2, "contains credentials", "the token is the only credential of a site: use https://hub.example:9003\n"},
		{pusher + "--to http://192.0.2.1:9003", 2, "the token would be sent to http://192.0.2.1:9003 over plain HTTP", "use https://, or add --plain-http"},
		{client + "--token-file far.token", 2, "over plain HTTP", "add --plain-http"},
		{keyedServer + "--authorize https://", 2, `--authorize: "https://" has no host`, "write the host"},
		{"--mode token --keys keys --id a --to https://hub:9003?", 2, "--to: ", "remove the ?"},

		// Files.
		{server + "--keys none", 1, "--keys none: open none/token.key: no such file", "correct --keys (a relative path begins at DIR"},
		{server + "--keys file", 1, "--keys file: ", "a file is in the place of a directory"},
		{server + "--keys bad", 1, "--keys bad: reading bad/token.key: line 1", "restore the file from a copy"},
		{server + "--keys badcrt", 1, "--keys badcrt: reading tls.crt and tls.key", "restore both files from a copy"},
		{server + "--keys half", 1, "--keys half: reading tls.crt and tls.key", "restore both files from a copy"},
		{server + "--keys plain --tls-client-ca keys/tls.crt", 1, "--tls-client-ca needs tls.crt and tls.key", "telemeter --mode keygen --keys plain --host NAME"},
		{keyedServer + "--tls-client-ca garbage", 1, "--tls-client-ca garbage contains no PEM certificate", "-----BEGIN CERTIFICATE-----"},
		{keyedServer + "--revoked-file none", 1, "--revoked-file none: ", "correct the path, or create it; a relative path begins at DIR"},
		{keyedServer + "--revoked-file revoked", 1, "--revoked-file revoked: line 2", "correct the line"},
		{keyedServer + "--revoked-file keys", 1, "--revoked-file keys: ", "name a file, not a directory"},
		{keyedServer + "--allow-file comments", 1, "--allow-file comments contains no selector", "write one selector per line"},
		{keyedServer + "--allow-file selectors", 1, "--allow-file selectors: ", "write a selector like up or {job=\"node\"}"},
		{keyedServer + "--federate-token-file empty", 1, "--federate-token-file empty: ", "write the secret into it"},
		{keyedServer + "--federate-token-file two", 1, "--federate-token-file two ", "one word of visible ASCII"},
		{client + "--token-file none", 1, "--token-file none: ", "copy this file to the site"},
		{client + "--token-file empty", 1, "--token-file empty: empty is empty: make a token on the hub", "telemeter --mode token --id SITE"},
		{client + "--token-file garbage", 1, "--token-file garbage is an HTML page", "telemeter --mode token --id SITE"},
		{client + "--token-file longsalt", 1, "--token-file longsalt is a key file of the servers, which must not leave the hub, or a salt", "telemeter --mode token --id SITE"},
		{client + "--token-file opaque", 2, "--token-file opaque contains no token of telemeter", "add --id ID and --to URL"},
		{client + "--token-file nourl.token", 2, "the token names no server", "pass --to https://HUB:9003"},
		{pusher + "--from-token-file empty", 1, "--from-token-file empty: ", "write the secret into it"},
		{pusher + "--from-ca-file garbage", 1, "--from-ca-file garbage contains no PEM certificate", "-----BEGIN CERTIFICATE-----"},
		{pusher + "--to-crt garbage --to-key garbage", 1, "--to-crt garbage and --to-key garbage: ", "name PEM files"},
		{pusher + "--to-crt keys/tls.crt --to-key half/tls.key", 1, "private key does not match public key", "name PEM files with a certificate and its private key"},
		{pusher + "--to-crt none --to-key none", 1, "--to-crt none and --to-key none: open none: ", "correct the path"},
		{pusher + "--match-file none", 1, "--match-file none: ", "correct the path"},
		{pusher + "--anonymize-labels a --anonymize-salt-file short", 1, "--anonymize-salt-file short has 10 bytes, fewer than 16", "head -c 32 /dev/urandom"},
		{"--mode token --keys none --id a", 1, "--keys none: ", "for the first server only, create the keys with telemeter --mode keygen --keys none --host NAME; for another server, copy them from the first"},
		{"--mode token --keys keys --inspect garbage", 1, "--inspect garbage: parsing token", "name a file that telemeter --mode token has written"},
		{"--mode token --keys keys --inspect empty", 1, "--inspect empty is empty", "name a file that telemeter --mode token has written"},
		{"--mode keygen --keys void --rotate token", 1, "--keys void: void/token.key is empty", "restore the file from a copy"},
		{"--mode token --keys keys --inspect none", 1, "--inspect none: ", "correct the path"},
		{"--mode keygen --keys file", 1, "--keys file: ", "a file is in the place of a directory"},
		{"--mode keygen --keys half", 1, "--keys half: half/tls.key exists without tls.crt", "restore tls.crt from a copy, or add --host NAME"},
		{"--mode keygen --keys otherhalf --host 127.0.0.1", 1, "--keys otherhalf: otherhalf/tls.crt exists without tls.key", "restore tls.key from a copy, or delete otherhalf/tls.crt"},
		{"--mode keygen --keys keys --host 127.0.0.1 --host other.example", 1, "--keys keys: keys/tls.crt is not for the host other.example: it is for 127.0.0.1", "move keys/tls.crt away (tls.key stays, so tokens keep their pin), and run keygen again with all --host names"},
		{"--mode keygen --keys badcrt --host 127.0.0.1", 1, "--keys badcrt: badcrt/tls.crt: no certificate", "restore the file from a copy"},
		{"--mode keygen --keys none --rotate token", 1, "--keys none: open none/token.key", "correct --keys (a relative path begins at DIR"},
		{"--mode keygen --keys bad --rotate token", 1, "bad/token.key: line 1", "want the base64 of 32 bytes"},
		{"--mode keygen --keys new --host https://hub:9003", 2, `--host: host "https://hub:9003"`, "want a DNS name or an IP address"},

		// Addresses and directories.
		{keyedServer + "--listen " + ln.Addr().String(), 1, "--listen " + ln.Addr().String() + ": address already in use", "choose another port"},
		{keyedServer + "--listen-internal " + ln.Addr().String(), 1, "--listen-internal " + ln.Addr().String() + ": address already in use", "choose another port"},
		{keyedServer + "--listen-cluster " + ln.Addr().String(), 1, "--listen-cluster " + ln.Addr().String() + ": address already in use", "choose another port"},
		{keyedServer + "--listen-cluster " + udp.LocalAddr().String(), 1, "--listen-cluster " + udp.LocalAddr().String() + ": address already in use", "choose another port"},
		{keyedServer + "--listen 192.0.2.1:9003", 1, "--listen 192.0.2.1:9003: cannot assign requested address", "use an address of this host"},
		{pusher + "--spool-dir s1 --listen " + ln.Addr().String(), 1, "--listen " + ln.Addr().String() + ": address already in use", "choose another port"},
		{keyedServer + "--storage-dir used-storage", 1, "--storage-dir DIR/used-storage: directory DIR/used-storage is in use by another process", "stop that process, or use another directory"},
		{pusher + "--spool-dir used-spool", 1, "--spool-dir used-spool: opening spool: directory DIR/used-spool is in use by another process", "stop that process, or use another directory"},
		{keyedServer + "--storage-dir file", 1, "--storage-dir DIR/file: ", "move the file away"},
		{keyedServer + "--storage-dir file/below", 1, "--storage-dir DIR/file/below: ", "move the file away"},
		{pusher + "--spool-dir file", 1, "--spool-dir file: ", "move the file away"},
		{keyedServer + "--storage-dir /proc/none", 1, "--storage-dir /proc/none: ", "correct the path"},
		{keyedServer + "--storage-dir open", 1, "every user can write to the directory DIR/open", "chmod -R o-w DIR/open"},
		{pusher + "--spool-dir open", 1, "every user can write to the directory DIR/open", "chmod -R o-w DIR/open"},
	} {
		status, stdout, stderr := runMode(t, strings.Fields(row.args)...)
		t.Logf("telemeter %s\nexit %d: %s", row.args, status, stderr)
		if status != row.status || stdout != "" {
			t.Errorf("telemeter %s: exit status %d, want %d; stdout %q; stderr:\n%s", row.args, status, row.status, stdout, stderr)
		}
		for _, text := range []string{row.want, row.advice} {
			if text = strings.ReplaceAll(text, "DIR/", dir+"/"); strings.HasSuffix(text, " DIR") && strings.Contains(text, "begins at") {
				text = strings.TrimSuffix(text, "DIR") + dir
			}
			if text == "" || !strings.Contains(stderr, text) {
				t.Errorf("telemeter %s: the message has no %q:\n%s", row.args, text, stderr)
			}
		}
		if strings.Contains(stderr, "secret@") {
			t.Errorf("telemeter %s: the message contains a password:\n%s", row.args, stderr)
		}
	}
}

// A URL of --to that cannot be used causes one message, which does not say that --to is missing.
func TestFaultyLoadURL(t *testing.T) {
	if _, _, stderr := runMode(t, "--mode", "load", "--keys", "keys", "--to", "127.0.0.1:39100"); strings.Contains(stderr, "missing") {
		t.Error(stderr)
	}
}

// A misspelled flag that a mode requires causes one message, which does not say that the flag is
// missing. An unknown flag that is no misspelling of it causes both messages.
func TestMisspelledRequiredFlag(t *testing.T) {
	for args, want := range map[string]string{
		"--mode client --tokenfile x":    "unknown flag --tokenfile: did you mean --token-file?",
		"--mode server --kyes x":         "unknown flag --kyes: did you mean --keys?",
		"--mode token --idd x":           "unknown flag --idd: did you mean --id?",
		"--mode client --spool-dirr x":   "--token-file FILE is missing",
		"--mode server --storage-dirr x": "--keys DIR is missing",
	} {
		status, _, stderr := runMode(t, strings.Fields(args)...)
		if isMissing := strings.Contains(stderr, "is missing"); status != exitUsage || !strings.Contains(stderr, want) || isMissing != strings.Contains(want, "is missing") {
			t.Errorf("telemeter %s: exit status %d, want %d and %q:\n%s", args, status, exitUsage, want, stderr)
		}
	}
}

// The habits of other programs work: they print the version, the usage text or the help of a mode,
// and the exit status is 0.
func TestHabits(t *testing.T) {
	const versionText, usageText = " (revision ", "Usage: telemeter --mode MODE [flags]"
	for args, want := range map[string]string{
		"--version": versionText, "-version": versionText, "-v": versionText, "version": versionText, "--mode version": versionText, "--mode server --version": versionText,
		"--help": usageText, "-help": usageText, "-h": usageText, "help": usageText, "help me": usageText,
		"--mode server --help": "telemeter --mode server: ", "help server": "telemeter --mode server: ", "help --mode client": "telemeter --mode client: ",
		"client --help": "telemeter --mode client: ", "keygen -h": "telemeter --mode keygen: ", "--token --help": "telemeter --mode token: ",
		"--mode token help": "telemeter --mode token: ", "-mode=token -h": "telemeter --mode token: ",
	} {
		status, stdout, stderr := runMode(t, strings.Fields(args)...)
		if status != exitOK || !strings.Contains(stdout, want) || stderr != "" {
			t.Errorf("telemeter %s: exit status %d, want 0 and %q; stdout %q; stderr %q", args, status, want, stdout, stderr)
		}
	}
}

// With --log-format json, each line on stderr is a JSON object, also the error that ends telemeter.
func TestLogFormatJSON(t *testing.T) {
	dir := t.TempDir()
	writeIn(t, dir, "salt", "0123456789abcdef")
	mustChmod(t, filepath.Join(dir, "salt"), 0o644)
	status, _, stderr := runMode(t, "--mode", "client", "--dry-run", "--from", "http://127.0.0.1:1", "--log-format", "json",
		"--anonymize-labels", "a", "--anonymize-salt-file", filepath.Join(dir, "salt"))
	var levels []string
	for line := range strings.Lines(stderr) {
		var fields struct{ Level, Msg, Err string }
		if err := json.Unmarshal([]byte(line), &fields); err != nil || fields.Msg == "" {
			t.Errorf("the line is not in JSON: %s", line)
		}
		levels = append(levels, fields.Level)
	}
	if status != exitFailure || len(levels) < 2 || levels[0] != "WARN" || levels[len(levels)-1] != "ERROR" {
		t.Errorf("exit status %d, want a warning of the salt file and the error of the scrape:\n%s", status, stderr)
	}
}

// Addresses and durations in a JSON log are texts, as in a text log.
func TestLogFormatJSONValues(t *testing.T) {
	var log logBuffer
	c := newCommand("server", nil, nil, &log)
	c.logsJSON = true
	c.logger(slog.LevelInfo).Info("m", "address", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 9}, "took", 3*time.Millisecond, "n", 7, "err", errors.New("why"))
	if got := log.String(); !strings.HasSuffix(got, `,"level":"INFO","msg":"m","address":"127.0.0.1:9","took":"3ms","n":7,"err":"why"}`+"\n") || !strings.HasPrefix(got, `{"time":"2`) {
		t.Errorf("the log is %s", got)
	}
}
