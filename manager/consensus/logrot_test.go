package consensus

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/hashicorp/raft"
)

var rotRounds = flag.Int("rot", 120, "damages of a raft log that are tried")

// held is what a log store holds.
type held struct {
	first, last uint64
	entries     []raft.Log
	term, voted uint64
	vote        string
}

func quietStore(path string, die func(int, error)) (*logStore, error) {
	log := slog.New(slog.NewTextHandler(io.Discard, nil))
	return openLogStore(path, newProgress(), newReserve(Config{Dir: filepath.Dir(path), Reserve: -1}, log), nil, die)
}

func (s *logStore) everything() (h held, err error) {
	first, ferr := s.FirstIndex()
	last, lerr := s.LastIndex()
	if err := errors.Join(ferr, lerr); err != nil {
		return h, err
	}
	if h, err = s.entriesOnly(first, last); err != nil {
		return h, err
	}
	term, terr := s.GetUint64([]byte("CurrentTerm"))
	voted, verr := s.GetUint64([]byte("LastVoteTerm"))
	vote, cerr := s.Get([]byte("LastVoteCand"))
	h.term, h.voted, h.vote = term, voted, string(vote)
	return h, errors.Join(terr, verr, cerr)
}

func (s *logStore) entriesOnly(first, last uint64) (h held, err error) {
	h.first, h.last = first, last
	for i := first; i <= last && err == nil && i > 0; i++ {
		var l raft.Log
		err = s.GetLog(i, &l)
		h.entries = append(h.entries, l)
	}
	return h, err
}

func equal(a, b held) bool {
	if a.first != b.first || a.last != b.last || len(a.entries) != len(b.entries) || a.term != b.term || a.voted != b.voted || a.vote != b.vote {
		return false
	}
	for i := range a.entries {
		x, y := a.entries[i], b.entries[i]
		if x.Index != y.Index || x.Term != y.Term || x.Type != y.Type || !bytes.Equal(x.Data, y.Data) {
			return false
		}
	}
	return true
}

// makeLog writes a log with entries of many sizes, of which the first were deleted, and a vote.
func makeLog(t *testing.T, path string) held {
	t.Helper()
	s, err := quietStore(path, func(_ int, err error) { t.Error(err) })
	if err != nil {
		t.Fatal(err)
	}
	r := rand.New(rand.NewPCG(1, 2))
	for i := uint64(1); i <= 400; {
		var batch []*raft.Log
		for range 1 + r.IntN(20) {
			size := r.IntN(200)
			if r.IntN(40) == 0 {
				size = 9000
			}
			batch = append(batch, &raft.Log{Index: i, Term: 1 + i/100, Type: raft.LogCommand, Data: bytes.Repeat([]byte{byte(i)}, size)})
			i++
		}
		if err := s.StoreLogs(batch); err != nil {
			t.Fatal(err)
		}
	}
	err = errors.Join(s.DeleteRange(1, 90), s.SetUint64([]byte("CurrentTerm"), 5), s.SetUint64([]byte("LastVoteTerm"), 5), s.Set([]byte("LastVoteCand"), []byte("10.0.0.1:2377")))
	if err != nil {
		t.Fatal(err)
	}
	h, err := s.everything()
	if err := errors.Join(err, s.Close()); err != nil {
		t.Fatal(err)
	}
	return h
}

// TestDamageIsSeenOrHarmless damages a log in random places: either it is refused or everything reads back as it was written. What would be
// worst is a log that looks whole and holds less.
func TestDamageIsSeenOrHarmless(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "raft.db")
	want := makeLog(t, path)
	if err := CheckLog(dir); err != nil {
		t.Fatalf("a log that is whole: %v", err)
	}
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	r := rand.New(rand.NewPCG(3, uint64(*rotRounds)))
	harmless := 0
	for i := range *rotRounds {
		b := bytes.Clone(whole)
		at, what := r.IntN(len(b)), ""
		switch r.IntN(5) {
		case 0, 1, 2:
			if i%3 == 0 { // where a little does much
				at = at/4096*4096 + r.IntN(128)
			}
			bit := r.IntN(8)
			b[at] ^= 1 << bit
			what = fmt.Sprintf("bit %d of byte %d of page %d", bit, at%4096, at/4096)
		case 3:
			at = at / 512 * 512
			clear(b[at : at+512])
			what = fmt.Sprintf("sector at %d zeroed", at)
		case 4:
			b = b[:at]
			what = fmt.Sprintf("cut at %d", at)
		}
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		if CheckLog(dir) != nil {
			continue
		}
		s, err := quietStore(path, func(int, error) {})
		if err != nil {
			continue
		}
		got, err := s.everything()
		if err == nil && !equal(got, want) {
			t.Errorf("%s: not seen: entries %d to %d, want %d to %d; term %d, vote %q", what, got.first, got.last, want.first, want.last, got.term, got.vote)
		}
		if err == nil {
			harmless++
		}
		_ = s.Close()
	}
	t.Logf("%d damages: %d harmless, the others refused", *rotRounds, harmless)
}

// Votes of earlier versions, without a checksum, are read.
func TestVotesWithoutChecksum(t *testing.T) {
	s, err := quietStore(filepath.Join(t.TempDir(), "raft.db"), func(_ int, err error) { t.Error(err) })
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if err := errors.Join(s.BoltStore.SetUint64([]byte("CurrentTerm"), 7), s.BoltStore.Set([]byte("LastVoteCand"), []byte("10.0.0.1:2377"))); err != nil {
		t.Fatal(err)
	}
	if term, err := s.GetUint64([]byte("CurrentTerm")); err != nil || term != 7 {
		t.Errorf("term %d, %v", term, err)
	}
	if vote, err := s.Get([]byte("LastVoteCand")); err != nil || string(vote) != "10.0.0.1:2377" {
		t.Errorf("vote %q, %v", vote, err)
	}
	if err := s.SetUint64([]byte("CurrentTerm"), 8); err != nil {
		t.Fatal(err)
	}
	if term, err := s.BoltStore.GetUint64([]byte("CurrentTerm")); err != nil || term != 8 { // as such a version reads it
		t.Errorf("term %d, %v", term, err)
	}
}
