package engine

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	cerrdefs "github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/api/types/registry"
	"github.com/moby/moby/api/types/swarm"

	"skein/agent/dockerapi"
	"skein/agent/task"
	"skein/manager/api"
	"skein/overlay"
	"skein/runtime/image"
)

const (
	readyWait    = 10 * time.Second      // how long a task may take to listen before it is called running all the same
	readyPoll    = 20 * time.Millisecond // the kernel announces no LISTEN; grows to readyPollMax
	readyPollMax = 200 * time.Millisecond
)

// taskController carries out one cluster task (task.Controller).
type taskController struct {
	e    *Engine
	a    *api.Assignment
	nets map[string]*api.NetworkRecord
	spec swarm.TaskSpec

	dependency task.Dependency
}

// Controller returns the controller of the assignment's container.
func (e *Engine) Controller(a *api.Assignment, networks map[string]*api.NetworkRecord, dependency task.Dependency) (task.Controller, error) {
	t := &taskController{e: e, a: a, nets: networks, dependency: dependency}
	if err := json.Unmarshal(a.SpecJson, &t.spec); err != nil {
		return nil, task.Fatal{Err: fmt.Errorf("task %s: its specification cannot be read: %w", a.TaskId, err)}
	}
	if t.spec.ContainerSpec == nil {
		return nil, task.Fatal{Err: fmt.Errorf("task %s: only container tasks can run", a.TaskId)}
	}
	return t, nil
}

// Tasks lists the tasks that have a container here.
func (e *Engine) Tasks(context.Context) ([]string, error) {
	var out []string
	for _, c := range e.all() {
		if c.rec.Task != "" {
			out = append(out, c.rec.Task)
		}
	}
	return out, nil
}

func (e *Engine) taskContainer(taskID string) *entry {
	e.mu.RLock()
	defer e.mu.RUnlock()
	return e.tasks[taskID]
}

// RemoveTask removes the container of a task that nobody asks for any more.
func (e *Engine) RemoveTask(ctx context.Context, taskID string) error {
	c := e.taskContainer(taskID)
	if c == nil {
		return nil
	}
	return e.ContainerRemove(ctx, c.rec.ID, true, true)
}

// State tells what exists already.
func (t *taskController) State(context.Context) (task.State, error) {
	c := t.e.taskContainer(t.a.TaskId)
	if c == nil {
		return task.State{}, nil
	}
	r := c.snapshot()
	s := task.State{Created: true, Running: r.State.active()}
	if r.State.Status == container.StateExited {
		s.Ended, s.Exit = true, exitOf(r)
		t.dropFiles()
	}
	return s, nil
}

func exitOf(r record) task.Exit {
	return task.Exit{Code: r.State.ExitCode, OOM: r.State.OOMKilled, At: r.State.FinishedAt, Err: r.State.Error}
}

// Prepare makes image and container present. Transient trouble is an ordinary error, to be retried.
func (t *taskController) Prepare(ctx context.Context) error {
	if t.e.taskContainer(t.a.TaskId) != nil {
		return nil
	}
	if err := t.e.rejectUnencrypted(t.attached()); err != nil {
		return task.Fatal{Err: err}
	}
	img, err := t.image(ctx)
	if err != nil {
		return err
	}
	req, err := t.createRequest()
	if err != nil {
		return task.Fatal{Err: err}
	}
	sb, nets, err := t.sandbox()
	if err != nil {
		return task.Fatal{Err: err}
	}
	slot := strconv.FormatUint(t.a.Slot, 10)
	if t.a.Slot == 0 {
		slot = t.a.NodeId
	}
	name := t.a.ServiceName + "." + slot + "." + t.a.TaskId
	files, err := t.provide()
	if err == nil {
		_, _, err = t.e.create(name, req, img, &taskPart{id: t.a.TaskId, sandbox: sb, networks: nets, ports: t.hostPorts(), files: files})
	}
	if err != nil {
		err = errors.Join(err, t.e.removeFiles(t.a.TaskId))
		if cerrdefs.IsInvalidArgument(err) || cerrdefs.IsNotImplemented(err) {
			return task.Fatal{Err: err}
		}
		return err
	}
	return nil
}

// hostPorts are the task's ports in mode host.
func (t *taskController) hostPorts() []overlay.HostPort {
	var out []overlay.HostPort
	for _, p := range t.a.Ports {
		if p.Published != 0 {
			out = append(out, overlay.HostPort{Published: uint16(p.Published), Target: uint16(p.Target), Protocol: p.Protocol})
		}
	}
	return out
}

// image finds the image locally first: a registry that is down must not stop a task whose image is here.
func (t *taskController) image(ctx context.Context) (image.Image, error) {
	ref := t.spec.ContainerSpec.Image
	img, err := t.e.cfg.Images.Get(ctx, ref)
	if err == nil {
		return img, nil
	}
	if !cerrdefs.IsNotFound(err) {
		return image.Image{}, err
	}
	var auth registry.AuthConfig
	if len(t.a.RegistryAuth) > 0 {
		if err := json.Unmarshal(t.a.RegistryAuth, &auth); err != nil {
			return img, task.Fatal{Err: fmt.Errorf("task %s: its registry credentials cannot be read", t.a.TaskId)} // without them in the text
		}
	}
	img, err = t.e.cfg.Images.Pull(ctx, ref, image.PullOptions{Auth: storeAuth(&auth)})
	if cerrdefs.IsNotFound(err) || cerrdefs.IsInvalidArgument(err) {
		return img, task.Fatal{Err: fmt.Errorf("No such image: %s: %w", ref, err)}
	}
	return img, err
}

func (t *taskController) createRequest() (container.CreateRequest, error) {
	var err error
	cs := t.spec.ContainerSpec
	x := expander{a: t.a, hostname: t.e.cfg.Hostname}
	cfg := &container.Config{
		Image: cs.Image, Hostname: x.expand(cs.Hostname), User: cs.User, WorkingDir: cs.Dir, Tty: cs.TTY, OpenStdin: cs.OpenStdin,
		StopSignal: cs.StopSignal, Healthcheck: cs.Healthcheck, Labels: t.labels(),
	}
	for _, kv := range cs.Env {
		cfg.Env = append(cfg.Env, x.expand(kv))
	}
	cfg.Env = append(cfg.Env, genericEnv(t.a.Generic)...)
	if len(cs.Command) > 0 {
		cfg.Entrypoint = cs.Command
	}
	cfg.Cmd = cs.Args
	if cs.StopGracePeriod != nil {
		secs := int((*cs.StopGracePeriod + time.Second - 1) / time.Second)
		cfg.StopTimeout = &secs
	}
	hc := &container.HostConfig{
		NetworkMode: "none", ReadonlyRootfs: cs.ReadOnly, Init: cs.Init, GroupAdd: cs.Groups, Sysctls: cs.Sysctls,
		CapAdd: cs.CapabilityAdd, CapDrop: cs.CapabilityDrop, OomScoreAdj: int(cs.OomScoreAdj),
	}
	if t.onHost() {
		hc.NetworkMode = "host"
	}
	hc.Ulimits = cs.Ulimits
	for _, m := range cs.Mounts {
		m.Source = x.expand(m.Source)
		hc.Mounts = append(hc.Mounts, m)
	}
	for _, h := range cs.Hosts { // "address name [alias…]"
		f := strings.Fields(h)
		for _, name := range f[min(1, len(f)):] {
			hc.ExtraHosts = append(hc.ExtraHosts, name+":"+f[0])
		}
	}
	if d := cs.DNSConfig; d != nil {
		hc.DNSSearch, hc.DNSOptions = d.Search, d.Options
		hc.DNS = append(hc.DNS, d.Nameservers...)
	}
	if d := t.spec.LogDriver; d != nil {
		hc.LogConfig = container.LogConfig{Type: d.Name, Config: d.Options}
	}
	taskResources(hc, t.spec.Resources)
	if hc.SecurityOpt, err = taskSecurity(cs.Privileges); err != nil {
		return container.CreateRequest{}, err
	}
	if x.err != nil {
		return container.CreateRequest{}, x.err
	}
	return container.CreateRequest{Config: cfg, HostConfig: hc}, nil
}

// taskResources are the limits of a service's tasks. Of a reservation only its memory is told to the kernel, the rest is the scheduler's.
func taskResources(hc *container.HostConfig, r *swarm.ResourceRequirements) {
	if r == nil {
		return
	}
	if l := r.Limits; l != nil {
		hc.Memory, hc.NanoCPUs = l.MemoryBytes, l.NanoCPUs
		if l.Pids > 0 {
			hc.PidsLimit = &l.Pids
		}
	}
	if r.Reservations != nil {
		hc.MemoryReservation = r.Reservations.MemoryBytes
	}
	if s := r.SwapBytes; s != nil {
		hc.MemorySwap = *s
		if *s >= 0 {
			hc.MemorySwap += hc.Memory // the engine counts both together
		}
	}
	hc.MemorySwappiness = r.MemorySwappiness
}

// taskSecurity are a service's privileges as security options of a container.
func taskSecurity(p *swarm.Privileges) ([]string, error) {
	if p == nil {
		return nil, nil
	}
	var out []string
	if p.NoNewPrivileges {
		out = append(out, "no-new-privileges")
	}
	if s := p.Seccomp; s != nil {
		switch s.Mode {
		case "", swarm.SeccompModeDefault:
		case swarm.SeccompModeUnconfined:
			out = append(out, "seccomp=unconfined")
		case swarm.SeccompModeCustom:
			out = append(out, "seccomp="+string(s.Profile))
		default:
			return nil, notBuilt("seccomp mode %q of services is not supported by this version of skein", s.Mode)
		}
	}
	if a := p.AppArmor; a != nil && a.Mode == swarm.AppArmorModeDisabled {
		out = append(out, "apparmor=unconfined")
	}
	switch l := p.SELinuxContext; {
	case l == nil:
	case *l != (swarm.SELinuxContext{Disable: l.Disable}):
		return nil, notBuilt("SELinux contexts of services are not supported by this version of skein")
	case l.Disable:
		out = append(out, "label=disable")
	}
	if p.CredentialSpec != nil && *p.CredentialSpec != (swarm.CredentialSpec{}) {
		return nil, notBuilt("credential specs are not supported by this version of skein")
	}
	return out, nil
}

func (t *taskController) labels() map[string]string {
	out := map[string]string{}
	for k, v := range t.spec.ContainerSpec.Labels {
		out[k] = v
	}
	slot := strconv.FormatUint(t.a.Slot, 10)
	if t.a.Slot == 0 {
		slot = t.a.NodeId
	}
	out["com.docker.swarm.task"] = ""
	out["com.docker.swarm.task.id"] = t.a.TaskId
	out["com.docker.swarm.task.name"] = t.a.ServiceName + "." + slot + "." + t.a.TaskId
	out["com.docker.swarm.node.id"] = t.a.NodeId
	out["com.docker.swarm.service.id"] = t.a.ServiceId
	out["com.docker.swarm.service.name"] = t.a.ServiceName
	return out
}

// onHost: the task shares the node's network. Networks of the cluster are named by id, never by this word.
func (t *taskController) onHost() bool {
	return slices.ContainsFunc(t.spec.Networks, func(n swarm.NetworkAttachmentConfig) bool { return n.Target == network.NetworkHost })
}

// sandbox turns the allocated addresses into legs.
func (t *taskController) sandbox() (overlay.Sandbox, map[string]*network.EndpointSettings, error) {
	nets := map[string]*network.EndpointSettings{}
	if t.onHost() {
		return overlay.Sandbox{}, nets, nil
	}
	sb := overlay.Sandbox{DNS: true}
	if d := t.spec.ContainerSpec.DNSConfig; d != nil {
		sb.SearchDNS = d.Search
		for _, n := range d.Nameservers {
			sb.Upstreams = append(sb.Upstreams, netip.AddrPortFrom(n, 53))
		}
	}
	for _, at := range t.a.Attachments {
		n := t.nets[at.NetworkId]
		if n == nil {
			return sb, nil, fmt.Errorf("task %s: network %s is not known on this node", t.a.TaskId, at.NetworkId)
		}
		if n.Ingress {
			continue
		}
		leg := overlay.Leg{NetworkID: n.Id}
		var err error
		if leg.Addr4, err = netip.ParsePrefix(at.Addr4); err != nil {
			return sb, nil, fmt.Errorf("task %s: address %q on network %s: %w", t.a.TaskId, at.Addr4, n.Name, err)
		}
		if at.Addr6 != "" {
			if leg.Addr6, err = netip.ParsePrefix(at.Addr6); err != nil {
				return sb, nil, fmt.Errorf("task %s: address %q on network %s: %w", t.a.TaskId, at.Addr6, n.Name, err)
			}
		}
		sb.Legs = append(sb.Legs, leg)
		nets[n.Name] = &network.EndpointSettings{
			NetworkID: n.Id, EndpointID: t.a.TaskId, IPAddress: leg.Addr4.Addr(), IPPrefixLen: leg.Addr4.Bits(), Aliases: at.Aliases,
			IPAMConfig: &network.EndpointIPAMConfig{IPv4Address: leg.Addr4.Addr()}, MacAddress: network.HardwareAddr(overlay.StationOfLeg(leg)),
			GlobalIPv6Address: leg.Addr6.Addr(), GlobalIPv6PrefixLen: max(leg.Addr6.Bits(), 0),
		}
	}
	if t.a.Gateway4 != "" {
		sb.Gateway4, _ = netip.ParseAddr(t.a.Gateway4)
	}
	if t.a.Gateway6 != "" {
		sb.Gateway6, _ = netip.ParseAddr(t.a.Gateway6)
	}
	return sb, nets, nil
}

func (t *taskController) mustContainer() (*entry, error) {
	c := t.e.taskContainer(t.a.TaskId)
	if c == nil {
		return nil, notFound("task %s: its container was removed", t.a.TaskId)
	}
	return c, nil
}

// Start executes the container unless it runs already.
func (t *taskController) Start(ctx context.Context) error {
	c, err := t.mustContainer()
	if err != nil {
		return err
	}
	if !c.snapshot().State.active() && !t.onHost() {
		if err := t.e.modeHostFree(t.hostPorts()); err != nil {
			return task.Fatal{Err: err}
		}
	}
	err = t.e.ContainerStart(ctx, c.rec.ID)
	var failed execError
	if errors.As(err, &failed) {
		return task.Fatal{Err: err}
	}
	if errors.Is(err, dockerapi.ErrNotModified) {
		return nil
	}
	return err
}

// Ready waits until the task can serve.
func (t *taskController) Ready(ctx context.Context) (string, error) {
	c, err := t.mustContainer()
	if err != nil {
		return "", err
	}
	if healthConfig(c.snapshot()) != nil {
		return "", t.awaitHealthy(ctx, c)
	}
	want := map[portKey]bool{}
	for _, p := range t.a.Ports {
		if p.Protocol != "sctp" { // whose listeners the kernel does not list
			want[portKey{p.Protocol, uint16(p.Target)}] = true
		}
	}
	if len(want) == 0 {
		return "", nil
	}
	limit := time.NewTimer(readyWait)
	defer limit.Stop()
	poll := readyPoll
	for {
		r, _, _, changed := c.watch()
		if !r.State.active() {
			return "", nil // Wait tells
		}
		have := listening(r.State.Pid, want)
		if len(have) == len(want) {
			return "", nil
		}
		tick := time.NewTimer(poll)
		poll = min(2*poll, readyPollMax)
		select {
		case <-tick.C:
		case <-changed:
			tick.Stop()
		case <-limit.C:
			tick.Stop()
			return fmt.Sprintf("nothing listens on %s after %v: the target port is another, or the process does not listen", silent(want, have), readyWait), nil
		case <-ctx.Done():
			tick.Stop()
			return "", ctx.Err()
		}
	}
}

// silent names the ports that nothing listens on.
func silent(want, have map[portKey]bool) string {
	var out []string
	for p := range want {
		if !have[p] {
			out = append(out, fmt.Sprintf("port %d/%s", p.port, p.proto))
		}
	}
	slices.Sort(out)
	return strings.Join(out, ", ")
}

func (t *taskController) awaitHealthy(ctx context.Context, c *entry) error {
	for {
		r, _, removed, changed := c.watch()
		if removed || !r.State.active() {
			return nil // Wait tells
		}
		if h := c.healthReport(); h != nil {
			switch h.Status {
			case container.Healthy:
				return nil
			case container.Unhealthy:
				return fmt.Errorf("task: unhealthy container: %s", lastProbe(h))
			}
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func lastProbe(h *container.Health) string {
	if len(h.Log) == 0 {
		return "no probe answered"
	}
	l := h.Log[len(h.Log)-1]
	return fmt.Sprintf("last probe exited with %d: %s", l.ExitCode, strings.TrimSpace(l.Output))
}

// Wait returns when the container's process ended, or when its health check gave it up. Its secrets are gone then, though the container stays
// as long as the task's history is kept.
func (t *taskController) Wait(ctx context.Context) (task.Exit, error) {
	x, err := t.ended(ctx)
	if err == nil && !x.Sick {
		t.dropFiles()
	}
	return x, err
}

// dropFiles removes the secrets and configs of a task that has ended: it is never started again.
func (t *taskController) dropFiles() {
	if err := t.e.removeFiles(t.a.TaskId); err != nil {
		t.e.log.Warn("remove the secrets of an ended task", "task", t.a.TaskId, "err", err)
	}
}

func (t *taskController) ended(ctx context.Context) (task.Exit, error) {
	c, err := t.mustContainer()
	if err != nil {
		return task.Exit{}, err
	}
	for {
		r, _, removed, changed := c.watch()
		if removed || !r.State.active() {
			return exitOf(r), nil
		}
		if h := c.healthReport(); h != nil && h.Status == container.Unhealthy {
			// As swarm does: an unhealthy task is stopped and counts as failed.
			return task.Exit{Sick: true, Err: "unhealthy container: " + lastProbe(h)}, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return task.Exit{}, ctx.Err()
		}
	}
}

// Shutdown ends the container: stop signal, grace, kill.
func (t *taskController) Shutdown(ctx context.Context) error {
	c := t.e.taskContainer(t.a.TaskId)
	if c == nil {
		return nil
	}
	err := t.e.ContainerStop(ctx, c.rec.ID, dockerapi.StopOptions{})
	if errors.Is(err, dockerapi.ErrNotModified) {
		return nil
	}
	return err
}

// Remove deletes the container.
func (t *taskController) Remove(ctx context.Context) error {
	return t.e.RemoveTask(ctx, t.a.TaskId)
}

// Info is what reports carry.
func (t *taskController) Info() task.Info {
	c := t.e.taskContainer(t.a.TaskId)
	if c == nil {
		return task.Info{}
	}
	r := c.snapshot()
	info := task.Info{ContainerID: r.ID, Pid: r.State.Pid}
	for _, p := range t.a.Ports {
		if p.Mode == "host" {
			info.Ports = append(info.Ports, p)
		}
	}
	return info
}

// TaskLogs emits a task's log lines.
func (e *Engine) TaskLogs(ctx context.Context, taskID string, o dockerapi.LogOptions, emit func(dockerapi.LogLine) error) error {
	c := e.taskContainer(taskID)
	if c == nil {
		return notFound("task %s has no container on node %s", taskID, e.cfg.Hostname)
	}
	return e.readLogs(ctx, c, o, emit)
}
