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
	maxAlias       = 253
	maxShortText   = 255     // bytes of a name that is shown, of a port or a platform
	minNanoCPUs    = 1e6     // 0.001 CPU
	minMemoryBytes = 4 << 20 // less starts nothing
)

var serviceName = regexp.MustCompile(`^[a-zA-Z0-9](?:[-_]*[A-Za-z0-9]+)*$`)

// validateService checks a spec by itself and fills in what clients may leave out. Each refusal names the field, its value and what is
// possible; texts that docker's clients and tests match are kept within.
func validateService(spec *swarm.ServiceSpec) error {
	root := at{object: "service spec"}
	for _, check := range []func(at, *swarm.ServiceSpec) error{
		validateName, validateMode, validateTask, validatePlacement, validateUpdates, validateEndpoint, validateServiceNetworks,
	} {
		if err := check(root, spec); err != nil {
			return err
		}
	}
	return nil
}

func validateName(root at, spec *swarm.ServiceSpec) error {
	a := root.field("Name")
	switch name := spec.Name; {
	case name == "": // one is made up
	case len(name) > maxNameLength:
		return a.bad(name, "name must be %d characters or fewer", maxNameLength)
	case !serviceName.MatchString(name):
		return a.bad(name, "name must be valid as a DNS name component: letters, digits, - and _ between them")
	}
	return validateOptions(root.field("Labels"), onService, spec.Labels)
}

func validateMode(root at, spec *swarm.ServiceSpec) error {
	m, n := &spec.Mode, 0
	for _, set := range []bool{m.Replicated != nil, m.Global != nil, m.ReplicatedJob != nil, m.GlobalJob != nil} {
		if set {
			n++
		}
	}
	a := root.field("Mode")
	if n > 1 {
		return a.bad(spec.Mode, "must specify only one service mode: Replicated, Global, ReplicatedJob or GlobalJob")
	}
	if n == 0 {
		m.Replicated = &swarm.ReplicatedService{}
	}
	if m.ReplicatedJob != nil || m.GlobalJob != nil {
		return validateJob(root, spec)
	}
	if r := m.Replicated; r != nil {
		if r.Replicas == nil {
			r.Replicas = ptr(uint64(1))
		}
		if *r.Replicas > maxReplicas {
			return a.field("Replicated.Replicas").bad(*r.Replicas, "more than the limit: want 0 to %d", maxReplicas)
		}
	}
	return nil
}

// validateJob fills in docker's defaults: one task at a time, and as many completions as tasks at a time.
func validateJob(root at, spec *swarm.ServiceSpec) error {
	for field, c := range map[string]*swarm.UpdateConfig{"UpdateConfig": spec.UpdateConfig, "RollbackConfig": spec.RollbackConfig} {
		if c != nil {
			return root.field(field).bad(*c, "update and rollback configuration is not supported for jobs: a changed job is executed anew; leave it out")
		}
	}
	j := spec.Mode.ReplicatedJob
	if j == nil {
		return nil
	}
	a := root.field("Mode.ReplicatedJob")
	if j.MaxConcurrent == nil {
		j.MaxConcurrent = ptr(uint64(1))
	}
	if n := *j.MaxConcurrent; n == 0 || n > maxReplicas {
		return a.field("MaxConcurrent").bad(n, "want 1 to %d", maxReplicas)
	}
	if j.TotalCompletions == nil {
		j.TotalCompletions = ptr(*j.MaxConcurrent)
	}
	if n := *j.TotalCompletions; n > maxReplicas {
		return a.field("TotalCompletions").bad(n, "more than the limit: want 0 to %d", maxReplicas)
	}
	return nil
}

func validateTask(root at, spec *swarm.ServiceSpec) error {
	t, a := &spec.TaskTemplate, root.field("TaskTemplate")
	switch {
	case t.Runtime != "" && t.Runtime != swarm.RuntimeContainer:
		return a.field("Runtime").unbuilt(t.Runtime, "tasks of another runtime than %q", swarm.RuntimeContainer)
	case t.PluginSpec != nil:
		return a.field("PluginSpec").unbuilt(*t.PluginSpec, "plugin tasks")
	case t.NetworkAttachmentSpec != nil:
		return a.field("NetworkAttachmentSpec").unbuilt(*t.NetworkAttachmentSpec, "network attachment tasks")
	case t.ContainerSpec == nil:
		return a.field("ContainerSpec").missing("TaskSpec: missing runtime: it must be set")
	}
	t.Runtime = swarm.RuntimeContainer
	if err := validateResources(a.field("Resources"), t.Resources); err != nil {
		return err
	}
	if err := validateRestart(a.field("RestartPolicy"), t.RestartPolicy); err != nil {
		return err
	}
	if err := validateLogDriver(a.field("LogDriver"), t.LogDriver); err != nil {
		return err
	}
	return validateContainer(a.field("ContainerSpec"), t.ContainerSpec)
}

func validateResources(a at, r *swarm.ResourceRequirements) error {
	if r == nil {
		return nil
	}
	check := func(a at, cpu, memory int64) error {
		if cpu != 0 && cpu < minNanoCPUs {
			return a.field("NanoCPUs").bad(cpu, "invalid cpu value %g: Must be at least %g (%d), or 0 for none", float64(cpu)/1e9, minNanoCPUs/1e9, int64(minNanoCPUs))
		}
		if memory != 0 && memory < minMemoryBytes {
			return a.field("MemoryBytes").bad(memory, "invalid memory value %d: Must be at least 4MiB (%d), or 0 for none", memory, minMemoryBytes)
		}
		return nil
	}
	l, v := r.Limits, r.Reservations
	if l != nil {
		if err := check(a.field("Limits"), l.NanoCPUs, l.MemoryBytes); err != nil {
			return err
		}
		if l.Pids < 0 {
			return a.field("Limits.Pids").bad(l.Pids, "want 1 or more, or 0 for no limit")
		}
	}
	if v != nil {
		if err := check(a.field("Reservations"), v.NanoCPUs, v.MemoryBytes); err != nil {
			return err
		}
		if err := validateGeneric(a.field("Reservations.GenericResources"), v.GenericResources); err != nil {
			return err
		}
	}
	if l != nil && v != nil && l.MemoryBytes > 0 && v.MemoryBytes > l.MemoryBytes {
		return a.field("Reservations.MemoryBytes").bad(v.MemoryBytes, "more than Limits.MemoryBytes (%d): reserve at most what a task may use", l.MemoryBytes)
	}
	if s := r.SwapBytes; s != nil && *s < -1 {
		return a.field("SwapBytes").bad(*s, "want 0 or more, or -1 for no limit")
	} else if s != nil && (l == nil || l.MemoryBytes == 0) {
		return a.field("SwapBytes").bad(*s, "a limit of swap needs a limit of memory with it: set Limits.MemoryBytes, too")
	}
	if w := r.MemorySwappiness; w != nil && (*w < -1 || *w > 100) {
		return a.field("MemorySwappiness").bad(*w, "want 0 to 100, or -1 for the default")
	}
	return nil
}

func validateRestart(a at, r *swarm.RestartPolicy) error {
	if r == nil {
		return nil
	}
	switch r.Condition {
	case "":
		r.Condition = swarm.RestartPolicyConditionAny
	case swarm.RestartPolicyConditionAny, swarm.RestartPolicyConditionNone, swarm.RestartPolicyConditionOnFailure:
	default:
		return a.field("Condition").bad(r.Condition, "invalid restart condition: want none, on-failure or any")
	}
	if r.Delay != nil && *r.Delay < 0 {
		return a.field("Delay").bad(*r.Delay, "TaskSpec: restart-delay cannot be negative: must be 0 or more")
	}
	if r.Window != nil && *r.Window < 0 {
		return a.field("Window").bad(*r.Window, "TaskSpec: restart-window cannot be negative: must be 0 or more")
	}
	return nil
}

func validatePlacement(root at, spec *swarm.ServiceSpec) error {
	p, a := spec.TaskTemplate.Placement, root.field("TaskTemplate.Placement")
	if p == nil {
		return nil
	}
	if len(p.Constraints) > maxConstraints {
		return a.field("Constraints").bad(p.Constraints, "at most %d are possible", maxConstraints)
	}
	for i, c := range p.Constraints {
		if _, err := scheduler.ParseConstraint(c); err != nil {
			return a.field("Constraints").index(i).bad(c, "%s", err)
		}
	}
	if len(p.Preferences) > maxConstraints {
		return a.field("Preferences").bad(p.Preferences, "at most %d are possible", maxConstraints)
	}
	for i, pref := range p.Preferences {
		a := a.field("Preferences").index(i).field("Spread")
		if pref.Spread == nil {
			return a.missing("a placement preference without spread: only spread is known")
		}
		if _, err := scheduler.ParseSpread(pref.Spread.SpreadDescriptor); err != nil {
			return a.field("SpreadDescriptor").bad(pref.Spread.SpreadDescriptor, "%s", err)
		}
	}
	if p.MaxReplicas > 0 && spec.Mode.Replicated == nil && spec.Mode.ReplicatedJob == nil {
		return a.field("MaxReplicas").bad(p.MaxReplicas, "replicas-max-per-node can only be used with replicated or replicated-job mode: a %s service has one task per node", modeOf(spec))
	}
	if len(p.Platforms) > maxConstraints {
		return a.field("Platforms").bad(p.Platforms, "at most %d are possible", maxConstraints)
	}
	for i, pf := range p.Platforms {
		for field, text := range map[string]string{"Architecture": pf.Architecture, "OS": pf.OS} {
			if len(text) > maxShortText || strings.ContainsFunc(text, unprintable) {
				return a.field("Platforms").index(i).field(field).bad(text, "want at most %d printable characters, such as amd64 or linux", maxShortText)
			}
		}
	}
	return nil
}

// unprintable are characters that have no place in a name: spaces, control characters, what is not ASCII.
func unprintable(r rune) bool { return r <= ' ' || r >= 0x7f }

func validateUpdates(root at, spec *swarm.ServiceSpec) error {
	if err := validateUpdate(root.field("UpdateConfig"), "update", spec.UpdateConfig); err != nil {
		return err
	}
	a := root.field("RollbackConfig")
	if err := validateUpdate(a, "rollback", spec.RollbackConfig); err != nil {
		return err
	}
	if r := spec.RollbackConfig; r != nil && r.FailureAction == swarm.UpdateFailureActionRollback {
		return a.field("FailureAction").bad(r.FailureAction, "a rollback that fails cannot be rolled back: want pause or continue")
	}
	return nil
}

func validateUpdate(a at, kind string, u *swarm.UpdateConfig) error {
	if u == nil {
		return nil
	}
	switch u.FailureAction {
	case "":
		u.FailureAction = swarm.UpdateFailureActionPause
	case swarm.UpdateFailureActionPause, swarm.UpdateFailureActionContinue, swarm.UpdateFailureActionRollback:
	default:
		return a.field("FailureAction").bad(u.FailureAction, "unrecognized %s failure action: want pause, continue or rollback", kind)
	}
	switch u.Order {
	case "":
		u.Order = swarm.UpdateOrderStopFirst
	case swarm.UpdateOrderStopFirst, swarm.UpdateOrderStartFirst:
	default:
		return a.field("Order").bad(u.Order, "unrecognized %s order: want stop-first or start-first", kind)
	}
	for _, d := range []struct {
		field string
		value time.Duration
	}{{"Delay", u.Delay}, {"Monitor", u.Monitor}} {
		if d.value < 0 {
			return a.field(d.field).bad(d.value, "TaskSpec: %s-%s cannot be negative: must be 0 or more", kind, strings.ToLower(d.field))
		}
	}
	if !(u.MaxFailureRatio >= 0 && u.MaxFailureRatio <= 1) {
		return a.field("MaxFailureRatio").bad(u.MaxFailureRatio, "TaskSpec: %s-maxfailureratio cannot be less than 0 or bigger than 1", kind)
	}
	return nil
}

func validateEndpoint(root at, spec *swarm.ServiceSpec) error {
	e, a := spec.EndpointSpec, root.field("EndpointSpec")
	if e == nil {
		return nil
	}
	switch e.Mode {
	case "":
		e.Mode = swarm.ResolutionModeVIP
	case swarm.ResolutionModeVIP, swarm.ResolutionModeDNSRR:
	default:
		return a.field("Mode").bad(e.Mode, "invalid endpoint mode: want vip or dnsrr")
	}
	if len(e.Ports) > maxPorts {
		return a.field("Ports").bad(e.Ports, "at most %d published ports are possible", maxPorts)
	}
	type key struct {
		proto string
		port  uint32
	}
	seen := map[key]bool{}
	for i := range e.Ports {
		p, a := &e.Ports[i], a.field("Ports").index(i)
		if err := validatePort(a, p); err != nil {
			return err
		}
		if p.PublishMode == swarm.PortConfigPublishModeIngress && e.Mode == swarm.ResolutionModeDNSRR {
			return a.field("PublishMode").bad(p.PublishMode, "EndpointSpec: port published with ingress mode can't be used with dnsrr mode: publish it in mode host, or use the mode vip")
		}
		k := key{string(p.Protocol), p.PublishedPort}
		if p.PublishedPort != 0 && seen[k] {
			return a.field("PublishedPort").bad(p.PublishedPort, "EndpointSpec: duplicate published ports provided: %d/%s", p.PublishedPort, p.Protocol)
		}
		seen[k] = true
	}
	return nil
}

func validatePort(a at, p *swarm.PortConfig) error {
	if len(p.Name) > maxShortText || strings.ContainsFunc(p.Name, unprintable) {
		return a.field("Name").bad(p.Name, "want at most %d printable characters without spaces", maxShortText)
	}
	switch p.Protocol {
	case "":
		p.Protocol = "tcp"
	case "tcp", "udp", "sctp":
	default:
		return a.field("Protocol").bad(p.Protocol, "invalid protocol: want tcp, udp or sctp")
	}
	switch p.PublishMode {
	case "":
		p.PublishMode = swarm.PortConfigPublishModeIngress
	case swarm.PortConfigPublishModeIngress, swarm.PortConfigPublishModeHost:
	default:
		return a.field("PublishMode").bad(p.PublishMode, "invalid publish mode: want ingress or host")
	}
	if p.TargetPort == 0 || p.TargetPort > 65535 {
		return a.field("TargetPort").bad(p.TargetPort, "invalid port: want 1 to 65535")
	}
	if p.PublishedPort > 65535 {
		return a.field("PublishedPort").bad(p.PublishedPort, "invalid port: want 1 to 65535, or 0 for one that is free")
	}
	return nil
}

func validateServiceNetworks(root at, spec *swarm.ServiceSpec) error {
	a := root.field("TaskTemplate.Networks")
	if len(spec.TaskTemplate.Networks) > maxNetworks {
		return a.bad(spec.TaskTemplate.Networks, "at most %d networks are possible", maxNetworks)
	}
	for i, n := range spec.TaskTemplate.Networks {
		a := a.index(i)
		if n.Target == "" {
			return a.field("Target").missing("name the network, or give its id")
		}
		if len(n.DriverOpts) > 0 {
			return a.field("DriverOpts").unbuilt(n.DriverOpts, "driver options of a service's network")
		}
		if len(n.Aliases) > maxNetworks {
			return a.field("Aliases").bad(n.Aliases, "at most %d aliases are possible", maxNetworks)
		}
		if j := slices.IndexFunc(n.Aliases, func(s string) bool { return s == "" || len(s) > maxAlias || strings.ContainsFunc(s, unprintable) }); j >= 0 {
			return a.field("Aliases").index(j).bad(n.Aliases[j], "invalid alias: want 1 to %d printable characters without spaces", maxAlias)
		}
	}
	return nil
}
