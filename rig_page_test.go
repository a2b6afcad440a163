package main

// Helpers for tests of pages for browsers: a parser of pages that checks their structure, and a
// filler of views and statuses, which sets every field by reflection. So the tests also cover fields
// that are added later.

import (
	"encoding/xml"
	"fmt"
	"io"
	"maps"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
)

// pageElement is an element of a page.
type pageElement struct {
	name       string
	attributes map[string]string
	parent     *pageElement // nil at the top
	text       string       // without that of the elements in it
}

// isBelow reports whether an element with the given name contains e.
func (e *pageElement) isBelow(name string) bool {
	for p := e.parent; p != nil; p = p.parent {
		if p.name == name {
			return true
		}
	}
	return false
}

// parsedPage has the elements of a page in the order of their start tags.
type parsedPage []*pageElement

// parsePage parses a page. It reports each element that is not closed, or not nested in its parent,
// and each attribute that an element has twice.
func parsePage(t testing.TB, page string) (all parsedPage) {
	t.Helper()
	void := []string{"meta", "link", "input", "br", "hr", "img"} // elements of HTML without an end tag
	d := xml.NewDecoder(strings.NewReader(page))
	d.Strict, d.Entity = false, xml.HTMLEntity
	var open *pageElement
	for {
		token, err := d.RawToken()
		if err == io.EOF {
			break
		} else if err != nil {
			t.Fatalf("%v in the page:\n%s", err, page)
		}
		switch token := token.(type) {
		case xml.StartElement:
			e := &pageElement{name: token.Name.Local, attributes: map[string]string{}, parent: open}
			for _, a := range token.Attr {
				if _, twice := e.attributes[a.Name.Local]; twice {
					t.Errorf("%s has the attribute %s twice", e.name, a.Name.Local)
				}
				e.attributes[a.Name.Local] = a.Value
			}
			if all = append(all, e); !slices.Contains(void, e.name) {
				open = e
			}
		case xml.EndElement:
			if open == nil || open.name != token.Name.Local {
				t.Fatalf("</%s> ends no element; %+v is open in the page:\n%s", token.Name.Local, open, page)
			}
			open = open.parent
		case xml.CharData:
			if open != nil {
				open.text += string(token)
			}
		}
	}
	if open != nil {
		t.Errorf("%s is not closed", open.name)
	}
	return all
}

// named returns the elements with one of the given names.
func (p parsedPage) named(names ...string) (found parsedPage) {
	for _, e := range p {
		if slices.Contains(names, e.name) {
			found = append(found, e)
		}
	}
	return found
}

// texts returns all texts and all values of attributes, one below the other.
func (p parsedPage) texts() string {
	var all strings.Builder
	for _, e := range p {
		fmt.Fprintln(&all, e.text)
		for _, value := range e.attributes {
			fmt.Fprintln(&all, value)
		}
	}
	return all.String()
}

// structure returns the names of all elements, each with the names of its ancestors and of its
// attributes. It leaves out links, because an address decides whether a text is a link.
func (p parsedPage) structure() (lines []string) {
	for _, e := range p {
		if e.name == "a" {
			continue
		}
		line := fmt.Sprint(e.name, slices.Sorted(maps.Keys(e.attributes)))
		for parent := e.parent; parent != nil; parent = parent.parent {
			if parent.name != "a" {
				line += " in " + parent.name
			}
		}
		lines = append(lines, line)
	}
	return lines
}

// browserScheme returns the scheme of an address as a browser reads it, according to the URL
// standard: a browser ignores control characters and spaces at the start, and tabs and newlines
// anywhere. It returns "" for a relative address.
func browserScheme(address string) string {
	address = strings.TrimLeftFunc(address, func(r rune) bool { return r <= ' ' })
	address = strings.ToLower(strings.NewReplacer("\t", "", "\n", "", "\r", "").Replace(address))
	for i, r := range address {
		switch {
		case r == ':' && i > 0:
			return address[:i]
		case 'a' <= r && r <= 'z' || i > 0 && ('0' <= r && r <= '9' || strings.ContainsRune("+-.", r)):
		default:
			return ""
		}
	}
	return ""
}

// check reports what a page must not have in any case: what a browser loads or runs, and what
// assistive technology needs and does not find.
func (p parsedPage) check(t testing.TB) {
	t.Helper()
	for _, name := range []string{"html", "head", "title", "body", "header", "main", "h1", "footer", "style", "script"} {
		if n := len(p.named(name)); n != 1 {
			t.Errorf("the page has %d elements %s, want 1", n, name)
		}
	}
	ids := map[string]bool{}
	for _, e := range p {
		if id, has := e.attributes["id"]; has && (ids[id] || id == "") {
			t.Errorf("%s has the id %q, which is empty or not unique", e.name, id)
		}
		ids[e.attributes["id"]] = true
	}
	for _, e := range p {
		for name, value := range e.attributes {
			isAddress := name == "href" && (e.name == "a" && slices.Contains([]string{"", "http", "https"}, browserScheme(value)) || e.name == "link" && value == "data:,")
			if name == "src" || name == "style" || strings.HasPrefix(name, "on") || strings.HasSuffix(name, "href") && !isAddress {
				t.Errorf("%s has the attribute %s=%q", e.name, name, value)
			}
		}
		if by, has := e.attributes["aria-labelledby"]; has && !ids[by] {
			t.Errorf("%s is labelled by %q, which is no id", e.name, by)
		}
		isInert := e.attributes["aria-hidden"] == "true" || e.attributes["type"] == "hidden"
		switch {
		case slices.Contains([]string{"img", "iframe", "object", "embed", "base", "video", "audio", "use", "image"}, e.name):
			t.Errorf("the page has the element %s", e.name)
		case e.name == "th" && e.attributes["scope"] == "":
			t.Errorf("th %q has no scope", e.text)
		case e.name == "svg" && !isInert && (e.attributes["role"] == "" || e.attributes["aria-label"] == ""):
			t.Errorf("an svg has neither aria-hidden nor role and label: %v", e.attributes)
		case (e.name == "input" || e.name == "select") && !isInert && !e.isBelow("label"):
			t.Errorf("%s %v has no label", e.name, e.attributes)
		case e.name == "table" && !slices.ContainsFunc(p.named("th"), func(th *pageElement) bool { return th.parent.parent.parent == e }):
			t.Error("a table has no th")
		case e.name == "nav" && e.attributes["aria-label"] == "":
			t.Error("a nav has no label")
		}
	}
}

// fillFields sets every exported field below v, and returns the texts that it set by the paths of
// their fields. A text is prefix and a number, so each is different. A list gets two elements.
func fillFields(v any, prefix string) map[string]string {
	texts := map[string]string{}
	var fill func(v reflect.Value, path string)
	fill = func(v reflect.Value, path string) {
		switch v.Kind() {
		case reflect.Pointer:
			v.Set(reflect.New(v.Type().Elem()))
			fill(v.Elem(), path)
		case reflect.Struct:
			if at, ok := v.Addr().Interface().(*time.Time); ok {
				*at = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
				return
			}
			for i := range v.NumField() {
				if v.Type().Field(i).IsExported() {
					fill(v.Field(i), path+"."+v.Type().Field(i).Name)
				}
			}
		case reflect.Slice:
			v.Set(reflect.MakeSlice(v.Type(), 2, 2))
			for i := range v.Len() {
				fill(v.Index(i), fmt.Sprintf("%s[%d]", path, i))
			}
		case reflect.String:
			texts[path] = fmt.Sprintf("%s%d.", prefix, len(texts))
			v.SetString(texts[path])
		case reflect.Bool:
			v.SetBool(true)
		case reflect.Float64:
			v.SetFloat(0.5)
		case reflect.Int, reflect.Int64:
			v.SetInt(2)
		case reflect.Uint16, reflect.Uint32, reflect.Uint64:
			v.SetUint(2)
		default:
			panic(path + " is a " + v.Kind().String() + ", which fillFields does not know")
		}
	}
	fill(reflect.ValueOf(v).Elem(), "")
	return texts
}
