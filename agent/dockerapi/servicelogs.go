package dockerapi

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/swarm"

	"skein/manager/api"
)

const (
	maxLogTasks   = 500             // tasks whose logs one request reads at the same time
	logsRelist    = 2 * time.Second // how often a follower looks for new tasks
	logsOpenGrace = 5 * time.Second // for a node to answer at all
)

// logTask is what log streams need of a task.
type logTask struct {
	ID, ServiceID, NodeID string
	Status                struct{ State swarm.TaskState }
	Spec                  struct{ ContainerSpec *struct{ TTY bool } }
}

func (t logTask) tty() bool { return t.Spec.ContainerSpec != nil && t.Spec.ContainerSpec.TTY }

// started reports whether the task may have written anything.
func (t logTask) started() bool {
	switch t.Status.State {
	case swarm.TaskStateRunning, swarm.TaskStateComplete, swarm.TaskStateShutdown, swarm.TaskStateFailed, swarm.TaskStateStarting, swarm.TaskStateOrphaned:
		return t.NodeID != ""
	}
	return false
}

func (t logTask) details() string {
	return detailsOf(map[string]string{
		"com.docker.swarm.node.id": t.NodeID, "com.docker.swarm.service.id": t.ServiceID, "com.docker.swarm.task.id": t.ID,
	})
}

func (h *handlers) taskLogs(w http.ResponseWriter, r *http.Request) error {
	ctl, ref, err := h.onObject(r)
	if err != nil {
		return err
	}
	q, err := readLogQuery(r.URL.Query())
	if err != nil {
		return err
	}
	obj, err := ctl.GetTask(r.Context(), &api.GetRequest{Ref: ref})
	if err != nil {
		return err
	}
	var t logTask
	if err := decodeObject(obj.GetJson(), &t, "task "+ref); err != nil {
		return err
	}
	return h.streamTaskLogs(w, r, q, t.tty(), func(context.Context) ([]logTask, error) { return []logTask{t}, nil }, false)
}

func (h *handlers) serviceLogs(w http.ResponseWriter, r *http.Request) error {
	ctl, ref, err := h.onObject(r)
	if err != nil {
		return err
	}
	q, err := readLogQuery(r.URL.Query())
	if err != nil {
		return err
	}
	obj, err := ctl.GetService(r.Context(), &api.GetRequest{Ref: ref})
	if err != nil {
		return err
	}
	var svc struct {
		ID   string
		Spec struct {
			TaskTemplate struct{ ContainerSpec *struct{ TTY bool } }
		}
	}
	if err := decodeObject(obj.GetJson(), &svc, "service "+ref); err != nil {
		return err
	}
	cs := svc.Spec.TaskTemplate.ContainerSpec
	list := func(ctx context.Context) ([]logTask, error) {
		var tasks []logTask
		err := api.EachPage(ctx, listRequest(Filters{"service": {svc.ID}}, false), lists(ctl.ListTasks), func(objects [][]byte) error {
			for _, raw := range objects {
				var t logTask
				if err := decodeObject(raw, &t, "a task of service "+ref); err != nil {
					return err
				}
				tasks = append(tasks, t)
			}
			return nil
		})
		return tasks, err
	}
	return h.streamTaskLogs(w, r, q, cs != nil && cs.TTY, list, q.Follow)
}

// streamTaskLogs merges the logs of tasks, wherever they run. With watch it picks up tasks that start later. Nodes that cannot be asked are
// named at the end, after all that could be read.
func (h *handlers) streamTaskLogs(w http.ResponseWriter, r *http.Request, q logQuery, tty bool, list func(context.Context) ([]logTask, error), watch bool) error {
	tasks, err := list(r.Context())
	if err != nil {
		return err
	}
	lw, f, err := beginLogs(w, r, q, tty)
	if err != nil {
		return err
	}
	defer f.close()
	m := newLogMerge(r.Context(), h, q, lw)
	if !q.Follow {
		m.inOrder(tasks)
		m.wait()
		return nil
	}
	m.add(tasks)
	for watch {
		select {
		case <-m.ctx.Done():
			watch = false
		case <-time.After(logsRelist):
			if tasks, err := list(m.ctx); err == nil { // a manager that is away comes back
				m.add(tasks)
			}
		}
	}
	m.wait()
	return nil
}

// logMerge reads several tasks' logs into one writer. Its goroutines end with wait.
type logMerge struct {
	h      *handlers
	q      logQuery
	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup
	seen   map[string]bool

	mu   sync.Mutex // guards out and errs
	out  *logWriter
	errs []string
	gone []string // like errs, of tasks whose node was removed: their logs went with it, which is no trouble while others are left
}

func newLogMerge(ctx context.Context, h *handlers, q logQuery, out *logWriter) *logMerge {
	m := &logMerge{h: h, q: q, out: out, seen: map[string]bool{}}
	m.ctx, m.cancel = context.WithCancel(ctx)
	return m
}

// add starts reading the tasks that are not read yet; lines are written as they come.
func (m *logMerge) add(tasks []logTask) {
	for _, t := range tasks {
		details := t.details()
		m.start(t, func(c *api.LogChunk) error { return m.write(c, details) }, func() {})
	}
}

// mergeAhead is how many lines of a task wait for their turn.
const mergeAhead = 16

// inOrder reads logs that end, and writes their lines by time across tasks.
func (m *logMerge) inOrder(tasks []logTask) {
	type source struct {
		head    *api.LogChunk
		lines   chan *api.LogChunk
		details string
	}
	var sources []*source
	for _, t := range tasks {
		s := &source{lines: make(chan *api.LogChunk, mergeAhead), details: t.details()}
		send := func(c *api.LogChunk) error {
			select {
			case s.lines <- c:
				return nil
			case <-m.ctx.Done():
				return m.ctx.Err()
			}
		}
		if m.start(t, send, func() { close(s.lines) }) {
			sources = append(sources, s)
		}
	}
	for {
		var first *source
		sources = slices.DeleteFunc(sources, func(s *source) bool {
			if s.head == nil {
				s.head = <-s.lines // nil when closed; readers end with the context
			}
			if s.head != nil && (first == nil || s.head.GetTime() < first.head.GetTime()) {
				first = s
			}
			return s.head == nil
		})
		if first == nil {
			return
		}
		if err := m.write(first.head, first.details); err != nil {
			m.cancel() // the client is gone
		}
		first.head = nil
	}
}

// start reads a task's log in a goroutine of its own, once, up to the bound of tasks. It reports whether it did.
func (m *logMerge) start(t logTask, emit func(*api.LogChunk) error, done func()) bool {
	if m.seen[t.ID] || !t.started() {
		return false
	}
	if len(m.seen) >= maxLogTasks {
		m.fail(fmt.Sprintf("only %d tasks are shown: ask for the logs of single tasks", maxLogTasks))
		return false
	}
	m.seen[t.ID] = true
	m.wg.Go(func() {
		defer done()
		if err := m.read(t, emit); err != nil && m.ctx.Err() == nil {
			_, text := statusOf(err)
			m.fail("task " + t.ID + " on node " + t.NodeID + ": " + text)
		}
	})
	return true
}

func (m *logMerge) fail(text string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !slices.Contains(m.errs, text) {
		m.errs = append(m.errs, text)
	}
}

func (m *logMerge) read(t logTask, emit func(*api.LogChunk) error) error {
	ag, err := m.h.Swarm.Agent(m.ctx, t.NodeID)
	if errdefs.IsNotFound(err) {
		m.mu.Lock()
		m.gone = append(m.gone, "task "+t.ID+" on node "+t.NodeID+": the node was removed from the cluster, and the logs with it")
		m.mu.Unlock()
		return nil
	}
	if err != nil {
		return err
	}
	if err := ping(m.ctx, ag); err != nil {
		return err
	}
	req := &api.TaskLogsRequest{TaskId: t.ID, Stdout: m.q.Stdout, Stderr: m.q.Stderr, Follow: m.q.Follow, Tail: m.q.Tail}
	if !m.q.Since.IsZero() {
		req.Since = m.q.Since.UnixNano()
	}
	if !m.q.Until.IsZero() {
		req.Until = m.q.Until.UnixNano()
	}
	stream, err := ag.TaskLogs(m.ctx, req)
	if err != nil {
		return err
	}
	for {
		c, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := emit(c); err != nil {
			m.cancel() // the client is gone
			return err
		}
	}
}

// ping tells a node that is away from one whose task says nothing.
func ping(ctx context.Context, ag api.AgentClient) error {
	ctx, cancel := context.WithTimeout(ctx, logsOpenGrace)
	defer cancel()
	_, err := ag.Ping(ctx, &api.Empty{})
	return err
}

func (m *logMerge) write(c *api.LogChunk, details string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	line := c.GetLine()
	if n := len(line); n == 0 || line[n-1] != '\n' {
		line = append(slices.Clip(line), '\n')
	}
	return m.out.line(time.Unix(0, c.GetTime()), c.GetStream() == 2, details, line)
}

// wait ends when every task's stream has, and then says what could not be read.
func (m *logMerge) wait() {
	m.wg.Wait()
	m.cancel()
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.gone) == len(m.seen) {
		m.errs = append(m.errs, m.gone...)
	}
	if len(m.errs) > 0 {
		_, _ = io.WriteString(m.out.sys, "warning: incomplete log stream. some logs could not be retrieved for the following reasons: "+strings.Join(m.errs, "; ")+"\n")
	}
}
