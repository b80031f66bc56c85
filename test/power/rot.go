package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/moby/moby/api/types/swarm"
	"github.com/moby/moby/client"

	"skein/cmd/dev"
	"skein/test/nemesis"
)

const (
	joinTime   = 10 * time.Second // to be a manager again after a wipe
	refuseTime = 20 * time.Second // to start or to end
)

// rot is a way to damage a file.
type rot struct {
	name string
	do   func(w *world, b []byte) []byte
}

var rots = []rot{
	{"one bit", func(w *world, b []byte) []byte { b[w.rand.IntN(len(b))] ^= 1 << w.rand.IntN(8); return b }},
	{"eight bits", func(w *world, b []byte) []byte {
		for range 8 {
			b[w.rand.IntN(len(b))] ^= 1 << w.rand.IntN(8)
		}
		return b
	}},
	{"zeroed page", func(w *world, b []byte) []byte {
		at := w.rand.IntN(len(b)) / 4096 * 4096
		clear(b[at:min(len(b), at+4096)])
		return b
	}},
	{"cut short", func(w *world, b []byte) []byte { return b[:w.rand.IntN(len(b))] }},
}

// files that are damaged, below the state directory, and how often.
func (w *world) victim(n *dev.Node) (string, error) {
	base := filepath.Join(n.StateDir, "cluster")
	snaps, _ := filepath.Glob(filepath.Join(base, "raft/snapshots/*/*"))
	list := []string{filepath.Join(base, "raft/raft.db")}
	for _, other := range append(snaps, filepath.Join(base, "keys.json"), filepath.Join(base, "node.json"), filepath.Join(base, "certificates/node.pem"), filepath.Join(base, "agent/agent.journal")) {
		if st, err := os.Stat(other); err == nil && st.Size() > 0 {
			list = append(list, other)
		}
	}
	if w.rand.IntN(2) == 0 { // half of them in the log
		return list[0], nil
	}
	return list[w.rand.IntN(len(list))], nil
}

// damage is one round: a manager goes down, one of its files rots, and it is started again while the others serve.
func (w *world) damage(ctx context.Context, round int) error {
	n := w.Managers()[w.rand.IntN(len(w.Managers()))]
	lctx, stop := context.WithTimeout(ctx, 500*time.Millisecond)
	w.load.run(lctx)
	stop()
	if err := w.Kill(n); err != nil {
		return err
	}
	file, err := w.victim(n)
	if err != nil {
		return err
	}
	b, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	r := rots[w.rand.IntN(len(rots))]
	if err := os.WriteFile(file, r.do(w, b), 0o600); err != nil {
		return err
	}
	short := strings.TrimPrefix(file, n.StateDir+"/")
	what := fmt.Sprintf("damage %d: %s: %s in %s", round, n.Name, r.name, short)
	if _, err := w.Leader(ctx, bootTime); err != nil {
		return fmt.Errorf("%s: the others: %w", what, err)
	}
	if err := w.compare(ctx, what, w.others(n)); err != nil {
		return err
	}
	sctx, cancel := context.WithTimeout(ctx, refuseTime)
	serr := w.Start(sctx, n)
	cancel()
	if serr == nil {
		serr = w.takesPart(ctx, n)
	}
	if serr != nil {
		return w.refused(ctx, n, what, short, serr)
	}
	w.Say("%s: as good as before", what)
	if err := w.makeLead(ctx, n); err != nil {
		return w.refused(ctx, n, what, short, err) // it ended when it read what is damaged
	}
	return w.compare(ctx, what+", it leads", w.Managers())
}

func (w *world) others(n *dev.Node) []*dev.Node {
	var out []*dev.Node
	for _, m := range w.Managers() {
		if m != n {
			out = append(out, m)
		}
	}
	return out
}

// takesPart waits until the node is a manager that answers; the error says why it is not.
func (w *world) takesPart(ctx context.Context, n *dev.Node) error {
	var last error
	for begun := time.Now(); time.Since(begun) < refuseTime && ctx.Err() == nil; nemesis.Sleep(ctx, 50*time.Millisecond) {
		if syscall.Kill(n.PID, 0) != nil {
			return errors.New("its daemon ended")
		}
		cctx, cancel := context.WithTimeout(ctx, 2*time.Second)
		_, last = w.load.verify(cctx, w.Client(n))
		if last == nil {
			last = w.reachable(cctx, n)
		}
		cancel()
		if last == nil {
			return nil
		}
	}
	return fmt.Errorf("it does not take part within %v: %w", refuseTime, last)
}

// reachable asks another manager for the node.
func (w *world) reachable(ctx context.Context, n *dev.Node) error {
	list, err := w.Client(w.others(n)[0]).NodeList(ctx, client.NodeListOptions{})
	if err != nil {
		return err
	}
	for _, x := range list.Items {
		if w.NodeOf(x.Description.Hostname) == n && x.Status.State == swarm.NodeStateReady && x.ManagerStatus != nil && x.ManagerStatus.Reachability == swarm.ReachabilityReachable {
			return nil
		}
	}
	return fmt.Errorf("%s is not called ready and reachable", n.Name)
}

// makeLead deposes leaders until the node leads.
func (w *world) makeLead(ctx context.Context, n *dev.Node) error {
	for range 20 {
		lead, err := w.Leader(ctx, bootTime)
		if err != nil {
			return err
		}
		if syscall.Kill(n.PID, 0) != nil {
			return errors.New("its daemon ended")
		}
		if lead == n {
			return nil
		}
		if err := w.KillDaemon(lead); err != nil {
			return err
		}
		_, _ = w.Leader(ctx, bootTime)
		if err := w.StartDaemon(ctx, lead); err != nil {
			return err
		}
	}
	w.Say("  %s does not come to lead", n.Name)
	return nil
}

// refused looks at what the node said, and brings it back by the documented way: removed, wiped, joined.
func (w *world) refused(ctx context.Context, n *dev.Node, what, short string, why error) error {
	log, _ := os.ReadFile(filepath.Join(filepath.Dir(n.StateDir), "daemon.log"))
	lines := strings.Split(strings.TrimSpace(string(log)), "\n")
	tail := lines[max(0, len(lines)-12):]
	told := ""
	for _, l := range tail {
		if strings.Contains(l, filepath.Base(short)) || strings.Contains(l, "snapshot") && strings.Contains(short, "snapshots") {
			told = l
		}
	}
	if told == "" {
		w.violate("%s: refused (%.200v), and no line names the file: %s", what, why, strings.Join(tail, "\n    "))
	} else {
		w.Say("%s: refused: %.400s", what, told)
	}
	if strings.Contains(strings.Join(tail, " "), "goroutine ") {
		w.violate("%s: it crashed: %s", what, strings.Join(tail, "\n    "))
	}
	return w.rejoin(ctx, n)
}

// rejoin removes the node from the cluster, wipes it and joins it again.
func (w *world) rejoin(ctx context.Context, n *dev.Node) error {
	if err := w.Kill(n); err != nil {
		return err
	}
	at := w.Client(w.others(n)[0])
	begun := time.Now()
	var err error
	for range 50 {
		if err = w.remove(ctx, at, n); err == nil {
			break
		}
		nemesis.Sleep(ctx, 200*time.Millisecond)
	}
	if err != nil {
		return fmt.Errorf("remove %s: %w", n.Name, err)
	}
	removed := time.Since(begun)
	if err := os.RemoveAll(filepath.Join(n.StateDir, "cluster")); err != nil {
		return err
	}
	begun = time.Now()
	if err := errors.Join(w.Start(ctx, n), w.Join(ctx, n)); err != nil {
		return err
	}
	if err := w.takesPart(ctx, n); err != nil {
		return fmt.Errorf("after it was wiped: %w", err)
	}
	took := time.Since(begun)
	w.joins = append(w.joins, took)
	w.Say("  removed after %v, wiped, a manager again after %v", removed.Round(10*time.Millisecond), took.Round(10*time.Millisecond))
	if took > joinTime {
		w.violate("%s was a manager again %v after it was wiped, promised are %v", n.Name, took, joinTime)
	}
	return w.compare(ctx, "after "+n.Name+" joined again", w.Managers())
}

// remove takes a node that is down out of the cluster.
func (w *world) remove(ctx context.Context, at *client.Client, n *dev.Node) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	list, err := at.NodeList(ctx, client.NodeListOptions{})
	if err != nil {
		return err
	}
	for _, x := range list.Items {
		if w.NodeOf(x.Description.Hostname) == n {
			if _, err := at.NodeRemove(ctx, x.ID, client.NodeRemoveOptions{Force: true}); err != nil {
				return err
			}
		}
	}
	return nil
}
