package main

// TestFamilies checks the architecture of the flat package. Every file belongs to a family, which
// is the part of the file's name before the first underscore: store.go and store_recovery.go belong
// to the family store. Names that begin with an upper-case letter may be used by other families, if
// the list families allows it; all other names are private to their family. TestFamiliesChecker
// breaks the rules in a small package, and checks that the faults are reported.

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

// fileFamily is a family of files: its name, and the names of the other families whose exported
// names it may use.
type fileFamily struct {
	name   string
	mayUse []string
}

// families lists all families from the top layer to the bottom layer. A family may use only
// families that follow it in this list, and of these only the ones in its mayUse. It need not use
// all of them.
var families = []fileFamily{
	{"main", []string{"client", "server", "hashring", "gossip", "store", "auth", "sanitize", "sample", "push", "log", "http", "metrics", "wire"}},
	// The family client may use wire because the records of the client's spool are untrusted bytes,
	// which wire can decode safely.
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

// pureFiles lists the files that must not import packages for the network or the disk, and must not
// read a clock. These files implement state machines and formats. They get times from their
// callers, so that tests can run them in virtual time.
var pureFiles = []string{
	"gossip_swim.go", "gossip_probe.go", "gossip_receive.go", "gossip_send.go", "gossip_session.go", "gossip_request.go", "gossip_table.go", "gossip_packet.go", "gossip_record.go",
	"hashring.go", "hashring_claim.go",
	"store_samples.go", "store_append.go", "store_read.go", "store_recovery_samples.go", "store_series.go", "store_batch.go", "store_record.go", "store_spools.go",
	"client_failover.go", "client_gaps.go", "client_spool_index.go", "client_spool_record.go", "client_spool_meta.go",
	"push.go", "push_ranges.go", "push_wallclock.go", "push_source_clock.go",
	"sample.go", "sample_line.go", "sample_parser.go", "sample_text.go", "sample_proto.go", "sample_exposition.go", "sample_grouper.go", "sample_known.go",
	"sanitize.go", "sanitize_nearest.go", "sanitize_selector.go", "sanitize_use.go", "auth_replay.go", "wire.go", "http_share.go",
}

// upcalls lists the function-typed fields, as "family.Field", that another family may set. Through
// such a field a family calls code of a family above it. A field with the name Now is a clock and
// needs no entry.
var upcalls = []string{
	"client.Boot",       // returns the time of a clock that also runs while the machine is suspended
	"client.NewCleaner", // returns a Cleaner of samples that anonymizes with the salt loaded last
	"server.HostLimits", // tells how much of the disk and memory of the host is used
	"gossip.Notify",     // logs an event of the gossip, such as a dead member
	"hashring.OnError",  // counts failures to save this member's state of the ring
	"hashring.OnView",   // gives a new view of the ring to the Forwarder
	"store.OnError",     // logs and counts errors of the store
	"store.OnWarning",   // logs warnings of the store
	"store.Owned",       // reports whether this server owns a site
	"store.NowInterval", // returns the earliest and latest time that may be the present, by the checked wall clock
}

// allowedModules lists the only Go modules whose packages the program may import, besides the
// standard library.
var allowedModules = []string{
	"github.com/prometheus/common", "github.com/prometheus/client_model", "golang.org/x/crypto",
}

const (
	maxFileLines           = 700  // most lines of a .go file that is not a test file
	minOpening, maxOpening = 2, 8 // fewest and most lines of the opening comment of a file
)

// The package of this directory, and the files in the directories below it, break none of the rules
// that checkFamilies checks. Every family in the list families may use only families that follow
// it.
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

// familyImporter returns a go/types importer for the packages that this package depends on, and the
// FileSet that must be used with it. The importer reads the export data that go list -export makes
// the compiler write.
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

// familyCheck is the state of one call of checkFamilies. The map set has the function-typed fields
// that a file of another family sets, as "family.Field".
type familyCheck struct {
	fset     *token.FileSet
	pkg      *types.Package
	info     *types.Info
	pure     []string
	upcalls  []string
	set      map[string]bool
	problems []string
}

// checkFamilies returns the faults in a tree of files, mostly in the form "file:line: name: fault".
// If the Go files have a syntax error or a type error, that error is the last fault, and the
// remaining checks are left out. tree maps paths to the contents of the files. pure and upcalls are
// used instead of the variables pureFiles and upcalls.
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

func (c *familyCheck) line(pos token.Pos) int { return c.fset.Position(pos).Line }

// report adds a fault to c.problems. The parameter what describes the fault. name is the faulty
// identifier, import or file, and pos is its position.
func (c *familyCheck) report(pos token.Pos, name, what string) {
	p := c.fset.Position(pos)
	c.problems = append(c.problems, fmt.Sprintf("%s:%d: %s: %s", p.Filename, p.Line, name, what))
}

var (
	impureImport = regexp.MustCompile(`^(net|net/http.*|os|os/.*|syscall|io/ioutil|crypto/rand|crypto/tls)$`)
	leftover     = regexp.MustCompile(`\b(TO` + `DO|FIX` + `ME)\b`) // the words are split, so that this file does not match the pattern itself
	moduleLine   = regexp.MustCompile(`^\s*(?:require\s+)?(\S+)\s+v\d\S*\s*(// indirect)?`)
)

// checkText reports each line of a text file that has a mark of unfinished work. In go.mod it also
// reports each direct dependency that is not in allowedModules. It does not check binary files.
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

// checkName reports a test file unless its name begins with the name of an existing file, as
// log_crash_test.go does for log.go. Files rig_*_test.go and e2e_*_test.go may have any name.
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

// checkFile checks the rules for a file that need no type information: its family, its opening
// comment, its length, its imports, and that it has no init function.
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
	// A comment between the package clause and the first declaration is the opening comment. If no
	// blank line separates the comment from the declaration, it is the comment of the declaration
	// instead.
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
	// checkText has checked the direct dependencies in go.mod. The imports are checked here as
	// well, because a file can also import a package of an indirect dependency.
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

// checkUse reports a use of obj at pos if obj is declared in a file of another family and the
// family of pos may not use it. An obj of another file is always a package-level name, a field or a
// method.
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

// checkClock reports id if it is in a file of c.pure and denotes a function of package time that
// reads a clock or starts a timer. obj is the object that id denotes.
func (c *familyCheck) checkClock(id *ast.Ident, obj types.Object) {
	file := c.fset.Position(id.Pos()).Filename
	if obj.Pkg() != nil && obj.Pkg().Path() == "time" && slices.Contains(c.pure, file) &&
		slices.Contains([]string{"Now", "Since", "Until", "Sleep", "After", "AfterFunc", "Tick", "NewTimer", "NewTicker"}, obj.Name()) {
		if f, ok := obj.(*types.Func); ok && f.Signature().Recv() == nil {
			c.report(id.Pos(), "time."+obj.Name(), "used by a file in pureFiles")
		}
	}
}

// checkUpcall is called when the code at pos sets obj. If obj is a function-typed field of another
// family, checkUpcall records the field in c.set. It reports a fault if the field is not in
// c.upcalls. It ignores fields with the name Now, which are clocks.
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

// familyOf returns the family of the file: the part of its name before the first underscore or
// before ".go".
func familyOf(file string) string {
	family, _, _ := strings.Cut(strings.TrimSuffix(file, ".go"), "_")
	return family
}

// familyLevel returns the index of the named family in families, or -1 if there is no such family.
func familyLevel(name string) int {
	return slices.IndexFunc(families, func(f fileFamily) bool { return f.name == name })
}

// checkNode checks what the uses of identifiers in c.info.Uses do not show: fields in unkeyed
// struct literals, assignments to function-typed fields, and changes of package variables.
// It always returns true, so that ast.Inspect also visits the children of n.
func (c *familyCheck) checkNode(n ast.Node) bool {
	switch n := n.(type) {
	case *ast.CompositeLit:
		typ := c.info.TypeOf(n).Underlying()
		if p, ok := typ.(*types.Pointer); ok { // the inner literal in []*T{{…}} has the type *T
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
		// A call of a method with a pointer receiver on a variable takes the variable's address
		// implicitly, so the method can change the variable.
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

// checkChange reports a fault if e, which the code changes or may change, is a package variable or
// a part of a package variable. The parameter how names the kind of change, such as "assigned".
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

// sharedState looks in the type t, at any depth, for a part that makes every variable of type t
// mutable or shared: a lock, an atomic, a channel or a function. It returns the name of that part,
// or "" if there is none. It ignores interfaces, because error sentinels are interfaces. seen has
// the types that were visited already.
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
	case interface{ Elem() types.Type }: // a pointer, slice or array
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

// cleanTree is the small package that TestFamiliesChecker checks, as a map from paths to contents.
// It breaks no rule, but several of its lines are close to a fault. Each case of the test appends
// text to one of its files, or adds a file.
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

// opening is the text at the beginning of a file of cleanTree: the package clause and a valid
// opening comment. Code after it starts on line 6.
const opening = "package main\n\n// one\n// two\n\n"

// checkFamilies reports the broken rule at the right line, and reports nothing else.
func TestFamiliesChecker(t *testing.T) {
	fset, imp := familyImporter(t)
	for _, c := range []struct {
		file, add string // the case appends the text add to this file of cleanTree, or creates the file with this text
		want      string // beginnings of all faults that must be reported, separated by |; "": no fault
	}{
		{"log.go", "", ""},

		// Each file must belong to a family, and may use only names of the families that its own
		// family may use.
		{"util.go", opening, "util.go:1: util.go: file belongs to no family"},
		{"store_clock.go", opening + "func f(s *Store) { s.n = size(s.n) }", ""},
		{"store_clock.go", opening + "var _ = NewLog()", ""},
		{"log.go", "var _ = Store{}", "log.go:13: Store: declared"},
		{"log.go", "func f(s *Store) { s.Put() }", "log.go:13: Store: declared|log.go:13: Put: declared"},
		{"auth.go", opening + "func f() { NewLog().Append() }", "auth.go:6: NewLog: declared|auth.go:6: Append: declared"},
		{"auth.go", opening + "type a struct { *Log }", "auth.go:6: Log: declared"},
		{"hashring.go", opening + "func f() { main() }", "hashring.go:6: main: private|hashring.go:6: main: declared"},

		// Names that begin with a lower-case letter may be used only by files of their own family.
		{"store.go", "func (s *Store) f() { _ = s.Log.off; _ = s.off }", "store.go:9: off: private|store.go:9: off: private"},
		{"store.go", "func f() { _ = Log{1, 2, Calls{}} }", "store.go:9: off: private"},
		{"store.go", "func f() { _ = []*Log{{Len: 1, off: 2}} }", "store.go:9: off: private"},
		{"store.go", "var _ = table", "store.go:9: table: private"},
		{"main.go", "func f() { size(1) }", "main.go:9: size: private"},
		{"log.go", "func (l *Log) close() {}", ""},
		{"main.go", "func f(c interface{ close() }) { c.close() }", ""},

		// A function-typed field may be set in a file of another family only if the field is in
		// upcalls or has the name Now.
		{"log.go", "func f(c *Calls) { c.OnDrop = nil; _ = Calls{nil, nil, nil} }", ""},
		{"store.go", "func (s *Store) f() { s.hooks.now = nil; s.Now = nil; s.OnTorn = nil }", ""},
		{"store.go", "func (s *Store) f() { s.OnDrop = func() {} }", "store.go:9: OnDrop: lets the family log call store"},
		{"store.go", "var _ = &Calls{OnTorn: nil, OnDrop: nil}", "store.go:9: OnDrop: lets"},
		{"store.go", "func f() { _ = []Calls{{nil, nil, nil}} }", "store.go:9: OnDrop: lets"},

		// Files in pureFiles must not read a clock, start a timer, or import packages for the
		// network or the disk.
		{"sample.go", "func f() { _ = time.Now() }", "sample.go:8: time.Now: used by a file in pureFiles"},
		{"sample.go", "var f = 0; func g() { <-time.After(0) }", "sample.go:8: time.After: used"},
		{"sample_line.go", opening + "import _ \"os\"", "sample_line.go:6: os: imported by a file in pureFiles"},
		{"sample_line.go", opening + "import _ \"net/http\"", "sample_line.go:6: net/http: imported"},
		{"sample_disk.go", opening + "import _ \"os\"", ""},

		// Init functions, and package variables that are changed or contain shared state, are
		// faults.
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

		// Modules that are not in allowedModules must not be direct dependencies, and their
		// packages must not be imported.
		{"go.mod", "require a.example/c v1.2.3\n", "go.mod:11: a.example/c"},
		{"auth.go", opening + "import _ \"a.example/b\"\n", "auth.go:6: a.example/b|auth.go:6:10: could not import"},

		// A file that is not a test file needs an opening comment of 2 to 8 lines below its package
		// clause, and has at most 700 lines. A test file is named after a tested file. No file has
		// a mark of unfinished work.
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
