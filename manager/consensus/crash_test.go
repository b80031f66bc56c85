package consensus

import (
	"bytes"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"skein/manager/api"
)

var crashTears = flag.Int("tears", 2, "torn writes that are tried at each boundary of the crash test")

const sector = 512 // bytes that a disk writes whole or not at all

// image is what the disk held at a moment when everything was synced, and what had been acknowledged by then.
type image struct {
	files map[string][]byte // below the directory
	acked []string
}

func (m *image) log() []byte { return m.files["raft.db"] }

func readDir(t *testing.T, dir string) map[string][]byte {
	t.Helper()
	out := map[string][]byte{}
	err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := os.ReadFile(path)
		rel, _ := filepath.Rel(dir, path)
		out[rel] = b
		return err
	})
	if err != nil {
		t.Error(err)
	}
	return out
}

func writeDir(t *testing.T, files map[string][]byte) string {
	t.Helper()
	dir := t.TempDir()
	for name, b := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// record runs a manager that writes and takes snapshots, and returns what the disk held before each of its writes.
func record(t *testing.T) (images []*image, asked map[string]bool) {
	h := newHub()
	dir := t.TempDir()
	m := h.open(t, "m1", dir)
	var mu sync.Mutex
	var acked []string
	m.logs.fault = func() error { // before every write of raft: nothing is unsynced
		mu.Lock()
		defer mu.Unlock()
		images = append(images, &image{files: readDir(t, dir), acked: append([]string(nil), acked...)})
		return nil
	}
	if err := m.Bootstrap(); err != nil {
		t.Fatal(err)
	}
	<-m.LeaderCh()
	asked = map[string]bool{}
	for round := range 6 {
		for i := range 8 {
			id := fmt.Sprintf("n%d-%d", round, i)
			asked[id] = true
			if _, _, err := m.store.Batch(within(t), []*api.Txn{node(id)}); err != nil {
				t.Fatal(err)
			}
			mu.Lock()
			acked = append(acked, id)
			mu.Unlock()
		}
		if round%2 == 1 { // not beside writes: what the disk holds would have no name
			if err := m.raft.Snapshot().Error(); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	return append(images, &image{files: readDir(t, dir), acked: acked}), asked
}

// torn is a file of which some of the sectors that differ from before reached the disk. The heads are written last, after a sync.
func torn(before, after []byte, reached func(at int) bool) []byte {
	out := bytes.Clone(after) // the file's new length is synced first
	for at := 0; at < len(out); at += sector {
		end := min(at+sector, len(out))
		old := make([]byte, end-at)
		if at < len(before) {
			copy(old, before[at:])
		}
		if !bytes.Equal(old, out[at:end]) && (at < 2*os.Getpagesize() || !reached(at)) {
			copy(out[at:end], old)
		}
	}
	return out
}

// TestCrashAtEverySync boots from what the disk holds at every point between two syncs of a run: from the state before with any part of
// what was being written, and from the state after. A log must hold exactly one of the two; a manager everything acknowledged and nothing
// that nobody asked for.
func TestCrashAtEverySync(t *testing.T) {
	images, asked := record(t)
	r := rand.New(rand.NewPCG(5, uint64(*crashTears)))
	tears := 0
	for i := 0; i+1 < len(images); i++ {
		before, after := images[i], images[i+1]
		if bytes.Equal(before.log(), after.log()) {
			continue
		}
		want := contents(t, "before", before.log())
		for try := range *crashTears + 1 {
			all := try == 0
			got := contents(t, fmt.Sprintf("boundary %d, tear %d", i, try), torn(before.log(), after.log(), func(int) bool { return all || r.IntN(2) == 0 }))
			if tears++; !equal(got, want) {
				t.Errorf("boundary %d, tear %d: entries %d to %d, want %d to %d", i, try, got.first, got.last, want.first, want.last)
			}
		}
	}
	boots := 0
	for i := 0; i < len(images); i += 1 + len(images)/12 {
		boot(t, images[i], asked)
		boots++
	}
	boot(t, images[len(images)-1], asked)
	t.Logf("%d boundaries, %d torn logs, %d boots", len(images)-1, tears, boots+1)
}

// contents is what a log file holds, which must be whole.
func contents(t *testing.T, what string, file []byte) held {
	t.Helper()
	dir := writeDir(t, map[string][]byte{"raft.db": file})
	if err := CheckLog(dir); err != nil {
		t.Fatalf("%s: %v", what, err)
	}
	s, err := quietStore(filepath.Join(dir, "raft.db"), func(_ int, err error) { t.Errorf("%s: %v", what, err) })
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
	defer s.Close()
	first, ferr := s.FirstIndex()
	last, lerr := s.LastIndex()
	if ferr != nil || lerr != nil {
		t.Fatalf("%s: %v %v", what, ferr, lerr)
	}
	h := held{first: first, last: last}
	if first > 0 {
		if h, err = s.entriesOnly(first, last); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
	}
	h.term, _ = s.GetUint64([]byte("CurrentTerm")) // may not be there yet
	h.voted, _ = s.GetUint64([]byte("LastVoteTerm"))
	vote, _ := s.Get([]byte("LastVoteCand"))
	h.vote = string(vote)
	return h
}

// boot starts a manager from an image. Only its own writes are in the group's log, so it leads.
func boot(t *testing.T, img *image, asked map[string]bool) {
	t.Helper()
	if len(img.acked) == 0 { // perhaps not a group yet
		return
	}
	h := newHub()
	files := map[string][]byte{}
	for name, b := range img.files {
		files[name] = b
	}
	m := h.open(t, "m1", writeDir(t, files))
	defer m.Close()
	if !<-m.LeaderCh() {
		t.Fatal("told of a loss first")
	}
	for _, id := range img.acked {
		if !m.has(id) {
			t.Errorf("with %d acknowledged: %s is lost", len(img.acked), id)
		}
	}
	found := 0
	for id := range asked {
		if m.has(id) {
			found++
		}
	}
	if found < len(img.acked) || found > len(img.acked)+1 {
		t.Errorf("%d objects after %d were acknowledged and at most one more asked for", found, len(img.acked))
	}
}
