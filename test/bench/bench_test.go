package main

import (
	"context"
	"os"
	"path/filepath"
	"testing"
	"time"

	"skein/test/images"
)

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && (os.Args[1] == "supervisor" || os.Args[1] == hiddenWord) {
		main() // what the program starts itself as
		return
	}
	os.Exit(m.Run())
}

// TestRuntimeSteps does a round of what measures the runtime alone; figures are for people.
func TestRuntimeSteps(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: real containers are left out")
	}
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes namespaces, mounts and cgroups")
	}
	b := &bench{dir: t.TempDir(), opts: options{rounds: 1, crowd: 5, million: 20_000, binary: "/proc/self/exe"}}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := images.Build(ctx, filepath.Join(b.dir, "noop"), "skein/test/bench/noop"); err != nil {
		t.Fatal(err)
	}
	for _, s := range steps() {
		if !s.alone {
			continue
		}
		if b.opts.rounds = 1; s.name == "oci" {
			b.opts.rounds = -1 // one of the two that warm up
		}
		if err := s.run(b, ctx); err != nil {
			t.Errorf("%s: %v", s.name, err)
		}
	}
}

// A bundle is complete.
func TestBundle(t *testing.T) {
	m := &ociBench{dir: t.TempDir(), group: "/skein-bench-test"}
	if err := os.WriteFile(filepath.Join(m.dir, "noop"), nil, 0o755); err != nil {
		t.Fatal(err)
	}
	dir, err := m.bundle("x", fullSpec("true"))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range []string{"config.json", "rootfs/noop"} {
		if _, err := os.Stat(filepath.Join(dir, f)); err != nil {
			t.Error(err)
		}
	}
	if c := (&bench{dir: m.dir}).commands(); c[0].Name != "skein-oci" {
		t.Errorf("commands %v", c)
	}
}
