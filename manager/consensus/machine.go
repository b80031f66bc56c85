package consensus

import (
	"errors"
	"fmt"
	"io"

	"github.com/hashicorp/raft"

	"skein/manager/store"
)

// machine is raft's view of the store.
type machine struct{ n *Node }

// Apply returns the results of the entry's transactions.
func (m *machine) Apply(l *raft.Log) any {
	results := m.n.cfg.Store.Apply(l.Index, l.Data)
	if len(results) == 1 {
		var level *store.LevelError
		if errors.As(results[0], &level) {
			m.n.die(ExitTooOld, level)
		}
	}
	m.n.progress.reached(l.Index)
	m.n.growth.applied(len(l.Data))
	return results
}

// ApplyBatch implements raft.BatchingFSM.
func (m *machine) ApplyBatch(logs []*raft.Log) []any {
	out := make([]any, len(logs))
	for i, l := range logs {
		if l.Type == raft.LogCommand {
			out[i] = m.Apply(l)
		}
	}
	return out
}

// Snapshot captures the store in no time; writing it goes on beside later entries.
func (m *machine) Snapshot() (raft.FSMSnapshot, error) {
	m.n.growth.begun()
	return &snapshot{write: m.n.cfg.Store.Snapshot(), growth: m.n.growth}, nil
}

// Restore replaces the store's content.
func (m *machine) Restore(r io.ReadCloser) error {
	defer r.Close()
	in := &counter{r: r}
	err := m.n.cfg.Store.Restore(in)
	var level *store.LevelError
	if errors.As(err, &level) {
		m.n.die(ExitTooOld, level)
	}
	if err != nil {
		return fmt.Errorf("restore the store from a raft snapshot: %w", err)
	}
	m.n.growth.begun()
	m.n.growth.sized(in.n)
	m.n.progress.reached(m.n.cfg.Store.Version())
	return nil
}

type snapshot struct {
	write  func(io.Writer) error
	growth *growth
}

func (s *snapshot) Persist(sink raft.SnapshotSink) error {
	out := &counter{w: sink}
	if err := s.write(out); err != nil {
		return errors.Join(fmt.Errorf("write raft snapshot: %w", err), sink.Cancel())
	}
	s.growth.sized(out.n)
	return sink.Close()
}

func (s *snapshot) Release() {}
