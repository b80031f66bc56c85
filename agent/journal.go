package agent

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"google.golang.org/protobuf/proto"

	"skein/manager/api"
)

// The journal is what the managers said, in order, after one whole account of what was known: a daemon that starts without managers
// reads it and goes on. It survives the end of the daemon, not necessarily that of the machine, which ends the containers too: so
// nothing is synced. A torn or damaged end is cut off. Write errors (a full disk) cost memory of a restart, not the running node.

// Kinds of frames.
const (
	frameManager byte = 1 // api.ManagerMessage
	frameReports byte = 2 // api.StatusBatch
)

const (
	frameHeader   = 9        // length, checksum, kind
	maxFrameBytes = 64 << 20 // one message: the receive limit of the session
	// A journal is written anew when it has grown by this much and to three times its size after the last rewriting.
	minGrowthBytes = 1 << 20
)

type frame struct {
	kind byte
	msg  proto.Message
}

type journal struct {
	path string

	mu     sync.Mutex // orders the file; held across its writes
	f      *os.File   // nil: broken or closed, the next write makes it anew
	size   int64
	base   int64 // size after the last rewriting
	closed bool
	failed bool // said once in the log
}

// openJournal reads the journal at path, calling replay for each frame, and opens it for writing.
func openJournal(path string, replay func(frame)) (*journal, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, fmt.Errorf("make state directory: %w", err)
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open journal: %w", err)
	}
	j := &journal{path: path, f: f}
	r := bufio.NewReaderSize(f, 1<<16)
	for {
		fr, n, err := readFrame(r)
		if err != nil {
			break // the end, or a torn one
		}
		replay(fr)
		j.size += n
	}
	if err := f.Truncate(j.size); err == nil {
		_, err = f.Seek(j.size, io.SeekStart)
		if err != nil {
			return nil, fmt.Errorf("open journal: %w", err)
		}
	}
	j.base = j.size
	return j, nil
}

func readFrame(r io.Reader) (frame, int64, error) {
	var h [frameHeader]byte
	if _, err := io.ReadFull(r, h[:]); err != nil {
		return frame{}, 0, err
	}
	n := binary.LittleEndian.Uint32(h[:])
	if n > maxFrameBytes {
		return frame{}, 0, errors.New("frame too long")
	}
	body := make([]byte, n)
	if _, err := io.ReadFull(r, body); err != nil {
		return frame{}, 0, err
	}
	if crc32.ChecksumIEEE(body) != binary.LittleEndian.Uint32(h[4:]) {
		return frame{}, 0, errors.New("damaged frame")
	}
	f := frame{kind: h[8]}
	switch f.kind {
	case frameManager:
		f.msg = &api.ManagerMessage{}
	case frameReports:
		f.msg = &api.StatusBatch{}
	default:
		return frame{}, 0, errors.New("frame of an unknown kind")
	}
	return f, frameHeader + int64(n), proto.Unmarshal(body, f.msg)
}

func appendFrame(b []byte, f frame) ([]byte, error) {
	start := len(b)
	b = append(b, make([]byte, frameHeader)...)
	msg := f.msg
	if f.kind == frameManager {
		msg = withoutSecrets(msg)
	}
	b, err := proto.MarshalOptions{}.MarshalAppend(b, msg)
	if err != nil {
		return nil, err
	}
	body := b[start+frameHeader:]
	binary.LittleEndian.PutUint32(b[start:], uint32(len(body)))
	binary.LittleEndian.PutUint32(b[start+4:], crc32.ChecksumIEEE(body))
	b[start+8] = f.kind
	return b, nil
}

// write calls change, which alters the knowledge, and appends the frames it returns if it says so, all in the file's order. all is
// called when the journal is written anew.
func (j *journal) write(change func() ([]frame, bool), all func() []frame, log *slog.Logger) {
	j.mu.Lock()
	defer j.mu.Unlock()
	frames, keep := change()
	if !keep || j.closed {
		return
	}
	err := j.append(frames)
	if err != nil || j.size > max(3*j.base, j.base+minGrowthBytes) {
		err = j.rewrite(all())
	}
	if err != nil && !j.failed {
		log.Error("write the agent's journal: a restart without managers would know less", "path", j.path, "err", err)
	}
	j.failed = err != nil
}

// withoutSecrets is a message as it may be on a disk: without credentials of registries, which managers send again.
func withoutSecrets(m proto.Message) proto.Message {
	u := m.(*api.ManagerMessage).GetAssignments()
	if !slices.ContainsFunc(u.GetSet(), func(a *api.Assignment) bool { return len(a.RegistryAuth) > 0 }) &&
		!slices.ContainsFunc(u.GetTemplates(), func(t *api.Template) bool { return len(t.RegistryAuth) > 0 }) {
		return m
	}
	c := proto.Clone(u).(*api.AssignmentUpdate)
	for _, a := range c.Set {
		a.RegistryAuth = nil
	}
	for _, t := range c.Templates {
		t.RegistryAuth = nil
	}
	return &api.ManagerMessage{Kind: &api.ManagerMessage_Assignments{Assignments: c}}
}

func (j *journal) append(frames []frame) error {
	if j.f == nil {
		return os.ErrClosed
	}
	var b []byte
	var err error
	for _, f := range frames {
		if b, err = appendFrame(b, f); err != nil {
			return err
		}
	}
	n, err := j.f.Write(b)
	j.size += int64(n)
	if err != nil {
		j.drop()
	}
	return err
}

// rewrite replaces the journal with the given frames in one step.
func (j *journal) rewrite(frames []frame) error {
	tmp := j.path + ".new"
	f, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	w := bufio.NewWriterSize(f, 1<<16)
	var size int64
	for _, fr := range frames {
		b, err := appendFrame(nil, fr)
		if err == nil {
			_, err = w.Write(b)
		}
		if err != nil {
			_ = f.Close()
			return errors.Join(err, os.Remove(tmp))
		}
		size += int64(len(b))
	}
	err = w.Flush()
	if err == nil {
		err = os.Rename(tmp, j.path)
	}
	if err != nil {
		_ = f.Close()
		return errors.Join(err, os.Remove(tmp))
	}
	j.drop()
	j.f, j.size, j.base = f, size, size
	return nil
}

func (j *journal) drop() {
	if j.f != nil {
		_ = j.f.Close() // nothing buffered here
		j.f = nil
	}
}

func (j *journal) close() {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.closed = true
	j.drop()
}
