package supervisor

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"skein/runtime"
)

func openTestJournal(t *testing.T, path string) (*journal, []runtime.Event) {
	t.Helper()
	j, events, err := openJournal(path, slog.Default())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { j.close() })
	return j, events
}

func TestJournal(t *testing.T) {
	path := filepath.Join(t.TempDir(), "journal")
	j, _ := openTestJournal(t, path)
	var wg sync.WaitGroup
	for i := range 50 {
		wg.Go(func() {
			if err := j.append(runtime.Event{ContainerID: fmt.Sprint(i), Exit: runtime.Exit{Code: i, At: time.Now()}}); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	// A crash tears the last record, at every possible place.
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for cut := len(whole) - 1; cut > len(whole)-60; cut-- {
		torn := filepath.Join(t.TempDir(), "torn")
		if err := os.WriteFile(torn, whole[:cut], 0o600); err != nil {
			t.Fatal(err)
		}
		k, events := openTestJournal(t, torn)
		if len(events) != 49 || k.next != 50 {
			t.Fatalf("cut at %d: %d records, next %d", cut, len(events), k.next)
		}
		if err := k.append(runtime.Event{ContainerID: "new"}); err != nil {
			t.Fatal(err)
		}
		if again, err := readEvents(torn, 49); err != nil || len(again) != 1 || again[0].ContainerID != "new" || again[0].Seq != 50 {
			t.Fatalf("cut at %d: %v %v", cut, again, err)
		}
	}
}

// TestJournalFollow: a reader sees every record once, in order, while the file is shortened under it.
func TestJournalFollow(t *testing.T) {
	j, _ := openTestJournal(t, filepath.Join(t.TempDir(), "journal"))
	const n = 400
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	seen := make(chan uint64, n)
	end := make(chan error, 1)
	go func() {
		next := uint64(1)
		end <- j.follow(ctx, 0, func(ev runtime.Event) error {
			if ev.Seq != next {
				return fmt.Errorf("record %d, want %d", ev.Seq, next)
			}
			next++
			seen <- ev.Seq
			return nil
		})
	}()
	var last uint64
	for i := range n {
		if err := j.append(runtime.Event{ContainerID: "c", Exit: runtime.Exit{Code: i}}); err != nil {
			t.Fatal(err)
		}
		if i%10 == 9 {
			select {
			case last = <-seen:
			case err := <-end:
				t.Fatal(err)
			}
			j.mu.Lock()
			j.size += compactAt // as if it were large
			j.mu.Unlock()
			if err := j.passed(last); err != nil {
				t.Fatal(err)
			}
		}
	}
	for last < n {
		select {
		case last = <-seen:
		case err := <-end:
			t.Fatal(err)
		}
	}
	cancel()
	if err := <-end; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if j.first == 1 {
		t.Error("the file was never shortened")
	}
}

// What an end changes is changed when it is told.
func TestJournalTellsLast(t *testing.T) {
	j, _, err := openJournal(filepath.Join(t.TempDir(), "journal"), slog.Default())
	if err != nil {
		t.Fatal(err)
	}
	defer j.close()
	ctx, cancel := context.WithCancel(t.Context())
	told := make(chan struct{})
	go func() {
		_ = j.follow(ctx, 0, func(runtime.Event) error { close(told); return nil })
	}()
	err = j.appendThen(runtime.Event{ContainerID: "c"}, func() {
		select {
		case <-told:
			t.Error("told before all was done")
		case <-time.After(50 * time.Millisecond):
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	<-told
	cancel()
}
