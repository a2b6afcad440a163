package main

// Seeds of random tests. The flag -seed sets the seed, so that a failed test can be run again with
// the same random choices.

import (
	"flag"
	"iter"
	"math/rand/v2"
	"strings"
	"testing"
)

var seedFlag = flag.Uint64("seed", 0, "seed of random tests; 0: each test's own, or a new one each time")

// testSeed returns the seed of a random test: the value of -seed if it is not 0, else own if it is
// not 0, else a random seed. If the test fails, its log shows how to run it again with the same
// seed.
func testSeed(t testing.TB, own uint64) uint64 {
	t.Helper()
	seed := own
	if *seedFlag != 0 {
		seed = *seedFlag
	}
	for seed == 0 {
		seed = rand.Uint64()
	}
	t.Cleanup(func() { logSeed(t, seed) })
	return seed
}

// testSeeds returns n consecutive seeds. The first seed is the value of -seed, which is 0 by
// default. If the test fails, its log shows how to run it again beginning with the seed that
// failed.
func testSeeds(t testing.TB, n int) iter.Seq[uint64] {
	t.Helper()
	return func(yield func(uint64) bool) {
		seed, failed := *seedFlag, false
		t.Cleanup(func() { logSeed(t, seed) })
		for i := range uint64(n) {
			if !failed {
				seed = *seedFlag + i
			}
			if !yield(*seedFlag + i) {
				return
			}
			failed = failed || t.Failed()
		}
	}
}

// logSeed logs the command that runs the test again with this seed, if the test has failed.
func logSeed(t testing.TB, seed uint64) {
	if t.Failed() {
		name, _, _ := strings.Cut(t.Name(), "/")
		t.Logf("to repeat: go test -run '^%s$' . -args -seed %d", name, seed)
	}
}
