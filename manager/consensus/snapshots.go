package consensus

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/hashicorp/raft"
)

// An encrypted snapshot is a head, magic and a random name, then chunks of chunkBytes, each encrypted and bound to name, number and
// whether it is the last: chunks cannot be exchanged, left out or cut off. Only the last chunk may be shorter.
const (
	snapMagic  = "SKS1"
	nameBytes  = 16
	headBytes  = len(snapMagic) + nameBytes
	chunkBytes = 64 << 10
)

// snapshots is raft's snapshot store on files, encrypted if there is a cipher. A plain snapshot, written before there was, is read.
type snapshots struct {
	files  *raft.FileSnapshotStore
	cipher Cipher // may be nil
}

// Create implements raft.SnapshotStore.
func (s *snapshots) Create(version raft.SnapshotVersion, index, term uint64, configuration raft.Configuration, configurationIndex uint64, trans raft.Transport) (raft.SnapshotSink, error) {
	sink, err := s.files.Create(version, index, term, configuration, configurationIndex, trans)
	if err != nil || s.cipher == nil {
		return sink, err
	}
	w := &sealedSink{SnapshotSink: sink, chunks: chunks{name: make([]byte, nameBytes)}, cipher: s.cipher}
	rand.Read(w.name) // never fails: crypto/rand
	if _, err := sink.Write(append([]byte(snapMagic), w.name...)); err != nil {
		return nil, errors.Join(err, sink.Cancel())
	}
	return w, nil
}

// List implements raft.SnapshotStore.
func (s *snapshots) List() ([]*raft.SnapshotMeta, error) { return s.files.List() }

// Open implements raft.SnapshotStore. The size it tells is that of the decrypted content, which is what is sent to other managers.
func (s *snapshots) Open(id string) (*raft.SnapshotMeta, io.ReadCloser, error) {
	meta, r, err := s.files.Open(id)
	if err != nil {
		return nil, nil, err
	}
	head := make([]byte, headBytes)
	n, err := io.ReadFull(r, head)
	switch {
	case n < headBytes && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF):
		return nil, nil, errors.Join(fmt.Errorf("read raft snapshot %s: %w", id, err), r.Close())
	case n < headBytes || string(head[:len(snapMagic)]) != snapMagic:
		return meta, &plainSnapshot{io.MultiReader(bytes.NewReader(head[:n]), r), r}, nil
	case s.cipher == nil:
		return nil, nil, errors.Join(fmt.Errorf("read raft snapshot %s: it is encrypted, and the keys are gone", id), r.Close())
	}
	size := meta.Size - int64(headBytes)
	over := int64(len(s.cipher.Seal(nil, nil)))
	meta.Size = size - over*((size+chunkBytes+over-1)/(chunkBytes+over))
	return meta, &sealedSnapshot{file: r, id: id, chunks: chunks{name: head[len(snapMagic):]}, cipher: s.cipher, over: int(over)}, nil
}

type plainSnapshot struct {
	io.Reader
	io.Closer
}

// chunks numbers the chunks of a snapshot.
type chunks struct {
	name []byte
	next uint64
}

// bound is what the next chunk is bound to.
func (c *chunks) bound(last bool) []byte {
	b := binary.BigEndian.AppendUint64(append([]byte(nil), c.name...), c.next)
	c.next++
	if last {
		return append(b, 1)
	}
	return append(b, 0)
}

// sealedSink encrypts what is written to it.
type sealedSink struct {
	raft.SnapshotSink
	chunks
	cipher Cipher
	buf    []byte
}

// Write implements io.Writer. A full chunk is held back until it is known not to be the last.
func (w *sealedSink) Write(p []byte) (int, error) {
	written := 0
	for len(p) > 0 {
		if len(w.buf) == chunkBytes {
			if err := w.flush(false); err != nil {
				return written, err
			}
		}
		n := min(len(p), chunkBytes-len(w.buf))
		w.buf = append(w.buf, p[:n]...)
		p, written = p[n:], written+n
	}
	return written, nil
}

func (w *sealedSink) flush(last bool) error {
	_, err := w.SnapshotSink.Write(w.cipher.Seal(w.buf, w.bound(last)))
	w.buf = w.buf[:0]
	return err
}

// Close implements raft.SnapshotSink: the snapshot counts from then on.
func (w *sealedSink) Close() error {
	if err := w.flush(true); err != nil {
		return errors.Join(err, w.Cancel())
	}
	return w.SnapshotSink.Close()
}

// sealedSnapshot decrypts a snapshot's file.
type sealedSnapshot struct {
	file io.ReadCloser
	id   string
	chunks
	cipher Cipher
	over   int
	rest   []byte // decrypted, not read yet
	ahead  []byte // read from the file, not decrypted yet
	done   bool
}

// Read implements io.Reader.
func (r *sealedSnapshot) Read(p []byte) (int, error) {
	for len(r.rest) == 0 {
		if r.done {
			return 0, io.EOF
		}
		if err := r.chunk(); err != nil {
			return 0, fmt.Errorf("read raft snapshot %s: %w", r.id, err)
		}
	}
	n := copy(p, r.rest)
	r.rest = r.rest[n:]
	return n, nil
}

// chunk decrypts the next chunk; it is the last if the file ends behind it.
func (r *sealedSnapshot) chunk() error {
	if r.next == 0 {
		if err := r.load(); err != nil {
			return err
		}
	}
	sealed := r.ahead
	if err := r.load(); err != nil {
		return err
	}
	r.done = len(r.ahead) == 0
	plain, err := r.cipher.Unseal(sealed, r.bound(r.done))
	r.rest = plain
	return err
}

func (r *sealedSnapshot) load() error {
	buf := make([]byte, chunkBytes+r.over)
	n, err := io.ReadFull(r.file, buf)
	r.ahead = buf[:n]
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return nil
	}
	return err
}

// Close implements io.Closer.
func (r *sealedSnapshot) Close() error { return r.file.Close() }
