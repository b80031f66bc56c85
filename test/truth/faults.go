package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"skein/cmd/dev"
	"skein/test/nemesis"
)

// fault is one way to break the cluster; heal is called when its time is over.
type fault struct {
	name  string
	brief bool // it lasts as long as the daemon needs to come back
	begin func(ctx context.Context, w *world) (heal func() error, err error)
}

func faults() []fault {
	one := func(kind nemesis.Kind, percent int, pick func(context.Context, *world) (*dev.Node, error)) func(context.Context, *world) (func() error, error) {
		return func(ctx context.Context, w *world) (func() error, error) {
			n, err := pick(ctx, w)
			if err != nil {
				return nil, err
			}
			w.Say("%s of %s", kind, n.Name)
			return w.nemesis.Break(ctx, n, nemesis.Step{Kind: kind, Percent: percent})
		}
	}
	return []fault{
		{"cut-worker", false, one(nemesis.Cut, 0, aWorker)},
		{"cut-leader", false, one(nemesis.Cut, 0, theLeader)},
		{"cut-follower", false, one(nemesis.Cut, 0, aFollower)},
		{"loss-worker", false, one(nemesis.Loss, 20, aWorker)},
		{"loss-leader", false, one(nemesis.Loss, 20, theLeader)},
		{"loss-all", false, lossOfAll},
		{"kill-worker", true, one(nemesis.Kill, 0, aWorker)},
		{"kill-leader", true, one(nemesis.Kill, 0, theLeader)},
		{"kill-all", true, killAll},
	}
}

func names() string {
	var out []string
	for _, f := range faults() {
		out = append(out, f.name)
	}
	return strings.Join(out, ",")
}

func choose(list string) ([]fault, error) {
	if list == "" {
		return faults(), nil
	}
	var out []fault
	for _, name := range strings.Split(list, ",") {
		i := slices.IndexFunc(faults(), func(f fault) bool { return f.name == name })
		if i < 0 {
			return nil, fmt.Errorf("there is no fault %q: %s", name, names())
		}
		out = append(out, faults()[i])
	}
	return out, nil
}

func aWorker(_ context.Context, w *world) (*dev.Node, error) {
	var list []*dev.Node
	for _, n := range w.Nodes {
		if n.Role != "manager" {
			list = append(list, n)
		}
	}
	if len(list) == 0 {
		return nil, errors.New("there is no worker")
	}
	return list[rand.IntN(len(list))], nil
}

func theLeader(ctx context.Context, w *world) (*dev.Node, error) {
	return w.Leader(ctx, 20*time.Second)
}

func aFollower(ctx context.Context, w *world) (*dev.Node, error) {
	lead, err := w.Leader(ctx, 20*time.Second)
	if err != nil {
		return nil, err
	}
	for _, n := range w.Managers() {
		if n != lead {
			return n, nil
		}
	}
	return nil, errors.New("there is no other manager")
}

func together(w *world, ctx context.Context, s nemesis.Step) (func() error, error) {
	var undo []func() error
	var errs []error
	for _, n := range w.Nodes {
		u, err := w.nemesis.Break(ctx, n, s)
		errs = append(errs, err)
		if u != nil {
			undo = append(undo, u)
		}
	}
	return func() error {
		done := make(chan error, len(undo))
		for _, u := range undo {
			go func() { done <- u() }()
		}
		var errs []error
		for range undo {
			errs = append(errs, <-done)
		}
		return errors.Join(errs...)
	}, errors.Join(errs...)
}

// lossOfAll drops a tenth of the packets on each node's cable, each way: a fifth between two nodes.
func lossOfAll(ctx context.Context, w *world) (func() error, error) {
	return together(w, ctx, nemesis.Step{Kind: nemesis.Loss, Percent: 10})
}

func killAll(ctx context.Context, w *world) (func() error, error) {
	return together(w, ctx, nemesis.Step{Kind: nemesis.Kill})
}
