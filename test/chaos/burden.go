package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"

	"github.com/moby/moby/api/types/swarm"
	"github.com/moby/moby/client"

	"skein/test/nemesis"
)

const burnCycle = 50 * time.Millisecond

// burn keeps one processor busy for a share of the time, until it is killed. It is what `chaos burn PERCENT` does.
func burn(percent int) {
	runtime.GOMAXPROCS(1)
	for {
		begun := time.Now()
		for busy := burnCycle * time.Duration(percent) / 100; time.Since(begun) < busy; {
		}
		time.Sleep(burnCycle - time.Since(begun))
	}
}

// underLoad keeps the machine busy for a while and counts what must not happen: nodes called down, tasks replaced, elections. Meanwhile
// writes go on.
func (f *figures) underLoad(ctx context.Context, o measureOptions) error {
	if err := f.calm(ctx); err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	for range runtime.NumCPU() {
		cmd := exec.CommandContext(ctx, self, "burn", strconv.Itoa(o.percent))
		if err := cmd.Start(); err != nil {
			return err
		}
		defer func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }()
	}
	before, err := f.tasks(ctx)
	if err != nil {
		return err
	}
	elections, b := f.elections(), newBusy()
	f.Say("load: %d %% of %d processors for %v minutes", o.percent, runtime.NumCPU(), o.minutes)
	var took []time.Duration
	deaths, failed := map[string]int{}, 0
	for end := time.Now().Add(time.Duration(o.minutes * float64(time.Minute))); time.Now().Before(end) && ctx.Err() == nil; nemesis.Sleep(ctx, 200*time.Millisecond) {
		f.n++
		begun := time.Now()
		cctx, cancel := context.WithTimeout(ctx, 10*time.Second)
		name := fmt.Sprintf("load%d", f.n)
		api := f.Client(f.Managers()[f.n%len(f.Managers())])
		_, err := api.ConfigCreate(cctx, client.ConfigCreateOptions{Spec: swarm.ConfigSpec{Annotations: swarm.Annotations{Name: name}, Data: []byte("x")}})
		if took = append(took, time.Since(begun)); err != nil {
			failed++
			f.Say("  write %s: %v", name, err)
		}
		_, rerr := api.ConfigRemove(cctx, name, client.ConfigRemoveOptions{})
		res, lerr := api.NodeList(cctx, client.NodeListOptions{})
		cancel()
		if err := errors.Join(rerr, lerr); err != nil {
			failed++
			f.Say("  %v", err)
		}
		for _, n := range res.Items {
			if n.Status.State != swarm.NodeStateReady {
				if deaths[n.Description.Hostname]++; deaths[n.Description.Hostname] == 1 {
					f.Say("  %s is %s: %s", n.Description.Hostname, n.Status.State, n.Status.Message)
				}
			}
		}
	}
	after, err := f.tasks(ctx)
	if err != nil {
		return err
	}
	moved := 0
	for id := range before {
		if !after[id] {
			moved++
		}
	}
	f.row("write under load", took, 0, 0, b)
	now := f.elections() - elections
	f.Say("under load: %d nodes called down, %d tasks replaced, %d elections, %d requests failed", len(deaths), moved, now, failed)
	if len(deaths)+moved+now+failed > 0 {
		f.broken++
	}
	return nil
}

// tasks are the ids of those that run.
func (f *figures) tasks(ctx context.Context) (map[string]bool, error) {
	res, err := f.Client(f.Managers()[0]).TaskList(ctx, client.TaskListOptions{Filters: make(client.Filters).Add("desired-state", "running")})
	out := map[string]bool{}
	for _, t := range res.Items {
		out[t.ID] = t.Status.State == swarm.TaskStateRunning
	}
	return out, err
}

// elections counts how often a manager began to lead, by the daemons' logs.
func (f *figures) elections() int {
	n := 0
	for _, m := range f.Managers() {
		b, err := os.ReadFile(filepath.Join(filepath.Dir(m.StateDir), "daemon.log"))
		if err == nil {
			n += strings.Count(string(b), "msg=leading ") + strings.Count(string(b), `msg="leading"`)
		}
	}
	return n
}
