package scheduler

import (
	"fmt"
	"sort"
	"strconv"
	"strings"
)

// refusal is the filter that refuses a node; the order is that of the explanation.
type refusal uint8

const (
	fits refusal = iota
	lacksCPU
	lacksMemory
	lacksGeneric
	portTaken
	tooManyReplicas
	isDown
	isUnknown
	isDrained
	isPaused
	otherPlatform
	lacksPlugin
	violates
)

// refusal checks every hard rule in the order of meaning: a node that is down is not said to lack memory.
func (s *Scheduler) refusal(i int32, req *Requirements, ofService int32) refusal {
	n := &s.nodes[i]
	switch n.State {
	case Down:
		return isDown
	case Unknown:
		return isUnknown
	case Drained:
		return isDrained
	case Paused:
		return isPaused
	}
	for _, c := range req.Constraints {
		if !c.Matches(n) {
			return violates
		}
	}
	switch {
	case !req.runsOn(n):
		return otherPlatform
	case !req.hasPlugins(n):
		return lacksPlugin
	}
	return s.lacking(i, req, ofService)
}

// lacking checks what depends on the other tasks of a node: resources, ports, replicas of the service.
func (s *Scheduler) lacking(i int32, req *Requirements, ofService int32) refusal {
	switch room := &s.room[i]; {
	case req.Reserve.NanoCPUs > 0 && req.Reserve.NanoCPUs > room.NanoCPUs:
		return lacksCPU
	case req.Reserve.MemoryBytes > 0 && req.Reserve.MemoryBytes > room.MemoryBytes:
		return lacksMemory
	case req.MaxPerNode > 0 && int(ofService) >= req.MaxPerNode:
		return tooManyReplicas
	}
	for _, c := range req.Generic {
		if s.generic[genericKey{i, c.Kind}] < c.N {
			return lacksGeneric
		}
	}
	for _, p := range req.Ports {
		if s.ports[portKey{i, p}] > 0 {
			return portTaken
		}
	}
	return fits
}

// reason is a refusal with what tells refusals of one kind apart.
type reason struct {
	refusal
	detail string
}

// Fits reports whether one more task of the group could be placed on the node.
func (s *Scheduler) Fits(g *Group, node int32) bool {
	return node >= 0 && s.nodes[node].ID != "" && (g.Node == "" || g.Node == s.nodes[node].ID) &&
		s.refusal(node, g.Req, s.service(g.Service).count.get(node)) == fits
}

// Explain tells, for a group that did not fit, what the nodes refused it for, in numbers.
func (s *Scheduler) Explain(g *Group) string {
	counts := map[reason]int{}
	sv := s.service(g.Service)
	for i := range s.nodes {
		if s.nodes[i].ID == "" || (g.Node != "" && s.nodes[i].ID != g.Node) {
			continue
		}
		if r := s.refusal(int32(i), g.Req, sv.count.get(int32(i))); r != fits {
			counts[reason{r, s.detail(int32(i), r, g.Req)}]++
		}
	}
	if len(counts) == 0 {
		if g.Node != "" {
			return "no suitable node (node " + g.Node + " is gone)"
		}
		return "no suitable node (the cluster has no node)"
	}
	reasons := make([]reason, 0, len(counts))
	for r := range counts {
		reasons = append(reasons, r)
	}
	sort.Slice(reasons, func(a, b int) bool {
		if reasons[a].refusal != reasons[b].refusal {
			return reasons[a].refusal < reasons[b].refusal
		}
		return reasons[a].detail < reasons[b].detail
	})
	parts := make([]string, len(reasons))
	for i, r := range reasons {
		parts[i] = r.sentence(counts[r])
	}
	return "no suitable node (" + strings.Join(parts, "; ") + ")"
}

// detail names what a node lacks.
func (s *Scheduler) detail(i int32, r refusal, req *Requirements) string {
	switch r {
	case lacksCPU:
		return strconv.FormatFloat(float64(req.Reserve.NanoCPUs)/1e9, 'g', -1, 64) + " CPU"
	case lacksMemory:
		return byteText(req.Reserve.MemoryBytes) + " memory"
	case lacksGeneric:
		for _, c := range req.Generic {
			if s.generic[genericKey{i, c.Kind}] < c.N {
				return fmt.Sprintf("%d %s", c.N, c.Kind)
			}
		}
	case tooManyReplicas:
		return strconv.Itoa(req.MaxPerNode)
	case portTaken:
		for _, p := range req.Ports {
			if s.ports[portKey{i, p}] > 0 {
				return fmt.Sprintf("%d/%s", p.Number, p.Protocol)
			}
		}
	case violates:
		for _, c := range req.Constraints {
			if !c.Matches(&s.nodes[i]) {
				return c.String()
			}
		}
	case lacksPlugin:
		return req.missingPlugin(&s.nodes[i])
	}
	return ""
}

func byteText(n int64) string {
	for _, u := range []struct {
		size int64
		name string
	}{{1 << 40, "TiB"}, {1 << 30, "GiB"}, {1 << 20, "MiB"}, {1 << 10, "KiB"}} {
		if n >= u.size {
			return strconv.FormatFloat(float64(n)/float64(u.size), 'g', 4, 64) + " " + u.name
		}
	}
	return strconv.FormatInt(n, 10) + " B"
}

// sentence says a refusal of n nodes. Where swarm has words for it, they are swarm's, and the detail follows.
func (r reason) sentence(n int) string {
	nodes := strconv.Itoa(n) + " nodes"
	if n == 1 {
		nodes = "1 node"
	}
	switch r.refusal {
	case lacksCPU, lacksMemory, lacksGeneric:
		return "insufficient resources on " + nodes + ": " + r.detail
	case portTaken:
		return "host-mode port already in use on " + nodes + ": " + r.detail
	case tooManyReplicas:
		return "max replicas per node limit exceed on " + nodes + ": " + r.detail
	case isDown:
		return nodes + " not available for new tasks: down"
	case isUnknown:
		return nodes + " not available for new tasks: not heard of yet"
	case isDrained:
		return nodes + " not available for new tasks: drained"
	case isPaused:
		return nodes + " not available for new tasks: paused"
	case otherPlatform:
		return "unsupported platform on " + nodes
	case lacksPlugin:
		return "missing plugin on " + nodes + ": " + r.detail
	}
	return "scheduling constraints not satisfied on " + nodes + ": " + r.detail
}
