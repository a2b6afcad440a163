package main

// The file checks the architecture of the flat package. Every file belongs to a family, which is
// the part of the file's name before the first underscore: store.go and store_recovery.go belong to
// the family store. A family exports its upper-case names to other families; its lower-case names
// are private to it. TestFamilies checks that the package follows the rules in this file.
// TestFamiliesChecker breaks each rule in a small package, and checks that the fault is reported.

import (
	"encoding/json"
	"errors"
	"fmt"
	"go/ast"
	"go/importer"
	"go/parser"
	"go/token"
	"go/types"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"unicode/utf8"
)

// fileFamily is a family of files, and the families whose upper-case names it may use.
type fileFamily struct {
	name   string
	mayUse []string
}

// families has all families from the top level to the bottom. A family may use only families that
// are below it, and only those in mayUse. It need not use all of them.
var families = []fileFamily{
	{"main", []string{"client", "server", "hashring", "gossip", "store", "auth", "sanitize", "sample", "push", "log", "http", "metrics", "wire"}},
	// The client uses wire because the records of its spool are untrusted bytes.
	{"client", []string{"auth", "sanitize", "sample", "log", "push", "http", "metrics", "wire"}},
	{"server", []string{"hashring", "gossip", "store", "auth", "sanitize", "sample", "push", "http", "metrics", "wire"}},
	{"hashring", []string{"gossip", "log"}},
	{"gossip", []string{"auth", "wire", "metrics"}},
	{"store", []string{"sample", "log", "push", "wire", "metrics"}},
	{"auth", []string{"wire"}},
	{"sanitize", []string{"sample"}},
	{"sample", []string{"wire"}},
	{"push", []string{"wire"}},
	{"log", []string{"wire"}},
	{"http", []string{"metrics"}},
	{"metrics", nil},
	{"wire", nil},
}

// pureFiles has the files that must not use the network, the disk or a clock. They implement state
// machines and formats, which get time, randomness and bytes from their callers, so that tests can
// run them in virtual time.
var pureFiles = []string{
	"gossip_swim.go", "gossip_probe.go", "gossip_receive.go", "gossip_send.go", "gossip_session.go", "gossip_request.go", "gossip_table.go", "gossip_packet.go", "gossip_record.go",
	"hashring.go", "hashring_claim.go",
	"store_samples.go", "store_append.go", "store_read.go", "store_recovery_samples.go", "store_series.go", "store_batch.go", "store_record.go", "store_spools.go",
	"client_failover.go", "client_spool_index.go", "client_spool_record.go", "client_spool_meta.go",
	"push.go", "push_ranges.go", "push_wallclock.go", "push_source_clock.go",
	"sample.go", "sample_line.go", "sample_parser.go", "sample_text.go", "sample_proto.go", "sample_exposition.go",
	"sanitize.go", "sanitize_selector.go", "auth_replay.go", "wire.go",
}

// upcalls has the function-typed fields through which a family calls a family above it, as
// "family.Field". A field with the name Now is a clock and needs no entry.
var upcalls = []string{
	"client.Boot",       // reads a clock that runs on while the machine sleeps
	"client.NewCleaner", // returns a cleaner with the salt that was loaded last
	"gossip.Notify",     // logs events
	"hashring.OnError",  // counts errors
	"hashring.OnView",   // gives the forwarder a new view of the ring
	"store.OnError",     // logs and counts errors
	"store.OnWarning",   // logs warnings
	"store.Owned",       // reports whether this server owns a site
	"store.NowInterval", // returns the range of the present time by the checked wall clock
}

// allowedModules has the modules that the package may import.
var allowedModules = []string{
	"github.com/prometheus/common", "github.com/prometheus/client_model", "golang.org/x/crypto",
}

const (
	maxFileLines           = 700  // of a file that is not a test
	minOpening, maxOpening = 2, 8 // lines of a file's opening comment
)

// The package and the files below its directory break none of the rules that checkFamilies checks.
func TestFamilies(t *testing.T) {
	tree := map[string]string{}
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		if err == nil && path == ".git" && d.IsDir() {
			return fs.SkipDir
		}
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		text, err := os.ReadFile(path)
		tree[filepath.ToSlash(path)] = string(text)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	fset, imp := familyImporter(t)
	for _, problem := range checkFamilies(tree, pureFiles, upcalls, fset, imp) {
		t.Error(problem)
	}
	for i, f := range families {
		for _, name := range f.mayUse {
			if familyLevel(name) <= i {
				t.Errorf("the family %s may use %s, which is not a family below it", f.name, name)
			}
		}
	}
}

// familyImporter returns an importer of the package's dependencies, which reads the export data
// that the compiler has written, and the file set that goes with the importer.
func familyImporter(t *testing.T) (*token.FileSet, types.Importer) {
	t.Helper()
	list := exec.Command("go", "list", "-deps", "-export", "-json=ImportPath,Export", ".")
	list.Stderr = os.Stderr
	out, err := list.Output()
	if err != nil {
		t.Fatalf("listing dependencies: %v", err)
	}
	exports := map[string]string{}
	for dec := json.NewDecoder(strings.NewReader(string(out))); dec.More(); {
		var p struct{ ImportPath, Export string }
		if err := dec.Decode(&p); err != nil {
			t.Fatal(err)
		}
		exports[p.ImportPath] = p.Export
	}
	fset := token.NewFileSet()
	return fset, importer.ForCompiler(fset, "gc", func(path string) (io.ReadCloser, error) {
		if exports[path] == "" {
			return nil, errors.New("no export data")
		}
		return os.Open(exports[path])
	})
}

// familyCheck is one run of checkFamilies. set has the upcalls that some file sets.
type familyCheck struct {
	fset     *token.FileSet
	pkg      *types.Package
	info     *types.Info
	pure     []string
	upcalls  []string
	set      map[string]bool
	problems []string
}

// checkFamilies returns the faults in a tree of files, each as "file:line: name: fault", sorted.
// tree maps paths to contents. pure and upcalls are lists like pureFiles and the variable upcalls.
func checkFamilies(tree map[string]string, pure, upcalls []string, fset *token.FileSet, imp types.Importer) []string {
	c := &familyCheck{fset: fset, pure: pure, upcalls: upcalls, set: map[string]bool{}, info: &types.Info{
		Types: map[ast.Expr]types.TypeAndValue{}, Uses: map[*ast.Ident]types.Object{},
		Selections: map[*ast.SelectorExpr]*types.Selection{},
	}}
	var files []*ast.File
	for _, path := range slices.Sorted(maps.Keys(tree)) {
		c.checkText(path, tree[path])
		c.checkName(path, tree)
		if strings.Contains(path, "/") || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			continue
		}
		f, err := parser.ParseFile(fset, path, tree[path], parser.ParseComments|parser.SkipObjectResolution)
		if err != nil {
			return append(c.problems, err.Error())
		}
		files = append(files, f)
		c.checkFile(path, f)
	}
	var err error
	if c.pkg, err = (&types.Config{Importer: imp}).Check("main", fset, files, c.info); err != nil {
		return append(c.problems, err.Error())
	}
	for id, obj := range c.info.Uses {
		c.checkUse(id.Pos(), obj)
		c.checkClock(id, obj)
	}
	for _, name := range c.pkg.Scope().Names() {
		if v, ok := c.pkg.Scope().Lookup(name).(*types.Var); ok {
			if what := sharedState(v.Type(), map[types.Type]bool{}); what != "" {
				c.report(v.Pos(), name, "package variable contains a "+what)
			}
		}
	}
	for _, f := range files {
		ast.Inspect(f, c.checkNode)
	}
	for _, name := range upcalls {
		if !c.set[name] {
			c.problems = append(c.problems, "upcalls: "+name+": set by no other family")
		}
	}
	slices.Sort(c.problems)
	return c.problems
}

// line returns the line of pos in its file.
func (c *familyCheck) line(pos token.Pos) int { return c.fset.Position(pos).Line }

// report adds a fault of name at pos.
func (c *familyCheck) report(pos token.Pos, name, what string) {
	p := c.fset.Position(pos)
	c.problems = append(c.problems, fmt.Sprintf("%s:%d: %s: %s", p.Filename, p.Line, name, what))
}

var (
	impureImport = regexp.MustCompile(`^(net|net/http.*|os|os/.*|syscall|io/ioutil|crypto/rand|crypto/tls)$`)
	leftover     = regexp.MustCompile(`\b(TO` + `DO|FIX` + `ME)\b`) // split, so that this file does not match
	moduleLine   = regexp.MustCompile(`^\s*(?:require\s+)?(\S+)\s+v\d\S*\s*(// indirect)?`)
)

// checkText checks a text file for marks of unfinished work, and go.mod for modules that are not
// allowed. Binary files pass.
func (c *familyCheck) checkText(path, text string) {
	if !utf8.ValidString(text) || strings.Contains(text, "\x00") {
		return
	}
	for i, line := range strings.Split(text, "\n") {
		if word := leftover.FindString(line); word != "" {
			c.problems = append(c.problems, fmt.Sprintf("%s:%d: %s: finish it or leave it out", path, i+1, word))
		}
		m := moduleLine.FindStringSubmatch(line)
		if path == "go.mod" && m != nil && m[2] == "" && !slices.Contains(allowedModules, m[1]) {
			c.problems = append(c.problems, fmt.Sprintf("go.mod:%d: %s: module not allowed", i+1, m[1]))
		}
	}
}

// checkName checks that the name of a test file begins with the name of the file that it tests. The
// names of rigs (rig_*) and of tests that start many processes (e2e_*) are free.
func (c *familyCheck) checkName(path string, tree map[string]string) {
	name, ok := strings.CutSuffix(path, "_test.go")
	if !ok || strings.Contains(path, "/") || strings.HasPrefix(name, "rig_") || strings.HasPrefix(name, "e2e_") {
		return
	}
	for part := name; part != ""; part = part[:max(0, strings.LastIndexByte(part, '_'))] {
		if _, ok := tree[part+".go"]; ok {
			return
		}
	}
	c.problems = append(c.problems, path+":1: "+path+": name does not begin with the name of a tested file")
}

// checkFile checks the rules that need no type information: the family, comments, length, init
// functions and imports of a file.
func (c *familyCheck) checkFile(path string, f *ast.File) {
	if familyLevel(familyOf(path)) < 0 {
		c.report(f.Package, path, "file belongs to no family")
	}
	if path != "main.go" && len(f.Comments) > 0 && f.Comments[0].Pos() < f.Package {
		c.report(f.Package, path, "comment above the package clause: only main.go has the package comment")
	}
	if lines := c.line(f.FileEnd); lines > maxFileLines {
		c.report(f.FileEnd, path, fmt.Sprintf("%d lines, the limit is %d", lines, maxFileLines))
	}
	// A comment below the package clause is the opening comment, unless it belongs to the first
	// declaration because no blank line separates them.
	first := f.FileEnd
	if len(f.Decls) > 0 {
		first = f.Decls[0].Pos()
	}
	if !slices.ContainsFunc(f.Comments, func(g *ast.CommentGroup) bool {
		lines := c.line(g.End()) - c.line(g.Pos()) + 1
		opening := f.Package < g.Pos() && g.Pos() < first && (len(f.Decls) == 0 || c.line(g.End())+1 < c.line(first))
		return (opening || path == "main.go") && minOpening <= lines && lines <= maxOpening
	}) {
		c.report(f.Package, path, fmt.Sprintf("no opening comment of %d to %d lines", minOpening, maxOpening))
	}
	for _, d := range f.Decls {
		if d, ok := d.(*ast.FuncDecl); ok && d.Recv == nil && d.Name.Name == "init" {
			c.report(d.Pos(), "init", "init function: callers must start all work")
		}
	}
	// Checking go.mod is not enough, because a file can also import an indirect module.
	for _, spec := range f.Imports {
		imported, _ := strconv.Unquote(spec.Path.Value)
		if slices.Contains(c.pure, path) && impureImport.MatchString(imported) {
			c.report(spec.Pos(), imported, "imported by a file in pureFiles")
		}
		host, _, _ := strings.Cut(imported, "/")
		if strings.Contains(host, ".") && !slices.ContainsFunc(allowedModules, func(m string) bool { return strings.HasPrefix(imported, m+"/") }) {
			c.report(spec.Pos(), imported, "module not allowed")
		}
	}
}

// checkUse checks the use at pos of obj, if obj is declared in a file of another family. Then obj
// is always a package-level name, a field or a method.
func (c *familyCheck) checkUse(pos token.Pos, obj types.Object) {
	from, to := c.fset.Position(pos).Filename, c.fset.Position(obj.Pos()).Filename
	if obj.Pkg() != c.pkg || familyOf(from) == familyOf(to) {
		return
	}
	if !obj.Exported() {
		c.report(pos, obj.Name(), "private to the family of "+to)
	}
	if level := familyLevel(familyOf(from)); level >= 0 && !slices.Contains(families[level].mayUse, familyOf(to)) {
		c.report(pos, obj.Name(), fmt.Sprintf("declared in %s, which the family %s may not use", to, familyOf(from)))
	}
}

// checkClock reports the use of a clock in a file of c.pure.
func (c *familyCheck) checkClock(id *ast.Ident, obj types.Object) {
	file := c.fset.Position(id.Pos()).Filename
	if obj.Pkg() != nil && obj.Pkg().Path() == "time" && slices.Contains(c.pure, file) &&
		slices.Contains([]string{"Now", "Since", "Until", "Sleep", "After", "AfterFunc", "Tick", "NewTimer", "NewTicker"}, obj.Name()) {
		if f, ok := obj.(*types.Func); ok && f.Signature().Recv() == nil {
			c.report(id.Pos(), "time."+obj.Name(), "used by a file in pureFiles")
		}
	}
}

// checkUpcall reports that the code at pos sets obj, if obj is a function-typed field of another
// family. It does not report clocks (Now) and fields in c.upcalls, but records the latter in c.set.
func (c *familyCheck) checkUpcall(pos token.Pos, obj types.Object) {
	v, ok := obj.(*types.Var)
	if !ok || !v.IsField() || v.Pkg() != c.pkg {
		return
	}
	if _, ok := v.Type().Underlying().(*types.Signature); !ok {
		return
	}
	from, to := c.fset.Position(pos).Filename, c.fset.Position(v.Pos()).Filename
	if familyOf(from) == familyOf(to) || v.Name() == "Now" {
		return
	}
	name := familyOf(to) + "." + v.Name()
	c.set[name] = true
	if !slices.Contains(c.upcalls, name) {
		c.report(pos, v.Name(), "lets the family "+familyOf(to)+" call "+familyOf(from)+", but is not in upcalls")
	}
}

// familyOf returns the family of a file: the part of its name before the first underscore.
func familyOf(file string) string {
	family, _, _ := strings.Cut(strings.TrimSuffix(file, ".go"), "_")
	return family
}

// familyLevel returns the index of a family in families, or -1.
func familyLevel(name string) int {
	return slices.IndexFunc(families, func(f fileFamily) bool { return f.name == name })
}

// checkNode checks the syntax that c.info.Uses does not cover: fields in unkeyed struct literals,
// assignments to function-typed fields, and every way to change a package variable. It returns
// true, so that ast.Inspect visits the children.
func (c *familyCheck) checkNode(n ast.Node) bool {
	switch n := n.(type) {
	case *ast.CompositeLit:
		typ := c.info.TypeOf(n).Underlying()
		if p, ok := typ.(*types.Pointer); ok { // the inner literal in []*T{{…}}
			typ = p.Elem().Underlying()
		}
		if s, ok := typ.(*types.Struct); ok {
			for i, elt := range n.Elts {
				kv, keyed := elt.(*ast.KeyValueExpr)
				if !keyed {
					c.checkUse(elt.Pos(), s.Field(i))
					c.checkUpcall(elt.Pos(), s.Field(i))
				} else if id, ok := kv.Key.(*ast.Ident); ok && c.info.Uses[id] != nil {
					c.checkUpcall(elt.Pos(), c.info.Uses[id])
				}
			}
		}
	case *ast.AssignStmt:
		if n.Tok != token.DEFINE {
			for _, lhs := range n.Lhs {
				c.checkChange(lhs, "assigned")
				if sel, ok := ast.Unparen(lhs).(*ast.SelectorExpr); ok && c.info.Uses[sel.Sel] != nil {
					c.checkUpcall(lhs.Pos(), c.info.Uses[sel.Sel])
				}
			}
		}
	case *ast.RangeStmt:
		if n.Tok == token.ASSIGN {
			c.checkChange(n.Key, "assigned")
			c.checkChange(n.Value, "assigned")
		}
	case *ast.IncDecStmt:
		c.checkChange(n.X, "assigned")
	case *ast.UnaryExpr:
		if n.Op == token.AND {
			c.checkChange(n.X, "used by address")
		}
	case *ast.SelectorExpr:
		// Calling a pointer method on a variable takes the variable's address implicitly.
		if sel := c.info.Selections[n]; sel != nil && sel.Kind() == types.MethodVal && !sel.Indirect() {
			if _, ok := sel.Obj().(*types.Func).Signature().Recv().Type().(*types.Pointer); ok {
				c.checkChange(n.X, "used by address in a call of "+n.Sel.Name)
			}
		}
	case *ast.CallExpr:
		id, _ := ast.Unparen(n.Fun).(*ast.Ident)
		if b, ok := c.info.Uses[id].(*types.Builtin); ok && slices.Contains([]string{"clear", "copy", "delete"}, b.Name()) {
			c.checkChange(n.Args[0], "changed by "+b.Name())
		}
	}
	return true
}

// checkChange reports that e is changed, if e is a package variable or a part of one. how says in
// which way.
func (c *familyCheck) checkChange(e ast.Expr, how string) {
	switch e := e.(type) {
	case *ast.ParenExpr:
		c.checkChange(e.X, how)
	case *ast.IndexExpr:
		c.checkChange(e.X, how)
	case *ast.SliceExpr:
		c.checkChange(e.X, how)
	case *ast.StarExpr:
		c.checkChange(e.X, how)
	case *ast.SelectorExpr:
		c.checkChange(e.X, how)
	case *ast.Ident:
		if v, ok := c.info.Uses[e].(*types.Var); ok && v.Parent() == c.pkg.Scope() {
			c.report(e.Pos(), e.Name, "package variable is "+how)
		}
	}
}

// sharedState returns the name of a part of t, at any depth, that makes every variable of type t
// mutable or shared: a lock, an atomic, a channel or a function. It returns "" if there is none.
// Interfaces pass, because error sentinels are interfaces. seen has the types that were visited.
func sharedState(t types.Type, seen map[types.Type]bool) string {
	if seen[t] {
		return ""
	}
	seen[t] = true
	if n, ok := types.Unalias(t).(*types.Named); ok && n.Obj().Pkg() != nil {
		if path := n.Obj().Pkg().Path(); path == "sync" || path == "sync/atomic" {
			return n.Obj().Pkg().Name() + "." + n.Obj().Name()
		}
	}
	var parts []types.Type
	switch u := t.Underlying().(type) {
	case *types.Chan:
		return "channel"
	case *types.Signature:
		return "function"
	case *types.Map:
		parts = []types.Type{u.Key(), u.Elem()}
	case interface{ Elem() types.Type }: // pointer, slice, array
		parts = []types.Type{u.Elem()}
	case *types.Struct:
		for f := range u.Fields() {
			parts = append(parts, f.Type())
		}
	}
	for _, part := range parts {
		if what := sharedState(part, seen); what != "" {
			return what
		}
	}
	return ""
}

// cleanTree is a package that breaks no rule, although several of its lines are close to a fault.
// Each case of TestFamiliesChecker adds text to one of its files.
var cleanTree = map[string]string{
	"go.mod": "module m\n\ngo 1.26\n\nrequire golang.org/x/crypto v0.1.0\n\nrequire (\n\tgithub.com/prometheus/common v0.72.1\n\ta.example/b v1.0.0 // indirect\n)\n",
	"main.go": "// one\n// two\n// three\npackage main\n\n" + `import "sync"
type app struct { sync.Mutex; log *Log }
func main() { a := app{log: NewLog()}; a.Lock(); (&Store{Log: a.log}).Put(); a.log.Len++; a.log.OnTorn = a.Lock }
`,
	"store.go": opening + `type Store struct { *Log; n int; hooks struct { now func() } }
func (s *Store) Put() { s.Append(); s.n++; x := []struct{ n int }{{1}}; x[0].n++; _ = size(x[0].n) }
func size(n int) int { return n }
`,
	"log.go": opening + `import ("errors"; "regexp")
var ErrTorn = errors.New("torn")
var (names = regexp.MustCompile("x"); table = [2]int{1, 2}; kinds = map[string][]int{"a": {1}})
type Log struct { Len int; off int64; Calls }
type Calls struct { OnTorn, OnDrop func(); Now func() int }
func NewLog() *Log { names := names; names = nil; _ = names; return &Log{1, 2, Calls{}} }
func (l *Log) Append() error { l.off += int64(table[0] + len(kinds["a"])); if names.MatchString("") { return nil }; return ErrTorn }
`,
	"sample.go":         opening + "import (_ \"net/netip\"; \"time\")\nfunc later(t time.Time) bool { return t.After(t) }\n",
	"log_test.go":       "package main\n\nvar mutable int\n\nfunc init() { mutable++ }\n",
	"log_crash_test.go": "package main\n",
	"rig_disk_test.go":  "package main\n",
	"e2e_start_test.go": "package main\n",
	"sub/x.go":          "package other\n",
	"binary":            "\x00TO" + "DO",
	"README.md":         "A todo list, mastodon" + "TO" + "DOS.\n",
}

// opening is the beginning of a file with an opening comment. Code after it starts on line 6.
const opening = "package main\n\n// one\n// two\n\n"

// checkFamilies reports every broken rule once, at the right line, and nothing else.
func TestFamiliesChecker(t *testing.T) {
	fset, imp := familyImporter(t)
	for _, c := range []struct {
		file, add string // add is appended to file
		want      string // the beginnings of all reported faults, separated by |
	}{
		{"log.go", "", ""},

		// Families and their levels.
		{"util.go", opening, "util.go:1: util.go: file belongs to no family"},
		{"store_clock.go", opening + "func f(s *Store) { s.n = size(s.n) }", ""},
		{"store_clock.go", opening + "var _ = NewLog()", ""},
		{"log.go", "var _ = Store{}", "log.go:13: Store: declared"},
		{"log.go", "func f(s *Store) { s.Put() }", "log.go:13: Store: declared|log.go:13: Put: declared"},
		{"auth.go", opening + "func f() { NewLog().Append() }", "auth.go:6: NewLog: declared|auth.go:6: Append: declared"},
		{"auth.go", opening + "type a struct { *Log }", "auth.go:6: Log: declared"},
		{"hashring.go", opening + "func f() { main() }", "hashring.go:6: main: private|hashring.go:6: main: declared"},

		// Lower-case names stay in their family.
		{"store.go", "func (s *Store) f() { _ = s.Log.off; _ = s.off }", "store.go:9: off: private|store.go:9: off: private"},
		{"store.go", "func f() { _ = Log{1, 2, Calls{}} }", "store.go:9: off: private"},
		{"store.go", "func f() { _ = []*Log{{Len: 1, off: 2}} }", "store.go:9: off: private"},
		{"store.go", "var _ = table", "store.go:9: table: private"},
		{"main.go", "func f() { size(1) }", "main.go:9: size: private"},
		{"log.go", "func (l *Log) close() {}", ""},
		{"main.go", "func f(c interface{ close() }) { c.close() }", ""},

		// Calls from a family to a family above it.
		{"log.go", "func f(c *Calls) { c.OnDrop = nil; _ = Calls{nil, nil, nil} }", ""},
		{"store.go", "func (s *Store) f() { s.hooks.now = nil; s.Now = nil; s.OnTorn = nil }", ""},
		{"store.go", "func (s *Store) f() { s.OnDrop = func() {} }", "store.go:9: OnDrop: lets the family log call store"},
		{"store.go", "var _ = &Calls{OnTorn: nil, OnDrop: nil}", "store.go:9: OnDrop: lets"},
		{"store.go", "func f() { _ = []Calls{{nil, nil, nil}} }", "store.go:9: OnDrop: lets"},

		// Pure files.
		{"sample.go", "func f() { _ = time.Now() }", "sample.go:8: time.Now: used by a file in pureFiles"},
		{"sample.go", "var f = 0; func g() { <-time.After(0) }", "sample.go:8: time.After: used"},
		{"sample_line.go", opening + "import _ \"os\"", "sample_line.go:6: os: imported by a file in pureFiles"},
		{"sample_line.go", opening + "import _ \"net/http\"", "sample_line.go:6: net/http: imported"},
		{"sample_disk.go", opening + "import _ \"os\"", ""},

		// Hidden or mutable package state.
		{"log.go", "func init() {}", "log.go:13: init"},
		{"log.go", "var x sync.Mutex", "log.go:13:7: undefined"},
		{"main.go", "var x struct { m map[int]*sync.Mutex }", "main.go:9: x: package variable contains a sync.Mutex"},
		{"log.go", "var x []chan int", "log.go:13: x: package variable contains a channel"},
		{"log.go", "var x = map[string]struct { f func() }{}", "log.go:13: x: package variable contains a function"},
		{"log.go", "func f() { table = [2]int{} }", "log.go:13: table"},
		{"log.go", "func f() { table[0] = 1 }", "log.go:13: table"},
		{"log.go", "func f() { table[1]++ }", "log.go:13: table"},
		{"log.go", "func f() { kinds[\"a\"][0] += 1 }", "log.go:13: kinds"},
		{"log.go", "func f() { _ = &(table) }", "log.go:13: table"},
		{"log.go", "func f() { for _, table[0] = range []int{1} { } }", "log.go:13: table"},
		{"log.go", "func f() { delete(kinds, \"a\"); copy(table[:], kinds[\"a\"]) }", "log.go:13: kinds|log.go:13: table"},
		{"log.go", "func f() { *names = regexp.Regexp{} }", "log.go:13: names"},
		{"log.go", "type n int; func (n *n) set() {}; var x n; func f() { x.set() }", "log.go:13: x"},

		// Modules.
		{"go.mod", "require a.example/c v1.2.3\n", "go.mod:11: a.example/c"},
		{"auth.go", opening + "import _ \"a.example/b\"\n", "auth.go:6: a.example/b|auth.go:6:10: could not import"},

		// The opening comment, the length of a file, and the names of test files.
		{"auth.go", "package main\n", "auth.go:1: auth.go: no opening"},
		{"auth.go", "package main\n\n// One\n// two.\n", ""},
		{"auth.go", "package main\n\n// Of\n// the\n// type.\ntype a int", "auth.go:1: auth.go: no opening"},
		{"auth.go", "package main\n\n// One.\n\ntype a int", "auth.go:1: auth.go: no opening"},
		{"auth.go", "package main\n\n" + strings.Repeat("// x\n", 9) + "\ntype a int", "auth.go:1: auth.go: no opening"},
		{"auth.go", "// one\n// two\npackage main\n", "auth.go:3: auth.go: comment above|auth.go:3: auth.go: no opening"},
		{"auth.go", "// one\n\n" + opening, "auth.go:3: auth.go: comment above"},
		{"log.go", strings.Repeat("\n", 688), ""},
		{"log.go", strings.Repeat("\n", 689), "log.go:701: log.go: 701 lines"},
		{"log_a_b_test.go", "package main\n", ""},
		{"logs_test.go", "package main\n", "logs_test.go:1: logs_test.go: name does not begin"},
		{"test/run.sh", "#!/bin/sh\n# FIX" + "ME: x\n", "test/run.sh:2: FIX" + "ME"},
	} {
		tree := maps.Clone(cleanTree)
		tree[c.file] += c.add
		got := checkFamilies(tree, []string{"sample.go", "sample_line.go"}, []string{"log.OnTorn"}, fset, imp)
		want := strings.FieldsFunc(c.want, func(r rune) bool { return r == '|' })
		for _, w := range want {
			i := slices.IndexFunc(got, func(g string) bool { return strings.HasPrefix(g, w) })
			if i < 0 {
				t.Errorf("%s with %q: the faults are %q, want %q", c.file, c.add, got, c.want)
				break
			}
			got = slices.Delete(got, i, i+1)
		}
		if len(got) > 0 {
			t.Errorf("%s with %q: unexpected faults %q", c.file, c.add, got)
		}
	}
	want := []string{"upcalls: log.Other: set by no other family"}
	if got := checkFamilies(cleanTree, nil, []string{"log.OnTorn", "log.Other"}, fset, imp); !slices.Equal(got, want) {
		t.Errorf("with an entry in upcalls that no file sets: the faults are %q, want %q", got, want)
	}
}
