package world

import (
	"encoding/json"
	"time"

	"github.com/moby/moby/api/types/swarm"

	"skein/manager/api"
	"skein/manager/control"
	"skein/manager/store"
	"skein/test/sim/check"
)

// started is told that a container runs: no other of its slot should.
func (w *World) started(n *node, id string) {
	for _, other := range w.check.SlotMates(id) {
		for _, name := range w.names {
			if c := w.nodes[name].holds[other]; c != nil && c.running {
				w.failed(w.check.Overlap(id, other))
			}
		}
	}
}

// machines is what really is on the nodes that are part of the cluster.
func (w *World) machines() []check.Machine {
	var out []check.Machine
	for _, name := range w.names {
		n := w.nodes[name]
		if n.gone {
			continue
		}
		m := check.Machine{Node: name, Secrets: keys(n.deps)}
		for _, id := range keys(n.holds) {
			m.Kept = append(m.Kept, id)
			if n.holds[id].running {
				m.Running = append(m.Running, id)
			}
		}
		out = append(out, m)
	}
	return out
}

// defaultHistory is the cluster's limit of ended tasks to a slot.
const defaultHistory = 5

// settle ends all trouble and looks at what becomes of it: first of what was left alone, then of services asked for anew with room for all,
// then of nothing at all.
func (w *World) settle() {
	w.calm = true
	w.note("all trouble ends")
	for _, m := range w.managers {
		m.cut = false
		if m.member {
			w.boot(m)
			m.follow()
		}
	}
	w.elect()
	for _, name := range w.names {
		w.nodes[name].pokeAll() // what hung goes on
	}
	w.until(w.now + 400*time.Second)
	if w.leader == nil {
		w.fail("no leader although all managers are there")
	}
	w.look("left alone", false)
	w.renew()
	w.until(w.now + 120*time.Second)
	w.look("asked for anew", true)
	w.empty()
}

func (w *World) look(what string, strict bool) {
	version := w.log.observer.Version()
	w.until(w.now + 15*time.Second)
	w.note("look: %s", what)
	w.compare()
	w.state(func(tx store.ReadTx) { w.failed(w.check.Calm(tx, w.machines(), defaultHistory, strict)) })
	if now := w.log.observer.Version(); now > version+8 {
		w.fail("%s: %d entries were written although nothing happens", what, now-version)
	}
	for _, m := range w.managers {
		if m.member && m.applied != len(w.log.entries) {
			w.fail("%s has applied %d of %d entries", m.name, m.applied, len(w.log.entries))
		}
	}
	if w.log.purist.Hash() != w.log.observer.Hash() {
		w.fail("a refused transaction left a trace: the store differs from one that never saw it")
	}
}

// renew gives every service room, and asks for it again.
func (w *World) renew() {
	for i := range 3 {
		w.join("z"+string(rune('0'+i)), "worker")
	}
	w.until(w.now + 3*time.Second)
	var nodes, services []string
	w.state(func(tx store.ReadTx) {
		for _, n := range tx.Nodes() {
			nodes = append(nodes, n.Id)
		}
		for _, s := range tx.Services() {
			services = append(services, s.Name)
		}
	})
	for i, name := range nodes {
		n := w.nodes[name]
		n.mem, n.cpus, n.desc = 1<<40, 1000, nil
		n.restart(time.Second, true, false)
		zone := string(rune('a' + i%3))
		w.users.insist("node "+name, func() error {
			return w.users.node(name, func(s *swarm.NodeSpec) { s.Availability, s.Labels = "active", map[string]string{"zone": zone} })
		})
	}
	w.until(w.now + 5*time.Second)
	for i, name := range services {
		w.users.insist("service "+name, func() error { return w.again(name, i) })
	}
}

// again is a user who wants a service to be as he said, whatever went wrong.
func (w *World) again(name string, number int) error {
	spec, version, ok := w.users.read(name)
	if !ok {
		return errUnknown
	}
	spec.TaskTemplate.ForceUpdate += 1000 // a slot where what an older revision asked for has ended would count as done
	spec.TaskTemplate.Networks = nil
	spec.TaskTemplate.Placement.MaxReplicas = 0
	if spec.EndpointSpec != nil && len(spec.EndpointSpec.Ports) > 0 {
		spec.EndpointSpec.Ports[0].PublishedPort = uint32(20000 + number)
		if r := spec.Mode.Replicated; r != nil {
			*r.Replicas = min(*r.Replicas, 1)
		}
	}
	for _, u := range []*swarm.UpdateConfig{spec.UpdateConfig, spec.RollbackConfig} {
		if u != nil {
			u.Parallelism, u.Delay, u.Order = 0, 0, swarm.UpdateOrderStopFirst
		}
	}
	for i, c := range spec.TaskTemplate.Placement.Constraints {
		if c == "engine.labels.disk==ssd" || c == "node.role!=worker" {
			spec.TaskTemplate.Placement.Constraints[i] = "node.platform.os==linux"
		}
	}
	b, _ := json.Marshal(spec)
	return w.users.do("ask again for service "+name, func(s *control.Server) error {
		_, err := s.UpdateService(ctx, &api.UpdateRequest{Ref: name, Version: version, SpecJson: b})
		return err
	})
}

// insist repeats a request until it is done.
func (u *users) insist(what string, request func() error) {
	var err error
	for range 50 {
		if err = request(); err == nil {
			return
		}
		u.w.until(u.w.now + 200*time.Millisecond)
	}
	u.w.fail("%s: refused although nothing is wrong: %v", what, err)
}

// empty removes everything.
func (w *World) empty() {
	var services []string
	w.state(func(tx store.ReadTx) {
		for _, s := range tx.Services() {
			services = append(services, s.Name)
		}
	})
	for _, name := range services {
		w.users.insist("remove "+name, func() error {
			s := w.users.server()
			if s == nil {
				return errUnknown
			}
			_, err := s.RemoveService(ctx, &api.RemoveRequest{Ref: name})
			return err
		})
	}
	w.until(w.now + 60*time.Second)
	w.state(func(tx store.ReadTx) { w.failed(w.check.Empty(tx, w.machines())) })
	var networks, secrets []string
	w.state(func(tx store.ReadTx) {
		for _, n := range tx.Networks() {
			networks = append(networks, n.Name)
		}
		for _, d := range tx.Dependencies(store.KindSecret) {
			secrets = append(secrets, d.Name)
		}
	})
	for _, name := range networks {
		w.users.insist("remove "+name, func() error {
			_, err := w.users.server().RemoveNetwork(ctx, &api.RemoveRequest{Ref: name})
			return err
		})
	}
	for _, name := range secrets {
		w.users.insist("remove "+name, func() error {
			_, err := w.users.server().RemoveDependency(ctx, &api.DependencyRequest{Kind: store.KindSecret, Ref: name})
			return err
		})
	}
	w.until(w.now + 10*time.Second)
	w.compare()
}
