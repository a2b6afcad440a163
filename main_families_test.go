package main

// Every file of the flat package belongs to a family, which its name begins with: store.go and
// store_recovery.go are of the family store. TestFamilies holds the tree to the names of files,
// to the list of pure files, and to the rules that keep a file readable by itself.

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

// families are those of the file names. Their levels are not held yet.
var families = []string{
	"main", "client", "server", "hashring", "gossip", "store", "auth", "sanitize", "sample", "push", "log", "http", "metrics", "wire",
}

// pureFiles use no network, no disk and no clock: time, randomness and bytes come in. They are
// the state machines and formats, which tests drive in virtual time.
var pureFiles = []string{
	"gossip_swim.go", "gossip_receive.go", "gossip_session.go", "gossip_request.go", "gossip_send.go", "gossip_probe.go", "gossip_table.go", "gossip_packet.go",
	"hashring.go", "hashring_claim.go",
	"store_data.go", "store_append.go", "store_read.go", "store_restore.go", "store_series.go", "store_batch.go", "store_record.go", "store_spools.go",
	"client_failover.go", "client_spool_plan.go", "client_spool_record.go", "client_spool_meta.go",
	"push.go", "push_ranges.go", "push_clock.go", "push_clock_source.go",
	"sample.go", "sample_line.go", "sample_parser.go", "sample_text.go", "sample_proto.go", "sample_exposition.go",
	"sanitize.go", "sanitize_selector.go", "auth_replay.go", "wire.go",
}

var allowedModules = []string{
	"github.com/prometheus/common", "github.com/prometheus/client_model", "golang.org/x/crypto",
}

const (
	maxFileLines           = 700
	minOpening, maxOpening = 2, 8 // lines of a file's opening comment
)

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
	for _, problem := range checkFamilies(tree, fset, imp) {
		t.Error(problem)
	}
}

// familyImporter imports what the package depends on from the compiler's own
// export data.
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

type familyCheck struct {
	fset     *token.FileSet
	pkg      *types.Package
	info     *types.Info
	problems []string
}

// checkFamilies returns what is wrong with a tree (path → content), as
// "file:line: name: what".
func checkFamilies(tree map[string]string, fset *token.FileSet, imp types.Importer) []string {
	c := &familyCheck{fset: fset, info: &types.Info{
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
		c.checkClock(id, obj)
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

func (c *familyCheck) line(pos token.Pos) int { return c.fset.Position(pos).Line }

func (c *familyCheck) report(pos token.Pos, name, what string) {
	p := c.fset.Position(pos)
	c.problems = append(c.problems, fmt.Sprintf("%s:%d: %s: %s", p.Filename, p.Line, name, what))
}

var (
	impureImport = regexp.MustCompile(`^(net|net/http.*|os|os/.*|syscall|io/ioutil|crypto/rand|crypto/tls)$`)
	leftover     = regexp.MustCompile(`\b(TO` + `DO|FIX` + `ME)\b`) // in two parts: this file must not match
	moduleLine   = regexp.MustCompile(`^\s*(?:require\s+)?(\S+)\s+v\d\S*\s*(// indirect)?`)
)

func (c *familyCheck) checkText(path, text string) {
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

// checkName checks the name of a file with tests: it begins with the name of the file that the
// tests are of. Rigs, and tests that start processes, have names of their own.
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
	c.problems = append(c.problems, path+":1: "+path+": begins with the name of no file")
}

// checkFile checks what shows without types.
func (c *familyCheck) checkFile(path string, f *ast.File) {
	if !slices.Contains(families, familyOf(path)) {
		c.report(f.Package, path, "file belongs to no family")
	}
	if f.Doc != nil && path != "main.go" {
		c.report(f.Package, path, "comment above the package clause: only main.go has the package's")
	}
	pure := slices.Contains(pureFiles, path)
	if lines := c.line(f.FileEnd); lines > maxFileLines {
		c.report(f.FileEnd, path, fmt.Sprintf("%d lines, more than %d", lines, maxFileLines))
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
		if pure && impureImport.MatchString(imported) {
			c.report(spec.Pos(), imported, "imported by a file that is listed as pure")
		}
		host, _, _ := strings.Cut(imported, "/")
		if strings.Contains(host, ".") && !slices.ContainsFunc(allowedModules, func(m string) bool { return strings.HasPrefix(imported, m+"/") }) {
			c.report(spec.Pos(), imported, "module not allowed")
		}
	}
}

// familyOf returns the family of a file: its name up to the first underscore.
func familyOf(file string) string {
	family, _, _ := strings.Cut(strings.TrimSuffix(file, ".go"), "_")
	return family
}

// checkClock reports the use of a clock in a file that is listed as pure.
func (c *familyCheck) checkClock(id *ast.Ident, obj types.Object) {
	file := c.fset.Position(id.Pos()).Filename
	if obj.Pkg() != nil && obj.Pkg().Path() == "time" && slices.Contains(pureFiles, file) &&
		slices.Contains([]string{"Now", "Since", "Until", "Sleep", "After", "AfterFunc", "Tick", "NewTimer", "NewTicker"}, obj.Name()) {
		if f, ok := obj.(*types.Func); ok && f.Signature().Recv() == nil {
			c.report(id.Pos(), "time."+obj.Name(), "used by a file that is listed as pure")
		}
	}
}

// checkNode looks for uses without an identifier (unkeyed struct literals) and
// for whatever could change a package variable.
func (c *familyCheck) checkNode(n ast.Node) bool {
	switch n := n.(type) {
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
