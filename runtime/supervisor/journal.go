package supervisor

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"skein/runtime"
)

// journal is the durable list of exits: one line {checksum event} each, consecutive numbers. An exit is told only after its record is
// on disk. Records that a reader has passed may be dropped when the file is large.
type journal struct {
	path string
	log  *slog.Logger

	mu      sync.Mutex
	f       *os.File
	size    int64
	next    uint64
	first   uint64        // number of the first record kept
	changed chan struct{} // closed at each append and replaced
	epoch   int           // counts replacements of the file
	queue   []*pending
	busy    bool
}

type pending struct {
	ev   runtime.Event
	kept func()
	done chan error
}

// compactAt is when passed records are dropped; maxRecord bounds one line.
const (
	compactAt  = 4 << 20
	maxRecord  = 64 << 10
	spaceRetry = time.Second
)

func openJournal(path string, log *slog.Logger) (*journal, []runtime.Event, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR|os.O_APPEND, 0o600)
	if err != nil {
		return nil, nil, fmt.Errorf("open exit journal: %w", err)
	}
	j := &journal{path: path, log: log, f: f, next: 1, first: 1, changed: make(chan struct{})}
	var events []runtime.Event
	br := bufio.NewReaderSize(f, maxRecord)
	for {
		line, err := br.ReadSlice('\n')
		if err == nil {
			var ev runtime.Event
			if ev, err = decodeEvent(line); err == nil {
				if len(events) == 0 {
					j.first = ev.Seq
				}
				events = append(events, ev)
				j.size += int64(len(line))
				j.next = ev.Seq + 1
				continue
			}
		}
		if errors.Is(err, io.EOF) && len(line) == 0 {
			break
		}
		// The last record was torn by a crash before anybody was told: it never happened.
		if err := f.Truncate(j.size); err != nil {
			f.Close()
			return nil, nil, fmt.Errorf("repair exit journal: %w", err)
		}
		break
	}
	return j, events, nil
}

func encodeEvent(ev runtime.Event) ([]byte, error) {
	b, err := json.Marshal(ev)
	if err != nil {
		return nil, err
	}
	return fmt.Appendf(nil, "%08x %s\n", crc32.ChecksumIEEE(b), b), nil
}

func decodeEvent(line []byte) (runtime.Event, error) {
	var ev runtime.Event
	sum, body, ok := bytes.Cut(bytes.TrimSuffix(line, []byte("\n")), []byte(" "))
	if !ok || fmt.Sprintf("%08x", crc32.ChecksumIEEE(body)) != string(sum) {
		return ev, errors.New("damaged record")
	}
	return ev, json.Unmarshal(body, &ev)
}

// append makes the exit durable; exits that come together share one fsync.
func (j *journal) append(ev runtime.Event) error { return j.appendThen(ev, func() {}) }

// appendThen is append with something to do once the record is on disk and before anybody is told. It must not wait.
func (j *journal) appendThen(ev runtime.Event, kept func()) error {
	p := &pending{ev: ev, kept: kept, done: make(chan error, 1)}
	j.mu.Lock()
	j.queue = append(j.queue, p)
	if j.busy {
		j.mu.Unlock()
		return <-p.done
	}
	j.busy = true
	for len(j.queue) > 0 {
		batch := j.queue
		j.queue = nil
		j.flush(batch)
	}
	j.busy = false
	j.mu.Unlock()
	return <-p.done
}

// flush writes a batch; it is called locked and unlocks for the disk.
func (j *journal) flush(batch []*pending) {
	var buf []byte
	seq := j.next
	for _, p := range batch {
		p.ev.Seq = seq
		if len(p.ev.Exit.Err) > maxRecord/4 {
			p.ev.Exit.Err = p.ev.Exit.Err[:maxRecord/4]
		}
		b, err := encodeEvent(p.ev)
		if err != nil {
			panic(fmt.Sprintf("encode exit: %v", err)) // plain data
		}
		buf = append(buf, b...)
		seq++
	}
	f, size := j.f, j.size
	j.mu.Unlock()
	err := writeSync(f, buf)
	for errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		// Nobody tells when space returns, and an exit may neither be lost nor told before it is kept.
		j.log.Error("exit journal: no space, trying again", "path", j.path, "error", err)
		time.Sleep(spaceRetry)
		if err = f.Truncate(size); err == nil {
			err = writeSync(f, buf)
		}
	}
	j.mu.Lock()
	if err != nil {
		// What is on disk is unknown now; a restart reads it again. Nothing of this batch was told.
		panic(fmt.Sprintf("exit journal %s: %v: the disk does not keep what is written to it", j.path, err))
	}
	j.size += int64(len(buf))
	j.next = seq
	for _, p := range batch {
		p.kept()
	}
	close(j.changed)
	j.changed = make(chan struct{})
	for _, p := range batch {
		p.done <- nil
	}
}

func writeSync(f *os.File, b []byte) error {
	if _, err := f.Write(b); err != nil {
		return err
	}
	return f.Sync()
}

// passed drops records up to seq when the file has grown large.
func (j *journal) passed(seq uint64) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.size < compactAt || j.busy {
		return nil
	}
	events, err := readEvents(j.path, seq)
	if err != nil {
		return err
	}
	var buf []byte
	for _, ev := range events {
		b, err := encodeEvent(ev)
		if err != nil {
			return err
		}
		buf = append(buf, b...)
	}
	if len(events) == 0 {
		return nil // keep one record: it carries the number
	}
	tmp := j.path + ".new"
	if err := writeDurably(tmp, buf); err != nil {
		return fmt.Errorf("shorten exit journal: %w", err)
	}
	if err := os.Rename(tmp, j.path); err != nil {
		return fmt.Errorf("shorten exit journal: %w", err)
	}
	if err := syncDir(filepath.Dir(j.path)); err != nil {
		return fmt.Errorf("shorten exit journal: %w", err)
	}
	f, err := os.OpenFile(j.path, os.O_RDWR|os.O_APPEND, 0o600)
	if err != nil {
		return fmt.Errorf("shorten exit journal: %w", err)
	}
	j.f.Close()
	j.f, j.size, j.first = f, int64(len(buf)), events[0].Seq
	j.epoch++
	return nil
}

func writeDurably(path string, b []byte) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	return writeSync(f, b)
}

func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

func readEvents(path string, after uint64) ([]runtime.Event, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("read exit journal: %w", err)
	}
	defer f.Close()
	var out []runtime.Event
	br := bufio.NewReaderSize(f, maxRecord)
	for {
		line, err := br.ReadSlice('\n')
		if err != nil {
			return out, nil
		}
		ev, err := decodeEvent(line)
		if err != nil {
			return out, nil
		}
		if ev.Seq > after {
			out = append(out, ev)
		}
	}
}

// follow calls each for every record after seq, in order, as they come.
func (j *journal) follow(ctx context.Context, seq uint64, each func(runtime.Event) error) error {
	var f *os.File
	var br *bufio.Reader
	epoch := -1
	defer func() {
		if f != nil {
			f.Close()
		}
	}()
	for {
		j.mu.Lock()
		changed, limit, now := j.changed, j.next, j.epoch
		j.mu.Unlock()
		if now != epoch {
			if f != nil {
				f.Close()
			}
			var err error
			if f, err = os.Open(j.path); err != nil {
				return fmt.Errorf("read exit journal: %w", err)
			}
			br, epoch = bufio.NewReaderSize(f, maxRecord), now
		}
		// Only records below limit are durable.
		for seq+1 < limit {
			line, err := br.ReadSlice('\n')
			if err != nil {
				if errors.Is(err, io.EOF) {
					break // the file was replaced between the two looks
				}
				return fmt.Errorf("read exit journal: %w", err)
			}
			ev, err := decodeEvent(line)
			if err != nil {
				return fmt.Errorf("read exit journal: %w", err)
			}
			if ev.Seq <= seq {
				continue
			}
			if err := each(ev); err != nil {
				return err
			}
			seq = ev.Seq
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-changed:
		}
	}
}

func (j *journal) close() error { return j.f.Close() }
