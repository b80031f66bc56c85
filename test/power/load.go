package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"strconv"
	"strings"
	"sync"
	"time"

	cerrdefs "github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/swarm"
	"github.com/moby/moby/client"

	"skein/test/nemesis"
)

const (
	writers   = 12
	perWriter = 5 // objects
	mark      = "count"
	absent    = -1
	writeTime = 5 * time.Second
)

// object has one writer, so its writes are in order: it is anything from its acknowledged state to the last that was asked for.
type object struct {
	name    string
	acked   int   // the count of the last acknowledged write, or absent
	pending []int // writes without an answer since: any one of them may have been the last
	last    int   // the highest count ever asked for
}

// may reports whether the object may be seen so.
func (o *object) may(count int) bool {
	if count == o.acked {
		return true
	}
	for _, p := range o.pending {
		if p == count {
			return true
		}
	}
	return false
}

// load writes configs at all managers.
type load struct {
	rig     *nemesis.Rig
	seed    uint64
	round   uint64
	objects [writers][]*object // of each writer
	acks    int
	mu      sync.Mutex
}

func newLoad(r *nemesis.Rig, seed uint64) *load {
	l := &load{rig: r, seed: seed}
	for i := range l.objects {
		for j := range perWriter {
			l.objects[i] = append(l.objects[i], &object{name: fmt.Sprintf("p%d-%d", i, j), acked: absent})
		}
	}
	return l
}

// run writes until ctx ends, and returns when no request is out any more.
func (l *load) run(ctx context.Context) {
	l.round++
	var wg sync.WaitGroup
	for i, list := range l.objects {
		r := rand.New(rand.NewPCG(l.seed, l.round<<8|uint64(i)))
		wg.Go(func() {
			for ctx.Err() == nil {
				l.write(ctx, r, list[r.IntN(len(list))])
			}
		})
	}
	wg.Wait()
}

// write does the next write of an object whose state is known, else finds it out.
func (l *load) write(ctx context.Context, r *rand.Rand, o *object) {
	managers := l.rig.Managers()
	api := l.rig.Client(managers[r.IntN(len(managers))])
	ctx, cancel := context.WithTimeout(ctx, writeTime)
	defer cancel()
	if len(o.pending) > 0 {
		// A write that was given up may still be carried out; reading settles nothing then. The object rests until the next round.
		nemesis.Sleep(ctx, 5*time.Millisecond)
		return
	}
	next := o.last + 1
	var err error
	switch {
	case o.acked == absent:
		o.last = next
		_, err = api.ConfigCreate(ctx, client.ConfigCreateOptions{Spec: swarm.ConfigSpec{
			Annotations: swarm.Annotations{Name: o.name, Labels: map[string]string{mark: strconv.Itoa(next)}},
			Data:        []byte(strings.Repeat("x", 1+r.IntN(2000))),
		}})
	case r.IntN(12) == 0:
		next = absent
		_, err = api.ConfigRemove(ctx, o.name, client.ConfigRemoveOptions{})
	default:
		in, rerr := api.ConfigInspect(ctx, o.name, client.ConfigInspectOptions{})
		if rerr != nil {
			return
		}
		o.last = next
		spec := in.Config.Spec
		spec.Labels = map[string]string{mark: strconv.Itoa(next)}
		_, err = api.ConfigUpdate(ctx, in.Config.ID, client.ConfigUpdateOptions{Version: in.Config.Version, Spec: spec})
	}
	if err != nil {
		o.pending = append(o.pending, next)
		return
	}
	o.acked = next
	l.mu.Lock()
	l.acks++
	l.mu.Unlock()
}

// verify compares what one manager shows with what may be there, and takes that as the state from now on.
func (l *load) verify(ctx context.Context, api *client.Client) (wrong []string, err error) {
	ctx, cancel := context.WithTimeout(ctx, writeTime)
	defer cancel()
	res, err := api.ConfigList(ctx, client.ConfigListOptions{})
	if err != nil {
		return nil, err
	}
	seen := map[string]int{}
	for _, c := range res.Items {
		if _, twice := seen[c.Spec.Name]; twice {
			wrong = append(wrong, c.Spec.Name+" is there twice")
		}
		count, err := strconv.Atoi(c.Spec.Labels[mark])
		if err != nil {
			wrong = append(wrong, fmt.Sprintf("%s has the label %q, which nobody set", c.Spec.Name, c.Spec.Labels[mark]))
		}
		seen[c.Spec.Name] = count
	}
	for _, list := range l.objects {
		for _, o := range list {
			count, ok := seen[o.name]
			if !ok {
				count = absent
			}
			if !o.may(count) {
				wrong = append(wrong, fmt.Sprintf("%s is %d, acknowledged was %d, asked for and not answered %v", o.name, count, o.acked, o.pending))
			}
			delete(seen, o.name)
		}
	}
	for name := range seen {
		wrong = append(wrong, name+" is there, and nobody made it")
	}
	return wrong, nil
}

// settle takes what is there as acknowledged: nothing is under way any more, as every process was killed.
func (l *load) settle(ctx context.Context, api *client.Client) error {
	for _, list := range l.objects {
		for _, o := range list {
			in, err := api.ConfigInspect(ctx, o.name, client.ConfigInspectOptions{})
			switch {
			case cerrdefs.IsNotFound(err):
				o.acked = absent
			case err != nil:
				return err
			default:
				if o.acked, err = strconv.Atoi(in.Config.Spec.Labels[mark]); err != nil {
					return err
				}
			}
			o.pending = nil
		}
	}
	return nil
}
