package main

import (
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/moby/moby/api/types/container"
)

// TestShort is every run of the program, a few seconds of each, with a fixed seed.
func TestShort(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: real nodes are left out")
	}
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes network namespaces, mounts and cgroups")
	}
	short := map[string]int{"kill-daemon": 4, "kill-supervisor": 3, "kill-both": 2, "oom": 10, "many": 24, "many-bridge": 8, "many-direct": 24, "cycles": 16, "cycles-direct": 60}
	w, err := newWorld(t.Context(), options{name: "endt", seed: 1, clients: 3})
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range runs() {
		if short[r.name] == 0 {
			t.Errorf("run %s has no short version", r.name)
			continue
		}
		t.Log(w.verdict(t.Context(), r, short[r.name]))
	}
	w.down()
	for _, b := range w.broken {
		t.Error(b)
	}
}

func TestHistory(t *testing.T) {
	whole := "a begin\na 0\na 1\na 2\n"
	for _, c := range []struct {
		name, log string
		gaps      bool
		runs      []logRun
		lost      int
		bad       bool
	}{
		{name: "nothing", log: ""},
		{name: "one run", log: whole, runs: []logRun{{lines: 3}}},
		{name: "two runs, one stopped", log: "a begin\na 0\na end 1\n" + whole, runs: []logRun{{1, true}, {3, false}}},
		{name: "a line is missing", log: "a begin\na 0\na 2\n", bad: true},
		{name: "a line may be missing", log: "a begin\na 0\na 2\n", gaps: true, runs: []logRun{{lines: 3}}, lost: 1},
		{name: "a line twice", log: "a begin\na 0\na 0\n", gaps: true, bad: true},
		{name: "lines before the beginning", log: "a 0\n", bad: true},
		{name: "somebody else's line", log: "a begin\nb 0\n", bad: true},
		{name: "a torn line", log: "a begin\na\n", bad: true},
	} {
		h, err := readHistory("a", c.log, c.gaps)
		if (err != nil) != c.bad || err == nil && (!slices.Equal(h.runs, c.runs) || h.lost != c.lost) {
			t.Errorf("%s: %+v, %v", c.name, h, err)
		}
	}
}

func TestCheck(t *testing.T) {
	run := func(runs ...logRun) history { return history{runs: runs} }
	exited := func(code int, text string) container.State {
		return container.State{Status: container.StateExited, ExitCode: code, Error: text}
	}
	three := job{code: 7, lines: 3, startsTried: 1, startsDone: 1}
	for _, c := range []struct {
		name  string
		job   job
		state container.State
		log   history
		bad   string
	}{
		{"as it should be", three, exited(7, ""), run(logRun{lines: 3}), ""},
		{"another code", three, exited(0, ""), run(logRun{lines: 3}), "exit code 0"},
		{"lines are missing", three, exited(7, ""), run(logRun{lines: 2}), "after 2 lines"},
		{"it never ran", three, exited(7, ""), run(), "0 runs"},
		{"it ran twice", three, exited(7, ""), run(logRun{lines: 3}, logRun{lines: 3}), "2 runs"},
		{"created, though it ran", job{code: 7, lines: 3, startsTried: 1}, container.State{Status: container.StateCreated}, run(logRun{lines: 3}), "called created"},
		{"a start without an answer that did nothing", job{code: 7, lines: 3, startsTried: 1}, container.State{Status: container.StateCreated}, run(), ""},
		{"killed by nobody", three, exited(137, ""), run(logRun{lines: 2}), "exit code 137"},
		{"killed", job{code: 7, startsTried: 1, startsDone: 1, killed: true}, exited(137, ""), run(logRun{lines: 2}), ""},
		{"an unknown code that somebody saw", three, exited(255, "exit code unknown"), run(logRun{lines: 3}), "exit code 255"},
		{"an unknown code", job{code: 7, lines: 3, startsTried: 1, startsDone: 1, unseen: true}, exited(255, "exit code unknown"), run(logRun{lines: 3}), ""},
		{"still called running", three, container.State{Status: container.StateRunning, Running: true}, run(logRun{lines: 3}), "state"},
	} {
		err := c.job.check(&c.state, c.log)
		if (err == nil) != (c.bad == "") || err != nil && !strings.Contains(err.Error(), c.bad) {
			t.Errorf("%s: %v, want %q", c.name, err, c.bad)
		}
	}
}

func TestGrowth(t *testing.T) {
	got := growth(holdings{"links": 3, "mounts": 5, "daemon threads": 10}, holdings{"links": 4, "mounts": 5, "daemon threads": 12, "volumes": 1})
	if want := []string{"links 3 → 4", "volumes 0 → 1"}; !slices.Equal(got, want) {
		t.Errorf("growth %v, want %v", got, want)
	}
}

func TestChoose(t *testing.T) {
	if all, err := choose(""); err != nil || len(all) != len(runs()) {
		t.Errorf("no names: %d runs, %v", len(all), err)
	}
	if some, err := choose("oom,cycles"); err != nil || len(some) != 2 {
		t.Errorf("two names: %d runs, %v", len(some), err)
	}
	if _, err := choose("nosuch"); err == nil {
		t.Error("nosuch was accepted")
	}
}
