package store

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"hash"
	"io"
	"math"
	"net/netip"

	"google.golang.org/protobuf/proto"

	"skein/manager/api"
)

// A snapshot is a stream of chunks, each a length (4 bytes, big endian) and a SnapshotChunk: header, cluster, nodes, networks,
// dependencies, services, tasks, quarantine, end. The end holds the SHA-256 of all bytes before it.

// maxChunk bounds one object with all its revisions.
const maxChunk = 64 << 20

// Snapshot takes a copy-on-write view and returns the function that writes it. The store goes on meanwhile.
func (s *Store) Snapshot() func(io.Writer) error {
	s.mu.Lock() // not the read lock: a clone marks the tree's nodes as shared
	defer s.mu.Unlock()
	st := s.state
	c := &frozen{
		header: &api.SnapshotHeader{Format: api.FormatV1, Level: st.level(), Index: st.version, TimeUnixNano: st.time, NextVni: st.alloc.NextVNI()},
		nodes:  st.nodes.clone(), services: st.services.clone(), networks: st.networks.clone(), tasks: st.tasks.freeze(),
		deps: st.deps.clone(), past: st.past.clone(), extra: st.extra.clone(), homes: st.homes.clone(), attachments: st.attachments.clone(),
		cluster: st.cluster, quarantine: st.alloc.Quarantine(),
	}
	return c.write
}

// Hash is the SHA-256 of the snapshot: equal on all managers at the same version.
func (s *Store) Hash() [sha256.Size]byte {
	h := sha256.New()
	if err := s.Snapshot()(h); err != nil {
		panic(err) // records that were decoded encode, and a hash takes every byte
	}
	return [sha256.Size]byte(h.Sum(nil))
}

type frozen struct {
	header      *api.SnapshotHeader
	cluster     *Cluster
	nodes       table[string, *Node]
	services    table[string, *Service]
	networks    table[string, *Network]
	tasks       *taskTable
	deps        table[string, *Dependency]
	past        table[revKey, *api.PastRevision]
	extra       table[string, *api.TaskExtra]
	homes       table[homeKey, string]
	attachments table[string, *api.AttachmentRecord]
	quarantine  []*api.Quarantine
}

func (f *frozen) write(w io.Writer) error {
	cw := &chunkWriter{w: bufio.NewWriterSize(w, 1<<16), sum: sha256.New()}
	cw.put(&api.SnapshotChunk{Kind: &api.SnapshotChunk_Header{Header: f.header}})
	if f.cluster != nil {
		cw.put(&api.SnapshotChunk{Kind: &api.SnapshotChunk_Cluster{Cluster: f.cluster}})
	}
	each(f.nodes, func(n *Node) { cw.put(&api.SnapshotChunk{Kind: &api.SnapshotChunk_Node{Node: n}}) })
	each(f.networks, func(n *Network) { cw.put(&api.SnapshotChunk{Kind: &api.SnapshotChunk_Network{Network: n}}) })
	each(f.deps, func(d *Dependency) { cw.put(&api.SnapshotChunk{Kind: &api.SnapshotChunk_Dependency{Dependency: d}}) })
	each(f.services, func(v *Service) {
		cw.put(&api.SnapshotChunk{Kind: &api.SnapshotChunk_Service{Service: v.ServiceRecord}})
		f.past.from(revKey{service: v.Id}, func(k revKey, r *api.PastRevision) bool {
			if k.service != v.Id {
				return false
			}
			cw.put(&api.SnapshotChunk{Kind: &api.SnapshotChunk_Revision{Revision: r}})
			return true
		})
	})
	if f.header.Level >= api.LevelPacked {
		f.tasks.writeTasks(cw.put)
	} else {
		for _, id := range f.tasks.sorted() {
			cw.put(&api.SnapshotChunk{Kind: &api.SnapshotChunk_Task{Task: recordOf(f.tasks.task(id))}})
		}
	}
	each(f.extra, func(x *api.TaskExtra) { cw.put(&api.SnapshotChunk{Kind: &api.SnapshotChunk_TaskExtra{TaskExtra: x}}) })
	f.homes.from(homeKey{}, func(k homeKey, node string) bool {
		cw.put(&api.SnapshotChunk{Kind: &api.SnapshotChunk_VolumeHome{VolumeHome: &api.VolumeHome{ServiceId: k.service, Slot: k.slot, Volume: k.volume, NodeId: node}}})
		return true
	})
	each(f.attachments, func(a *api.AttachmentRecord) {
		cw.put(&api.SnapshotChunk{Kind: &api.SnapshotChunk_Attachment{Attachment: a}})
	})
	for _, q := range f.quarantine {
		cw.put(&api.SnapshotChunk{Kind: &api.SnapshotChunk_Quarantine{Quarantine: q}})
	}
	end := &api.SnapshotEnd{Chunks: cw.chunks, Sha256: cw.sum.Sum(nil)}
	cw.put(&api.SnapshotChunk{Kind: &api.SnapshotChunk_End{End: end}})
	if cw.err != nil {
		return cw.err
	}
	return cw.w.Flush()
}

func each[V any](t table[string, V], f func(V)) {
	t.from("", func(_ string, v V) bool {
		f(v)
		return true
	})
}

type chunkWriter struct {
	w      *bufio.Writer
	sum    hash.Hash
	buf    []byte
	chunks uint64
	err    error
}

func (c *chunkWriter) put(m *api.SnapshotChunk) {
	if c.err != nil {
		return
	}
	c.buf = append(c.buf[:0], 0, 0, 0, 0)
	if c.buf, c.err = (proto.MarshalOptions{Deterministic: true}).MarshalAppend(c.buf, m); c.err != nil {
		return
	}
	binary.BigEndian.PutUint32(c.buf, uint32(len(c.buf)-4))
	c.sum.Write(c.buf)
	c.chunks++
	_, c.err = c.w.Write(c.buf)
}

// Restore replaces everything with a snapshot. On an error the store is as it was.
func (s *Store) Restore(r io.Reader) error {
	st, err := readSnapshot(r, s.highest)
	if err != nil {
		return err
	}
	s.mu.Lock()
	s.state = st
	s.mu.Unlock()
	s.publishAll()
	return nil
}

func readSnapshot(r io.Reader, highest uint32) (*state, error) {
	cr := &chunkReader{r: bufio.NewReaderSize(r, 1<<16), sum: sha256.New()}
	l := &loader{s: newState(), highest: highest}
	for n := uint64(0); ; n++ {
		before := cr.sum.Sum(nil)
		m, err := cr.next()
		if err != nil {
			return nil, damaged("chunk %d: %v", n, err)
		}
		if end := m.GetEnd(); end != nil {
			if end.Chunks != n || !bytes.Equal(end.Sha256, before) {
				return nil, damaged("checksum does not match after %d chunks", n)
			}
			if _, err := cr.r.ReadByte(); !errors.Is(err, io.EOF) {
				return nil, damaged("bytes follow the end")
			}
			return l.finish()
		}
		if err := l.load(n, m); err != nil {
			return nil, err
		}
	}
}

func damaged(format string, args ...any) error {
	return api.Errorf(errDataLoss, "raft snapshot is damaged: "+format, args...)
}

type chunkReader struct {
	r   *bufio.Reader
	sum hash.Hash
	buf bytes.Buffer
}

func (c *chunkReader) next() (*api.SnapshotChunk, error) {
	var head [4]byte
	if _, err := io.ReadFull(c.r, head[:]); err != nil {
		return nil, err
	}
	size := binary.BigEndian.Uint32(head[:])
	if size > maxChunk {
		return nil, errors.New("its length is out of bounds")
	}
	c.buf.Reset() // grows with what is read, not with what the length claims
	if _, err := io.CopyN(&c.buf, c.r, int64(size)); err != nil {
		return nil, err
	}
	c.sum.Write(head[:])
	c.sum.Write(c.buf.Bytes())
	m := &api.SnapshotChunk{}
	return m, proto.Unmarshal(c.buf.Bytes(), m)
}

// loader builds a state from chunks.
type loader struct {
	s       *state
	highest uint32 // feature level
	columns columnReader
}

func (l *loader) load(n uint64, m *api.SnapshotChunk) error {
	if (n == 0) != (m.GetHeader() != nil) {
		return damaged("chunk %d: the header must come first and once", n)
	}
	s := l.s
	switch k := m.Kind.(type) {
	case *api.SnapshotChunk_Header:
		h := k.Header
		if h.Format != api.FormatV1 || h.Level > l.highest {
			return &LevelError{What: "raft snapshot", Format: h.Format, Level: h.Level, Known: l.highest}
		}
		s.version, s.time = h.Index, h.TimeUnixNano
		s.alloc.SetNextVNI(h.NextVni)
		s.alloc.SetTime(h.TimeUnixNano)
	case *api.SnapshotChunk_Cluster:
		s.cluster = k.Cluster
		return s.alloc.SetPools(k.Cluster)
	case *api.SnapshotChunk_Node:
		s.nodes.put(k.Node.Id, k.Node)
		return s.alloc.RestoreNode(k.Node)
	case *api.SnapshotChunk_Network:
		s.networks.put(k.Network.Id, k.Network)
		s.networkNames[k.Network.Name] = k.Network.Id
		return s.alloc.RestoreNetwork(k.Network)
	case *api.SnapshotChunk_Dependency:
		s.storeDependency(k.Dependency)
	case *api.SnapshotChunk_Service:
		v, err := newService(k.Service, nil)
		if err != nil {
			return err
		}
		s.putService(v)
		return s.alloc.RestoreService(v.Id, v.Name, v.Vips, v.Ports)
	case *api.SnapshotChunk_Revision:
		if s.services.get(k.Revision.ServiceId) == nil {
			return damaged("chunk %d: a revision of service %s, which does not exist", n, k.Revision.ServiceId)
		}
		s.putPast(k.Revision)
	case *api.SnapshotChunk_Task:
		return l.loadTask(k.Task)
	case *api.SnapshotChunk_TaskNames:
		return l.loadNames(k.TaskNames)
	case *api.SnapshotChunk_TaskColumns:
		return l.loadColumns(k.TaskColumns)
	case *api.SnapshotChunk_TaskExtra:
		return s.loadExtra(k.TaskExtra)
	case *api.SnapshotChunk_Attachment:
		return s.loadAttachment(k.Attachment)
	case *api.SnapshotChunk_VolumeHome:
		h := k.VolumeHome
		s.homes.put(homeKey{h.ServiceId, h.Slot, h.Volume}, h.NodeId)
	case *api.SnapshotChunk_Quarantine:
		return s.alloc.RestoreQuarantine(k.Quarantine)
	default:
		return damaged("chunk %d is of an unknown kind", n)
	}
	return nil
}

func (l *loader) loadTask(r *api.TaskRecord) error {
	id, ok := api.ParseID(r.Id)
	if !ok || r.Revision > math.MaxUint32 || r.State > math.MaxUint16 {
		return damaged("task %q: id, revision %d or state %d is out of bounds", r.Id, r.Revision, r.State)
	}
	g, err := grantOf(r)
	if err != nil {
		return damaged("task %s: %v", r.Id, err)
	}
	row := taskRow{
		idTop: id.Top, idHi: id.Hi, idLo: id.Lo, slot: r.Slot, generation: r.Generation, revision: uint32(r.Revision), state: uint16(r.State),
		desired: r.Desired, version: r.Version, created: r.Created, updated: r.Updated, started: r.Started,
	}
	l.s.side = l.s.tasks.forms.appendFixed(l.s.side[:0], r.StartAfter, extraOf(r), &g)
	return l.loadRow(&row, r.ServiceId, r.NodeId, r.Status, nil)
}

// loadRow stores a task; what it waits for and holds is in l.s.side.
func (l *loader) loadRow(row *taskRow, service, node string, status *api.TaskReport, container []byte) error {
	s, id, idNode := l.s, row.id(), node
	if row.slot != 0 {
		idNode = ""
	}
	switch {
	case id != api.TaskIDOf(service, row.slot, idNode, row.generation):
		return damaged("task %s: its id is not that of generation %d of slot %d%s of service %s", id, row.generation, row.slot, idNode, service)
	case row.slot == 0 && node == "":
		return damaged("task %s has no slot and no node", id)
	case s.tasks.find(id) != 0:
		return damaged("task %s is there twice", id)
	}
	t := s.tasks.create(*row, service, s.tasks.lists.node(node))
	s.side = appendStatus(s.side, s.tasks.row(t), node, status, container)
	if len(s.side) > 1 {
		s.tasks.setSide(t, s.side)
	}
	live := s.tasks.row(t).live()
	s.commit()
	if !live {
		return nil
	}
	s.tasks.forms.grant(readSide(s.tasks.sideOf(t)), &s.grant)
	text := ""
	if len(s.grant.HostPorts) > 0 {
		text = id.String()
	}
	return s.alloc.RestoreTask(text, node, &s.grant)
}

func (l *loader) finish() (*state, error) {
	l.s.commit()
	l.s.dirty = nil
	return l.s, nil
}

func recordOf(t *Task) *api.TaskRecord {
	return &api.TaskRecord{
		Id: t.ID, ServiceId: t.ServiceID, Slot: t.Slot, Generation: t.Generation, Revision: t.Revision, NodeId: t.NodeID,
		State: uint32(t.State), Desired: uint32(t.Desired), Version: t.Version, Created: t.Created, Updated: t.Updated,
		StartAfter: t.StartAfter, Started: t.Started, Restarts: t.Restarts, Status: t.Status, Attachments: t.Attachments, HostPorts: t.HostPorts,
		Gateway4: addrText(t.Gateway4), Gateway6: addrText(t.Gateway6),
	}
}

func addrText(a netip.Addr) string {
	if !a.IsValid() {
		return ""
	}
	return a.String()
}

func parseAddr(s string) (netip.Addr, error) {
	if s == "" {
		return netip.Addr{}, nil
	}
	return netip.ParseAddr(s)
}
