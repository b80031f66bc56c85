package dispatcher

import (
	"strings"
	"sync"

	"skein/manager/api"
	"skein/manager/store"
)

const maxReportPorts = 1024

// softStates keeps the reports that are not worth a log entry: agents say them again to the next leader.
type softStates struct {
	mu   sync.RWMutex
	last map[string]*api.TaskReport
}

func newSoftStates() *softStates { return &softStates{last: map[string]*api.TaskReport{}} }

func (s *softStates) get(id string) *api.TaskReport {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.last[id]
}

func (s *softStates) set(r *api.TaskReport) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if old := s.last[r.TaskId]; old == nil || old.State <= r.State {
		s.last[r.TaskId] = r
	}
}

// settled forgets a soft state that the store has reached (t nil: the task is gone).
func (s *softStates) settled(id string, t *store.Task) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if r := s.last[id]; r != nil && (t == nil || uint32(t.State) >= r.State) {
		delete(s.last, id)
	}
}

// soft reports whether a state stays in this leader's memory (DECISIONS 10). An error is always worth keeping: users ask for it later.
func soft(r *api.TaskReport) bool {
	switch api.TaskState(r.State) {
	case api.TaskAccepted, api.TaskPreparing, api.TaskStarting:
		return r.Err == ""
	}
	return false
}

// intake takes a node's reports: of its own tasks only, within what an agent may say, and only what is new.
func (d *Dispatcher) intake(n *node, reports []*api.TaskReport) {
	d.cfg.Store.View(func(tx store.ReadTx) {
		for _, r := range reports {
			t := tx.Task(r.TaskId)
			state := api.TaskState(r.State)
			if t == nil || t.NodeID != n.id || t.State < api.TaskAssigned || state < t.State ||
				state < api.TaskAccepted || state > api.TaskRejected || state.String() == "unknown" || len(r.Ports) > maxReportPorts {
				continue
			}
			r.NodeId, r.Message, r.Err = n.id, clip(r.Message), clip(r.Err)
			switch {
			case soft(r):
				d.soft.set(r)
			case !told(t, r):
				d.writer.report(r)
			}
		}
	})
}

// told reports whether the store knows all that a report says.
func told(t *store.Task, r *api.TaskReport) bool {
	s := t.Status
	return s != nil && s.State == r.State && s.Message == r.Message && s.Err == r.Err && s.ContainerId == r.ContainerId && s.Pid == r.Pid
}

func clip(s string) string {
	s = strings.ToValidUTF8(s, "\uFFFD")
	if len(s) > maxText {
		s = strings.ToValidUTF8(s[:maxText], "") + "…"
	}
	return s
}
