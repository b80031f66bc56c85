package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/moby/moby/api/types/swarm"
	"github.com/moby/moby/client"
)

// setImage starts an update to the other version.
func (w *world) setImage(ctx context.Context, name string) error {
	v := "v2"
	if w.version[name] == "v2" {
		v = "v1"
	}
	w.version[name] = v
	_, err := w.persist(ctx, 10*time.Second, name, func(spec *swarm.ServiceSpec) { spec.TaskTemplate.ContainerSpec.Image = w.image(v) })
	return err
}

// updated waits for the end of an update.
func (w *world) updated(ctx context.Context, name string, limit time.Duration) error {
	begun := time.Now()
	var last string
	for time.Since(begun) < limit && ctx.Err() == nil {
		state := swarm.UpdateState("")
		err := w.call(ctx, w.managers()[0], func(ctx context.Context, api *client.Client) error {
			in, err := api.ServiceInspect(ctx, name, client.ServiceInspectOptions{})
			if err == nil && in.Service.UpdateStatus != nil {
				state = in.Service.UpdateStatus.State
			}
			return err
		})
		// None: a later write, of labels only, had nothing to roll out and took the report of the one before along.
		if err == nil && (state == "" || state == swarm.UpdateStateCompleted || state == swarm.UpdateStateRollbackCompleted) {
			return nil
		}
		last = fmt.Sprintf("state %q, error %v", state, err)
		sleep(ctx, 2*pollStep)
	}
	return fmt.Errorf("the update of %s did not end within %v: %s", name, limit, last)
}

func (w *world) scaleTo(ctx context.Context, name string, n uint64) error {
	_, err := w.persist(ctx, 10*time.Second, name, func(spec *swarm.ServiceSpec) { spec.Mode.Replicated.Replicas = &n })
	if err == nil {
		w.mu.Lock()
		w.services[name].replicas = int(n)
		w.mu.Unlock()
	}
	return err
}

func roll(ctx context.Context, w *world) error {
	for _, name := range []string{"web", "sf"} {
		begun := time.Now()
		if err := errors.Join(w.setImage(ctx, name), w.updated(ctx, name, 90*time.Second)); err != nil {
			return err
		}
		w.say("  %s updated in %v", name, time.Since(begun).Round(10*time.Millisecond))
	}
	return nil
}

func scale(ctx context.Context, w *world) error {
	for _, n := range []uint64{12, 3, 6} {
		if err := w.scaleTo(ctx, "web", n); err != nil {
			return err
		}
		w.check(ctx, fmt.Sprintf("scale to %d", n), true)
	}
	return nil
}

// rollback asks for the previous spec in the middle of an update.
func rollback(ctx context.Context, w *world) error {
	if err := w.setImage(ctx, "web"); err != nil {
		return err
	}
	sleep(ctx, time.Duration(w.rand.IntN(3000))*time.Millisecond)
	s := w.services["web"]
	err := w.call(ctx, w.managers()[0], func(ctx context.Context, api *client.Client) error {
		in, err := api.ServiceInspect(ctx, "web", client.ServiceInspectOptions{})
		if err != nil {
			return err
		}
		_, err = api.ServiceUpdate(ctx, in.Service.ID, client.ServiceUpdateOptions{Version: in.Service.Version, Spec: in.Service.Spec, Rollback: "previous"})
		return err
	})
	if err != nil {
		return err
	}
	w.mu.Lock()
	s.ack-- // the label is the previous spec's, too
	w.mu.Unlock()
	if w.version["web"] = "v1"; true {
		err = w.updated(ctx, "web", 60*time.Second)
	}
	_, perr := w.persist(ctx, 10*time.Second, "web", nil)
	return errors.Join(err, perr)
}

func drain(ctx context.Context, w *world) error {
	n := w.Nodes[w.rand.IntN(len(w.Nodes))]
	w.say("  %s", n.Name)
	id, err := w.nodeID(ctx, n)
	if err != nil {
		return err
	}
	if err := w.setAvailability(ctx, id, swarm.NodeAvailabilityDrain); err != nil {
		return err
	}
	w.mu.Lock()
	w.services["probe"].replicas--
	w.mu.Unlock()
	w.check(ctx, "drained", true)
	err = w.setAvailability(ctx, id, swarm.NodeAvailabilityActive)
	w.mu.Lock()
	w.services["probe"].replicas++
	w.mu.Unlock()
	return err
}

func (w *world) setAvailability(ctx context.Context, id string, a swarm.NodeAvailability) error {
	return w.call(ctx, w.managers()[0], func(ctx context.Context, api *client.Client) error {
		in, err := api.NodeInspect(ctx, id, client.NodeInspectOptions{})
		if err != nil {
			return err
		}
		spec := in.Node.Spec
		spec.Availability = a
		_, err = api.NodeUpdate(ctx, id, client.NodeUpdateOptions{Version: in.Node.Version, Spec: spec})
		return err
	})
}

// churn creates and removes services, and compares what the nodes hold of kernel objects before and after.
func churn(ctx context.Context, w *world) error {
	before := w.holdings()
	for i := range 12 {
		at := w.managers()[i%len(w.managers())]
		s := &service{name: fmt.Sprintf("churn%d", i), port: uint32(12000 + i%3), replicas: 5, order: swarm.UpdateOrderStopFirst}
		if err := w.create(ctx, at, s); err != nil {
			return fmt.Errorf("create %s at %s: %w", s.name, at.Name, err)
		}
		sleep(ctx, time.Duration(w.rand.IntN(1500))*time.Millisecond)
		if err := w.remove(ctx, s.name); err != nil {
			return fmt.Errorf("remove %s: %w", s.name, err)
		}
		if err := w.refused(ctx, s); err != nil {
			return err
		}
	}
	var grown map[string]string
	for begun := time.Now(); time.Since(begun) < 30*time.Second; sleep(ctx, time.Second) {
		if grown = growth(before, w.holdings()); len(grown) == 0 {
			w.say("  nothing left after %v", time.Since(begun).Round(time.Second))
			return nil
		}
	}
	var out []string
	for _, k := range slices.Sorted(maps.Keys(grown)) {
		out = append(out, k+" "+grown[k])
	}
	return fmt.Errorf("left behind 30 s after the last removal: %v", out)
}

// refused waits until the port of a removed service is closed everywhere; clients must be told at once, not left to time out.
func (w *world) refused(ctx context.Context, s *service) error {
	for _, n := range w.living() {
		url := fmt.Sprintf("http://%s:%d/", n.Address, s.port)
		begun := time.Now()
		for {
			asked := time.Now()
			_, err := fresh(url, 3*time.Second)
			if took := time.Since(asked); took > 1500*time.Millisecond {
				return fmt.Errorf("port %d of %s, which was removed %v ago: %s left its client waiting for %v: %w", s.port, s.name, time.Since(begun), n.Name, took, err)
			}
			if err != nil {
				break
			}
			if time.Since(begun) > 15*time.Second {
				return fmt.Errorf("port %d of %s still answers at %s 15 s after the removal", s.port, s.name, n.Name)
			}
			sleep(ctx, pollStep)
		}
	}
	return nil
}
