package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"syscall"
	"time"

	cerrdefs "github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/swarm"
	"github.com/moby/moby/client"

	"skein/cmd/dev"
)

const (
	failoverTime = 4 * time.Second  // a leader's death to the first accepted write
	moveTime     = 10 * time.Second // a node's death to its tasks running elsewhere
)

// fault is one way to break the cluster. inject breaks, keeps things broken for a while and heals; it returns an error when a promise
// was broken meanwhile.
type fault struct {
	name     string
	about    string
	restarts bool // whether containers may be other ones afterwards
	calm     bool // nothing is broken: no request may fail
	inject   func(context.Context, *world) error
}

var faults = []fault{
	{"kill-leader", "kill -9 of the leader's daemon, restarted after the next leader took a write", false, false, killLeader},
	{"kill-follower", "kill -9 of a follower's daemon, restarted at once", false, false, killFollower},
	{"kill-worker", "kill -9 of a worker's daemon, three times in a row", false, false, killWorker},
	{"kill-all", "kill -9 of all daemons at once", false, false, killAll},
	{"kill-supervisor", "kill -9 of a supervisor alone", false, false, killSupervisor},
	{"kill-both", "kill -9 of a node's supervisor and daemon at once", false, false, killBoth},
	{"orphan-exit", "a supervisor is killed, then a container that it started: its end is noticed and it is replaced", true, false, orphanExit},
	{"create-kill", "services are created while leaders are killed: no acknowledged one is lost, none comes twice", true, false, createKill},
	{"kill-node", "kill -9 of everything of a node, restarted when its tasks run elsewhere", true, false, killNode},
	{"pause-leader", "SIGSTOP of the leader for 1 to 20 s: no stale read afterwards", true, false, pauseLeader},
	{"pause-worker", "SIGSTOP of a worker's daemon for 1 to 20 s", true, false, pauseWorker},
	{"cut-leader", "the leader's link is cut for 5 to 30 s", true, false, cutLeader},
	{"cut-follower", "a follower's link is cut for 5 to 30 s", true, false, cutFollower},
	{"cut-worker", "a worker's link is cut for 5 to 30 s", true, false, cutWorker},
	{"flap", "a link goes down and up every second, ten times", true, false, flap},
	{"update-kill", "a rolling update while daemons are killed", true, false, updateKill},
	{"scale-kill", "services are scaled while the leader is killed", true, false, scaleKill},
	{"full-disk", "the disk of the leader's state fills up", true, false, fullDisk},
	{"roll", "rolling updates, start-first and stop-first", true, true, roll},
	{"scale", "scaling up and down", true, true, scale},
	{"rollback", "an update is rolled back half-way", true, true, rollback},
	{"drain", "a node is drained and activated again", true, true, drain},
	{"churn", "services are created and removed in a loop: nothing may be left", true, true, churn},
}

func (w *world) follower(ctx context.Context) (*dev.Node, error) {
	lead, err := w.leader(ctx)
	if err != nil {
		return nil, err
	}
	var list []*dev.Node
	for _, n := range w.managers() {
		if n != lead {
			list = append(list, n)
		}
	}
	return list[w.rand.IntN(len(list))], nil
}

func (w *world) worker() *dev.Node {
	var list []*dev.Node
	for _, n := range w.living() {
		if n.Role != "manager" {
			list = append(list, n)
		}
	}
	return list[w.rand.IntN(len(list))]
}

func (w *world) seconds(from, to int) time.Duration {
	return time.Duration(from)*time.Second + time.Duration(w.rand.Int64N(int64(to-from)*int64(time.Second)))
}

func sleep(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}

func killDaemon(n *dev.Node) error {
	if n.PID == 0 {
		return fmt.Errorf("%s has no daemon", n.Name)
	}
	err := syscall.Kill(n.PID, syscall.SIGKILL)
	n.PID = 0
	return err
}

// start waits for the old process to be gone: it may still be dying.
func (w *world) start(ctx context.Context, n *dev.Node) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	var err error
	for range 40 {
		if err = w.Start(ctx, n); err == nil || n.PID != 0 {
			return err
		}
		sleep(ctx, pollStep)
	}
	return err
}

// firstWrite measures how long writes are refused after a leader is lost.
func (w *world) firstWrite(ctx context.Context) error {
	took, err := w.anyWrite(ctx, 15*time.Second)
	if err != nil {
		return err
	}
	w.writes[w.fault] = append(w.writes[w.fault], took)
	w.say("  first write after %v", took.Round(10*time.Millisecond))
	if took > failoverTime {
		return fmt.Errorf("the first write was accepted after %v, promised are %v", took, failoverTime)
	}
	return nil
}

// anyWrite writes at all living managers until one of them takes it.
func (w *world) anyWrite(ctx context.Context, limit time.Duration) (time.Duration, error) {
	begun := time.Now()
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	managers := w.managers()
	done := make(chan error, len(managers))
	for _, n := range managers {
		go func() {
			var err error
			for {
				if err = w.update(ctx, n, "web", nil); err == nil {
					cancel()
				}
				if ctx.Err() != nil {
					done <- err
					return
				}
				sleep(ctx, pollStep)
			}
		}()
	}
	var took time.Duration
	var last error
	for range managers {
		if err := <-done; err != nil {
			last = err
		} else if took == 0 {
			took = time.Since(begun)
		}
	}
	if took == 0 {
		return 0, fmt.Errorf("no manager took a write within %v: %w", limit, last)
	}
	return took, nil
}

func killLeader(ctx context.Context, w *world) error {
	lead, err := w.leader(ctx)
	if err != nil {
		return err
	}
	w.say("  leader %s", lead.Name)
	if err := killDaemon(lead); err != nil {
		return err
	}
	w.down_[lead.Name] = true
	defer w.away(lead, false)
	return errors.Join(w.firstWrite(ctx), w.start(ctx, lead))
}

func killFollower(ctx context.Context, w *world) error {
	n, err := w.follower(ctx)
	if err != nil {
		return err
	}
	return errors.Join(killDaemon(n), w.start(ctx, n))
}

func killWorker(ctx context.Context, w *world) error {
	n := w.worker()
	for range 3 {
		if err := errors.Join(killDaemon(n), w.start(ctx, n)); err != nil {
			return err
		}
		sleep(ctx, time.Duration(w.rand.IntN(1500))*time.Millisecond)
	}
	return nil
}

func killAll(ctx context.Context, w *world) error {
	for _, n := range w.Nodes {
		if err := killDaemon(n); err != nil {
			return err
		}
	}
	sleep(ctx, w.seconds(0, 3))
	errs := make(chan error, len(w.Nodes))
	for _, n := range w.Nodes {
		go func() { errs <- w.start(ctx, n) }()
	}
	var all error
	for range w.Nodes {
		all = errors.Join(all, <-errs)
	}
	return errors.Join(all, w.firstWriteAfterRestart(ctx))
}

// firstWriteAfterRestart has no promise but to come.
func (w *world) firstWriteAfterRestart(ctx context.Context) error {
	took, err := w.persist(ctx, 15*time.Second, "web", nil)
	w.say("  first write after %v", took.Round(10*time.Millisecond))
	return err
}

// supervisorPID is the node's supervisor.
func supervisorPID(n *dev.Node) (int, error) {
	return dev.Listener(filepath.Join(filepath.Dir(n.Socket), "supervisor.sock"))
}

func killSupervisor(ctx context.Context, w *world) error {
	n := w.Nodes[w.rand.IntN(len(w.Nodes))]
	pid, err := supervisorPID(n)
	if err != nil {
		return err
	}
	w.say("  supervisor %d of %s", pid, n.Name)
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		return err
	}
	begun := time.Now()
	for {
		now, err := supervisorPID(n)
		if err == nil && now != pid {
			w.say("  next supervisor %d after %v", now, time.Since(begun).Round(time.Millisecond))
			break
		}
		if time.Since(begun) > 10*time.Second {
			return fmt.Errorf("%s has no new supervisor after 10 s: %v", n.Name, err)
		}
		sleep(ctx, pollStep)
	}
	sleep(ctx, time.Second)
	return nil
}

// orphanExit ends a container whose parent is no longer the supervisor that started it.
func orphanExit(ctx context.Context, w *world) error {
	if err := killSupervisor(ctx, w); err != nil {
		return err
	}
	for name, pid := range w.before {
		w.say("  container %s, pid %d", name, pid)
		return syscall.Kill(pid, syscall.SIGKILL)
	}
	return nil
}

func createKill(ctx context.Context, w *world) error {
	names := make(chan string, 8)
	go func() {
		defer close(names)
		for i := range cap(names) {
			list := w.managers()
			s := &service{name: fmt.Sprintf("ck%d", i), replicas: 1, order: swarm.UpdateOrderStopFirst}
			err := w.create(ctx, list[i%len(list)], s)
			for try := 0; err != nil && try < 20 && ctx.Err() == nil; try++ { // it may have been done: then its name is taken
				if cerrdefs.IsAlreadyExists(err) || cerrdefs.IsConflict(err) {
					w.mu.Lock()
					w.services[s.name], err = s, nil
					w.mu.Unlock()
					break
				}
				sleep(ctx, 100*time.Millisecond)
				list = w.managers()
				err = w.create(ctx, list[try%len(list)], s)
			}
			if err != nil {
				w.say("  create %s: %v", s.name, err)
			}
			names <- s.name
			sleep(ctx, 200*time.Millisecond)
		}
	}()
	err := errors.Join(killLeader(ctx, w), killLeader(ctx, w))
	var all []string
	for n := range names {
		all = append(all, n)
	}
	w.check(ctx, "created", true)
	for _, n := range all {
		err = errors.Join(err, w.remove(ctx, n))
	}
	return err
}

func (w *world) remove(ctx context.Context, name string) error {
	w.mu.Lock()
	delete(w.services, name)
	w.mu.Unlock()
	return w.call(ctx, w.managers()[0], func(ctx context.Context, api *client.Client) error {
		_, err := api.ServiceRemove(ctx, name, client.ServiceRemoveOptions{})
		return err
	})
}

func killBoth(ctx context.Context, w *world) error {
	n := w.Nodes[w.rand.IntN(len(w.Nodes))]
	pid, err := supervisorPID(n)
	if err != nil {
		return err
	}
	w.say("  %s", n.Name)
	err = errors.Join(killDaemon(n), syscall.Kill(pid, syscall.SIGKILL))
	return errors.Join(err, w.start(ctx, n))
}

func killNode(ctx context.Context, w *world) error {
	n := w.Nodes[w.rand.IntN(len(w.Nodes))]
	w.say("  %s", n.Name)
	id, err := w.nodeID(ctx, n)
	if err != nil {
		return err
	}
	w.away(n, true)
	defer w.away(n, false)
	if err := w.Kill(n); err != nil {
		return err
	}
	return errors.Join(w.elsewhere(ctx, id), w.start(ctx, n))
}

func (w *world) nodeID(ctx context.Context, n *dev.Node) (id string, err error) {
	err = w.call(ctx, n, func(ctx context.Context, api *client.Client) error {
		info, err := api.Info(ctx, client.InfoOptions{})
		id = info.Info.Swarm.NodeID
		return err
	})
	return id, err
}

// elsewhere waits until all replicas run on other nodes.
func (w *world) elsewhere(ctx context.Context, id string) error {
	begun := time.Now()
	want := w.services["web"].replicas + w.services["sf"].replicas
	var last string
	for time.Since(begun) < 2*moveTime && ctx.Err() == nil {
		n := 0
		err := w.call(ctx, w.managers()[w.rand.IntN(len(w.managers()))], func(ctx context.Context, api *client.Client) error {
			list, err := api.TaskList(ctx, client.TaskListOptions{})
			for _, t := range list.Items {
				if t.NodeID != id && t.Slot != 0 && t.DesiredState == swarm.TaskStateRunning && t.Status.State == swarm.TaskStateRunning {
					n++
				}
			}
			return err
		})
		if n == want {
			took := time.Since(begun)
			w.say("  tasks run elsewhere after %v", took.Round(10*time.Millisecond))
			if took > moveTime {
				return fmt.Errorf("a lost node's tasks ran elsewhere after %v, promised are %v", took, moveTime)
			}
			return nil
		}
		last = fmt.Sprintf("%d of %d run elsewhere (%v)", n, want, err)
		sleep(ctx, pollStep)
	}
	return fmt.Errorf("a lost node's tasks do not run elsewhere after %v: %s", 2*moveTime, last)
}

func pauseLeader(ctx context.Context, w *world) error {
	lead, err := w.leader(ctx)
	if err != nil {
		return err
	}
	d := w.seconds(1, 20)
	w.say("  leader %s for %v", lead.Name, d.Round(time.Millisecond))
	w.away(lead, true)
	defer w.away(lead, false)
	if err := syscall.Kill(lead.PID, syscall.SIGSTOP); err != nil {
		return err
	}
	begun := time.Now()
	werr := w.firstWrite(ctx)
	mark := w.services["web"].ack
	sleep(ctx, d-time.Since(begun))
	if err := syscall.Kill(lead.PID, syscall.SIGCONT); err != nil {
		return err
	}
	return errors.Join(werr, w.noStaleRead(ctx, lead, mark))
}

// noStaleRead reads at a manager that was away: an error is fine, an old answer is not.
func (w *world) noStaleRead(ctx context.Context, n *dev.Node, mark int) error {
	for begun := time.Now(); time.Since(begun) < 3*time.Second; {
		got := -1
		cctx, cancel := context.WithTimeout(ctx, time.Second)
		err := w.call(cctx, n, func(ctx context.Context, api *client.Client) error {
			in, err := api.ServiceInspect(ctx, "web", client.ServiceInspectOptions{})
			if err == nil {
				_, err = fmt.Sscan(in.Service.Spec.Labels[ackLabel], &got)
			}
			return err
		})
		cancel()
		if err == nil && got < mark {
			return fmt.Errorf("%s answered write %d after write %d was acknowledged: a stale read", n.Name, got, mark)
		}
		sleep(ctx, 10*time.Millisecond)
	}
	return nil
}

func pauseWorker(ctx context.Context, w *world) error {
	n, d := w.worker(), w.seconds(1, 20)
	w.say("  %s for %v", n.Name, d.Round(time.Millisecond))
	if err := syscall.Kill(n.PID, syscall.SIGSTOP); err != nil {
		return err
	}
	sleep(ctx, d)
	return syscall.Kill(n.PID, syscall.SIGCONT)
}

// cut cuts a node off; meanwhile writes must be taken elsewhere, and when it lasts long enough its tasks must run there.
func (w *world) cut(ctx context.Context, n *dev.Node, leads bool) error {
	id, err := w.nodeID(ctx, n)
	if err != nil {
		return err
	}
	d := w.seconds(5, 30)
	w.say("  %s for %v", n.Name, d.Round(time.Millisecond))
	w.away(n, true)
	defer w.away(n, false)
	if err := w.Cut(n); err != nil {
		return err
	}
	begun := time.Now()
	var errs error
	if leads {
		errs = w.firstWrite(ctx)
	}
	if d > moveTime+time.Second {
		errs = errors.Join(errs, w.elsewhere(ctx, id))
	}
	_, err = w.persist(ctx, failoverTime, "web", nil)
	errs = errors.Join(errs, err)
	mark := w.services["web"].ack
	sleep(ctx, d-time.Since(begun))
	if n.Role == "manager" {
		errs = errors.Join(errs, w.noStaleRead(ctx, n, mark))
	}
	return errors.Join(errs, w.Heal(n))
}

func cutLeader(ctx context.Context, w *world) error {
	n, err := w.leader(ctx)
	if err != nil {
		return err
	}
	return w.cut(ctx, n, true)
}

func cutFollower(ctx context.Context, w *world) error {
	n, err := w.follower(ctx)
	if err != nil {
		return err
	}
	return w.cut(ctx, n, false)
}

func cutWorker(ctx context.Context, w *world) error { return w.cut(ctx, w.worker(), false) }

func flap(ctx context.Context, w *world) error {
	n := w.Nodes[w.rand.IntN(len(w.Nodes))]
	w.say("  %s", n.Name)
	w.away(n, true)
	defer w.away(n, false)
	for range 10 {
		if err := w.Cut(n); err != nil {
			return err
		}
		sleep(ctx, 500*time.Millisecond)
		if err := w.Heal(n); err != nil {
			return err
		}
		sleep(ctx, 500*time.Millisecond)
	}
	return nil
}

// updateKill kills the leader, then a worker's daemon, in the middle of rolling updates.
func updateKill(ctx context.Context, w *world) error {
	err := errors.Join(w.setImage(ctx, "web"), w.setImage(ctx, "sf"))
	if err != nil {
		return err
	}
	sleep(ctx, time.Duration(w.rand.IntN(2000))*time.Millisecond)
	if err := killLeader(ctx, w); err != nil {
		return err
	}
	if err := killWorker(ctx, w); err != nil {
		return err
	}
	return errors.Join(w.updated(ctx, "web", 60*time.Second), w.updated(ctx, "sf", 60*time.Second))
}

func scaleKill(ctx context.Context, w *world) error {
	if err := w.scaleTo(ctx, "web", 12); err != nil {
		return err
	}
	sleep(ctx, time.Duration(w.rand.IntN(1000))*time.Millisecond)
	if err := killLeader(ctx, w); err != nil {
		return err
	}
	if err := w.scaleTo(ctx, "web", 6); err != nil {
		return err
	}
	sleep(ctx, time.Duration(w.rand.IntN(1000))*time.Millisecond)
	return killLeader(ctx, w)
}
