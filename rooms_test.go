// rooms_test.go: the walls of a package that has none. Every file is a room:
// upper-case names are what it offers the others, lower-case ones belong to its
// family (store.go and store_recovery.go are one), and allowedRooms says which room
// may use which. TestRooms holds the tree to that and to the few rules that keep a
// room readable by itself; TestRoomsChecker proves that it would notice.

package main

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

// allowedRooms has a row for every file but tests: the files whose upper-case
// names it may use. A leaf uses none; main.go and the
// modes that it is divided into wire the rooms and may use all.
var allowedRooms = map[string][]string{
	"main.go":         nil,
	"mode_server.go":  nil,
	"mode_client.go":  nil,
	"mode_keys.go":    nil,
	"flags.go":        {"auth.go", "sanitize.go", "exposition.go"},
	"client.go":       {"deliver.go", "deliver_request.go", "spool.go", "spool_file.go", "spool_plan.go", "sanitize.go", "exposition.go", "decode.go", "compression.go", "http.go", "metrics.go"},
	"deliver.go":      {"client_clock.go", "spool.go", "spool_file.go", "spool_plan.go", "push_spool.go", "compression.go", "metrics.go"},
	"spool.go":        {"push_spool.go", "log.go"},
	"bootclock.go":    {},
	"federate.go":     {"site.go", "store.go", "scrape.go", "consumers.go", "cluster.go", "senders.go", "sanitize.go", "exposition.go", "http.go", "metrics.go"},
	"server.go":       {"federate.go", "authorize.go", "forward.go", "member.go", "senders.go", "site.go", "store.go", "cluster.go", "auth.go", "sanitize.go", "exposition.go", "decode.go", "compression.go", "http.go", "metrics.go", "push_spool.go", "consumers.go"},
	"push_spool.go":   {"wire.go"},
	"mode_cluster.go": nil,
	"forward.go":      {"hashring.go", "seal.go", "site.go", "store.go", "cluster.go", "auth.go", "exposition.go", "metrics.go"},
	"member.go":       {"gossip.go", "swim.go", "link.go", "members.go", "packet.go", "hashring.go", "forward.go", "site.go", "store.go", "log.go", "http.go", "metrics.go"},
	"gossip.go":       {"swim.go", "link.go", "members.go", "packet.go", "seal.go", "auth.go"},
	"swim.go":         {"link.go", "members.go", "packet.go", "seal.go", "auth.go"},
	"link.go":         {"members.go", "packet.go", "seal.go"},
	"members.go":      {"packet.go", "seal.go"},
	"seal.go":         {"packet.go", "auth.go"},
	"packet.go":       {},
	"hashring.go":     {},
	"scrape.go":       {"store.go", "consumers.go", "cluster.go", "series.go", "exposition.go"},
	"store.go":        {"site.go", "consumers.go", "cluster.go", "series.go", "batch.go", "log.go", "exposition.go", "push_spool.go", "store_spools.go"},
	"site.go":         {"store_clock.go", "cluster.go", "series.go", "batch.go", "log.go", "exposition.go", "push_spool.go", "store_spools.go"},
	"consumers.go":    {"push_spool.go", "store_state.go", "batch.go", "log.go"},
	"cluster.go":      {"store_clock.go", "series.go", "batch.go", "log.go", "exposition.go", "push_spool.go", "store_spools.go"},
	"senders.go":      {},
	"authorize.go":    {},
	"series.go":       {"exposition.go"},
	"batch.go":        {"push_spool.go", "wire.go"},
	"log.go":          {},
	"auth.go":         {},
	"sanitize.go":     {"exposition.go"},
	"decode.go":       {"exposition.go"},
	"exposition.go":   {},
	"compression.go":  {},
	"http.go":         {"metrics.go"},
	"metrics.go":      {},

	"server_auth.go":    {"senders.go", "authorize.go", "forward.go", "auth.go", "sanitize.go", "exposition.go", "http.go", "metrics.go"},
	"store_recovery.go": {"site.go", "consumers.go", "cluster.go", "batch.go", "log.go", "exposition.go", "store_spools.go"},
	"store_state.go":    {"push_spool.go", "consumers.go", "log.go"},
	"store_clock.go":    {},
	"store_spools.go":   {"push_spool.go", "wire.go", "batch.go"},
	"server_leave.go":   {"store.go"},
	"wire.go":           {},

	"client_clock.go":    {"spool_file.go"},
	"deliver_request.go": {"client_clock.go", "spool.go", "spool_file.go", "spool_plan.go", "push_spool.go", "metrics.go"},
	"spool_file.go":      {},
	"spool_log.go":       {"push_spool.go", "log.go"},
	"spool_plan.go":      {"push_spool.go"},
}

var allowedModules = []string{
	"github.com/prometheus/common", "github.com/prometheus/client_model", "golang.org/x/crypto",
}

const (
	maxRoomLines           = 700
	minOpening, maxOpening = 3, 8 // lines of a file's opening comment
)

func TestRooms(t *testing.T) {
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
	fset, imp := roomImporter(t)
	for _, problem := range checkRooms(tree, fset, imp) {
		t.Error(problem)
	}
}

// roomImporter imports what the package depends on from the compiler's own
// export data.
func roomImporter(t *testing.T) (*token.FileSet, types.Importer) {
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

type roomCheck struct {
	fset     *token.FileSet
	pkg      *types.Package
	info     *types.Info
	problems []string
}

// checkRooms returns what is wrong with a tree (path → content), as
// "file:line: name: what".
func checkRooms(tree map[string]string, fset *token.FileSet, imp types.Importer) []string {
	c := &roomCheck{fset: fset, info: &types.Info{
		Types: map[ast.Expr]types.TypeAndValue{}, Uses: map[*ast.Ident]types.Object{},
		Selections: map[*ast.SelectorExpr]*types.Selection{},
	}}
	var files []*ast.File
	for _, path := range slices.Sorted(maps.Keys(tree)) {
		c.checkText(path, tree[path])
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
	}
	for _, name := range c.pkg.Scope().Names() {
		if v, ok := c.pkg.Scope().Lookup(name).(*types.Var); ok {
			if what := sharedState(v.Type(), map[types.Type]bool{}); what != "" {
				c.report(v.Pos(), name, "package variable holds a "+what)
			}
		}
	}
	for _, f := range files {
		ast.Inspect(f, c.checkNode)
	}
	slices.Sort(c.problems)
	return c.problems
}

func (c *roomCheck) line(pos token.Pos) int { return c.fset.Position(pos).Line }

func (c *roomCheck) report(pos token.Pos, name, what string) {
	p := c.fset.Position(pos)
	c.problems = append(c.problems, fmt.Sprintf("%s:%d: %s: %s", p.Filename, p.Line, name, what))
}

var (
	leftover   = regexp.MustCompile(`\b(TO` + `DO|FIX` + `ME)\b`) // in two parts: this file must not match
	moduleLine = regexp.MustCompile(`^\s*(?:require\s+)?(\S+)\s+v\d\S*\s*(// indirect)?`)
)

func (c *roomCheck) checkText(path, text string) {
	if !utf8.ValidString(text) || strings.Contains(text, "\x00") {
		return // binary
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

// checkFile checks what shows without types.
func (c *roomCheck) checkFile(path string, f *ast.File) {
	if _, ok := allowedRooms[path]; !ok {
		c.report(f.Package, path, "file has no row in allowedRooms")
	}
	if lines := c.line(f.FileEnd); lines > maxRoomLines {
		c.report(f.FileEnd, path, fmt.Sprintf("%d lines, more than %d", lines, maxRoomLines))
	}
	// Behind the package clause a comment opens the file unless it is of the first
	// declaration.
	first := f.FileEnd
	if len(f.Decls) > 0 {
		first = f.Decls[0].Pos()
	}
	if !slices.ContainsFunc(f.Comments, func(g *ast.CommentGroup) bool {
		lines := c.line(g.End()) - c.line(g.Pos()) + 1
		opening := g.Pos() < f.Package || g.Pos() < first && c.line(g.End())+1 < c.line(first)
		return opening && minOpening <= lines && lines <= maxOpening
	}) {
		c.report(f.Package, path, fmt.Sprintf("no opening comment of %d to %d lines", minOpening, maxOpening))
	}
	for _, d := range f.Decls {
		if d, ok := d.(*ast.FuncDecl); ok && d.Recv == nil && d.Name.Name == "init" {
			c.report(d.Pos(), "init", "work at start that no caller asked for")
		}
	}
	// go.mod alone is no wall: an indirect module can be imported all the same.
	for _, spec := range f.Imports {
		imported, _ := strconv.Unquote(spec.Path.Value)
		host, _, _ := strings.Cut(imported, "/")
		if strings.Contains(host, ".") && !slices.ContainsFunc(allowedModules, func(m string) bool { return strings.HasPrefix(imported, m+"/") }) {
			c.report(spec.Pos(), imported, "module not allowed")
		}
	}
}

// checkUse checks the use of a name across files; there, it is always one
// declared at package level, a field or a method.
func (c *roomCheck) checkUse(pos token.Pos, obj types.Object) {
	from, to := c.fset.Position(pos).Filename, c.fset.Position(obj.Pos()).Filename
	if obj.Pkg() != c.pkg || roomFamily(from) == roomFamily(to) {
		return
	}
	if !obj.Exported() {
		c.report(pos, obj.Name(), "private to "+to)
	}
	if from != "main.go" && !strings.HasPrefix(from, "mode_") && !slices.Contains(allowedRooms[from], to) {
		c.report(pos, obj.Name(), fmt.Sprintf("offered by %s, which %s may not use", to, from))
	}
}

// roomFamily returns the family of a file: its name up to the first underscore.
func roomFamily(file string) string {
	family, _, _ := strings.Cut(strings.TrimSuffix(file, ".go"), "_")
	return family
}

// checkNode looks for uses without an identifier (unkeyed struct literals) and
// for whatever could change a package variable.
func (c *roomCheck) checkNode(n ast.Node) bool {
	switch n := n.(type) {
	case *ast.CompositeLit:
		typ := c.info.TypeOf(n).Underlying()
		if p, ok := typ.(*types.Pointer); ok { // of []*T{{…}}
			typ = p.Elem().Underlying()
		}
		if s, ok := typ.(*types.Struct); ok {
			for i, elt := range n.Elts {
				if _, keyed := elt.(*ast.KeyValueExpr); !keyed {
					c.checkUse(elt.Pos(), s.Field(i))
				}
			}
		}
	case *ast.AssignStmt:
		if n.Tok != token.DEFINE {
			for _, lhs := range n.Lhs {
				c.checkChange(lhs, "assigned")
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
			c.checkChange(n.X, "its address taken")
		}
	case *ast.SelectorExpr:
		// A pointer method called on a variable takes its address, unseen.
		if sel := c.info.Selections[n]; sel != nil && sel.Kind() == types.MethodVal && !sel.Indirect() {
			if _, ok := sel.Obj().(*types.Func).Signature().Recv().Type().(*types.Pointer); ok {
				c.checkChange(n.X, "its address taken by "+n.Sel.Name)
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

// checkChange reports a change of e when e is a package variable or part of one.
func (c *roomCheck) checkChange(e ast.Expr, how string) {
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
			c.report(e.Pos(), e.Name, "package variable has "+how)
		}
	}
}

// sharedState names what in t, at any depth, makes a variable of that type
// mutable or shared however it is used, or "". Interfaces pass: error sentinels
// are such.
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

// The package that each case of TestRoomsChecker spoils breaks no rule, though it
// comes close to several.
var cleanRooms = map[string]string{
	"go.mod": "module m\n\ngo 1.26\n\nrequire golang.org/x/crypto v0.1.0\n\nrequire (\n\tgithub.com/prometheus/common v0.72.1\n\ta.example/b v1.0.0 // indirect\n)\n",
	"main.go": opening + `import "sync"
type app struct { sync.Mutex; log *Log }
func main() { a := app{log: NewLog()}; a.Lock(); (&Store{Log: a.log}).Put(); a.log.Len++ }
`,
	"store.go": "package main\n\n// one\n// two\n// three\n\n" + `type Store struct { *Log; n int }
func (s *Store) Put() { s.Append(); s.n++; x := []struct{ n int }{{1}}; x[0].n++; _ = size(x[0].n) }
func size(n int) int { return n }
`,
	"log.go": opening + `import ("errors"; "regexp")
var ErrTorn = errors.New("torn")
var (names = regexp.MustCompile("x"); table = [2]int{1, 2}; kinds = map[string][]int{"a": {1}})
type Log struct { Len int; off int64 }
func NewLog() *Log { names := names; names = nil; _ = names; return &Log{1, 2} }
func (l *Log) Append() error { l.off += int64(table[0] + len(kinds["a"])); if names.MatchString("") { return nil }; return ErrTorn }
`,
	"log_test.go": "package main\n\nvar mutable int\n\nfunc init() { mutable++ }\n",
	"sub/x.go":    "package other\n",
	"binary":      "\x00TO" + "DO",
	"README.md":   "A todo list, mastodon" + "TO" + "DOS.\n",
}

const opening = "// x.go: one\n// two\n// three\npackage main\n" // code starts on line 5

func TestRoomsChecker(t *testing.T) {
	fset, imp := roomImporter(t)
	for _, c := range []struct{ file, add, want string }{ // add goes to the end of file; want: what each problem starts with
		{"log.go", "", ""},
		{"util.go", opening, "util.go:4: util.go"},
		{"store_clock.go", opening + "func f(s *Store) { s.n = size(s.n) }", ""},
		{"store_clock.go", opening + "var _ = NewLog", "store_clock.go:5: NewLog"},
		{"log.go", "var _ = Store{}", "log.go:11: Store"},
		{"log.go", "func f(s *Store) { s.Put() }", "log.go:11: Store|log.go:11: Put"},
		{"auth.go", opening + "func f() { NewLog().Append() }", "auth.go:5: NewLog|auth.go:5: Append"},
		{"auth.go", opening + "type a struct { *Log }", "auth.go:5: Log"},
		{"hashring.go", opening + "func f() { main() }", "hashring.go:5: main: private|hashring.go:5: main: offered"},
		{"store.go", "func (s *Store) f() { _ = s.Log.off; _ = s.off }", "store.go:10: off|store.go:10: off"},
		{"store.go", "func f() { _ = Log{1, 2} }", "store.go:10: off"},
		{"store.go", "func f() { _ = []*Log{{Len: 1, off: 2}} }", "store.go:10: off"},
		{"store.go", "var _ = table", "store.go:10: table"},
		{"main.go", "func f() { size(1) }", "main.go:8: size"},
		{"log.go", "func (l *Log) close() {}", ""},
		{"main.go", "func f(c interface{ close() }) { c.close() }", ""},
		{"log.go", "func init() {}", "log.go:11: init"},
		{"log.go", "var x sync.Mutex", "log.go:11:7: undefined"},
		{"main.go", "var x struct { m map[int]*sync.Mutex }", "main.go:8: x: package variable holds a sync.Mutex"},
		{"log.go", "var x []chan int", "log.go:11: x: package variable holds a channel"},
		{"log.go", "var x = map[string]struct { f func() }{}", "log.go:11: x: package variable holds a function"},
		{"log.go", "func f() { table = [2]int{} }", "log.go:11: table"},
		{"log.go", "func f() { table[0] = 1 }", "log.go:11: table"},
		{"log.go", "func f() { table[1]++ }", "log.go:11: table"},
		{"log.go", "func f() { kinds[\"a\"][0] += 1 }", "log.go:11: kinds"},
		{"log.go", "func f() { _ = &(table) }", "log.go:11: table"},
		{"log.go", "func f() { for _, table[0] = range []int{1} { } }", "log.go:11: table"},
		{"log.go", "func f() { delete(kinds, \"a\"); copy(table[:], kinds[\"a\"]) }", "log.go:11: kinds|log.go:11: table"},
		{"log.go", "func f() { *names = regexp.Regexp{} }", "log.go:11: names"},
		{"log.go", "type n int; func (n *n) set() {}; var x n; func f() { x.set() }", "log.go:11: x"},
		{"go.mod", "require a.example/c v1.2.3\n", "go.mod:11: a.example/c"},
		{"auth.go", "package main\n", "auth.go:1: auth.go: no opening"},
		{"auth.go", "package main\n\n// Of\n// the\n// type.\ntype a int", "auth.go:1: auth.go: no opening"},
		{"auth.go", "// one\n// two\npackage main\n", "auth.go:3: auth.go: no opening"},
		{"auth.go", strings.Repeat("// x\n", 9) + "package main\n", "auth.go:10: auth.go: no opening"},
		{"log.go", strings.Repeat("\n", 690), ""},
		{"log.go", strings.Repeat("\n", 691), "log.go:701: log.go: 701 lines"},
		{"auth.go", opening + "import _ \"a.example/b\"\n", "auth.go:5: a.example/b|auth.go:5:10: could not import"},
		{"test/run.sh", "#!/bin/sh\n# FIX" + "ME: x\n", "test/run.sh:2: FIX" + "ME"},
	} {
		tree := maps.Clone(cleanRooms)
		tree[c.file] += c.add
		got := checkRooms(tree, fset, imp)
		want := strings.FieldsFunc(c.want, func(r rune) bool { return r == '|' })
		for _, w := range want {
			i := slices.IndexFunc(got, func(g string) bool { return strings.HasPrefix(g, w) })
			if i < 0 {
				t.Errorf("%s with %q: got %q, want %q", c.file, c.add, got, c.want)
				break
			}
			got = slices.Delete(got, i, i+1)
		}
		if len(got) > 0 {
			t.Errorf("%s with %q: too much: %q", c.file, c.add, got)
		}
	}
}
