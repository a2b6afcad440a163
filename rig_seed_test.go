package main

// The seed of random tests.

import (
	"flag"
	"iter"
	"math/rand/v2"
	"strings"
	"testing"
)

var seedFlag = flag.Uint64("seed", 0, "seed of random tests; 0: each test's own, or a new one each time")

// testSeed returns the value of -seed if it is set, else own; if both are 0 it returns a random
// seed. If the test fails, its log says how to run it again with the same seed.
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

// testSeeds returns n consecutive seeds that begin with the value of -seed, or with 0. If the test
// fails, its log says how to begin with the seed that failed.
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

// logSeed says how to repeat a test that failed.
func logSeed(t testing.TB, seed uint64) {
	if t.Failed() {
		name, _, _ := strings.Cut(t.Name(), "/")
		t.Logf("to repeat: go test -run '^%s$' . -args -seed %d", name, seed)
	}
}
