package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/client"
)

// idle prints what the nodes' own processes hold.
func (b *bench) idle(context.Context) error {
	ps, err := b.processes()
	for _, p := range ps {
		if p.role == "daemon" || p.role == "supervisor" {
			fmt.Printf("  %s %-12s RSS %s, private %s\n", p.node, p.role, mib(p.rss), mib(p.priv))
		}
	}
	return err
}

// pull makes an image present on the first node.
func (b *bench) pull(ctx context.Context, ref string) error {
	res, err := b.apis[0].ImagePull(ctx, ref, client.ImagePullOptions{})
	if err != nil {
		return err
	}
	defer res.Close()
	_, err = io.Copy(io.Discard, res)
	return err
}

// runs is what `docker run --rm IMAGE true` asks, by one client.
func (b *bench) runs(ctx context.Context) error {
	if err := b.pull(ctx, b.image("v1")); err != nil {
		return err
	}
	for _, net := range []string{"none", "bridge"} {
		for _, rest := range []time.Duration{0, 100 * time.Millisecond} {
			parts := map[string][]time.Duration{}
			if _, err := b.runOnce(ctx, net, map[string][]time.Duration{}); err != nil { // warm
				return err
			}
			var walls []time.Duration
			cpu := b.cpu()
			for range b.opts.rounds {
				time.Sleep(rest)
				d, err := b.runOnce(ctx, net, parts)
				if err != nil {
					return err
				}
				walls = append(walls, d)
			}
			label := "run --rm, " + net
			if rest > 0 {
				label += ", rested"
			}
			row(label, walls, b.cpu()-cpu)
			for _, p := range []string{"create", "attach", "start", "end"} {
				row("  "+p, parts[p], 0)
			}
		}
	}
	return nil
}

func (b *bench) runOnce(ctx context.Context, network string, parts map[string][]time.Duration) (time.Duration, error) {
	api := b.apis[0]
	begun := time.Now()
	last := begun
	mark := func(part string) {
		now := time.Now()
		parts[part] = append(parts[part], now.Sub(last))
		last = now
	}
	res, err := api.ContainerCreate(ctx, client.ContainerCreateOptions{
		Config:     &container.Config{Image: b.image("v1"), Cmd: []string{"true"}, AttachStdout: true, AttachStderr: true},
		HostConfig: &container.HostConfig{AutoRemove: true, NetworkMode: container.NetworkMode(network)},
	})
	if err != nil {
		return 0, err
	}
	mark("create")
	att, err := api.ContainerAttach(ctx, res.ID, client.ContainerAttachOptions{Stream: true, Stdout: true, Stderr: true})
	if err != nil {
		return 0, err
	}
	defer att.Close()
	wctx, cancel := context.WithCancel(ctx)
	defer cancel()
	wait := api.ContainerWait(wctx, res.ID, client.ContainerWaitOptions{Condition: container.WaitConditionRemoved})
	mark("attach")
	if _, err := api.ContainerStart(ctx, res.ID, client.ContainerStartOptions{}); err != nil {
		return 0, err
	}
	mark("start")
	if _, err := io.Copy(io.Discard, att.Reader); err != nil {
		return 0, err
	}
	select {
	case err := <-wait.Error:
		return 0, err
	case r := <-wait.Result:
		if r.StatusCode != 0 {
			return 0, fmt.Errorf("exit code %d", r.StatusCode)
		}
	}
	mark("end")
	return last.Sub(begun), nil
}

// sleeper starts a container that idles.
func (b *bench) sleeper(ctx context.Context, network string) (string, error) {
	res, err := b.apis[0].ContainerCreate(ctx, client.ContainerCreateOptions{
		Config: &container.Config{Image: b.image("v1")}, HostConfig: &container.HostConfig{NetworkMode: container.NetworkMode(network)},
	})
	if err == nil {
		_, err = b.apis[0].ContainerStart(ctx, res.ID, client.ContainerStartOptions{})
	}
	return res.ID, err
}

func (b *bench) removeAll(ctx context.Context, ids []string) error {
	var errs []error
	for _, id := range ids {
		_, err := b.apis[0].ContainerRemove(ctx, id, client.ContainerRemoveOptions{Force: true})
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// execs is `docker exec C /noop true`, by one client.
func (b *bench) execs(ctx context.Context) error {
	if err := b.pull(ctx, b.image("v1")); err != nil {
		return err
	}
	id, err := b.sleeper(ctx, "none")
	if err != nil {
		return err
	}
	var walls []time.Duration
	cpu := b.cpu()
	for range b.opts.rounds {
		begun := time.Now()
		x, err := b.apis[0].ExecCreate(ctx, id, client.ExecCreateOptions{Cmd: []string{"/noop", "true"}, AttachStdout: true, AttachStderr: true})
		if err != nil {
			return err
		}
		att, err := b.apis[0].ExecAttach(ctx, x.ID, client.ExecAttachOptions{})
		if err != nil {
			return err
		}
		_, err = io.Copy(io.Discard, att.Reader)
		att.Close()
		if err != nil {
			return err
		}
		walls = append(walls, time.Since(begun))
	}
	row("exec", walls, b.cpu()-cpu)
	return b.removeAll(ctx, []string{id})
}

// density compares the node's own memory with and without containers.
func (b *bench) density(ctx context.Context) error {
	if err := b.pull(ctx, b.image("v1")); err != nil {
		return err
	}
	before, err := b.processes()
	if err != nil {
		return err
	}
	var ids []string
	for range b.opts.rounds {
		id, err := b.sleeper(ctx, "bridge")
		if err != nil {
			return err
		}
		ids = append(ids, id)
	}
	after, err := b.processes()
	if err != nil {
		return err
	}
	private := func(ps []process, role string) int64 {
		for _, p := range ps {
			if p.role == role && p.node == b.Nodes[0].Name {
				return p.priv
			}
		}
		return 0
	}
	for _, role := range []string{"daemon", "supervisor"} {
		was, is := private(before, role), private(after, role)
		fmt.Printf("  %-12s private %s, %s with %d containers: %d KiB each\n", role, mib(was), mib(is), len(ids), (is-was)>>10/int64(len(ids)))
	}
	return b.removeAll(ctx, ids)
}
