package world

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/mount"
	"github.com/moby/moby/api/types/swarm"

	"skein/manager/api"
	"skein/manager/control"
	"skein/manager/store"
)

var ctx = context.Background()

// users are clients of the API. They believe what they are told: what was acknowledged must be there.
type users struct {
	w        *World
	made     int // objects, for their ids
	named    int
	networks []string
	secrets  []string
	busy     bool
	late     []func() // requests that are sent a second time
}

func newUsers(w *World) *users { return &users{w: w} }

func (u *users) begin() {
	for range 2 {
		u.w.after(u.w.between(time.Second, 2*time.Second), u.network)
	}
	u.w.after(u.w.between(time.Second, 2*time.Second), u.secret)
	for range 3 {
		u.w.after(u.w.between(time.Second, 3*time.Second), u.create)
	}
	u.w.after(2*time.Second, u.go_)
}

// go_ has users act again and again until all is calm.
func (u *users) go_() {
	if u.w.calm {
		return
	}
	u.act()
	u.w.after(u.w.between(50*time.Millisecond, 2500*time.Millisecond), u.go_)
}

// server is the API, nil while there is no leader.
func (u *users) server() *control.Server {
	if l := u.w.leader; l != nil && l.term != nil {
		return l.term.control
	}
	return nil
}

// do sends a request. An unknown outcome is answered as clients do: the same again, later. Sometimes the network delivers it twice anyway.
func (u *users) do(what string, request func(*control.Server) error) error {
	s := u.server()
	if s == nil {
		return errUnknown
	}
	err := request(s)
	u.w.note("user: %s: %v", what, err)
	if (errdefs.IsUnavailable(err) && u.w.chance(0.7)) || u.w.chance(0.03) {
		u.w.after(u.w.between(10*time.Millisecond, 5*time.Second), func() {
			if s := u.server(); s != nil {
				u.w.note("user: again: %s: %v", what, request(s))
			}
		})
	}
	return err
}

// act is one thing a user does.
func (u *users) act() {
	if u.busy { // one at a time, or a request would get in front of itself
		return
	}
	u.busy = true
	defer func() { u.busy = false }()
	w := u.w
	var services, nodes []string
	w.state(func(tx store.ReadTx) {
		for _, s := range tx.Services() {
			services = append(services, s.Name)
		}
		for _, n := range tx.Nodes() {
			nodes = append(nodes, n.Id)
		}
	})
	if len(services) == 0 || len(nodes) == 0 {
		u.create()
		return
	}
	service, node := pick(w, services), pick(w, nodes)
	switch x := w.r.IntN(40); {
	case x < 5 && len(services) < 8:
		u.create()
	case x < 11:
		u.update(service, func(s *swarm.ServiceSpec) { scale(w, s) })
	case x < 19:
		u.update(service, func(s *swarm.ServiceSpec) { u.change(s) })
	case x < 22:
		u.rollback(service)
	case x < 24:
		u.remove(service)
	case x < 30:
		u.node(node, func(s *swarm.NodeSpec) {
			s.Availability = pick(w, []swarm.NodeAvailability{"active", "active", "drain", "drain", "pause"})
		})
	case x < 32:
		u.node(node, func(s *swarm.NodeSpec) {
			s.Labels = map[string]string{"zone": pick(w, []string{"a", "b", "c"})}
		})
	case x < 34:
		u.node(node, func(s *swarm.NodeSpec) { s.Role = pick(w, []swarm.NodeRole{"manager", "worker"}) })
	case x < 35:
		u.removeNode(node)
	case x < 36 && len(nodes) < 9:
		u.named++
		w.join(fmt.Sprint("x", u.named), pick(w, []string{"worker", "worker", "worker", "manager"}))
	case x < 37:
		u.network()
	case x < 38:
		u.secret()
	case x < 39 && len(u.networks) > 0:
		name := pick(w, u.networks)
		u.do("remove network "+name, func(s *control.Server) error {
			_, err := s.RemoveNetwork(ctx, &api.RemoveRequest{Ref: name})
			return err
		})
	case x < 40 && len(u.secrets) > 0:
		name := pick(w, u.secrets)
		u.do("remove secret "+name, func(s *control.Server) error {
			_, err := s.RemoveDependency(ctx, &api.DependencyRequest{Kind: store.KindSecret, Ref: name})
			return err
		})
	}
}

func (u *users) network() {
	u.named++
	name := fmt.Sprint("net", u.named)
	spec := fmt.Sprintf(`{"Name":%q,"Driver":"overlay"}`, name)
	if u.w.r.IntN(3) == 0 { // a small one: addresses run out
		spec = fmt.Sprintf(`{"Name":%q,"Driver":"overlay","IPAM":{"Config":[{"Subnet":"172.30.%d.0/28"}]}}`, name, u.named%250)
	}
	if u.do("create network "+name, func(s *control.Server) error {
		_, err := s.CreateNetwork(ctx, &api.CreateRequest{SpecJson: []byte(spec)})
		return err
	}) == nil {
		u.networks = append(u.networks, name)
	}
}

func (u *users) secret() {
	u.named++
	name := fmt.Sprint("secret", u.named)
	if u.do("create secret "+name, func(s *control.Server) error {
		_, err := s.CreateDependency(ctx, &api.DependencyRequest{Kind: store.KindSecret, SpecJson: fmt.Appendf(nil, `{"Name":%q,"Data":"c2VjcmV0"}`, name)})
		return err
	}) == nil {
		u.secrets = append(u.secrets, name)
	}
}

func ptr[T any](v T) *T { return &v }

// create makes a service of any kind.
func (u *users) create() {
	w := u.w
	u.named++
	spec := &swarm.ServiceSpec{}
	spec.Name = fmt.Sprint("svc", u.named)
	spec.TaskTemplate.ContainerSpec = &swarm.ContainerSpec{Image: u.image()}
	if w.r.IntN(5) == 0 {
		spec.TaskTemplate.ContainerSpec.Mounts = []mount.Mount{{Type: mount.TypeTmpfs, Target: "/tmp"}}
	}
	spec.TaskTemplate.RestartPolicy = &swarm.RestartPolicy{Condition: pick(w, []swarm.RestartPolicyCondition{"any", "any", "on-failure", "none"}),
		Delay: ptr(time.Duration(w.r.IntN(3)) * time.Second)}
	if w.r.IntN(3) == 0 {
		spec.TaskTemplate.RestartPolicy.MaxAttempts = ptr(uint64(1 + w.r.IntN(3)))
		spec.TaskTemplate.RestartPolicy.Window = ptr(time.Duration(w.r.IntN(3)) * 10 * time.Second)
	}
	spec.TaskTemplate.Resources = &swarm.ResourceRequirements{Reservations: &swarm.Resources{MemoryBytes: int64(w.r.IntN(4)) * 200 << 20, NanoCPUs: int64(w.r.IntN(3)) * 3e8}}
	switch w.r.IntN(8) {
	case 0, 1:
		spec.Mode.Global = &swarm.GlobalService{}
	case 2:
		spec.Mode.ReplicatedJob = &swarm.ReplicatedJob{MaxConcurrent: ptr(uint64(1 + w.r.IntN(3))), TotalCompletions: ptr(uint64(w.r.IntN(7)))}
	case 3:
		spec.Mode.GlobalJob = &swarm.GlobalJob{}
	default:
		spec.Mode.Replicated = &swarm.ReplicatedService{Replicas: ptr(uint64(w.r.IntN(7)))}
	}
	u.placement(spec)
	u.connections(spec)
	if spec.Mode.Replicated != nil || spec.Mode.Global != nil {
		u.updates(spec)
	}
	b, _ := json.Marshal(spec) // plain data
	name := spec.Name
	if u.do("create service "+name, func(s *control.Server) error {
		_, err := s.CreateService(ctx, &api.CreateRequest{SpecJson: b})
		return err
	}) == nil {
		w.state(func(tx store.ReadTx) {
			if tx.ServiceByName(name) == nil {
				w.fail("service %s was acknowledged and is not there", name)
			}
		})
	}
}

func (u *users) image() string {
	return fmt.Sprintf("%s:v%d", pick(u.w, []string{"web", "web", "web", "bad"}), u.w.r.IntN(100))
}

func (u *users) placement(spec *swarm.ServiceSpec) {
	w := u.w
	p := &swarm.Placement{}
	if w.r.IntN(3) == 0 {
		p.Constraints = append(p.Constraints, pick(w, []string{"node.labels.zone==a", "node.labels.zone!=b", "node.role==worker", "node.role!=worker",
			"engine.labels.disk==ssd", "node.platform.os==linux", "node.hostname!=w0"}))
	}
	if w.r.IntN(4) == 0 {
		p.Preferences = []swarm.PlacementPreference{{Spread: &swarm.SpreadOver{SpreadDescriptor: "node.labels.zone"}}}
	}
	if w.r.IntN(5) == 0 && spec.Mode.Replicated != nil {
		p.MaxReplicas = uint64(1 + w.r.IntN(2))
	}
	spec.TaskTemplate.Placement = p
}

// connections are networks, ports and secrets.
func (u *users) connections(spec *swarm.ServiceSpec) {
	w := u.w
	if len(u.networks) > 0 && w.r.IntN(2) == 0 {
		spec.TaskTemplate.Networks = []swarm.NetworkAttachmentConfig{{Target: pick(w, u.networks)}}
	}
	if len(u.secrets) > 0 && w.r.IntN(3) == 0 {
		name := pick(w, u.secrets)
		w.state(func(tx store.ReadTx) {
			if d, err := tx.FindDependency(store.KindSecret, name); err == nil {
				spec.TaskTemplate.ContainerSpec.Secrets = []*swarm.SecretReference{{SecretID: d.Id, SecretName: name,
					File: &swarm.SecretReferenceFileTarget{Name: name, UID: "0", GID: "0", Mode: 0o400}}}
			}
		})
	}
	if spec.Mode.ReplicatedJob != nil || spec.Mode.GlobalJob != nil {
		return
	}
	switch w.r.IntN(6) {
	case 0:
		spec.EndpointSpec = &swarm.EndpointSpec{Ports: []swarm.PortConfig{{TargetPort: 80, PublishedPort: uint32(8000 + w.r.IntN(6)), PublishMode: "host"}}}
	case 1:
		spec.EndpointSpec = &swarm.EndpointSpec{Ports: []swarm.PortConfig{{TargetPort: 80, PublishedPort: uint32(w.r.IntN(2) * (9000 + w.r.IntN(6)))}}}
	case 2:
		spec.EndpointSpec = &swarm.EndpointSpec{Mode: swarm.ResolutionModeDNSRR}
	}
}

func (u *users) updates(spec *swarm.ServiceSpec) {
	w := u.w
	draw := func(actions ...string) *swarm.UpdateConfig {
		return &swarm.UpdateConfig{Parallelism: uint64(w.r.IntN(3)), Delay: time.Duration(w.r.IntN(3)) * time.Second, FailureAction: swarm.FailureAction(pick(w, actions)),
			Monitor: time.Duration(w.r.IntN(4)) * time.Second, MaxFailureRatio: pick(w, []float32{0, 0, 0.3, 0.6}), Order: pick(w, []swarm.UpdateOrder{"stop-first", "stop-first", "start-first"})}
	}
	spec.UpdateConfig, spec.RollbackConfig = draw("pause", "continue", "rollback", "rollback"), draw("pause", "continue")
}

func scale(w *World, s *swarm.ServiceSpec) {
	switch m := s.Mode; {
	case m.Replicated != nil:
		m.Replicated.Replicas = ptr(uint64(w.r.IntN(9)))
	case m.ReplicatedJob != nil:
		m.ReplicatedJob.TotalCompletions = ptr(uint64(w.r.IntN(7)))
	}
}

// change changes some of a spec.
func (u *users) change(s *swarm.ServiceSpec) {
	w := u.w
	for range 1 + w.r.IntN(2) {
		switch w.r.IntN(7) {
		case 0, 1, 2:
			s.TaskTemplate.ContainerSpec.Image = u.image()
		case 3:
			s.TaskTemplate.ForceUpdate++
		case 4:
			u.placement(s)
		case 5:
			if s.UpdateConfig != nil {
				u.updates(s)
			}
		case 6:
			s.EndpointSpec, s.TaskTemplate.Networks, s.TaskTemplate.ContainerSpec.Secrets = nil, nil, nil
			u.connections(s)
		}
	}
}

// read gets a service as a user would, who takes some time to think.
func (u *users) read(name string) (spec swarm.ServiceSpec, version uint64, ok bool) {
	s := u.server()
	if s == nil {
		return
	}
	o, err := s.GetService(ctx, &api.GetRequest{Ref: name})
	if err != nil {
		return
	}
	var svc swarm.Service
	if err := json.Unmarshal(o.Json, &svc); err != nil {
		u.w.fail("service %s: %v", name, err)
	}
	return svc.Spec, svc.Version.Index, true
}

func (u *users) update(name string, change func(*swarm.ServiceSpec)) {
	spec, version, ok := u.read(name)
	if !ok {
		return
	}
	change(&spec)
	b, _ := json.Marshal(spec)
	err := u.do("update service "+name, func(s *control.Server) error {
		_, err := s.UpdateService(ctx, &api.UpdateRequest{Ref: name, Version: version, SpecJson: b})
		return err
	})
	if errdefs.IsInvalidArgument(err) && !strings.Contains(err.Error(), "conflict") && !u.w.calm {
		u.w.note("user: %v", err)
	}
}

func (u *users) rollback(name string) {
	_, version, ok := u.read(name)
	if !ok {
		return
	}
	u.do("roll back service "+name, func(s *control.Server) error {
		_, err := s.UpdateService(ctx, &api.UpdateRequest{Ref: name, Version: version, Rollback: "previous"})
		return err
	})
}

func (u *users) remove(name string) {
	u.do("remove service "+name, func(s *control.Server) error {
		_, err := s.RemoveService(ctx, &api.RemoveRequest{Ref: name})
		return err
	})
}

func (u *users) node(name string, change func(*swarm.NodeSpec)) error {
	s := u.server()
	if s == nil {
		return errUnknown
	}
	o, err := s.GetNode(ctx, &api.GetRequest{Ref: name})
	if err != nil {
		return err
	}
	var n swarm.Node
	if err := json.Unmarshal(o.Json, &n); err != nil {
		u.w.fail("node %s: %v", name, err)
	}
	change(&n.Spec)
	b, _ := json.Marshal(n.Spec)
	return u.do(fmt.Sprintf("update node %s to %s", name, b), func(s *control.Server) error {
		_, err := s.UpdateNode(ctx, &api.UpdateRequest{Ref: name, Version: n.Version.Index, SpecJson: b})
		return err
	})
}

func (u *users) removeNode(name string) {
	left := 0
	u.w.state(func(tx store.ReadTx) { left = len(tx.Nodes()) })
	if left < 4 {
		return
	}
	u.do("remove node "+name, func(s *control.Server) error {
		_, err := s.RemoveNode(ctx, &api.RemoveRequest{Ref: name, Force: true})
		return err
	})
}
