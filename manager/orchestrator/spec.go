package orchestrator

import (
	"encoding/json"
	"time"

	"github.com/moby/moby/api/types/swarm"

	"skein/manager/store"
	"skein/scheduler"

	"skein/manager/placement"
)

// Defaults where the spec says nothing, as Docker's.
const (
	defaultRestartDelay  = 5 * time.Second
	defaultUpdateMonitor = 5 * time.Second
	defaultParallelism   = 1
)

// maxFacts bounds the decoded specs that are kept.
const maxFacts = 10_000

// specFacts is what is derived once from a revision's spec.
type specFacts struct {
	constraints []scheduler.Constraint
	req         *scheduler.Requirements // nil when the spec cannot be honoured
	opts        serviceOptions
	task        string // what a task is made of, but for the placement constraints
}

func (o *Orchestrator) facts(spec *swarm.ServiceSpec) *specFacts {
	if f := o.specs[spec]; f != nil {
		return f
	}
	if len(o.specs) >= maxFacts {
		clear(o.specs)
	}
	f := &specFacts{task: fingerprint(spec), opts: serviceOptionsOf(spec.Labels)}
	if req, err := placement.RequirementsOf(spec); err == nil {
		f.req, f.constraints = req, req.Constraints
	}
	o.specs[spec] = f
	return f
}

// fingerprint is equal for specs whose tasks are the same, except for placement constraints.
func fingerprint(spec *swarm.ServiceSpec) string {
	var parts struct {
		Task     swarm.TaskSpec
		Endpoint swarm.EndpointSpec
	}
	parts.Task = spec.TaskTemplate
	if p := parts.Task.Placement; p != nil {
		c := *p
		c.Constraints = nil
		parts.Task.Placement = &c
		if c.MaxReplicas == 0 && len(c.Preferences) == 0 && len(c.Platforms) == 0 {
			parts.Task.Placement = nil
		}
	}
	if spec.EndpointSpec != nil {
		parts.Endpoint = *spec.EndpointSpec
	}
	if parts.Endpoint.Mode == "" {
		parts.Endpoint.Mode = swarm.ResolutionModeVIP
	}
	b, err := json.Marshal(parts)
	if err != nil {
		panic(err) // the types of the API are JSON types
	}
	return string(b)
}

// class says how a revision's tasks compare with the current spec.
type class uint8

const (
	unknownClass    class = iota
	same                  // nothing to do
	otherConstraint       // the same if the node satisfies the new constraints
	other                 // to be updated
)

// classOf compares a revision with the current one. Every revision of a job is an execution of its own.
func (p *pass) classOf(revision uint64) class {
	if revision == p.svc.Revision {
		return same
	}
	if c := p.classes[revision]; c != unknownClass {
		return c
	}
	c := other
	if old := p.svc.Revs[revision]; !p.svc.Job() && old != nil && p.o.facts(old).task == p.o.facts(p.svc.Spec).task {
		c = otherConstraint
	}
	p.classes[revision] = c
	return c
}

// clean reports whether the task is what the current spec asks for.
func (p *pass) clean(t *store.Task) bool {
	switch p.classOf(t.Revision) {
	case same:
		return true
	case otherConstraint:
		if t.NodeID == "" {
			return equalConstraints(p.o.facts(p.svc.Revs[t.Revision]), p.o.facts(p.svc.Spec))
		}
		n := p.o.node(p.view, t.NodeID)
		return n == nil || p.matches(p.svc.Revision, &n.node)
	}
	return false
}

func equalConstraints(a, b *specFacts) bool {
	if len(a.constraints) != len(b.constraints) {
		return false
	}
	for i := range a.constraints {
		if a.constraints[i] != b.constraints[i] {
			return false
		}
	}
	return true
}

// restartPolicy is a restart policy with the defaults filled in.
type restartPolicy struct {
	condition   swarm.RestartPolicyCondition
	delay       time.Duration
	maxAttempts uint64 // 0 unlimited
	window      time.Duration
}

func restartPolicyOf(spec *swarm.ServiceSpec) restartPolicy {
	r := restartPolicy{condition: swarm.RestartPolicyConditionAny, delay: defaultRestartDelay}
	p := spec.TaskTemplate.RestartPolicy
	if p == nil {
		return r
	}
	if p.Condition != "" {
		r.condition = p.Condition
	}
	if p.Delay != nil {
		r.delay = *p.Delay
	}
	if p.MaxAttempts != nil {
		r.maxAttempts = *p.MaxAttempts
	}
	if p.Window != nil {
		r.window = *p.Window
	}
	return r
}

// updateConfig fills in the defaults of an update or rollback configuration.
func updateConfig(c *swarm.UpdateConfig) swarm.UpdateConfig {
	u := swarm.UpdateConfig{Parallelism: defaultParallelism}
	if c != nil {
		u = *c
	}
	if u.FailureAction == "" {
		u.FailureAction = swarm.UpdateFailureActionPause
	}
	if u.Monitor == 0 {
		u.Monitor = defaultUpdateMonitor
	}
	if u.Monitor <= u.Delay {
		u.Monitor = u.Delay + time.Second
	}
	if u.Order == "" {
		u.Order = swarm.UpdateOrderStopFirst
	}
	return u
}
