package control

import (
	"cmp"
	"math"
	"slices"
	"strings"

	"github.com/moby/moby/api/types/swarm"

	"skein/manager/api"
)

// maxKinds bounds the kinds of generic resources that a service reserves.
const maxKinds = 100

// validateGeneric checks reserved generic resources: so many of a kind, each kind once. Which ones they are is not the spec's business.
func validateGeneric(a at, wish []swarm.GenericResource) error {
	if len(wish) > maxKinds {
		return a.bad(len(wish), "more than %d kinds", maxKinds)
	}
	var seen []string
	for i, g := range wish {
		a, d := a.index(i), g.DiscreteResourceSpec
		switch {
		case g.NamedResourceSpec != nil:
			return a.field("NamedResourceSpec").bad(g.NamedResourceSpec.Kind, "want a number of them: the node chooses which ones")
		case d == nil:
			return a.missing("want DiscreteResourceSpec: a kind and how many of it, as gpu=2")
		case d.Kind == "" || strings.ContainsAny(d.Kind, " =,\t\n\x00"):
			return a.field("DiscreteResourceSpec.Kind").bad(d.Kind, "want a name without spaces, = and comma")
		case d.Value < 1 || d.Value > math.MaxInt32:
			return a.field("DiscreteResourceSpec.Value").bad(d.Value, "want 1 to %d", math.MaxInt32)
		case slices.Contains(seen, d.Kind):
			return a.field("DiscreteResourceSpec.Kind").bad(d.Kind, "reserved twice")
		}
		seen = append(seen, d.Kind)
	}
	return nil
}

// assigned shows what a task holds of its node's generic resources, as swarm does: one entry for each named one.
func assigned(held []*api.GenericResource) []swarm.GenericResource {
	var out []swarm.GenericResource
	for _, g := range held {
		for _, id := range g.Ids {
			out = append(out, swarm.GenericResource{NamedResourceSpec: &swarm.NamedGenericResource{Kind: g.Kind, Value: id}})
		}
		if len(g.Ids) == 0 {
			out = append(out, swarm.GenericResource{DiscreteResourceSpec: &swarm.DiscreteGenericResource{Kind: g.Kind, Value: g.Count}})
		}
	}
	slices.SortStableFunc(out, func(a, b swarm.GenericResource) int { return cmp.Compare(kindOf(a), kindOf(b)) })
	return out
}

func kindOf(g swarm.GenericResource) string {
	if g.NamedResourceSpec != nil {
		return g.NamedResourceSpec.Kind
	}
	return g.DiscreteResourceSpec.Kind
}
