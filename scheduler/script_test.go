package scheduler

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

var rewrite = flag.Bool("rewrite", false, "write the observed output into testdata")

// TestScripts runs testdata/*.txt: blocks of commands, "----", expected output, an empty line.
//
//	nodes NAME{cpu=2 mem=1G label.zone=x engine.disk=ssd drained|paused|down|unknown role=manager os=linux arch=arm64 ip=10.0.0.1} ...
//	hold SERVICE NODE...                 tasks that run already
//	schedule NAME{n=3 cpu=1 mem=1G constraint="..." spread=node.labels.zone port=80/tcp max=2 platform=linux/amd64 node=a}
//	end SERVICE NODE                     one task of the last schedule ends
//	fail SERVICE NODE N                  recent failures
func TestScripts(t *testing.T) {
	files, _ := filepath.Glob("testdata/*.txt")
	if len(files) == 0 {
		t.Fatal("no scripts")
	}
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			got := runScript(t, string(text))
			if *rewrite {
				if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			} else if got != string(text) {
				t.Errorf("%s differs, got:\n%s", file, got)
			}
		})
	}
}

func runScript(t *testing.T, text string) string {
	var out strings.Builder
	sc := script{t: t, s: New(), reqs: map[string]*Requirements{}}
	for _, block := range strings.Split(strings.TrimRight(text, "\n"), "\n\n") {
		commands, _, _ := strings.Cut(block, "\n----")
		out.WriteString(commands + "\n----\n")
		for line := range strings.SplitSeq(commands, "\n") {
			if line = strings.TrimSpace(line); line != "" && line[0] != '#' {
				out.WriteString(sc.command(line))
			}
		}
		out.WriteString("\n")
	}
	return strings.TrimRight(out.String(), "\n") + "\n"
}

type script struct {
	t    *testing.T
	s    *Scheduler
	reqs map[string]*Requirements
}

func (sc *script) command(line string) string {
	verb, rest, _ := strings.Cut(line, " ")
	switch verb {
	case "nodes":
		for rest != "" {
			name, attrs, after := item(rest)
			sc.s.SetNode(node(sc.t, name, attrs))
			rest = after
		}
	case "remove":
		sc.s.RemoveNode(rest)
	case "hold":
		f := strings.Fields(rest)
		for _, n := range f[1:] {
			sc.s.Hold(Holding{Service: f[0], Node: n, Req: sc.req(f[0]), Meant: true})
		}
	case "end":
		f := strings.Fields(rest)
		sc.s.Release(Holding{Service: f[0], Node: f[1], Req: sc.req(f[0]), Meant: true})
	case "fail":
		f := strings.Fields(rest)
		n, _ := strconv.Atoi(f[2])
		sc.s.SetFailures(f[0], f[1], n)
	case "schedule":
		name, attrs, _ := item(rest)
		return sc.schedule(name, attrs)
	default:
		sc.t.Fatalf("unknown command %q", line)
	}
	return ""
}

func (sc *script) req(service string) *Requirements {
	if sc.reqs[service] == nil {
		sc.reqs[service] = &Requirements{}
	}
	return sc.reqs[service]
}

func (sc *script) schedule(name string, attrs [][2]string) string {
	g := Group{Service: name, Count: 1, Req: &Requirements{}}
	for _, a := range attrs {
		switch v := a[1]; a[0] {
		case "n":
			g.Count, _ = strconv.Atoi(v)
		case "cpu", "mem":
			setResource(&g.Req.Reserve, a)
		case "max":
			g.Req.MaxPerNode, _ = strconv.Atoi(v)
		case "node":
			g.Node = v
		case "constraint":
			c, err := ParseConstraint(v)
			if err != nil {
				return "error: " + err.Error() + "\n"
			}
			g.Req.Constraints = append(g.Req.Constraints, c)
		case "spread":
			label, err := ParseSpread(v)
			if err != nil {
				return "error: " + err.Error() + "\n"
			}
			g.Req.Spread = append(g.Req.Spread, label)
		case "platform":
			osName, arch, _ := strings.Cut(v, "/")
			g.Req.Platforms = append(g.Req.Platforms, Platform{osName, arch})
		case "port":
			n, proto, _ := strings.Cut(v, "/")
			number, _ := strconv.Atoi(n)
			g.Req.Ports = append(g.Req.Ports, Port{proto, uint16(number)})
		default:
			sc.t.Fatalf("unknown attribute %q", a[0])
		}
	}
	sc.reqs[name] = g.Req
	d := sc.s.Schedule([]Group{g})[0]
	placed := strings.Join(d.Nodes, " ")
	if placed == "" {
		placed = "none"
	}
	if d.Reason != "" {
		placed += " " + strings.TrimPrefix(d.Reason, "no suitable node ")
	}
	return name + ": " + placed + "\n"
}

// item cuts name{key=value key="quoted value" flag} from the front.
func item(s string) (name string, attrs [][2]string, rest string) {
	s = strings.TrimSpace(s)
	name, s, ok := strings.Cut(s, "{")
	if !ok {
		name, rest, _ = strings.Cut(name, " ")
		return name, nil, rest
	}
	for {
		s = strings.TrimLeft(s, " ")
		if s[0] == '}' {
			return name, attrs, strings.TrimSpace(s[1:])
		}
		end := strings.IndexAny(s, " }=")
		key := s[:end]
		s = s[end:]
		value := ""
		if s[0] == '=' {
			if s[1] == '"' {
				end = strings.IndexByte(s[2:], '"') + 2
				value, s = s[2:end], s[end+1:]
			} else {
				end = strings.IndexAny(s, " }")
				value, s = s[1:end], s[end:]
			}
		}
		attrs = append(attrs, [2]string{key, value})
	}
}

func node(t *testing.T, name string, attrs [][2]string) Node {
	n := Node{ID: name, Hostname: name, Role: "worker", Platform: Platform{"linux", "amd64"}, Labels: map[string]string{}, EngineLabels: map[string]string{}}
	for _, a := range attrs {
		key, label, _ := strings.Cut(a[0], ".")
		switch key {
		case "cpu", "mem":
			setResource(&n.Total, a)
		case "label":
			n.Labels[label] = a[1]
		case "engine":
			n.EngineLabels[label] = a[1]
		case "down":
			n.State = Down
		case "unknown":
			n.State = Unknown
		case "drained":
			n.State = Drained
		case "paused":
			n.State = Paused
		case "role":
			n.Role = a[1]
		case "os":
			n.Platform.OS = a[1]
		case "arch":
			n.Platform.Arch = a[1]
		case "ip":
			n.Addr = a[1]
		case "hostname":
			n.Hostname = a[1]
		default:
			t.Fatalf("unknown attribute %q of node %s", a[0], name)
		}
	}
	return n
}

func setResource(r *Resources, a [2]string) {
	if a[0] == "cpu" {
		f, _ := strconv.ParseFloat(a[1], 64)
		r.NanoCPUs = int64(f * 1e9)
		return
	}
	unit := map[byte]int64{'G': 1 << 30, 'M': 1 << 20}[a[1][len(a[1])-1]]
	n, _ := strconv.ParseInt(a[1][:len(a[1])-1], 10, 64)
	r.MemoryBytes = n * unit
	if unit == 0 {
		panic(fmt.Sprintf("memory %q lacks a unit", a[1]))
	}
}
