package main

// The seed of random tests.

import (
	"flag"
	"math/rand/v2"
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
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("run again with the same seed: go test -run '^%s$' . -args -seed %d", t.Name(), seed)
		}
	})
	return seed
}
