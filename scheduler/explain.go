package scheduler

import (
	"fmt"
	"sort"
	"strings"
)

// refusalKind is a filter; the order is that of the explanation.
type refusalKind uint8

const (
	fits refusalKind = iota
	lacksCPU
	lacksMemory
	portTaken
	tooManyReplicas
	isDown
	isUnknown
	isDrained
	isPaused
	otherPlatform
	violates
)

// refusal is why one node does not take a task; detail tells refusals of one kind apart.
type refusal struct {
	kind   refusalKind
	detail string
}

// refusal checks every hard rule in the order of meaning: a node that is down is not said to lack memory.
func (s *Scheduler) refusal(i int32, g *Group, ofService int32) refusal {
	n := &s.nodes[i]
	switch n.State {
	case Down:
		return refusal{kind: isDown}
	case Unknown:
		return refusal{kind: isUnknown}
	case Drained:
		return refusal{kind: isDrained}
	case Paused:
		return refusal{kind: isPaused}
	}
	for _, c := range g.Req.Constraints {
		if !c.Matches(n) {
			return refusal{violates, c.String()}
		}
	}
	if !g.Req.runsOn(n) {
		return refusal{kind: otherPlatform}
	}
	return s.lacking(i, g.Req, ofService)
}

func (s *Scheduler) lacking(i int32, req *Requirements, ofService int32) refusal {
	switch room := s.room[i]; {
	case req.Reserve.NanoCPUs > 0 && req.Reserve.NanoCPUs > room.NanoCPUs:
		return refusal{kind: lacksCPU}
	case req.Reserve.MemoryBytes > 0 && req.Reserve.MemoryBytes > room.MemoryBytes:
		return refusal{kind: lacksMemory}
	case req.MaxPerNode > 0 && int(ofService) >= req.MaxPerNode:
		return refusal{tooManyReplicas, fmt.Sprint(req.MaxPerNode)}
	}
	for _, p := range req.Ports {
		if s.ports[portKey{i, p}] > 0 {
			return refusal{portTaken, fmt.Sprintf("%d/%s", p.Number, p.Protocol)}
		}
	}
	return refusal{}
}

// explain counts, for a group that did not fit, what every node refused it for.
func (s *Scheduler) explain(g *Group) string {
	counts := map[refusal]int{}
	for i := range s.nodes {
		if s.nodes[i].ID == "" || (g.Node != "" && s.nodes[i].ID != g.Node) {
			continue
		}
		if r := s.refusal(int32(i), g, s.service(g.Service).count[int32(i)]); r.kind != fits {
			counts[r]++
		}
	}
	if len(counts) == 0 {
		if g.Node != "" {
			return "no suitable node (node " + g.Node + " is gone)"
		}
		return "no suitable node (the cluster has no node)"
	}
	reasons := make([]refusal, 0, len(counts))
	for r := range counts {
		reasons = append(reasons, r)
	}
	sort.Slice(reasons, func(a, b int) bool {
		if reasons[a].kind != reasons[b].kind {
			return reasons[a].kind < reasons[b].kind
		}
		return reasons[a].detail < reasons[b].detail
	})
	parts := make([]string, len(reasons))
	for i, r := range reasons {
		parts[i] = r.sentence(counts[r])
	}
	return "no suitable node (" + strings.Join(parts, ", ") + ")"
}

// sentence says a refusal of n nodes: "2 nodes lack memory".
func (r refusal) sentence(n int) string {
	nodes, be, s := "nodes", "are", ""
	if n == 1 {
		nodes, be, s = "node", "is", "s"
	}
	var what string
	switch r.kind {
	case lacksCPU:
		what = "lack" + s + " CPU"
	case lacksMemory:
		what = "lack" + s + " memory"
	case portTaken:
		what = "already use" + s + " port " + r.detail
	case tooManyReplicas:
		what = "already run" + s + " the most tasks of a service per node, " + r.detail
	case isDown:
		what = be + " down"
	case isUnknown:
		what = be + " not heard of yet"
	case isDrained:
		what = be + " drained"
	case isPaused:
		what = be + " paused"
	case otherPlatform:
		what = "run" + s + " another platform"
	case violates:
		what = "violate" + s + " " + r.detail
	}
	return fmt.Sprintf("%d %s %s", n, nodes, what)
}
