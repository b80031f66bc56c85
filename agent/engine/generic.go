package engine

import (
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"

	"github.com/moby/moby/api/types/swarm"

	"skein/manager/api"
)

// ParseGenericResources reads what a node announces: "gpu=GPU-1" once for each named resource of a kind, or "gpu=2" for a number of equal
// ones.
func ParseGenericResources(texts []string) ([]swarm.GenericResource, error) {
	var out []swarm.GenericResource
	seen := map[string]bool{} // kind → named
	for _, text := range texts {
		kind, value, ok := strings.Cut(text, "=")
		if kind = strings.TrimSpace(kind); !ok || kind == "" || value == "" || strings.ContainsAny(kind+value, " ,\t\n\x00") {
			return nil, fmt.Errorf("generic resource %q: want KIND=ID or KIND=NUMBER, as in gpu=GPU-1 or gpu=2", text)
		}
		n, err := strconv.ParseInt(value, 10, 64)
		named := err != nil
		if !named && (n < 1 || n > math.MaxInt32) {
			return nil, fmt.Errorf("generic resource %q: the number is not in 1..%d", text, math.MaxInt32)
		}
		before, known := seen[kind]
		switch {
		case known && before != named:
			return nil, fmt.Errorf("generic resource %q: %s has both ids and a number: give one of them", text, kind)
		case known && !named:
			return nil, fmt.Errorf("generic resource %q: the number of %s is given twice", text, kind)
		}
		seen[kind] = named
		if !named {
			out = append(out, swarm.GenericResource{DiscreteResourceSpec: &swarm.DiscreteGenericResource{Kind: kind, Value: n}})
			continue
		}
		if slices.ContainsFunc(out, func(g swarm.GenericResource) bool {
			return g.NamedResourceSpec != nil && *g.NamedResourceSpec == swarm.NamedGenericResource{Kind: kind, Value: value}
		}) {
			return nil, fmt.Errorf("generic resource %q is given twice", text)
		}
		out = append(out, swarm.GenericResource{NamedResourceSpec: &swarm.NamedGenericResource{Kind: kind, Value: value}})
	}
	return out, nil
}

// genericEnv tells a task's process what it holds, as docker does: DOCKER_RESOURCE_GPU=GPU-1,GPU-2, or the number.
func genericEnv(held []*api.GenericResource) []string {
	var out []string
	for _, g := range held {
		value := strings.Join(g.Ids, ",")
		if len(g.Ids) == 0 {
			value = strconv.FormatInt(g.Count, 10)
		}
		out = append(out, "DOCKER_RESOURCE_"+strings.ToUpper(g.Kind)+"="+value)
	}
	return out
}
