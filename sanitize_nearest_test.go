package main

import "testing"

// NearestName returns the name that differs least from a misspelled word, and none if all names
// differ in more than a third of the word.
func TestNearestName(t *testing.T) {
	names := []string{"instance", "job", "node", "namespace", "name"}
	for word, want := range map[string]string{
		"instnce": "instance", "instanec": "instance", "instances": "instance", "jbo": "job", "nod": "node", "nmae": "name", "namespaec": "namespace",
		"region": "", "x": "", "": "", "job_name_of_x": "",
	} {
		if got := NearestName(word, names); got != want {
			t.Errorf("%q: got %q, want %q", word, got, want)
		}
	}
}
