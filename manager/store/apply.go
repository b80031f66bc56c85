package store

import (
	"fmt"
	"strings"

	"google.golang.org/protobuf/proto"

	"skein/manager/api"
)

// Bounds of records.
const (
	maxID       = 64  // bytes of an id
	maxNetworks = 256 // of one service
	maxAuthor   = 256 // bytes
	maxNote     = 1024
)

// EncodeEntry makes the payload of a log entry, at the level that the cluster has agreed on, or that the entry raises it to: managers that
// know less must stop there. now is the only clock that applying it will use.
func (s *Store) EncodeEntry(nowUnixNano int64, txns []*api.Txn) ([]byte, error) {
	level := s.Level()
	for _, t := range txns {
		for _, c := range t.Changes {
			level = max(level, c.GetPutCluster().GetFeatureLevel())
		}
	}
	e := &api.Entry{Format: api.FormatV1, Level: level, TimeUnixNano: nowUnixNano, Txns: txns}
	return proto.MarshalOptions{Deterministic: true}.Marshal(e)
}

// Level is the feature level that the cluster has agreed on.
func (s *Store) Level() uint32 {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.state.level()
}

// CountNodes counts the nodes.
func (s *Store) CountNodes() int {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.state.nodes.tree.Len()
}

// Highest is the highest level that this manager knows.
func (s *Store) Highest() uint32 { return s.highest }

// Apply applies one log entry and returns the result of each of its transactions. It is called by consensus only, in order. An entry
// that cannot be read at all gives one error: a *LevelError must stop the process.
func (s *Store) Apply(index uint64, entry []byte) []error {
	var e api.Entry
	if err := proto.Unmarshal(entry, &e); err != nil {
		return []error{api.Errorf(errDataLoss, "log entry %d is damaged: %v", index, err)}
	}
	if e.Format != api.FormatV1 || e.Level > s.highest {
		return []error{&LevelError{What: fmt.Sprintf("log entry %d", index), Format: e.Format, Level: e.Level, Known: s.highest}}
	}
	s.mu.Lock()
	if index <= s.state.version {
		defer s.mu.Unlock()
		return []error{api.Errorf(errDataLoss, "log entry %d is not above entry %d, which was applied already", index, s.state.version)}
	}
	results, dirty := s.state.apply(index, &e)
	tasks := s.state.tasks.count
	s.mu.Unlock()
	s.publish(dirty, tasks)
	return results
}

func (s *state) apply(index uint64, e *api.Entry) ([]error, []dirtyKey) {
	s.version, s.time = index, e.TimeUnixNano
	s.alloc.Advance(e.TimeUnixNano)
	s.dirty = nil
	results := make([]error, len(e.Txns))
	for i, t := range e.Txns {
		results[i] = s.applyTxn(t)
	}
	return results, s.dirty
}

// applyTxn applies a transaction whole, or refuses it and leaves no trace of it.
func (s *state) applyTxn(t *api.Txn) error {
	clean := len(s.dirty)
	var partial PartialError
	for _, c := range t.Changes {
		items, err := s.applyChange(c)
		if err != nil {
			s.rollback()
			s.dirty = s.dirty[:clean]
			return err
		}
		partial.Items = append(partial.Items, items...)
	}
	s.commit()
	if len(partial.Items) > 0 {
		return &partial
	}
	return nil
}

// rollback takes back what the transaction under way did.
func (s *state) rollback() {
	s.j.Rollback(0)
	s.tasks.rollback()
	clear(s.requests)
}

func (s *state) commit() {
	s.j.Commit()
	s.tasks.settle()
}

func (s *state) applyChange(c *api.Change) ([]ItemError, error) {
	switch k := c.Kind.(type) {
	case *api.Change_Expect:
		return nil, s.expect(k.Expect)
	case *api.Change_PutCluster:
		return nil, s.putCluster(k.PutCluster)
	case *api.Change_PutNode:
		return nil, s.putNode(k.PutNode)
	case *api.Change_DeleteNode:
		return nil, s.deleteNode(k.DeleteNode)
	case *api.Change_NodeStatus:
		return nil, s.setNodeStatus(k.NodeStatus)
	case *api.Change_PutService:
		return nil, s.applyService(k.PutService)
	case *api.Change_DeleteService:
		return nil, s.deleteService(k.DeleteService)
	case *api.Change_UpdateStatus:
		return nil, s.setUpdateStatus(k.UpdateStatus)
	case *api.Change_PutNetwork:
		return nil, s.putNetwork(k.PutNetwork)
	case *api.Change_DeleteNetwork:
		return nil, s.deleteNetwork(k.DeleteNetwork)
	case *api.Change_PutDependency:
		return nil, s.putDependency(k.PutDependency)
	case *api.Change_DeleteDependency:
		return nil, s.deleteDependency(k.DeleteDependency)
	case *api.Change_CreateTasks:
		return nil, s.createTasks(k.CreateTasks)
	case *api.Change_PlaceTasks:
		return s.placeTasks(k.PlaceTasks)
	case *api.Change_ReportTask:
		return nil, s.reportTask(k.ReportTask)
	case *api.Change_DesireTasks:
		return nil, s.desireTasks(k.DesireTasks)
	case *api.Change_MoveTasks:
		return nil, s.moveTasks(k.MoveTasks)
	case *api.Change_DeleteTasks:
		return s.deleteTasks(k.DeleteTasks)
	}
	return s.applyLater(c)
}

func (s *state) applyLater(c *api.Change) ([]ItemError, error) {
	switch k := c.Kind.(type) {
	case *api.Change_PutAttachment:
		return nil, s.putAttachment(k.PutAttachment)
	case *api.Change_DeleteAttachment:
		return nil, s.deleteAttachment(k.DeleteAttachment)
	}
	return s.applyPacked(c)
}

func (s *state) applyPacked(c *api.Change) ([]ItemError, error) {
	switch k := c.Kind.(type) {
	case *api.Change_PackedCreate:
		return nil, s.createPacked(k.PackedCreate)
	case *api.Change_PackedPlacement:
		return s.placePacked(k.PackedPlacement)
	case *api.Change_PackedReports:
		return s.reportPacked(k.PackedReports)
	case *api.Change_PackedDelete:
		return s.deletePacked(k.PackedDelete)
	case *api.Change_PackedDesire:
		return nil, s.desirePacked(k.PackedDesire)
	}
	return nil, api.Errorf(errInvalid, "transaction holds a change of a kind that feature level %d does not know", api.FeatureLevel)
}

// expect checks that an object has the version a decision was based on; 0 means that it must not exist.
func (s *state) expect(e *api.Expect) error {
	var version uint64
	name := e.Id
	switch e.Kind {
	case "cluster":
		version = s.cluster.GetMeta().GetVersion()
	case "node":
		n := s.nodes.get(e.Id)
		version, name = n.GetMeta().GetVersion(), either(n.GetHostname(), e.Id)
	case "service":
		if v := s.services.get(e.Id); v != nil {
			version, name = v.Meta.Version, v.Name
		}
	case "network":
		n := s.networks.get(e.Id)
		version, name = n.GetMeta().GetVersion(), either(n.GetName(), e.Id)
	case KindSecret, KindConfig:
		if d := s.deps.get(e.Id); d.GetKind() == e.Kind {
			version, name = d.GetMeta().GetVersion(), d.GetName()
		}
	case "task":
		if t := s.tasks.findText(e.Id); t != 0 {
			version = s.tasks.row(t).version
		}
	default:
		return api.Errorf(errInvalid, "expectation of an object of unknown kind %q", e.Kind)
	}
	switch {
	case version == e.Version:
		return nil
	case version == 0:
		return api.Errorf(errNotFound, "%s %s not found", e.Kind, name)
	case e.Version == 0:
		return api.Errorf(errExists, "%s %s already exists", e.Kind, name)
	}
	return api.Errorf(errConflict, "update out of sequence: %s %s changed from version %d to %d meanwhile: read it again and repeat the change",
		e.Kind, name, e.Version, version)
}

func either(a, b string) string {
	if a != "" {
		return a
	}
	return b
}

// checkID refuses what cannot be an id. A colon would mix with the names of quarantine pools.
func checkID(kind, id string) error {
	if id == "" || len(id) > maxID || strings.ContainsAny(id, ":/ \t\r\n\x00") {
		return api.Errorf(errInvalid, "%s id %q is not valid: 1 to %d characters without space, colon and slash", kind, id, maxID)
	}
	return nil
}

func checkSize(kind, id string, b []byte) error {
	if len(b) > api.MaxSpecBytes {
		return api.Errorf(errInvalid, "%s %s: its spec has %d bytes, the limit is %d", kind, id, len(b), api.MaxSpecBytes)
	}
	return nil
}
