package main

import (
	"encoding/json"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/anishathalye/porcupine"
)

// judgeTime bounds porcupine's search for one object.
const judgeTime = 60 * time.Second

// What a request was and how it ended.
const (
	opCreate = "create"
	opRead   = "read" // also a list's answer for one name
	opUpdate = "update"
	opRemove = "remove"

	resOK      = "ok"
	resExists  = "exists"
	resMissing = "missing"
	resStale   = "stale"   // refused: another version by now
	resUnknown = "unknown" // may have happened, now or later
)

// input is a request concerning one object. Values are never used twice, so a value stands for a version.
type input struct {
	Object string
	Op     string
	Value  string `json:",omitempty"` // of creates and updates
	Prior  string `json:",omitempty"` // the value the updater had read with the version it sent
	At     string // manager
}

type output struct {
	Result string
	Value  string `json:",omitempty"` // read; empty: there is no such object
}

// history is what the clients saw.
type history struct {
	begun time.Time

	mu  sync.Mutex
	ops []porcupine.Operation
}

func (h *history) now() int64 { return int64(time.Since(h.begun)) }

// add notes a request. A read without an answer says nothing.
func (h *history) add(client int, in input, out output, call, back int64) {
	if out.Result == resUnknown {
		if in.Op == opRead {
			return
		}
		back = math.MaxInt64
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.ops = append(h.ops, porcupine.Operation{ClientId: client, Input: in, Output: out, Call: call, Return: back})
}

// model of one object: its value, empty while there is none.
func model() porcupine.Model {
	return porcupine.Model{
		Partition: func(ops []porcupine.Operation) [][]porcupine.Operation {
			var names []string
			by := map[string][]porcupine.Operation{}
			for _, o := range ops {
				n := o.Input.(input).Object
				if by[n] == nil {
					names = append(names, n)
				}
				by[n] = append(by[n], o)
			}
			var out [][]porcupine.Operation
			for _, n := range names {
				out = append(out, by[n])
			}
			return out
		},
		Init: func() any { return "" },
		Step: func(state, in, out any) (bool, any) { return step(state.(string), in.(input), out.(output)) },
		DescribeOperation: func(in, out any) string {
			i, o := in.(input), out.(output)
			return fmt.Sprintf("%s %s %s→%s @%s: %s %s", i.Op, i.Object, i.Prior, i.Value, i.At, o.Result, o.Value)
		},
	}
}

// step says whether the object could have answered so, and what it is then.
func step(s string, in input, out output) (bool, any) {
	switch in.Op {
	case opRead:
		return out.Value == s, s
	case opCreate:
		switch {
		case out.Result == resExists:
			return s != "", s
		case s == "":
			return true, in.Value
		}
		return out.Result == resUnknown, s
	case opRemove:
		switch out.Result {
		case resMissing:
			return s == "", s
		case resUnknown:
			return true, ""
		}
		return s != "", ""
	}
	switch out.Result {
	case resOK:
		return s == in.Prior, in.Value
	case resMissing: // the id that was read is gone, whatever has the name now
		return s != in.Prior, s
	case resStale:
		return s != "" && (s != in.Prior || versionMoves(in.Object)), s
	}
	if s == in.Prior { // unknown
		return true, in.Value
	}
	return true, s
}

// judge checks the history and keeps what failed.
func (w *world) judge(o options) {
	w.hist.mu.Lock()
	defer w.hist.mu.Unlock()
	m := model()
	parts := m.Partition(w.hist.ops)
	unknown := 0
	begun := time.Now()
	for _, p := range parts {
		name := p[0].Input.(input).Object
		res, info := porcupine.CheckOperationsVerbose(m, p, judgeTime)
		switch res {
		case porcupine.Illegal:
			w.violate("object %s: its history of %d operations is not linearizable%s", name, len(p), w.keep(o, name, p, info))
		case porcupine.Unknown:
			w.violate("object %s: porcupine did not judge its history of %d operations within %v%s", name, len(p), judgeTime, w.keep(o, name, p, info))
		}
		for _, x := range p {
			if x.Return == math.MaxInt64 {
				unknown++
			}
		}
	}
	w.rig.Say("history: %d operations on %d objects, %d writes of unknown outcome; judged in %v", len(w.hist.ops), len(parts), unknown, time.Since(begun).Round(time.Millisecond))
}

// keep writes an object's history and its picture.
func (w *world) keep(o options, name string, ops []porcupine.Operation, info porcupine.LinearizationInfo) string {
	if w.outDir == "" {
		if w.outDir = o.out; w.outDir == "" {
			dir, err := os.MkdirTemp("", fmt.Sprintf("skein-linear-%d-", o.seed))
			if err != nil {
				return "; " + err.Error()
			}
			w.outDir = dir
		}
		if err := os.MkdirAll(w.outDir, 0o755); err != nil {
			return "; " + err.Error()
		}
	}
	base := filepath.Join(w.outDir, filepath.Base(name))
	f, err := os.Create(base + ".jsonl")
	if err != nil {
		return "; " + err.Error()
	}
	defer f.Close()
	enc := json.NewEncoder(f)
	for _, x := range ops {
		if err := enc.Encode(x); err != nil {
			return "; " + err.Error()
		}
	}
	if err := porcupine.VisualizePath(model(), info, base+".html"); err != nil {
		return "; " + err.Error()
	}
	return "; see " + base + ".html"
}
