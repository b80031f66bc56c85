// Package arch enforces the import rules of the architecture: what may know what. Each rule carries its reason.
package arch

import (
	"encoding/json"
	"fmt"
	"io"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

type pkg struct {
	ImportPath  string
	Dir         string
	Imports     []string
	TestImports []string
	Standard    bool
}

type rule struct {
	pkg    string   // "a" or "a/..."
	except []string // packages the rule does not bind
	deny   []string // "a", "a/...", or "ours" for the whole module
	allow  []string // exceptions from deny
	why    string
}

var rules = []rule{
	{pkg: "scheduler/...", deny: []string{"ours", "os", "net", "net/...", "io/ioutil"}, allow: []string{"skein/scheduler/...", "net/netip"},
		why: "a pure library: fuzzed, benchmarked and read alone"},
	{pkg: "runtime/...", deny: []string{"ours"}, allow: []string{"skein/runtime/..."}, why: "one node's containers, no cluster words"},
	{pkg: "overlay/...", deny: []string{"ours"}, allow: []string{"skein/overlay/..."}, why: "one node's networks, no orchestration"},
	{pkg: "manager/...", deny: []string{"skein/agent/...", "skein/runtime/...", "skein/overlay/...", "skein/cmd/..."}, why: "decides; never touches a kernel"},
	{pkg: "manager/api", deny: []string{"ours"}, why: "what both sides say to each other depends on neither"},
	{pkg: "manager/store", deny: []string{"ours"}, allow: []string{"skein/manager/api", "skein/manager/allocator", "skein/manager/store/..."}, why: "state has no opinion"},
	{pkg: "agent/...", deny: []string{"skein/manager/..."}, allow: []string{"skein/manager/api"}, why: "agents and managers meet only through the API"},
	{pkg: "agent/...", except: []string{"agent/engine"}, deny: []string{"skein/runtime/...", "skein/overlay/..."}, why: "one composer, so agents can be simulated"},
	{pkg: "agent/...", deny: []string{"skein/cmd/...", "skein/scheduler/..."}, why: "a node carries out; it is composed above and decides nothing"},
	{pkg: "...", except: []string{"test/..."}, deny: []string{"skein/test/..."}, why: "tests know the product, never the reverse"},
	{pkg: "...", except: []string{"cmd/cli", "test/..."}, deny: []string{"github.com/docker/cli/..."}, why: "the command line's packages cost start-up time and memory: only the CLI pays (DECISIONS 4)"},
	{pkg: "...", deny: []string{"github.com/docker/docker/...", "github.com/moby/moby/v2/...", "github.com/moby/swarmkit/..."}, why: "their engines are not our foundation"},
}

func load(t *testing.T) []pkg {
	t.Helper()
	cmd := exec.Command("go", "list", "-e", "-json=ImportPath,Dir,Imports,TestImports,Standard", "skein/...")
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	var pkgs []pkg
	dec := json.NewDecoder(strings.NewReader(string(out)))
	for {
		var p pkg
		if err := dec.Decode(&p); err == io.EOF {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		pkgs = append(pkgs, p)
	}
	if len(pkgs) < 10 {
		t.Fatalf("go list found only %d packages", len(pkgs))
	}
	return pkgs
}

// match reports whether path is pattern, or below it when the pattern ends in "/...".
func match(pattern, path string) bool {
	if pattern == "..." {
		return true
	}
	if base, ok := strings.CutSuffix(pattern, "/..."); ok {
		return path == base || strings.HasPrefix(path, base+"/")
	}
	return pattern == path
}

func (r rule) denies(imp string) bool {
	if slices.ContainsFunc(r.allow, func(p string) bool { return match(p, imp) }) {
		return false
	}
	return slices.ContainsFunc(r.deny, func(p string) bool {
		if p == "ours" {
			return strings.HasPrefix(imp, "skein/")
		}
		return match(p, imp)
	})
}

// violations is pure, so that the rules themselves can be tested.
func violations(pkgs []pkg) []string {
	var out []string
	for _, p := range pkgs {
		rel := strings.TrimPrefix(p.ImportPath, "skein/")
		for _, r := range rules {
			if !match(r.pkg, rel) || slices.ContainsFunc(r.except, func(e string) bool { return match(e, rel) }) {
				continue
			}
			for _, imp := range p.Imports {
				if r.denies(imp) {
					out = append(out, fmt.Sprintf("%s imports %s: %s", rel, imp, r.why))
				}
			}
		}
	}
	return out
}

func TestImports(t *testing.T) {
	for _, v := range violations(load(t)) {
		t.Error(v)
	}
}

func TestRulesBite(t *testing.T) {
	for _, c := range []struct{ pkg, imp string }{
		{"scheduler", "os"}, {"scheduler", "skein/manager/api"}, {"runtime/cgroup", "skein/overlay"}, {"overlay/dns", "skein/runtime"},
		{"manager/control", "skein/agent"}, {"agent", "skein/manager/store"}, {"agent/task", "skein/runtime"}, {"cmd/daemon", "skein/test/lab"},
		{"agent/engine", "github.com/docker/cli/cli/command"},
	} {
		if len(violations([]pkg{{ImportPath: "skein/" + c.pkg, Imports: []string{c.imp}}})) == 0 {
			t.Errorf("%s may import %s, but must not", c.pkg, c.imp)
		}
	}
	if v := violations([]pkg{{ImportPath: "skein/agent/engine", Imports: []string{"skein/runtime", "skein/overlay", "skein/manager/api"}}}); len(v) != 0 {
		t.Errorf("the composer is bound: %v", v)
	}
}

func TestNames(t *testing.T) {
	for _, p := range load(t) {
		switch base := filepath.Base(p.ImportPath); base {
		case "util", "utils", "common", "helper", "helpers", "types", "misc", "base", "shared":
			t.Errorf("%s: a package is named after what it does, not %q", p.ImportPath, base)
		}
	}
}

func TestTopLevel(t *testing.T) {
	allowed := map[string]bool{"manager": true, "agent": true, "scheduler": true, "runtime": true, "overlay": true, "cmd": true, "test": true}
	for _, p := range load(t) {
		top, _, _ := strings.Cut(strings.TrimPrefix(p.ImportPath, "skein/"), "/")
		if !allowed[top] {
			t.Errorf("%s is outside the fixed top-level layout", p.ImportPath)
		}
	}
}
