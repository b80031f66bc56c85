package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"syscall"
	"time"

	"github.com/moby/moby/api/types/swarm"
	"github.com/moby/moby/client"

	"skein/cmd/dev"
	"skein/test/flow/load"
)

// operation is something an operator does, or that happens, and that no client may notice.
type operation struct {
	name  string
	about string
	do    func(context.Context, *world) error
}

func operations() []operation {
	return []operation{
		{"start-first", "rolling update, the new task first", func(ctx context.Context, w *world) error { return w.roll(ctx, swarm.UpdateOrderStartFirst) }},
		{"stop-first", "rolling update, the old task ends first", func(ctx context.Context, w *world) error { return w.roll(ctx, swarm.UpdateOrderStopFirst) }},
		{"force", "all tasks anew", force},
		{"rollback", "an update is rolled back half-way", rollback},
		{"scale-up", "two more tasks of each service", func(ctx context.Context, w *world) error { return w.scale(ctx, +2) }},
		{"scale-down", "two fewer tasks of each service", func(ctx context.Context, w *world) error { return w.scale(ctx, -2) }},
		{"drain-worker", "a worker is drained and activated again", func(ctx context.Context, w *world) error { return w.drain(ctx, "worker") }},
		{"drain-manager", "a manager is drained and activated again", func(ctx context.Context, w *world) error { return w.drain(ctx, "manager") }},
		{"rebalance", "tasks move to level the nodes", rebalance},
		{"kill-leader", "kill -9 of the leader's daemon during an update", func(ctx context.Context, w *world) error { return w.killDuringUpdate(ctx, w.leader) }},
		{"kill-worker", "kill -9 of a worker's daemon during an update", func(ctx context.Context, w *world) error {
			return w.killDuringUpdate(ctx, func(context.Context) (*dev.Node, error) { return w.some("worker"), nil })
		}},
		{"kill-daemons", "kill -9 of one daemon after the other", killDaemons},
		{"sick", "a task's health check begins to fail", sick},
		{"preempt", "a service of a higher priority takes the room of tasks on a node, and leaves again", preempt},
		{"remove", "a service is removed: what it was answering is answered", remove},
		{"move", "a service moves to other nodes by a constraint", move},
	}
}

// roll updates both services to their other version.
func (w *world) roll(ctx context.Context, order swarm.UpdateOrder) error {
	return errors.Join(w.next(ctx, graceful, order), w.next(ctx, abrupt, order))
}

func (w *world) next(ctx context.Context, name string, order swarm.UpdateOrder) error {
	v := "v2"
	if w.version[name] == v {
		v = "v1"
	}
	w.version[name] = v
	return w.update(ctx, name, func(s *swarm.ServiceSpec) {
		s.TaskTemplate.ContainerSpec.Image = w.repo + "/app:" + v
		s.UpdateConfig.Order, s.RollbackConfig.Order = order, order
	})
}

func force(ctx context.Context, w *world) error {
	again := func(s *swarm.ServiceSpec) { s.TaskTemplate.ForceUpdate++ }
	return errors.Join(w.update(ctx, graceful, again), w.update(ctx, abrupt, again))
}

func rollback(ctx context.Context, w *world) error {
	before := w.version[graceful]
	if err := w.next(ctx, graceful, swarm.UpdateOrderStartFirst); err != nil {
		return err
	}
	sleep(ctx, time.Duration(w.rand.IntN(3000))*time.Millisecond)
	w.version[graceful] = before
	return w.call(ctx, func(ctx context.Context, api *client.Client) error {
		in, err := api.ServiceInspect(ctx, graceful, client.ServiceInspectOptions{})
		if err != nil {
			return err
		}
		_, err = api.ServiceUpdate(ctx, in.Service.ID, client.ServiceUpdateOptions{Version: in.Service.Version, Spec: in.Service.Spec, Rollback: "previous"})
		return err
	})
}

// scale changes the number of tasks, within bounds.
func (w *world) scale(ctx context.Context, by int) error {
	for _, name := range []string{graceful, abrupt} {
		n := w.want[name] + by
		if n < 2 || n > 12 {
			n = w.opts.replicas
		}
		replicas := uint64(n)
		if err := w.update(ctx, name, func(s *swarm.ServiceSpec) { s.Mode.Replicated.Replicas = &replicas }); err != nil {
			return err
		}
		w.want[name] = n
	}
	return nil
}

func (w *world) drain(ctx context.Context, role string) error {
	n := w.some(role)
	if err := w.setAvailability(ctx, n, swarm.NodeAvailabilityDrain); err != nil {
		return err
	}
	return errors.Join(w.settled(ctx), w.setAvailability(ctx, n, swarm.NodeAvailabilityActive))
}

func (w *world) setAvailability(ctx context.Context, n *dev.Node, a swarm.NodeAvailability) error {
	return w.updateNode(ctx, n, func(s *swarm.NodeSpec) { s.Availability = a })
}

func (w *world) updateNode(ctx context.Context, n *dev.Node, change func(*swarm.NodeSpec)) error {
	return w.call(ctx, func(ctx context.Context, api *client.Client) error {
		nodes, err := api.NodeList(ctx, client.NodeListOptions{})
		if err != nil {
			return err
		}
		for _, x := range nodes.Items {
			if x.Description.Hostname == w.Name+"-"+n.Name {
				change(&x.Spec)
				_, err := api.NodeUpdate(ctx, x.ID, client.NodeUpdateOptions{Version: x.Version, Spec: x.Spec})
				return err
			}
		}
		return fmt.Errorf("no node is called %s-%s", w.Name, n.Name)
	})
}

// rebalance empties a node, then asks for its share to come back.
func rebalance(ctx context.Context, w *world) error {
	if err := w.drain(ctx, "worker"); err != nil {
		return err
	}
	m := w.some("manager")
	c := http.Client{Timeout: callTime, Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", m.Socket)
	}}}
	defer c.CloseIdleConnections()
	resp, err := c.Post("http://skein/skein/rebalance", "application/json", nil)
	if err != nil {
		return err
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("rebalance: status %s", resp.Status)
	}
	sleep(ctx, time.Second)
	return nil
}

func (w *world) leader(ctx context.Context) (lead *dev.Node, err error) {
	err = w.call(ctx, func(ctx context.Context, api *client.Client) error {
		nodes, err := api.NodeList(ctx, client.NodeListOptions{})
		for _, x := range nodes.Items {
			for _, n := range w.Nodes {
				if x.ManagerStatus != nil && x.ManagerStatus.Leader && x.Description.Hostname == w.Name+"-"+n.Name {
					lead = n
				}
			}
		}
		return err
	})
	if err == nil && lead == nil {
		err = errors.New("nobody leads")
	}
	return lead, err
}

func (w *world) killDuringUpdate(ctx context.Context, whom func(context.Context) (*dev.Node, error)) error {
	n, err := whom(ctx)
	if err != nil {
		return err
	}
	if err := w.next(ctx, graceful, swarm.UpdateOrderStartFirst); err != nil {
		return err
	}
	sleep(ctx, time.Duration(w.rand.IntN(3000))*time.Millisecond)
	return w.restart(ctx, n)
}

// restart kills a node's daemon and starts it again after a while.
func (w *world) restart(ctx context.Context, n *dev.Node) error {
	if err := syscall.Kill(n.PID, syscall.SIGKILL); err != nil {
		return err
	}
	n.PID = 0
	sleep(ctx, time.Duration(w.rand.IntN(1000))*time.Millisecond)
	var err error
	for begun := time.Now(); time.Since(begun) < 20*time.Second && ctx.Err() == nil; sleep(ctx, pollStep) { // the old process may still be dying
		if err = w.Start(ctx, n); err == nil || n.PID != 0 {
			return err
		}
	}
	return err
}

func killDaemons(ctx context.Context, w *world) error {
	for _, n := range w.Nodes {
		if err := w.restart(ctx, n); err != nil {
			return err
		}
		sleep(ctx, 2*time.Second)
	}
	return nil
}

// sick makes one task's probe fail; it goes on serving meanwhile.
func sick(ctx context.Context, w *world) error {
	resp, err := http.Get(fmt.Sprintf("http://%s:%d/sick", w.some("manager").Address, gracefulPort))
	if err != nil {
		return err
	}
	resp.Body.Close()
	sleep(ctx, 6*time.Second) // two probes
	return nil
}

// move allows a service the managers only, then all nodes again.
func move(ctx context.Context, w *world) error {
	at := func(constraints ...string) func(*swarm.ServiceSpec) {
		return func(s *swarm.ServiceSpec) {
			s.TaskTemplate.Placement = &swarm.Placement{Constraints: constraints}
			s.UpdateConfig.Order = swarm.UpdateOrderStartFirst
		}
	}
	return errors.Join(w.update(ctx, graceful, at("node.role==manager")), w.settled(ctx), w.update(ctx, graceful, at()))
}

// preempt has a more important service need so much memory that others must make room.
func preempt(ctx context.Context, w *world) error {
	const name = "urgent"
	room := func(bytes int64) func(*swarm.ServiceSpec) {
		return func(s *swarm.ServiceSpec) {
			s.TaskTemplate.Resources = &swarm.ResourceRequirements{Reservations: &swarm.Resources{MemoryBytes: bytes}}
		}
	}
	memory, err := w.memory(ctx)
	if err != nil {
		return err
	}
	// Each task of the service takes a third of a node: where two are, the urgent one needs the room of one.
	if err := errors.Join(w.update(ctx, graceful, room(memory/3)), w.settled(ctx)); err != nil {
		return err
	}
	s := w.spec(name, 0, 1)
	s.Labels = map[string]string{"skein.priority": "100"}
	room(memory * 3 / 4)(&s)
	if err := w.create(ctx, s); err != nil {
		return err
	}
	err = w.settled(ctx)
	delete(w.want, name)
	rerr := w.call(ctx, func(ctx context.Context, api *client.Client) error {
		_, err := api.ServiceRemove(ctx, name, client.ServiceRemoveOptions{})
		return err
	})
	return errors.Join(err, rerr, w.update(ctx, graceful, room(0)))
}

// memory is that of the smallest node.
func (w *world) memory(ctx context.Context) (least int64, err error) {
	err = w.call(ctx, func(ctx context.Context, api *client.Client) error {
		nodes, err := api.NodeList(ctx, client.NodeListOptions{})
		for _, n := range nodes.Items {
			if m := n.Description.Resources.MemoryBytes; least == 0 || m < least {
				least = m
			}
		}
		return err
	})
	return least, err
}

// remove removes a service while it answers.
func remove(ctx context.Context, w *world) error {
	const name, port = "brief", 8082
	if err := errors.Join(w.create(ctx, w.spec(name, port, 2)), w.settled(ctx)); err != nil {
		return err
	}
	streams := load.Start(load.Config{From: "outside", Targets: []string{fmt.Sprintf("%s:%d", w.Nodes[0].Address, port), fmt.Sprintf("%s:%d", w.some("worker").Address, port)},
		Clients: map[string]int{load.Stream: 3}, Pause: time.Hour, Stream: w.opts.stream, Failed: w.tally.note})
	sleep(ctx, 500*time.Millisecond) // each client asks once, within this time
	delete(w.want, name)
	err := w.call(ctx, func(ctx context.Context, api *client.Client) error {
		_, err := api.ServiceRemove(ctx, name, client.ServiceRemoveOptions{})
		return err
	})
	sleep(ctx, w.opts.stream)
	if n := streams.Stop()[load.Stream]; n.Sent != 6 {
		err = errors.Join(err, fmt.Errorf("%d of 6 streams were answered or failed", n.Sent))
	}
	return err
}

// some returns a node of a role.
func (w *world) some(role string) *dev.Node {
	var list []*dev.Node
	for _, n := range w.Nodes {
		if n.Role == role && n.PID != 0 {
			list = append(list, n)
		}
	}
	return list[w.rand.IntN(len(list))]
}
