package control

import (
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/moby/moby/api/types/swarm"

	"skein/scheduler"
)

const (
	maxNameLength  = 63
	maxReplicas    = 1_000_000 // what the store and the scheduler are measured with
	maxConstraints = 100
	maxPorts       = 500
	maxNetworks    = 64
	minNanoCPUs    = 1e6     // 0.001 CPU
	minMemoryBytes = 4 << 20 // less starts nothing
)

var serviceName = regexp.MustCompile(`^[a-zA-Z0-9](?:[-_]*[A-Za-z0-9]+)*$`)

// validateService checks a spec by itself and fills in what clients may leave out.
func validateService(spec *swarm.ServiceSpec) error {
	for _, check := range []func(*swarm.ServiceSpec) error{
		validateName, validateMode, validateTask, validatePlacement, validateUpdates, validateEndpoint, validateServiceNetworks,
	} {
		if err := check(spec); err != nil {
			return err
		}
	}
	return nil
}

func validateName(spec *swarm.ServiceSpec) error {
	switch name := spec.Name; {
	case name == "": // one is made up
	case len(name) > maxNameLength:
		return invalid("service name %.80q: name must be %d characters or fewer", name, maxNameLength)
	case !serviceName.MatchString(name):
		return invalid("service name %q: name must be valid as a DNS name component: letters, digits, - and _ between them", name)
	}
	return nil
}

func validateMode(spec *swarm.ServiceSpec) error {
	m, n := &spec.Mode, 0
	for _, set := range []bool{m.Replicated != nil, m.Global != nil, m.ReplicatedJob != nil, m.GlobalJob != nil} {
		if set {
			n++
		}
	}
	if n > 1 {
		return invalid("service %s: must specify only one service mode", spec.Name)
	}
	if n == 0 {
		m.Replicated = &swarm.ReplicatedService{}
	}
	if m.ReplicatedJob != nil || m.GlobalJob != nil {
		return validateJob(spec)
	}
	if r := m.Replicated; r != nil {
		if r.Replicas == nil {
			one := uint64(1)
			r.Replicas = &one
		}
		if *r.Replicas > maxReplicas {
			return invalid("service %s: %d replicas are more than the limit of %d", spec.Name, *r.Replicas, maxReplicas)
		}
	}
	return nil
}

// validateJob fills in docker's defaults: one task at a time, and as many completions as tasks at a time.
func validateJob(spec *swarm.ServiceSpec) error {
	if spec.UpdateConfig != nil || spec.RollbackConfig != nil {
		return invalid("service %s: update and rollback configuration is not supported for jobs: a changed job is executed anew", spec.Name)
	}
	j := spec.Mode.ReplicatedJob
	if j == nil {
		return nil
	}
	switch {
	case j.MaxConcurrent == nil:
		j.MaxConcurrent = ptr(uint64(1))
	case *j.MaxConcurrent == 0:
		return invalid("service %s: Mode.ReplicatedJob.MaxConcurrent is 0: want 1 to %d", spec.Name, maxReplicas)
	}
	if j.TotalCompletions == nil {
		j.TotalCompletions = ptr(*j.MaxConcurrent)
	}
	if n := max(*j.TotalCompletions, *j.MaxConcurrent); n > maxReplicas {
		return invalid("service %s: %d tasks of a job are more than the limit of %d", spec.Name, n, maxReplicas)
	}
	return nil
}

func validateTask(spec *swarm.ServiceSpec) error {
	t := &spec.TaskTemplate
	switch {
	case t.Runtime != "" && t.Runtime != swarm.RuntimeContainer:
		return notBuilt("service %s: task runtime %q", spec.Name, t.Runtime)
	case t.PluginSpec != nil || t.NetworkAttachmentSpec != nil:
		return notBuilt("service %s: plugin and network attachment tasks", spec.Name)
	case t.ContainerSpec == nil:
		return invalid("service %s: TaskSpec: missing runtime: ContainerSpec must be set", spec.Name)
	}
	t.Runtime = swarm.RuntimeContainer
	if err := validateResources(t.Resources); err != nil {
		return err
	}
	if err := validateRestart(t.RestartPolicy); err != nil {
		return err
	}
	if d := t.LogDriver; d != nil && !slices.Contains([]string{"", "json-file", "local", "none"}, d.Name) {
		return notBuilt("service %s: log driver %q (json-file, local and none are built)", spec.Name, d.Name)
	}
	return validateContainer(t.ContainerSpec)
}

func validateResources(r *swarm.ResourceRequirements) error {
	if r == nil {
		return nil
	}
	check := func(what string, cpu, memory int64) error {
		if cpu != 0 && cpu < minNanoCPUs {
			return invalid("%s: invalid cpu value %g: must be at least %g", what, float64(cpu)/1e9, minNanoCPUs/1e9)
		}
		if memory != 0 && memory < minMemoryBytes {
			return invalid("%s: invalid memory value %d: must be at least 4MiB", what, memory)
		}
		return nil
	}
	if l := r.Limits; l != nil {
		if err := check("limits", l.NanoCPUs, l.MemoryBytes); err != nil {
			return err
		}
		if l.Pids < 0 {
			return invalid("limits: invalid pids value %d: must be 0 (no limit) or more", l.Pids)
		}
	}
	if v := r.Reservations; v != nil {
		if err := check("reservations", v.NanoCPUs, v.MemoryBytes); err != nil {
			return err
		}
		if len(v.GenericResources) > 0 {
			return notBuilt("generic resources")
		}
	}
	if r.SwapBytes != nil && (*r.SwapBytes < -1 || r.Limits == nil || r.Limits.MemoryBytes == 0) {
		return invalid("swap: want -1 or more bytes, and a memory limit with it")
	}
	if w := r.MemorySwappiness; w != nil && (*w < -1 || *w > 100) {
		return invalid("memory swappiness %d: want 0 to 100, or -1 for the default", *w)
	}
	return nil
}

func validateRestart(r *swarm.RestartPolicy) error {
	if r == nil {
		return nil
	}
	switch r.Condition {
	case "":
		r.Condition = swarm.RestartPolicyConditionAny
	case swarm.RestartPolicyConditionAny, swarm.RestartPolicyConditionNone, swarm.RestartPolicyConditionOnFailure:
	default:
		return invalid("invalid restart condition %q: want none, on-failure or any", r.Condition)
	}
	if r.Delay != nil && *r.Delay < 0 {
		return invalid("TaskSpec: restart-delay cannot be negative")
	}
	if r.Window != nil && *r.Window < 0 {
		return invalid("TaskSpec: restart-window cannot be negative")
	}
	return nil
}

func validatePlacement(spec *swarm.ServiceSpec) error {
	p := spec.TaskTemplate.Placement
	if p == nil {
		return nil
	}
	if len(p.Constraints) > maxConstraints || len(p.Preferences) > maxConstraints {
		return invalid("service %s: more than %d placement constraints or preferences", spec.Name, maxConstraints)
	}
	if _, err := scheduler.ParseConstraints(p.Constraints); err != nil {
		return invalid("service %s: %s", spec.Name, err)
	}
	for _, pref := range p.Preferences {
		if pref.Spread == nil {
			return invalid("service %s: placement preference without spread: only spread is known", spec.Name)
		}
		if _, err := scheduler.ParseSpread(pref.Spread.SpreadDescriptor); err != nil {
			return invalid("service %s: %s", spec.Name, err)
		}
	}
	return nil
}

func validateUpdates(spec *swarm.ServiceSpec) error {
	if err := validateUpdate("update", spec.UpdateConfig); err != nil {
		return err
	}
	if err := validateUpdate("rollback", spec.RollbackConfig); err != nil {
		return err
	}
	if r := spec.RollbackConfig; r != nil && r.FailureAction == swarm.UpdateFailureActionRollback {
		return invalid("rollback-failure-action: a rollback that fails cannot be rolled back: want pause or continue")
	}
	return nil
}

func validateUpdate(kind string, u *swarm.UpdateConfig) error {
	if u == nil {
		return nil
	}
	switch u.FailureAction {
	case "":
		u.FailureAction = swarm.UpdateFailureActionPause
	case swarm.UpdateFailureActionPause, swarm.UpdateFailureActionContinue, swarm.UpdateFailureActionRollback:
	default:
		return invalid("unrecognized %s failure action %q: want pause, continue or rollback", kind, u.FailureAction)
	}
	switch u.Order {
	case "":
		u.Order = swarm.UpdateOrderStopFirst
	case swarm.UpdateOrderStopFirst, swarm.UpdateOrderStartFirst:
	default:
		return invalid("unrecognized %s order %q: want stop-first or start-first", kind, u.Order)
	}
	for name, d := range map[string]time.Duration{"delay": u.Delay, "monitor": u.Monitor} {
		if d < 0 {
			return invalid("TaskSpec: %s-%s cannot be negative", kind, name)
		}
	}
	if !(u.MaxFailureRatio >= 0 && u.MaxFailureRatio <= 1) {
		return invalid("TaskSpec: %s-maxfailureratio cannot be less than 0 or bigger than 1", kind)
	}
	return nil
}

func validateEndpoint(spec *swarm.ServiceSpec) error {
	e := spec.EndpointSpec
	if e == nil {
		return nil
	}
	switch e.Mode {
	case "":
		e.Mode = swarm.ResolutionModeVIP
	case swarm.ResolutionModeVIP, swarm.ResolutionModeDNSRR:
	default:
		return invalid("service %s: invalid endpoint mode %q: want vip or dnsrr", spec.Name, e.Mode)
	}
	if len(e.Ports) > maxPorts {
		return invalid("service %s: more than %d published ports", spec.Name, maxPorts)
	}
	type key struct {
		proto, mode string
		port        uint32
	}
	seen := map[key]bool{}
	for i := range e.Ports {
		p := &e.Ports[i]
		if err := validatePort(spec.Name, p); err != nil {
			return err
		}
		if p.PublishMode == swarm.PortConfigPublishModeIngress && e.Mode == swarm.ResolutionModeDNSRR {
			return invalid("EndpointSpec: port published with ingress mode can't be used with dnsrr mode")
		}
		k := key{string(p.Protocol), "", p.PublishedPort}
		if p.PublishedPort != 0 && seen[k] {
			return invalid("EndpointSpec: duplicate published ports provided: %d/%s", p.PublishedPort, p.Protocol)
		}
		seen[k] = true
	}
	return nil
}

func validatePort(service string, p *swarm.PortConfig) error {
	switch p.Protocol {
	case "":
		p.Protocol = "tcp"
	case "tcp", "udp":
	case "sctp":
		return notBuilt("service %s: publishing sctp ports", service)
	default:
		return invalid("service %s: invalid protocol %q of port %d: want tcp or udp", service, p.Protocol, p.TargetPort)
	}
	switch p.PublishMode {
	case "":
		p.PublishMode = swarm.PortConfigPublishModeIngress
	case swarm.PortConfigPublishModeIngress, swarm.PortConfigPublishModeHost:
	default:
		return invalid("service %s: invalid publish mode %q of port %d: want ingress or host", service, p.PublishMode, p.TargetPort)
	}
	if p.TargetPort == 0 || p.TargetPort > 65535 || p.PublishedPort > 65535 {
		return invalid("service %s: invalid port %d:%d: ports are 1 to 65535", service, p.PublishedPort, p.TargetPort)
	}
	return nil
}

func validateServiceNetworks(spec *swarm.ServiceSpec) error {
	if len(spec.TaskTemplate.Networks) > maxNetworks {
		return invalid("service %s: more than %d networks", spec.Name, maxNetworks)
	}
	for _, n := range spec.TaskTemplate.Networks {
		if n.Target == "" {
			return invalid("service %s: network without a target", spec.Name)
		}
		if len(n.DriverOpts) > 0 {
			return notBuilt("service %s: driver options of network %s", spec.Name, n.Target)
		}
		for _, a := range n.Aliases {
			if a == "" || len(a) > 253 || strings.ContainsFunc(a, func(r rune) bool { return r <= ' ' || r >= 0x7f }) {
				return invalid("service %s: network %s: invalid alias %.80q", spec.Name, n.Target, a)
			}
		}
	}
	return nil
}
