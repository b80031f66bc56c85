package orchestrator

import (
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/moby/moby/api/types/swarm"

	"skein/manager/api"
	"skein/manager/placement"
	"skein/manager/store"
)

var rewrite = flag.Bool("rewrite", false, "write the observed output into testdata")

// TestScripts runs testdata/*.txt: blocks of commands, "----", expected output, an empty line. All controllers run, with a store and a
// virtual clock. Commands:
//
//	node NAME [ready|down|active|pause|drain|cpu=2|mem=1G|label.zone=x|remove]...
//	service NAME [image=|replicas=|global|job=CONCURRENT/TOTAL|globaljob|restart=|delay=|attempts=|window=|constraint=|mem=|u.NAME=|r.NAME=|force=|label=|priority=]...  create or change
//	rollback NAME        as control does it by hand
//	remove NAME
//	history N            retention limit
//	status TASK STATE [text]   what the agent says; TASK is web.1 (newest) or web.1#2
//	agents               agents bring every task where it shall be
//	advance DURATION [agents]
//	leader               another manager takes over
//	rebalance            lists the moves that level the nodes, and asks for them
//	tasks [NAME]         list
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

type script struct {
	*world
	specs map[string]*swarm.ServiceSpec
	nodes map[string]*api.NodeRecord
	seen  map[string]string
	out   strings.Builder
}

func runScript(t *testing.T, text string) string {
	sc := &script{world: newWorld(t), specs: map[string]*swarm.ServiceSpec{}, nodes: map[string]*api.NodeRecord{}, seen: map[string]string{}}
	for _, block := range strings.Split(strings.TrimRight(text, "\n"), "\n\n") {
		commands, _, _ := strings.Cut(block, "\n----")
		sc.out.WriteString(commands + "\n----\n")
		for line := range strings.SplitSeq(commands, "\n") {
			if line = strings.TrimSpace(line); line != "" && line[0] != '#' {
				sc.command(line)
				next := sc.settle()
				sc.diff()
				if !next.IsZero() && strings.HasPrefix(line, "status") {
					fmt.Fprintf(&sc.out, "wake at +%v\n", next.Sub(sc.now))
				}
			}
		}
		sc.out.WriteString("\n")
	}
	return strings.TrimRight(sc.out.String(), "\n") + "\n"
}

var word = regexp.MustCompile(`[^\s"]*"[^"]*"|\S+`)

func (sc *script) command(line string) {
	args := word.FindAllString(line, -1)
	for i := range args {
		args[i] = strings.ReplaceAll(args[i], `"`, "")
	}
	switch args[0] {
	case "node":
		sc.node(args[1], args[2:])
	case "service":
		sc.service(args[1], args[2:])
	case "rollback":
		sc.rollback(args[1])
	case "remove":
		sc.do(&api.Change{Kind: &api.Change_DeleteService{DeleteService: args[1]}})
	case "history":
		n, _ := strconv.ParseInt(args[1], 10, 64)
		var rec *api.ClusterRecord
		sc.view(func(tx store.ReadTx) { rec = tx.Cluster() })
		text, _ := json.Marshal(swarm.Spec{Orchestration: swarm.OrchestrationConfig{TaskHistoryRetentionLimit: &n}})
		sc.do(&api.Change{Kind: &api.Change_PutCluster{PutCluster: &api.ClusterRecord{
			Id: rec.Id, SpecJson: text, OverlayPool: rec.OverlayPool, MeshPool: rec.MeshPool, UlaPrefix: rec.UlaPrefix, OverlayBits: rec.OverlayBits, DataPort: rec.DataPort}}})
	case "cluster": // a label of the cluster: NAME=VALUE
		name, value, _ := strings.Cut(args[1], "=")
		var rec *api.ClusterRecord
		sc.view(func(tx store.ReadTx) { rec = tx.Cluster() })
		text, _ := json.Marshal(swarm.Spec{Annotations: swarm.Annotations{Labels: map[string]string{name: value}}})
		sc.do(&api.Change{Kind: &api.Change_PutCluster{PutCluster: &api.ClusterRecord{
			Id: rec.Id, SpecJson: text, OverlayPool: rec.OverlayPool, MeshPool: rec.MeshPool, UlaPrefix: rec.UlaPrefix, OverlayBits: rec.OverlayBits, DataPort: rec.DataPort}}})
	case "status":
		sc.status(args[1], args[2], strings.Join(args[3:], " "))
	case "agents":
		sc.agents()
	case "advance":
		d, err := time.ParseDuration(args[1])
		if err != nil {
			sc.t.Fatal(err)
		}
		look := func() {
			sc.settle()
			sc.diff()
		}
		if len(args) == 2 {
			sc.advance(d, look)
			break
		}
		const tick = 500 * time.Millisecond // agents are that slow
		for ; d > 0; d -= tick {
			sc.agents()
			look()
			sc.advance(min(d, tick), look)
		}
	case "leader":
		sc.newTerm()
	case "rebalance":
		sc.rebalance()
	case "tasks":
		for _, t := range sc.tasks() {
			if len(args) < 2 || t.ServiceID == args[1] {
				fmt.Fprintf(&sc.out, "  %s %s\n", sc.name(t), describe(t))
			}
		}
	default:
		sc.t.Fatalf("unknown command %q", line)
	}
}

func (sc *script) node(name string, args []string) {
	n := sc.nodes[name]
	if n == nil {
		n = &api.NodeRecord{Id: name, Hostname: name, Role: "worker", Availability: "active", Labels: map[string]string{},
			UnderlayAddr: fmt.Sprintf("192.168.0.%d", len(sc.nodes)+1), Status: &api.NodeStatus{State: "ready"}}
		sc.nodes[name] = n
	}
	d := swarm.NodeDescription{Hostname: name, Platform: swarm.Platform{OS: "linux", Architecture: "x86_64"}}
	_ = json.Unmarshal(n.DescriptionJson, &d)
	for _, a := range args {
		key, value, _ := strings.Cut(a, "=")
		switch {
		case key == "ready" || key == "down" || key == "unknown":
			n.Status = &api.NodeStatus{NodeId: name, State: key}
		case key == "active" || key == "pause" || key == "drain":
			if key == "active" && n.Availability != key { // as control does it
				n.ActiveSince = sc.now.UnixNano()
			}
			n.Availability = key
		case key == "mem":
			d.Resources.MemoryBytes = bytesOf(value)
		case strings.HasPrefix(key, "label."):
			n.Labels[key[len("label."):]] = value
		case key == "option":
			name, v, _ := strings.Cut(value, "=")
			n.Labels[name] = v
		case key == "remove":
			sc.do(&api.Change{Kind: &api.Change_DeleteNode{DeleteNode: name}})
			delete(sc.nodes, name)
			return
		default:
			sc.t.Fatalf("node attribute %q", a)
		}
	}
	n.DescriptionJson, _ = json.Marshal(d)
	sc.do(&api.Change{Kind: &api.Change_PutNode{PutNode: n}})
}

func bytesOf(s string) int64 {
	n, _ := strconv.ParseInt(strings.TrimRight(s, "MG"), 10, 64)
	if strings.HasSuffix(s, "G") {
		n <<= 10
	}
	return n << 20
}

func (sc *script) service(name string, args []string) {
	spec := sc.specs[name]
	if spec == nil {
		one := uint64(1)
		spec = &swarm.ServiceSpec{Mode: swarm.ServiceMode{Replicated: &swarm.ReplicatedService{Replicas: &one}}}
		spec.TaskTemplate.ContainerSpec = &swarm.ContainerSpec{Image: "v1"}
		sc.specs[name] = spec
	}
	for _, a := range args {
		setSpec(sc.t, spec, a)
	}
	if err := sc.putService(name, spec, nil); err != nil {
		fmt.Fprintf(&sc.out, "error: %v\n", err)
		sc.t.Logf("service %s: %v", name, err)
	}
}

func setSpec(t testing.TB, spec *swarm.ServiceSpec, arg string) {
	key, value, _ := strings.Cut(arg, "=")
	n, _ := strconv.ParseUint(value, 10, 64)
	d, _ := time.ParseDuration(value)
	tt := &spec.TaskTemplate
	if tt.RestartPolicy == nil {
		tt.RestartPolicy = &swarm.RestartPolicy{}
	}
	if tt.Placement == nil {
		tt.Placement = &swarm.Placement{}
	}
	switch key {
	case "image":
		tt.ContainerSpec.Image = value
	case "replicas":
		spec.Mode.Replicated = &swarm.ReplicatedService{Replicas: &n}
	case "global":
		spec.Mode = swarm.ServiceMode{Global: &swarm.GlobalService{}}
	case "job":
		var concurrent, total uint64
		if _, err := fmt.Sscanf(value, "%d/%d", &concurrent, &total); err != nil {
			t.Fatal(err)
		}
		spec.Mode = swarm.ServiceMode{ReplicatedJob: &swarm.ReplicatedJob{MaxConcurrent: &concurrent, TotalCompletions: &total}}
	case "globaljob":
		spec.Mode = swarm.ServiceMode{GlobalJob: &swarm.GlobalJob{}}
	case "restart":
		tt.RestartPolicy.Condition = swarm.RestartPolicyCondition(value)
	case "delay":
		tt.RestartPolicy.Delay = &d
	case "attempts":
		tt.RestartPolicy.MaxAttempts = &n
	case "window":
		tt.RestartPolicy.Window = &d
	case "constraint":
		tt.Placement.Constraints = slices.DeleteFunc([]string{value}, func(s string) bool { return s == "" })
	case "maxpernode":
		tt.Placement.MaxReplicas = n
	case "mem":
		tt.Resources = &swarm.ResourceRequirements{Reservations: &swarm.Resources{MemoryBytes: bytesOf(value)}}
	case "force":
		tt.ForceUpdate = n
	case "priority":
		spec.Labels = map[string]string{placement.LabelPriority: value}
	case "option":
		name, v, _ := strings.Cut(value, "=")
		spec.Labels = map[string]string{name: v}
	case "label":
		spec.Labels = map[string]string{"l": value}
	default:
		if field, ok := strings.CutPrefix(key, "u."); ok {
			spec.UpdateConfig = setUpdate(t, spec.UpdateConfig, field, value)
		} else if field, ok := strings.CutPrefix(key, "r."); ok {
			spec.RollbackConfig = setUpdate(t, spec.RollbackConfig, field, value)
		} else {
			t.Fatalf("service attribute %q", arg)
		}
	}
}

func setUpdate(t testing.TB, c *swarm.UpdateConfig, field, value string) *swarm.UpdateConfig {
	if c == nil {
		c = &swarm.UpdateConfig{Parallelism: 1}
	}
	switch field {
	case "parallelism":
		c.Parallelism, _ = strconv.ParseUint(value, 10, 64)
	case "delay":
		c.Delay, _ = time.ParseDuration(value)
	case "monitor":
		c.Monitor, _ = time.ParseDuration(value)
	case "action":
		c.FailureAction = swarm.FailureAction(value)
	case "ratio":
		f, _ := strconv.ParseFloat(value, 32)
		c.MaxFailureRatio = float32(f)
	case "order":
		c.Order = swarm.UpdateOrder(value)
	default:
		t.Fatalf("update field %q", field)
	}
	return c
}

func (sc *script) rollback(name string) {
	var prev swarm.ServiceSpec
	sc.view(func(tx store.ReadTx) { _ = json.Unmarshal(tx.Service(name).PreviousSpecJson, &prev) })
	sc.specs[name] = &prev
	st := &api.UpdateStatus{State: string(swarm.UpdateStateRollbackStarted), Started: sc.now.UnixNano(), Message: "manually requested rollback"}
	if err := sc.putService(name, &prev, st); err != nil {
		sc.t.Fatal(err)
	}
}

func (sc *script) status(ref, state, text string) {
	var found *store.Task
	for _, t := range sc.tasks() {
		n := sc.name(t)
		slot, _, _ := strings.Cut(n, "#")
		if n == ref || slot == ref {
			found = t
		}
	}
	if found == nil {
		sc.t.Fatalf("no task %s", ref)
	}
	for s := range api.TaskOrphaned + 1 {
		if s.String() == strings.ToLower(state) {
			sc.report(found, s, text)
			return
		}
	}
	sc.t.Fatalf("no state %s", state)
}

// agents bring every task on a living node to its desired state, one round.
func (sc *script) agents() {
	sc.settle()
	for _, t := range sc.tasks() {
		n := sc.nodes[t.NodeID]
		switch {
		case n == nil || n.Status.State == "down" || !t.Live():
		case t.Desired >= api.TaskShutdown:
			sc.report(t, api.TaskShutdown, "")
		case t.State < t.Desired:
			sc.report(t, t.Desired, "")
		}
	}
}

func describe(t *store.Task) string {
	s := fmt.Sprintf("rev=%d desired=%s %s", t.Revision, strings.ToUpper(t.Desired.String()), strings.ToUpper(t.State.String()))
	if t.NodeID != "" {
		s += " on " + t.NodeID
	}
	if e := t.Status.GetErr(); e != "" {
		s += fmt.Sprintf(" %q", e)
	}
	return s
}

// diff prints what changed since the last look.
func (sc *script) diff() {
	now := map[string]string{}
	var keys []string
	put := func(k, v string) {
		now[k] = v
		keys = append(keys, k)
	}
	sc.view(func(tx store.ReadTx) {
		for _, svc := range tx.Services() {
			if st := svc.UpdateStatus; st.GetState() != "" {
				put(svc.Id, fmt.Sprintf("%s %q", st.State, sc.pretty(st.Message)))
			}
		}
	})
	for _, t := range sc.tasks() {
		put(sc.name(t), describe(t))
	}
	for _, k := range keys {
		if old, had := sc.seen[k]; !had {
			fmt.Fprintf(&sc.out, "+ %s %s\n", k, now[k])
		} else if old != now[k] {
			fmt.Fprintf(&sc.out, "  %s %s\n", k, now[k])
		}
	}
	var gone []string
	for k := range sc.seen {
		if _, still := now[k]; !still {
			gone = append(gone, k)
		}
	}
	slices.Sort(gone)
	for _, k := range gone {
		fmt.Fprintf(&sc.out, "- %s\n", k)
	}
	sc.seen = now
}

func (sc *script) pretty(message string) string {
	for id, name := range sc.names {
		message = strings.ReplaceAll(message, id, name)
	}
	return message
}

func (sc *script) rebalance() {
	var ids []string
	sc.view(func(tx store.ReadTx) {
		for _, m := range placement.Plan(tx, "") {
			fmt.Fprintf(&sc.out, "  move %s from %s to %s\n", sc.name(m.Task), m.Task.NodeID, m.To)
			ids = append(ids, m.Task.ID)
		}
	})
	if len(ids) > 0 {
		sc.do(&api.Change{Kind: &api.Change_MoveTasks{MoveTasks: &api.TaskMove{TaskIds: ids, Reason: "level"}}})
	}
}
