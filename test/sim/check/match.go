package check

import (
	"encoding/json"
	"strings"

	"github.com/moby/moby/api/types/swarm"
)

// describe reads what a node says of itself.
func (n *nodeSeen) describe() {
	var d swarm.NodeDescription
	_ = json.Unmarshal(n.rec.DescriptionJson, &d) // one that cannot be read has nothing
	n.total, n.engine = d.Resources, d.Engine.Labels
	n.os, n.arch = d.Platform.OS, d.Platform.Architecture
}

// fits reports whether a node meets a spec's constraints.
func (c *Checker) fits(spec *swarm.ServiceSpec, n *nodeSeen) bool {
	if spec.TaskTemplate.Placement == nil {
		return true
	}
	for _, text := range spec.TaskTemplate.Placement.Constraints {
		if !n.meets(text) {
			return false
		}
	}
	return true
}

func (n *nodeSeen) meets(text string) bool {
	key, value, equal := strings.Cut(text, "==")
	if !equal {
		key, value, _ = strings.Cut(text, "!=")
	}
	key, value = strings.TrimSpace(key), strings.TrimSpace(value)
	var have string
	switch {
	case key == "node.id":
		have = n.rec.Id
	case key == "node.hostname":
		have = n.rec.Hostname
	case key == "node.role":
		have = n.rec.Role
	case key == "node.platform.os":
		have = n.os
	case key == "node.platform.arch":
		have = n.arch
	case strings.HasPrefix(key, "node.labels."):
		have = n.rec.Labels[strings.TrimPrefix(key, "node.labels.")]
	case strings.HasPrefix(key, "engine.labels."):
		have = n.engine[strings.TrimPrefix(key, "engine.labels.")]
	default:
		return false // histories use no others
	}
	return strings.EqualFold(have, value) == equal
}
