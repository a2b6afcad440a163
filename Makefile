# Needs Go and make; a C compiler lets the tests look for data races.
# Works from a release archive as well as from a git clone.

GO         ?= go
PROMTOOL   ?= promtool
OUTAGE     ?= full
CHAOS      ?= full
SEED       ?= 0
SITES      ?= 10000
FUZZTIME   ?= 3s
STATICCHECK = honnef.co/go/tools/cmd/staticcheck@v0.8.2

# The race detector links with C: $(CC) (which may have arguments), or what else
# is found.
found    = $(shell command -v $(firstword $(1)) 2>/dev/null)
RACE_CC := $(or $(if $(call found,$(CC)),$(CC)),$(call found,gcc),$(call found,cc),$(call found,clang))

all: telemeter ## build ./telemeter, one static binary (the default)

# Always run: what to rebuild, Go knows better than make. -buildvcs is said
# because a user's GOFLAGS may say otherwise, and the version comes from it.
telemeter: FORCE
	CGO_ENABLED=0 $(GO) build -buildvcs=auto -trimpath -ldflags "-s -w" -o $@ .

CHECKS = gofmt vet staticcheck test sweeps fuzz

check: ## all checks that need nothing but Go: three minutes on two cores
	@set -e; n=0; for step in $(CHECKS); do \
		n=$$((n + 1)); echo "check $$n of $(words $(CHECKS)): $$step"; \
		$(MAKE) --no-print-directory $$step; \
	done; echo "check: all passed"

gofmt:
	@out=$$("$$($(GO) env GOROOT)/bin/gofmt" -l .) && test -z "$$out" || \
		{ echo "not formatted (run: gofmt -w .):" $$out; exit 1; }

vet:
	$(GO) vet ./...

staticcheck:
	$(GO) run $(STATICCHECK) ./...

test: ## unit tests, under the race detector where there is a C compiler
ifeq ($(RACE_CC),)
	@echo "no C compiler: the tests run without the race detector"
	@GO="$(GO)" ./test/unit.sh -timeout 30m
else
	@GO="$(GO)" CGO_ENABLED=1 CC="$(RACE_CC)" ./test/unit.sh -race -timeout 30m
endif

sweeps: ## tests of many states in one goroutine, which "test" leaves out under the race detector
	$(GO) test -timeout 30m -run '^TestSweep' .

fuzz: ## every fuzz target for FUZZTIME (3s)
	@GO="$(GO)" ./test/fuzz.sh $(FUZZTIME)

bench: ## benchmarks, but for gossip's on sockets
	$(GO) test -run '^$$' -bench . -skip GossipSockets -benchmem ./...

sim: ## gossip of up to 300 members in virtual time: prints the table of figures
	$(GO) test -count=1 -timeout 30m -run '^TestSimulationTable$$' -v . -args -sim

model: ## delivery, in 5,000,000 random interleavings in virtual time; SEED is the first
	$(GO) test -count=1 -timeout 60m -run '^TestSweepDelivery$$' -v . -args -delivery 5000000 -seed $(SEED)

stampede: ## SITES (10,000) after a server joins, a center was away, all disks are lost; in virtual time: 25 minutes, 4 GiB
	$(GO) test -count=1 -timeout 90m -v -run '^TestStampede$$' . -args -stampede $(SITES)

sockets: ## gossip on real sockets, for seven minutes: prints the table of figures
	$(GO) test -timeout 30m -run '^$$' -bench '^BenchmarkGossipSockets$$' .

test-integration: telemeter ## client, two servers and a real Prometheus, as source and as sink
	./test/integration.sh

test-outage: ## every outage, with a real Prometheus (PROMETHEUS): half an hour; OUTAGE=short: six minutes
	$(GO) test -count=1 -timeout 60m -v -run '^TestOutage(|Drain|Late|Ages|Clocks)$$' . -args -outage $(OUTAGE)

test-alerts: ## the central Prometheus's configuration and alerts, by its promtool (PROMTOOL)
	$(PROMTOOL) check config testdata/prometheus.yml
	$(PROMTOOL) check rules testdata/rules.yml testdata/alerts.yml
	$(PROMTOOL) test rules testdata/alerts_test.yml

test-netns: telemeter ## five servers in network namespaces, cut in two and healed; needs root and Linux
	./test/netns.sh

test-chaos: ## servers restarted, killed, cut off, added, their disks lost, restored, damaged: 20 minutes; CHAOS=short: three; SEED; root and Linux
	$(GO) test -count=1 -timeout 60m -v -exec 'unshare --net --mount --propagation private' -run '^TestChaos$$' . -args -chaos $(CHAOS) -seed $(SEED)

test-readme: telemeter ## the README's commands, as they are but for addresses
	./test/readme.sh

demo: telemeter ## a server and a client that pushes the server's own metrics; Ctrl-C ends it
	./test/demo.sh

clean: ## remove what was built
	rm -f telemeter

help: ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1: /p' Makefile

FORCE:

# The output of the targets must not mix.
.NOTPARALLEL:
.PHONY: all check gofmt vet staticcheck test sweeps fuzz bench sim model stampede sockets test-integration test-outage test-alerts test-netns test-chaos test-readme demo clean help FORCE
