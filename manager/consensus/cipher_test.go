package consensus

import (
	"bytes"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"

	"skein/manager/api"
	"skein/manager/keyring"
)

// encrypted gives each manager a keyring of its own beside its log.
func encrypted(t *testing.T) func(*Config) {
	return func(c *Config) {
		k, err := keyring.Open(c.Dir)
		if err != nil {
			k, err = keyring.Create(c.Dir)
		}
		if err != nil {
			t.Fatal(err)
		}
		c.Cipher = k
	}
}

const marker = "a-rather-special-secret"

func marked(id string) *api.Txn {
	tx := node(id)
	tx.Changes[0].GetPutNode().Labels = map[string]string{"secret": marker}
	return tx
}

// onDisk reports which files below dir hold the marker.
func onDisk(t *testing.T, dir string) (found []string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := os.ReadFile(path)
		if bytes.Contains(b, []byte(marker)) {
			found = append(found, filepath.Base(path))
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// A manager that was plain is encrypted from its next start on, reads what it had, and what a lagging manager gets is what was written.
func TestEncryption(t *testing.T) {
	h := newHub()
	m := h.bootstrapped(t, "m1")
	if _, _, err := m.store.Batch(within(t), []*api.Txn{marked("before")}); err != nil {
		t.Fatal(err)
	}
	if len(onDisk(t, m.dir)) == 0 {
		t.Fatal("the marker is not on the disk of a plain manager: this test proves nothing")
	}
	_ = m.Close()
	m = h.open(t, "m1", m.dir, encrypted(t), func(c *Config) { c.TrailingLogs = 1 })
	<-m.LeaderCh()
	for i := range 30 {
		if _, _, err := m.store.Batch(within(t), []*api.Txn{marked(fmt.Sprint("n", i))}); err != nil {
			t.Fatal(err)
		}
	}
	if err := m.raft.Snapshot().Error(); err != nil {
		t.Fatal(err)
	}
	if _, _, err := m.store.Batch(within(t), []*api.Txn{marked("after")}); err != nil {
		t.Fatal(err)
	}
	other := h.open(t, "m2", t.TempDir(), encrypted(t)) // gets the snapshot, then the entry
	if err := m.AddVoter(within(t), "m2", "m2"); err != nil {
		t.Fatal(err)
	}
	same(t, []*manager{m, other})
	if found := onDisk(t, other.dir); len(found) > 0 {
		t.Errorf("the second manager's disk holds it in plain: %v", found)
	}
	_, _ = m.Close(), other.Close()
	again := []*manager{h.open(t, "m1", m.dir, encrypted(t)), h.open(t, "m2", other.dir, encrypted(t))}
	leader(t, again)
	same(t, append(again, m))
}

// Without its keys a manager ends; it does not begin anew.
func TestKeysAreGone(t *testing.T) {
	h := newHub()
	m := h.bootstrapped(t, "m1", encrypted(t))
	if _, _, err := m.store.Batch(within(t), []*api.Txn{node("x")}); err != nil {
		t.Fatal(err)
	}
	_ = m.Close()
	l, err := openLogStore(filepath.Join(m.dir, "raft.db"), newProgress(), nil, nil, func(int, error) {})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	last, err := l.LastIndex()
	if err != nil {
		t.Fatal(err)
	}
	if err := l.GetLog(last, &raft.Log{}); err == nil || !strings.Contains(err.Error(), "the keys are gone") {
		t.Errorf("read without keys: %v", err)
	}
}

func TestSnapshotFiles(t *testing.T) {
	dir := t.TempDir()
	k, err := keyring.Create(dir)
	if err != nil {
		t.Fatal(err)
	}
	files, err := raft.NewFileSnapshotStoreWithLogger(dir, 100, hclog.NewNullLogger())
	if err != nil {
		t.Fatal(err)
	}
	_, trans := raft.NewInmemTransport("")
	sealed, plain := &snapshots{files: files, cipher: k}, &snapshots{files: files}
	write := func(s *snapshots, index uint64, content []byte) string {
		t.Helper()
		sink, err := s.Create(raft.SnapshotVersionMax, index, 1, raft.Configuration{}, 1, trans)
		if err != nil {
			t.Fatal(err)
		}
		for rest := content; len(rest) > 0; {
			n := min(len(rest), 1+int(index)*9999)
			if _, err := sink.Write(rest[:n]); err != nil {
				t.Fatal(err)
			}
			rest = rest[n:]
		}
		if err := sink.Close(); err != nil {
			t.Fatal(err)
		}
		return sink.ID()
	}
	read := func(id string) ([]byte, int64, error) {
		t.Helper()
		meta, r, err := sealed.Open(id)
		if err != nil {
			return nil, 0, err
		}
		defer r.Close()
		b, err := io.ReadAll(r)
		return b, meta.Size, err
	}
	for i, size := range []int{0, 1, chunkBytes - 1, chunkBytes, chunkBytes + 1, 3 * chunkBytes, 3*chunkBytes + 7} {
		content := bytes.Repeat([]byte("0123456789abcdef!"), size/17+1)[:size]
		for j, s := range []*snapshots{plain, sealed} {
			id := write(s, uint64(10*i+j+1), content)
			if b, told, err := read(id); err != nil || !bytes.Equal(b, content) || told != int64(size) {
				t.Errorf("%d bytes, encrypted %v: read %d, told %d: %v", size, j == 1, len(b), told, err)
			}
		}
	}
	// Whoever changes the file and its checksum, which is no secret, is found out: chunks taken away, exchanged, changed.
	id := write(sealed, 200, bytes.Repeat([]byte("x"), 3*chunkBytes+5))
	full, err := os.ReadFile(filepath.Join(dir, "snapshots", id, "state.bin"))
	if err != nil {
		t.Fatal(err)
	}
	rec := chunkBytes + keyring.Overhead
	at := func(i int) []byte { return full[headBytes+i*rec : min(headBytes+(i+1)*rec, len(full))] }
	flipped := bytes.Clone(at(1))
	flipped[100] ^= 1
	for name, chunks := range map[string][][]byte{
		"whole": {at(0), at(1), at(2), at(3)}, "cut at a chunk": {at(0), at(1), at(2)}, "first gone": {at(1), at(2), at(3)},
		"exchanged": {at(1), at(0), at(2), at(3)}, "changed": {at(0), flipped, at(2), at(3)}, "cut short": {at(0), at(1), at(2), at(3)[:10]}, "empty": nil,
	} {
		content := append(bytes.Clone(full[:headBytes]), bytes.Join(chunks, nil)...)
		forged := write(plain, 300, content)
		if b, _, err := read(forged); (err == nil) != (name == "whole") {
			t.Errorf("%s: %d bytes, %v", name, len(b), err)
		}
		if err := os.RemoveAll(filepath.Join(dir, "snapshots", forged)); err != nil {
			t.Fatal(err)
		}
	}
}
