package main

// A driver of a headless Chromium for tests of the status pages. It speaks the DevTools protocol over
// two pipes: JSON messages that end with a NUL byte. It records what a page must never do: open a
// dialog, write an error to the console, violate its Content-Security-Policy, or send a request to
// anything but the servers of the test. A test without Chromium on PATH is skipped.

import (
	"bufio"
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// browserLimit is how long an answer of Chromium, and each condition that a test waits for, may take.
const browserLimit = time.Minute

// browser is a Chromium with one tab.
type browser struct {
	t       *testing.T
	to      io.Writer
	session string   // ID of the DevTools session of the tab
	allowed []string // beginnings of the addresses that the tab may request

	mu       sync.Mutex // guards the fields below, and writes to the field to
	id       int        // of the newest call
	waiting  map[int]chan browserMessage
	faults   []string // what the page did and must not do
	requests []string // addresses that the page requested
}

// browserMessage is an answer, if it has an ID, or else an event.
type browserMessage struct {
	ID     int             `json:"id"`
	Method string          `json:"method"`
	Params json.RawMessage `json:"params"`
	Result json.RawMessage `json:"result"`
	Error  *struct{ Message string }
}

// startBrowser starts Chromium with an empty tab that may request only addresses that begin with one
// of allowed. At the end of the test, it ends all processes of Chromium, and fails the test if the
// page had faults.
func startBrowser(t *testing.T, allowed ...string) *browser {
	t.Helper()
	skipProcesses(t)
	program := ""
	for _, name := range []string{"chromium", "chromium-browser", "google-chrome"} {
		if path, err := exec.LookPath(name); err == nil {
			program = cmp.Or(program, path)
		}
	}
	if program == "" {
		t.Skipf("left out: %s needs chromium, chromium-browser or google-chrome, which are missing", t.Name())
	}
	b := &browser{t: t, allowed: append(allowed, "data:,"), waiting: map[int]chan browserMessage{}}
	home := filepath.Join(t.TempDir(), "home")
	commands, to := browserPipe(t)
	from, answers := browserPipe(t)
	cmd := exec.Command(program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-breakpad",
		"--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run", "--no-default-browser-check",
		"--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--user-data-dir="+home, "--window-size=1280,800", "--remote-debugging-pipe", "about:blank")
	cmd.Env = append(os.Environ(), "HOME="+home, "XDG_CONFIG_HOME="+home, "XDG_CACHE_HOME="+home)
	cmd.ExtraFiles = []*os.File{commands, answers} // the descriptors 3 and 4
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	var said logBuffer
	cmd.Stdout, cmd.Stderr = &said, &said
	cmd.WaitDelay = browserLimit
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	commands.Close()
	answers.Close()
	b.to = to
	read := make(chan struct{})
	go func() { b.read(from); close(read) }()
	t.Cleanup(func() {
		b.mu.Lock()
		faults := b.faults
		b.mu.Unlock()
		for _, fault := range faults {
			t.Error(fault)
		}
		// All processes of Chromium are in one process group. The profile is removed here and not by
		// t.TempDir, because a process that is about to end may still write to it.
		syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		cmd.Wait()
		from.Close()
		<-read
		eventually(t, "the profile of Chromium is removed", func() bool { return os.RemoveAll(home) == nil })
		if t.Failed() {
			t.Logf("Chromium said:\n%s", said.String())
		}
	})
	var target struct{ TargetID string }
	b.call("Target.createTarget", map[string]any{"url": "about:blank"}, &target)
	var attached struct{ SessionID string }
	b.call("Target.attachToTarget", map[string]any{"targetId": target.TargetID, "flatten": true}, &attached)
	b.session = attached.SessionID
	for _, domain := range []string{"Page", "Runtime", "Log", "Network", "Accessibility"} {
		b.call(domain+".enable", nil, nil)
	}
	// A refresh at an interval would come between two steps of a test on a slow machine.
	b.call("Page.addScriptToEvaluateOnNewDocument", map[string]any{"source": "window.setInterval = (f, interval) => { window.refreshInterval = interval; }"}, nil)
	return b
}

func browserPipe(t *testing.T) (r, w *os.File) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close(); w.Close() })
	return r, w
}

// send sends a command. Its answer goes to the returned channel.
func (b *browser) send(method string, params any) (answer chan browserMessage, err error) {
	if params == nil {
		params = struct{}{}
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.id++
	message, err := json.Marshal(struct {
		ID      int    `json:"id"`
		Method  string `json:"method"`
		Params  any    `json:"params"`
		Session string `json:"sessionId,omitempty"`
	}{b.id, method, params, b.session})
	if err != nil {
		return nil, err
	}
	answer = make(chan browserMessage, 1)
	b.waiting[b.id] = answer
	_, err = b.to.Write(append(message, 0))
	return answer, err
}

// try sends a command and decodes its result into result, unless result is nil.
func (b *browser) try(method string, params, result any) error {
	answer, err := b.send(method, params)
	if err != nil {
		return err
	}
	select {
	case m := <-answer:
		switch {
		case m.Error != nil:
			return fmt.Errorf("%s: %s", method, m.Error.Message)
		case result != nil:
			return json.Unmarshal(m.Result, result)
		}
		return nil
	case <-time.After(browserLimit):
		return fmt.Errorf("%s: no answer within %v", method, browserLimit)
	}
}

// call does the same as try, but fails the test if there is an error.
func (b *browser) call(method string, params, result any) {
	b.t.Helper()
	if err := b.try(method, params, result); err != nil {
		b.t.Fatal(err)
	}
}

// read takes the messages of Chromium until the pipe ends.
func (b *browser) read(from io.Reader) {
	for in := bufio.NewReader(from); ; {
		text, err := in.ReadBytes(0)
		if err != nil {
			return
		}
		var m browserMessage
		if err := json.Unmarshal(text[:len(text)-1], &m); err != nil {
			b.fault("Chromium sent %.200q: %v", text, err)
			continue
		}
		if m.ID == 0 {
			b.event(m)
			continue
		}
		b.mu.Lock()
		answer := b.waiting[m.ID]
		delete(b.waiting, m.ID)
		b.mu.Unlock()
		answer <- m
	}
}

// event records a fault if an event shows one. A request that fails because its server is down is no
// fault.
func (b *browser) event(m browserMessage) {
	var p struct {
		Message          string // of a dialog
		Entry            struct{ Source, Level, Text string }
		Request          struct{ URL string }
		ExceptionDetails json.RawMessage
	}
	json.Unmarshal(m.Params, &p) // an error means that an event without use here has other types of these fields
	switch m.Method {
	case "Page.javascriptDialogOpening":
		b.fault("the page opens a dialog: %s", p.Message)
		if _, err := b.send("Page.handleJavaScriptDialog", map[string]any{"accept": true}); err != nil {
			b.fault("closing a dialog: %v", err)
		}
	case "Runtime.consoleAPICalled":
		b.fault("the page writes to the console: %.500s", m.Params)
	case "Runtime.exceptionThrown":
		b.fault("a script throws: %.500s", p.ExceptionDetails)
	case "Log.entryAdded":
		if p.Entry.Source != "network" {
			b.fault("console: %s: %s: %s", p.Entry.Source, p.Entry.Level, p.Entry.Text)
		}
	case "Network.requestWillBeSent":
		b.mu.Lock()
		b.requests = append(b.requests, p.Request.URL)
		b.mu.Unlock()
		for _, prefix := range b.allowed {
			if strings.HasPrefix(p.Request.URL, prefix) {
				return
			}
		}
		b.fault("the page requests %s", p.Request.URL)
	}
}

func (b *browser) fault(format string, args ...any) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.faults = append(b.faults, fmt.Sprintf(format, args...))
}

// open loads a page, and waits until it is complete.
func (b *browser) open(url string) {
	b.t.Helper()
	var loaded struct{ ErrorText string }
	b.call("Page.navigate", map[string]any{"url": url}, &loaded)
	if loaded.ErrorText != "" {
		b.t.Fatalf("loading %s: %s", url, loaded.ErrorText)
	}
	b.until(fmt.Sprintf("location.href === %q", url))
}

// evaluate returns the value of an expression in JavaScript as text: that of a text itself, and of
// everything else as JSON. The error is not nil if the expression throws, or while the tab changes to
// another page.
func (b *browser) evaluate(expression string) (string, error) {
	var answer struct {
		Result           struct{ Value json.RawMessage }
		ExceptionDetails *struct {
			Exception struct{ Description string }
		}
	}
	if err := b.try("Runtime.evaluate", map[string]any{"expression": expression, "returnByValue": true, "awaitPromise": true}, &answer); err != nil {
		return "", err
	}
	if answer.ExceptionDetails != nil {
		return "", fmt.Errorf("%s: %s", expression, answer.ExceptionDetails.Exception.Description)
	}
	var text string
	if json.Unmarshal(answer.Result.Value, &text) == nil {
		return text, nil
	}
	return string(answer.Result.Value), nil
}

// is checks that an expression in JavaScript has a value, once the page is complete.
func (b *browser) is(want, expression string) {
	b.t.Helper()
	b.until("true")
	if got, err := b.evaluate(expression); err != nil || got != want {
		b.t.Errorf("%s is %q, %v; want %q", expression, got, err, want)
	}
}

// until waits until the page is complete and an expression in JavaScript is true.
func (b *browser) until(expression string) {
	b.t.Helper()
	var got string
	var err error
	for deadline := time.Now().Add(browserLimit); ; time.Sleep(10 * time.Millisecond) {
		if got, err = b.evaluate("document.readyState === 'complete' && (" + expression + ")"); err == nil && got == "true" {
			return
		}
		if time.Now().After(deadline) {
			page, _ := b.evaluate("location.href + '\\n' + document.body.innerText.slice(0, 2000)")
			b.t.Fatalf("not within %v: %s; it is %q, %v, on the page %s", browserLimit, expression, got, err, page)
		}
	}
}

// do runs statements in JavaScript.
func (b *browser) do(statements string) {
	b.t.Helper()
	if _, err := b.evaluate(statements + "; null"); err != nil {
		b.t.Fatal(err)
	}
}

// click clicks with the mouse on the middle of the element that a CSS selector selects first.
func (b *browser) click(selector string) {
	b.t.Helper()
	var at struct{ X, Y float64 }
	text, err := b.evaluate(fmt.Sprintf(`(() => {
		const e = document.querySelector(%q);
		e.scrollIntoView({ block: "center", inline: "center" });
		const r = e.getBoundingClientRect();
		return { x: r.x + r.width / 2, y: r.y + r.height / 2 };
	})()`, selector))
	if err == nil {
		err = json.Unmarshal([]byte(text), &at)
	}
	if err != nil {
		b.t.Fatalf("clicking %s: %v", selector, err)
	}
	for _, kind := range []string{"mousePressed", "mouseReleased"} {
		b.call("Input.dispatchMouseEvent", map[string]any{"type": kind, "x": at.X, "y": at.Y, "button": "left", "clickCount": 1}, nil)
	}
}

// press presses a key: Enter or Tab.
func (b *browser) press(key string) {
	b.t.Helper()
	code, text := 9, ""
	if key == "Enter" {
		code, text = 13, "\r"
	}
	b.call("Input.dispatchKeyEvent", map[string]any{"type": "keyDown", "key": key, "code": key, "windowsVirtualKeyCode": code, "text": text}, nil)
	b.call("Input.dispatchKeyEvent", map[string]any{"type": "keyUp", "key": key, "code": key, "windowsVirtualKeyCode": code}, nil)
}

// typeText types a text into an input, in place of the text that it has.
func (b *browser) typeText(selector, text string) {
	b.t.Helper()
	b.click(selector)
	b.do(fmt.Sprintf("document.querySelector(%q).select()", selector))
	b.call("Input.insertText", map[string]any{"text": text}, nil)
}

// requested returns the addresses that the page has requested.
func (b *browser) requested() []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.Clone(b.requests)
}
