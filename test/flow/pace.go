package main

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/moby/moby/api/types/swarm"
	"github.com/moby/moby/client"
)

// measurePace times rolling updates of ten tasks, two at a time, until the service says that its update is complete.
func (w *world) measurePace(ctx context.Context) error {
	if err := w.update(ctx, abrupt, func(s *swarm.ServiceSpec) { s.UpdateConfig.Monitor, s.UpdateConfig.Delay = time.Second, 0 }); err != nil {
		return err
	}
	for _, order := range []swarm.UpdateOrder{swarm.UpdateOrderStopFirst, swarm.UpdateOrderStartFirst} {
		var took []time.Duration
		for range w.opts.pace {
			if err := w.settled(ctx); err != nil {
				return err
			}
			begun := time.Now()
			if err := w.next(ctx, abrupt, order); err != nil {
				return err
			}
			if err := w.updated(ctx); err != nil {
				return err
			}
			took = append(took, time.Since(begun))
		}
		slices.Sort(took)
		w.say("%-11s ten tasks, two at a time, monitored for 1 s: min %.2f s, median %.2f s, max %.2f s", order, took[0].Seconds(), took[len(took)/2].Seconds(),
			took[len(took)-1].Seconds())
	}
	return nil
}

// updated waits until the update is complete.
func (w *world) updated(ctx context.Context) error {
	for begun := time.Now(); time.Since(begun) < settleTime && ctx.Err() == nil; sleep(ctx, pollStep/4) {
		state := swarm.UpdateState("")
		err := w.call(ctx, func(ctx context.Context, api *client.Client) error {
			in, err := api.ServiceInspect(ctx, abrupt, client.ServiceInspectOptions{})
			if err == nil && in.Service.UpdateStatus != nil {
				state = in.Service.UpdateStatus.State
			}
			return err
		})
		if err == nil && state == swarm.UpdateStateCompleted && w.unsettled(ctx) == nil {
			return nil
		}
	}
	return fmt.Errorf("the update did not end within %v", settleTime)
}
