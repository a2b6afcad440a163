# Building needs Go and make. With a C compiler, the tests run under the race detector.
# The targets work in a git clone and in an unpacked release archive.

GO         ?= go
PROMTOOL   ?= promtool
BENCH      ?= full
OUTAGE     ?= full
CHAOS      ?= full
HOSTILE    ?= full
SEED       ?= 0
SITES      ?= 10000
# The architectures of make dist and make test-dist.
ARCHS      ?= amd64 arm64 armv7
# The earlier version of make test-upgrade. A commit that raises the version of a format raises this too.
FROM       ?= 2fc253e
FUZZTIME   ?= 3s
STATICCHECK = honnef.co/go/tools/cmd/staticcheck@v0.8.2

# The race detector needs a C compiler: $(CC), which may have arguments, or else the
# first of gcc, cc and clang on PATH.
found    = $(shell command -v $(firstword $(1)) 2>/dev/null)
RACE_CC := $(or $(if $(call found,$(CC)),$(CC)),$(call found,gcc),$(call found,cc),$(call found,clang))

all: telemeter ## build ./telemeter, one static binary (the default)

# This target always runs go build, because Go decides itself what to rebuild. The version
# comes from -buildvcs, which is set here because GOFLAGS may disable it.
telemeter: FORCE
	CGO_ENABLED=0 $(GO) build -buildvcs=auto -trimpath -ldflags "-s -w" -o $@ .

dist: ## build static binaries for Linux on amd64, arm64 and armv7 (ARCHS), and SHA256SUMS, in dist/
	@GO="$(GO)" ARCHS="$(ARCHS)" ./test/dist.sh

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

test-32bit: ## unit tests in one process, on 32 bits as on armv7: a minute; needs a machine that runs 386 binaries
	GOARCH=386 CGO_ENABLED=0 $(GO) test -short -timeout 30m .

sweeps: ## tests of many states in one goroutine, which "test" leaves out under the race detector
	$(GO) test -timeout 30m -run '^TestSweep' .

fuzz: ## every fuzz target for FUZZTIME (3s)
	@GO="$(GO)" ./test/fuzz.sh $(FUZZTIME)

bench: ## measure a server and a client beside yardsticks, then the inner loops: 15 minutes; BENCH=short: the first, in a minute; BENCH=scale: 20,000 sites for five minutes
	$(GO) test -count=1 -timeout 60m -v -run '^TestSpeed(|Scale)$$' . -args -speed $(BENCH)
ifeq ($(BENCH),full)
	$(GO) test -run '^$$' -bench . -skip GossipSockets -benchmem ./...
endif

sim: ## simulate gossip of up to 300 members in virtual time, and print the table of figures
	$(GO) test -count=1 -timeout 30m -run '^TestSimulationTable$$' -v . -args -sim

model: ## check delivery in 5,000,000 random interleavings in virtual time; SEED: the seed of the first
	$(GO) test -count=1 -timeout 60m -run '^TestSweepDelivery$$' -v . -args -delivery 5000000 -seed $(SEED)

stampede: ## simulate SITES (10,000) sites after a join, an outage of the center and the loss of all disks; takes 25 minutes and 4 GiB
	$(GO) test -count=1 -timeout 90m -v -run '^TestStampede$$' . -args -stampede $(SITES)

sockets: ## run gossip on real sockets for seven minutes, and print the table of figures
	$(GO) test -timeout 30m -run '^$$' -bench '^BenchmarkGossipSockets$$' .

test-integration: telemeter ## test a client and two servers with a real Prometheus as source and sink
	./test/integration.sh

test-outage: ## test all kinds of outages with a real Prometheus (PROMETHEUS): an hour; OUTAGE=short: eight minutes; also with VictoriaMetrics if it is installed, and with Prometheus 3 (PROMETHEUS3)
	$(GO) test -count=1 -timeout 120m -v -run '^TestOutage(|Drain|Late|Ages|Clocks|Backfill|BackfillReplicas|BackfillHour)$$' . -args -outage $(OUTAGE)

test-upgrade: ## test the upgrade of a ring and a client from the commit FROM, and the way back, with a real Prometheus: a minute; needs the git history
	$(GO) test -count=1 -timeout 30m -v -run '^TestUpgrade$$' . -args -upgrade $(FROM)

test-hostile: ## attack a ring of servers, and check a well-behaved site, a client and a real Prometheus meanwhile: ten minutes; HOSTILE=short: 75 seconds; HOSTILE=full:strangers: one attack; needs Linux
	$(GO) test -count=1 -timeout 60m -v -run '^TestHostile$$' . -args -hostile $(HOSTILE)

test-alerts: ## check the central Prometheus's configuration and alerts with promtool (PROMTOOL)
	$(PROMTOOL) check config testdata/prometheus.yml
	for page in README.md docs/operating.md; do \
		sed -n '/^```yaml$$/,/^```$$/p' $$page | grep -v '^```' | $(PROMTOOL) check config --syntax-only /dev/stdin || exit 1; \
	done
	$(PROMTOOL) check rules testdata/rules.yml testdata/alerts.yml
	$(PROMTOOL) test rules testdata/alerts_test.yml

test-netns: telemeter ## test five servers in a network that is cut in two and healed; needs root and Linux
	./test/netns.sh

test-chaos: ## test restarts, kills, network cuts, joins, and lost, restored or damaged disks of servers: 20 minutes; CHAOS=short: three minutes; SEED; needs root and Linux
	$(GO) test -count=1 -timeout 60m -v -exec 'unshare --net --mount --propagation private' -run '^TestChaos$$' . -args -chaos $(CHAOS) -seed $(SEED)

test-docs: telemeter ## run the commands of README.md and docs/operating.md, with the addresses replaced
	./test/docs.sh

test-dist: ## test that make dist gives the same binaries in two directories: two to six minutes; ARCHS=amd64: less
	$(GO) test -count=1 -timeout 30m -run '^TestDist$$' . -args -dist "$(ARCHS)"

demo: telemeter ## run a server, and a client that pushes the server's own metrics, until Ctrl-C
	./test/demo.sh

clean: ## remove the binary and dist/
	rm -f telemeter
	rm -rf dist

help: ## print this list
	@sed -n 's/^\([a-z0-9-]*\):[^#]*## /\1: /p' Makefile

FORCE:

# The output of the targets must not mix.
.NOTPARALLEL:
.PHONY: all check gofmt vet staticcheck test sweeps fuzz bench sim model stampede sockets test-integration test-outage test-hostile test-alerts test-netns test-chaos test-docs test-32bit test-dist test-upgrade dist demo clean help FORCE
