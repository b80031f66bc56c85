package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/moby/moby/client"

	"skein/cmd/dev"
	"skein/test/nemesis"
)

const (
	leadAttempts = 8                       // to make each manager lead
	lossNoticed  = 1300 * time.Millisecond // by all followers that run
)

// finish waits until all is whole after the last fault, then has every manager lead once and reads everything at all of them.
func (w *world) finish(ctx context.Context) {
	w.whole(ctx, "after the last fault")
	led := map[string]string{} // manager → what it answered when it led
	for range leadAttempts * len(w.rig.Managers()) {
		lead, err := w.rig.Leader(ctx, 15*time.Second)
		if err != nil {
			w.violate("at the end: %v", err)
			return
		}
		if led[lead.Name] == "" {
			if led[lead.Name], err = w.view(ctx); err != nil {
				w.violate("read everything while %s leads: %v", lead.Name, err)
				return
			}
			w.rig.Say("%s leads: every manager was read", lead.Name)
		}
		if len(led) == len(w.rig.Managers()) || ctx.Err() != nil {
			break
		}
		if err := w.depose(ctx, lead, led); err != nil {
			w.violate("depose %s: %v", lead.Name, err)
			return
		}
	}
	names := slices.Sorted(maps.Keys(led))
	if len(names) < len(w.rig.Managers()) && ctx.Err() == nil {
		w.violate("only %v came to lead", names)
	}
	for _, n := range names[1:] {
		if led[n] != led[names[0]] {
			w.violate("%s and %s answered differently as leaders: %s", names[0], n, difference(led[names[0]], led[n]))
		}
	}
	w.whole(ctx, "at the end")
}

// depose kills the leader, and as many of the others that have led as a majority can spare. The next to lead is stopped meanwhile: the others
// cannot elect without it, and who notices the loss last is elected.
func (w *world) depose(ctx context.Context, lead *dev.Node, led map[string]string) error {
	away := []*dev.Node{lead}
	for _, m := range w.rig.Managers() {
		if m != lead && led[m.Name] != "" && len(away) < (len(w.rig.Managers())-1)/2 {
			away = append(away, m)
		}
	}
	var err error
	for _, m := range w.rig.Managers() {
		if m != lead && led[m.Name] == "" {
			err = w.rig.Signal(m, syscall.SIGSTOP)
			defer func() { _ = w.rig.Signal(m, syscall.SIGCONT) }()
			for _, m := range away {
				err = errors.Join(err, w.rig.KillDaemon(m))
			}
			nemesis.Sleep(ctx, lossNoticed)
			err = errors.Join(err, w.rig.Signal(m, syscall.SIGCONT))
			break
		}
	}
	_, lerr := w.rig.Leader(ctx, 15*time.Second)
	for _, m := range away {
		err = errors.Join(err, w.rig.StartDaemon(ctx, m))
	}
	return errors.Join(err, lerr)
}

// whole waits until the service has its tasks, each a process.
func (w *world) whole(ctx context.Context, when string) {
	begun := time.Now()
	err := errors.New("not looked at")
	scaled := false
	for time.Since(begun) < wholeTime && ctx.Err() == nil {
		cctx, cancel := context.WithTimeout(ctx, 5*time.Second)
		if !scaled {
			scaled = w.scale(cctx, w.rig.Nodes[0], finalScale) == nil
		}
		err = w.alive(cctx)
		cancel()
		if err == nil && scaled {
			w.rig.Say("%s: whole after %v", when, time.Since(begun).Round(10*time.Millisecond))
			return
		}
		nemesis.Sleep(ctx, 100*time.Millisecond)
	}
	if ctx.Err() == nil {
		w.violate("%s: not whole within %v: %v", when, wholeTime, err)
	}
}

// view reads everything at every manager: into the history, and as one text, which must be the same at all of them.
func (w *world) view(ctx context.Context) (string, error) {
	w.mu.Lock()
	objects := slices.Clone(w.all)
	w.mu.Unlock()
	views := map[string]string{}
	for i, m := range w.rig.Managers() {
		text := map[string]map[string]string{}
		for name, k := range w.kinds {
			var all map[string]string
			err := errors.New("not asked")
			for try := 0; err != nil && try < 10 && ctx.Err() == nil; try++ {
				all, err = w.listed(ctx, 5000+i, m, k, objects)
			}
			if err != nil {
				return "", fmt.Errorf("list %ss at %s: %w", name, m.Name, err)
			}
			text[name] = all
		}
		tasks, err := w.rig.Client(m).TaskList(ctx, client.TaskListOptions{})
		if err != nil {
			return "", fmt.Errorf("list tasks at %s: %w", m.Name, err)
		}
		text["task"] = map[string]string{}
		for _, t := range tasks.Items {
			text["task"][t.ID] = fmt.Sprintf("%s %d %s", t.ServiceID, t.Slot, t.NodeID)
		}
		b, err := json.MarshalIndent(text, "", " ")
		if err != nil {
			return "", err
		}
		views[m.Name] = string(b)
		if first := views[w.rig.Managers()[0].Name]; views[m.Name] != first {
			return "", fmt.Errorf("%s and %s answer differently: %s", w.rig.Managers()[0].Name, m.Name, difference(first, views[m.Name]))
		}
	}
	delete(views, "")
	return withoutTasks(views[w.rig.Managers()[0].Name]), nil
}

// withoutTasks leaves tasks out: their history is trimmed meanwhile.
func withoutTasks(view string) string {
	var v map[string]map[string]string
	if json.Unmarshal([]byte(view), &v) != nil {
		return view
	}
	delete(v, "task")
	b, _ := json.MarshalIndent(v, "", " ")
	return string(b)
}

// difference is the lines that only one of two texts has.
func difference(a, b string) string {
	in := func(s string) map[string]bool {
		m := map[string]bool{}
		for _, l := range strings.Split(s, "\n") {
			m[strings.TrimRight(l, ",")] = true
		}
		return m
	}
	la, lb := in(a), in(b)
	var out []string
	for l := range la {
		if !lb[l] {
			out = append(out, "-"+l)
		}
	}
	for l := range lb {
		if !la[l] {
			out = append(out, "+"+l)
		}
	}
	slices.Sort(out)
	return strings.Join(out[:min(len(out), 20)], " ")
}

func living(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil || pid == 0 {
		return false
	}
	i := strings.LastIndexByte(string(b), ')')
	return i > 0 && i+2 < len(b) && b[i+2] != 'Z' && b[i+2] != 'X'
}
