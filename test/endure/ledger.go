package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/moby/moby/api/pkg/stdcopy"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/client"
)

// job is a container and what its client believes of it. "Tried" counts requests, "done" those that were acknowledged; one whose
// answer was lost with a killed process is either done or not.
type job struct {
	name    string
	id      string
	code    int // of its own end
	lines   int // 0: until it is stopped
	pause   time.Duration
	network string
	rm      bool // removes itself

	startsTried, startsDone int
	stopped                 bool // asked to end, gently or not
	killed                  bool // asked to end at once
	unseen                  bool // supervisors are killed: nobody may have seen its end
	unread                  bool // daemons are killed with them: who ended meanwhile left its last lines in a pipe that is gone
}

// spec is the container's configuration.
func (j *job) spec(image string) client.ContainerCreateOptions {
	timeout := 5
	return client.ContainerCreateOptions{Name: j.name,
		Config: &container.Config{Image: image, StopTimeout: &timeout, AttachStdout: true,
			Cmd: []string{"lines", j.name, strconv.Itoa(j.lines), j.pause.String(), strconv.Itoa(j.code)}},
		HostConfig: &container.HostConfig{NetworkMode: container.NetworkMode(j.network), AutoRemove: j.rm}}
}

// history is what a container's log tells: how far each of its runs came.
type history struct {
	runs []logRun
	lost int // lines that are missing, where some may be
}

type logRun struct {
	lines int
	ended bool // said so itself
}

// readHistory checks that lines are consecutive in each run. Where a supervisor may have died between reading a chunk of output and writing it
// down, gaps are counted instead.
func readHistory(name, log string, gaps bool) (history, error) {
	var h history
	for l := range strings.Lines(log) {
		f := strings.Fields(l)
		if len(f) < 2 || f[0] != name {
			return h, fmt.Errorf("strange line %q", l)
		}
		if f[1] == "begin" {
			h.runs = append(h.runs, logRun{})
			continue
		}
		if len(h.runs) == 0 {
			return h, fmt.Errorf("line %q before the first beginning", l)
		}
		r := &h.runs[len(h.runs)-1]
		n := f[len(f)-1]
		if at, err := strconv.Atoi(n); gaps && err == nil && at > r.lines {
			h.lost += at - r.lines
			r.lines = at
		}
		if n != strconv.Itoa(r.lines) {
			return h, fmt.Errorf("line %q after %d lines of run %d", l, r.lines, len(h.runs))
		}
		if f[1] == "end" {
			r.ended = true
		} else {
			r.lines++
		}
	}
	return h, nil
}

// check compares an ended container with what its client knows.
func (j *job) check(s *container.State, h history) error {
	var errs []error
	fail := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if n := len(h.runs); n < j.startsDone && !j.killed || n > j.startsTried {
		fail("%d runs in the log, %d of %d starts were acknowledged", n, j.startsDone, j.startsTried)
	}
	if s.Status == container.StateCreated {
		if len(h.runs) > 0 || j.startsDone > 0 {
			fail("it is called created, but it ran %d times", len(h.runs))
		}
		return errors.Join(errs...)
	}
	if s.Status != container.StateExited || s.Running || s.OOMKilled || s.Pid != 0 {
		fail("state %+v", *s)
	}
	for i, r := range h.runs[:max(0, len(h.runs)-1)] {
		if j.lines > 0 && r.lines != j.lines && !r.ended && !j.killed {
			fail("run %d has %d of %d lines", i, r.lines, j.lines)
		}
	}
	last := logRun{}
	if len(h.runs) > 0 {
		last = h.runs[len(h.runs)-1]
	}
	whole := last.ended || j.lines > 0 && last.lines == j.lines
	unknown := s.ExitCode == 255 && strings.Contains(s.Error, "unknown")
	switch {
	case unknown && j.unseen:
	case s.ExitCode == 125 && j.unseen && strings.Contains(s.Error, "never executed") && len(h.runs) < j.startsTried: // the start was not done
	case s.ExitCode == j.code && whole && s.Error == "":
	case s.ExitCode == j.code && j.unread && s.Error == "":
	case s.ExitCode == 137 && j.killed && s.Error == "":
	default:
		fail("exit code %d %q after %d lines (said it ends: %v); its own code is %d of %d lines, stopped %v, killed %v", s.ExitCode, s.Error, last.lines, last.ended, j.code, j.lines, j.stopped, j.killed)
	}
	return errors.Join(errs...)
}

// log fetches what the container wrote.
func fetchLog(ctx context.Context, api *client.Client, id string) (string, error) {
	r, err := api.ContainerLogs(ctx, id, client.ContainerLogsOptions{ShowStdout: true, ShowStderr: true})
	if err != nil {
		return "", err
	}
	defer r.Close()
	var out, errs bytes.Buffer
	if _, err := stdcopy.StdCopy(&out, &errs, r); err != nil {
		return "", err
	}
	if errs.Len() > 0 {
		return "", fmt.Errorf("it wrote to stderr: %s", errs.String())
	}
	return out.String(), nil
}
