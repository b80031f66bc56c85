package main

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"sync"
	"time"

	"skein/test/flow/load"
)

// tally is what went wrong so far, and during which operation.
type tally struct {
	mu        sync.Mutex
	spans     []span
	failed    []load.Failure
	idle      int
	counts    map[string]map[string]load.Counts // by who asked, by kind
	complains []string
	say       func(string, ...any)
	verbose   bool
}

// span is an operation's time.
type span struct {
	name  string
	begun time.Time
}

func newTally(say func(string, ...any), verbose bool) *tally {
	return &tally{counts: map[string]map[string]load.Counts{}, say: say, verbose: verbose}
}

func (t *tally) begin(name string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.spans = append(t.spans, span{name, time.Now()})
}

// during names the operation that was under way at an instant.
func (t *tally) during(at time.Time) string {
	for _, s := range slices.Backward(t.spans) {
		if !at.Before(s.begun) {
			return s.name
		}
	}
	return "start"
}

func (t *tally) note(f load.Failure) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if f.Idle() {
		t.idle++
		if t.verbose {
			t.say("   idle during %q: %v", t.during(f.At), f)
		}
		return
	}
	t.failed = append(t.failed, f)
	if len(t.failed) <= 200 {
		t.say("   FAILED during %q: %v", t.during(f.At), f)
	}
}

func (t *tally) take(from string, counts map[string]load.Counts) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.counts[from] = counts
}

func (t *tally) failures() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.failed)
}

func (t *tally) idles() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.idle
}

func (t *tally) violate(w *world, format string, args ...any) {
	msg := fmt.Sprintf(format, args...)
	w.say("BROKEN: %s", msg)
	t.mu.Lock()
	defer t.mu.Unlock()
	t.complains = append(t.complains, msg)
}

func (t *tally) broken() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.failed) + len(t.complains)
}

// report takes what a client inside the cluster tells.
func (t *tally) report(rw http.ResponseWriter, r *http.Request) {
	var rep struct {
		From     string
		Counts   map[string]load.Counts
		Failures []load.Failure
	}
	if err := json.NewDecoder(http.MaxBytesReader(rw, r.Body, 16<<20)).Decode(&rep); err != nil {
		http.Error(rw, err.Error(), http.StatusBadRequest)
		return
	}
	for _, f := range rep.Failures {
		t.note(f)
	}
	t.take(rep.From, rep.Counts)
}

// summary prints the outcome and returns how much went wrong.
func (t *tally) summary(w *world) int {
	t.mu.Lock()
	defer t.mu.Unlock()
	sums := map[string]load.Counts{}
	for from, kinds := range t.counts {
		where := "inside"
		if from == "outside" {
			where = from
		}
		for kind, c := range kinds {
			s := sums[where+" "+kind]
			sums[where+" "+kind] = load.Counts{Sent: s.Sent + c.Sent, Failed: s.Failed + c.Failed, Idle: s.Idle + c.Idle}
		}
	}
	w.say("%-20s %9s %7s %5s", "clients", "requests", "failed", "idle")
	for _, k := range slices.Sorted(maps.Keys(sums)) {
		w.say("%-20s %9d %7d %5d", k, sums[k].Sent, sums[k].Failed, sums[k].Idle)
	}
	kinds := map[string]int{}
	for _, f := range t.failed {
		kinds[fmt.Sprintf("%s %s %s during %q", f.Kind, f.Class, f.Phase, t.during(f.At))]++
	}
	for _, k := range slices.Sorted(maps.Keys(kinds)) {
		w.say("%6d× %s", kinds[k], k)
	}
	for _, c := range t.complains {
		w.say("  - %s", c)
	}
	w.say("%d failed, %d operations broken (seed %d)", len(t.failed), len(t.complains), w.opts.seed)
	return len(t.failed) + len(t.complains)
}
