package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	cerrdefs "github.com/containerd/errdefs"
	"github.com/moby/moby/api/pkg/stdcopy"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/client"
)

const (
	callTime = 40 * time.Second // of one API call
	tries    = 50               // of an operation whose answer was lost
)

// errUnsure is an operation whose answer was lost with a killed process: it is done or it is not.
var errUnsure = errors.New("its answer was lost")

// crew is the clients of a run.
type crew struct {
	*world
	quiet sync.RWMutex // held by each operation for reading, by an audit for writing

	lost victims // what is killed, and what it knew with it

	mu    sync.Mutex
	count map[string]int // operations by outcome
	kept  []*job         // verified and left there until the end
}

func (c *crew) counted(what string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.count[what]++
}

// call does one operation when everything is up. An error while something was killed is errUnsure.
func (c *crew) call(ctx context.Context, what string, f func(context.Context) error) error {
	c.quiet.RLock()
	defer c.quiet.RUnlock()
	epoch := c.await(ctx)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	cctx, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	err := f(cctx)
	c.counted("operations")
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return ctx.Err()
	case c.killedSince(epoch):
		c.counted("unsure")
		return fmt.Errorf("%s: %w: %w", what, errUnsure, err)
	}
	return fmt.Errorf("%s: %w", what, err)
}

// work lives one container's life after the other until it is told to stop.
func (c *crew) work(ctx context.Context, stop <-chan struct{}) {
	for ctx.Err() == nil {
		select {
		case <-stop:
			return
		default:
		}
		j := c.newJob()
		if err := c.live(ctx, j); err != nil && ctx.Err() == nil {
			c.breaks("container %s (%.12s): %v; it is %s", j.name, j.id, err, c.situation(ctx, j))
		}
		c.counted("containers")
	}
}

// situation tells what a container is after something went wrong with it.
func (c *crew) situation(ctx context.Context, j *job) string {
	in, err := c.inspect(ctx, j)
	if err != nil || in == nil {
		return fmt.Sprintf("not to be found (%v)", err)
	}
	process, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", in.State.Pid))
	return fmt.Sprintf("%+v, its process %.60q", *in.State, process)
}

func (c *crew) newJob() *job {
	n := c.next()
	j := &job{name: fmt.Sprintf("job-%d", n), unseen: c.lost.supervisor, unread: c.lost.supervisor && c.lost.daemon, code: 3 + n%120, pause: time.Millisecond, network: []string{"none", "bridge"}[c.pick(2)], rm: c.pick(8) == 0}
	if c.pick(2) == 0 {
		j.lines = 1 + c.pick(300)
	}
	return j
}

// live is create, start, some work, end, check, and most often remove.
func (c *crew) live(ctx context.Context, j *job) error {
	if err := c.create(ctx, j); err != nil {
		return err
	}
	if err := c.start(ctx, j); err != nil {
		return err
	}
	for range c.pick(3) {
		if err := c.act(ctx, j); err != nil {
			return err
		}
	}
	if err := c.end(ctx, j); err != nil {
		return err
	}
	if j.rm {
		return c.awaitGone(ctx, j)
	}
	if err := c.verify(ctx, j); err != nil {
		return err
	}
	if c.pick(4) == 0 {
		c.mu.Lock()
		c.kept = append(c.kept, j)
		c.mu.Unlock()
		return nil
	}
	return c.remove(ctx, j)
}

// inspect looks at a container by name until an answer comes; nil: there is none.
func (c *crew) inspect(ctx context.Context, j *job) (*container.InspectResponse, error) {
	var in client.ContainerInspectResult
	err := c.sure(ctx, "inspect", func(ctx context.Context) (err error) {
		in, err = c.api.ContainerInspect(ctx, j.name, client.ContainerInspectOptions{})
		return err
	})
	if cerrdefs.IsNotFound(err) {
		return nil, nil
	}
	return &in.Container, err
}

// sure repeats a question until its answer comes.
func (c *crew) sure(ctx context.Context, what string, f func(context.Context) error) error {
	for range tries {
		if err := c.call(ctx, what, f); !errors.Is(err, errUnsure) {
			return err
		}
	}
	return fmt.Errorf("%s: no answer %d times", what, tries)
}

func (c *crew) create(ctx context.Context, j *job) error {
	for range tries {
		err := c.call(ctx, "create", func(ctx context.Context) error {
			res, err := c.api.ContainerCreate(ctx, j.spec(c.image))
			j.id = res.ID
			return err
		})
		if !errors.Is(err, errUnsure) {
			return err
		}
		in, err := c.inspect(ctx, j)
		if err != nil {
			return err
		}
		if in != nil {
			j.id = in.ID
			return nil
		}
	}
	return fmt.Errorf("create: no answer %d times", tries)
}

// start starts it; after a lost answer it looks what came of it.
func (c *crew) start(ctx context.Context, j *job) error {
	for range tries {
		j.startsTried++
		err := c.call(ctx, "start", func(ctx context.Context) error {
			_, err := c.api.ContainerStart(ctx, j.id, client.ContainerStartOptions{})
			return err
		})
		if err == nil {
			j.startsDone++
			return nil
		}
		if cerrdefs.IsNotFound(err) && j.rm && j.startsTried > 1 {
			return nil // an earlier attempt came to an end after all
		}
		if !errors.Is(err, errUnsure) {
			return err
		}
		if done, err := c.happened(ctx, j); done || err != nil {
			return err
		}
	}
	return fmt.Errorf("start: no answer %d times", tries)
}

// happened says whether a start whose answer was lost took place.
func (c *crew) happened(ctx context.Context, j *job) (bool, error) {
	in, err := c.inspect(ctx, j)
	if err != nil || in == nil {
		if err == nil && !j.rm {
			err = errors.New("it is gone after a start whose answer was lost")
		}
		return true, err
	}
	if in.State.Status != container.StateCreated && in.State.Status != container.StateExited {
		return true, nil
	}
	log, err := c.log(ctx, j)
	if err != nil && j.rm && (cerrdefs.IsNotFound(err) || strings.Contains(err.Error(), "No such container")) {
		return true, nil // it was just removing itself, perhaps in the middle of the answer
	}
	if err != nil {
		return true, err
	}
	h, err := readHistory(j.name, log, j.unseen)
	return len(h.runs) > j.startsDone, err
}

func (c *crew) log(ctx context.Context, j *job) (log string, err error) {
	err = c.sure(ctx, "logs", func(ctx context.Context) (err error) {
		log, err = fetchLog(ctx, c.api, j.id)
		return err
	})
	return log, err
}

// act does something with a container that runs, or may have ended.
func (c *crew) act(ctx context.Context, j *job) error {
	pause(ctx, c.between(0, 200*time.Millisecond))
	switch c.pick(3) {
	case 0:
		return c.exec(ctx, j)
	case 1:
		if j.lines > 0 || j.rm {
			return nil
		}
		return c.restart(ctx, j)
	}
	return nil
}

// exec runs a further process and checks its output and code, unless it ended before or the answer was lost.
func (c *crew) exec(ctx context.Context, j *job) error {
	if j.lines > 0 {
		return nil // it may end meanwhile
	}
	name, lines, code := j.name+"x", 1+c.pick(50), 3+c.pick(100)
	var id string
	err := c.call(ctx, "exec create", func(ctx context.Context) error {
		res, err := c.api.ExecCreate(ctx, j.id, client.ExecCreateOptions{AttachStdout: true,
			Cmd: []string{"/inside", "lines", name, strconv.Itoa(lines), "0s", strconv.Itoa(code)}})
		id = res.ID
		return err
	})
	var out string
	if err == nil {
		err = c.call(ctx, "exec", func(ctx context.Context) (err error) {
			out, err = c.execOutput(ctx, id)
			return err
		})
	}
	var x client.ExecInspectResult
	if err == nil {
		err = c.call(ctx, "exec inspect", func(ctx context.Context) (err error) {
			x, err = c.api.ExecInspect(ctx, id, client.ExecInspectOptions{})
			return err
		})
	}
	if c.forgiven(err) {
		return nil
	}
	if err != nil {
		return err
	}
	h, err := readHistory(name, out, false)
	if err != nil && j.stopped {
		return nil // the first half of a restart was done: it ended
	}
	if err != nil {
		return fmt.Errorf("exec: %w", err)
	}
	if len(h.runs) != 1 || h.runs[0].lines != lines || x.ExitCode != code || x.Running {
		return fmt.Errorf("exec: exit code %d, want %d; %d of %d lines; running %v", x.ExitCode, code, strings.Count(out, "\n")-1, lines, x.Running)
	}
	c.counted("execs checked")
	return nil
}

// forgiven is an additional process that went with the process that knew it: the daemon forgets it, the supervisor loses its output.
func (c *crew) forgiven(err error) bool {
	if err == nil {
		return false
	}
	gone := cerrdefs.IsNotFound(err) || strings.Contains(err.Error(), "received 404") // the latter instead of a stream
	return errors.Is(err, errUnsure) || gone && c.died() || c.lost.supervisor
}

// died says whether anything was killed yet.
func (c *crew) died() bool { return c.killedSince(0) }

func (c *crew) execOutput(ctx context.Context, id string) (string, error) {
	epoch := c.epochNow()
	att, err := c.api.ExecAttach(ctx, id, client.ExecAttachOptions{})
	if err != nil {
		return "", err
	}
	defer att.Close()
	stop := context.AfterFunc(ctx, att.Close)
	defer stop()
	var out, errs bytes.Buffer
	_, err = stdcopy.StdCopy(&out, &errs, att.Reader)
	if c.killedSince(epoch) { // a stream that is cut ends like one that is complete
		err = errors.Join(err, io.ErrUnexpectedEOF)
	}
	return out.String() + errs.String(), err
}

func (c *crew) restart(ctx context.Context, j *job) error {
	if err := c.awaitBegun(ctx, j); err != nil {
		return err
	}
	j.startsTried++
	err := c.call(ctx, "restart", func(ctx context.Context) error {
		_, err := c.api.ContainerRestart(ctx, j.id, client.ContainerRestartOptions{})
		return err
	})
	if err == nil {
		j.startsDone++
		return nil
	}
	if !errors.Is(err, errUnsure) {
		return err
	}
	j.stopped = true // the first half of it may be done
	in, err := c.inspect(ctx, j)
	if err == nil && in == nil {
		err = errors.New("it is gone after a restart")
	}
	if err != nil || in.State.Status != container.StateExited {
		return err
	}
	return c.start(ctx, j)
}

// awaitBegun waits until the newest run has installed its handler of SIGTERM.
func (c *crew) awaitBegun(ctx context.Context, j *job) error {
	return eventually(ctx, callTime, func() error {
		in, err := c.inspect(ctx, j)
		if err != nil || in == nil || in.State.Status != container.StateRunning {
			return err
		}
		log, err := c.log(ctx, j)
		if err != nil {
			return err
		}
		if n := strings.Count(log, " begin\n"); n < j.startsDone || n == 0 {
			return fmt.Errorf("%d runs in its log", n)
		}
		return nil
	})
}

// end brings the container to its end in one of several ways and waits for it.
func (c *crew) end(ctx context.Context, j *job) error {
	if j.lines == 0 {
		if err := c.awaitBegun(ctx, j); err != nil {
			return err
		}
		if err := c.stop(ctx, j, c.pick(3)); err != nil {
			return err
		}
	}
	return c.sure(ctx, "wait", func(ctx context.Context) error {
		res := c.api.ContainerWait(ctx, j.id, client.ContainerWaitOptions{Condition: container.WaitConditionNotRunning})
		select {
		case err := <-res.Error:
			if cerrdefs.IsNotFound(err) && j.rm {
				return nil
			}
			return err
		case <-res.Result:
			return nil
		}
	})
}

func (c *crew) stop(ctx context.Context, j *job, how int) error {
	for range tries {
		j.stopped = true
		err := c.call(ctx, []string{"stop", "kill -TERM", "kill"}[how], func(ctx context.Context) (err error) {
			switch how {
			case 0:
				_, err = c.api.ContainerStop(ctx, j.id, client.ContainerStopOptions{})
			case 1:
				_, err = c.api.ContainerKill(ctx, j.id, client.ContainerKillOptions{Signal: "TERM"})
			default:
				j.killed = true
				_, err = c.api.ContainerKill(ctx, j.id, client.ContainerKillOptions{Signal: "KILL"})
			}
			return err
		})
		if cerrdefs.IsNotFound(err) && j.rm || cerrdefs.IsConflict(err) && c.died() {
			return nil // an earlier attempt was done after all
		}
		if !errors.Is(err, errUnsure) {
			return err
		}
	}
	return fmt.Errorf("stop: no answer %d times", tries)
}

// verify compares the ended container with what the client knows.
func (c *crew) verify(ctx context.Context, j *job) error {
	in, err := c.inspect(ctx, j)
	if err != nil {
		return err
	}
	if in == nil {
		return errors.New("it is gone, but nobody removed it")
	}
	log, err := c.log(ctx, j)
	if err != nil {
		return err
	}
	h, err := readHistory(j.name, log, j.unseen)
	if err != nil {
		return err
	}
	if in.State.ExitCode == 255 {
		c.counted("exit codes unknown")
	}
	c.mu.Lock()
	c.count["lines"] += strings.Count(log, "\n")
	c.count["runs"] += len(h.runs)
	if h.lost > 0 {
		c.count["lines lost with a supervisor"] += h.lost
	}
	c.mu.Unlock()
	return j.check(in.State, h)
}

func (c *crew) remove(ctx context.Context, j *job) error {
	err := c.sure(ctx, "remove", func(ctx context.Context) error {
		_, err := c.api.ContainerRemove(ctx, j.id, client.ContainerRemoveOptions{Force: c.pick(2) == 0})
		return err
	})
	if err != nil && !(cerrdefs.IsNotFound(err) && c.died()) {
		return err
	}
	in, ierr := c.inspect(ctx, j)
	if ierr == nil && in != nil {
		ierr = fmt.Errorf("it is there, %s, after its removal was acknowledged (%v)", in.State.Status, err)
	}
	return ierr
}

func (c *crew) awaitGone(ctx context.Context, j *job) error {
	return eventually(ctx, settleTime, func() error {
		in, err := c.inspect(ctx, j)
		if err == nil && in != nil {
			err = fmt.Errorf("it should remove itself, but is %s", in.State.Status)
		}
		return err
	})
}
