package consensus

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"syscall"
	"time"

	"github.com/hashicorp/raft"
	raftboltdb "github.com/hashicorp/raft-boltdb/v2"
	"go.etcd.io/bbolt"
	bbolterrors "go.etcd.io/bbolt/errors"
)

// damageAdvice is what to do about a log that cannot be read.
const damageAdvice = "on another manager demote or remove this node (docker node rm --force), then leave and join again here: a manager that comes back under its name with an empty log could undo what it had agreed to"

// logStore is raft's log and vote store on one file. What it adds to the library's: every entry is sealed with a checksum, and a write
// that failed, or an entry that does not read back, ends the process: raft itself would only log it and go on.
type logStore struct {
	*raftboltdb.BoltStore
	path     string
	progress *progress
	reserve  *reserve
	cipher   Cipher // may be nil
	die      func(code int, err error)
	fault    func() error // tests: the next write's error
}

func openLogStore(path string, p *progress, r *reserve, c Cipher, die func(int, error)) (_ *logStore, err error) {
	defer func() { // the library panics on pages it cannot make sense of
		if e := recover(); e != nil {
			err = fmt.Errorf("open raft log %s: the file is damaged (%v): %s", path, e, damageAdvice)
		}
	}()
	b, err := raftboltdb.New(raftboltdb.Options{
		Path:                    path,
		MsgpackUseNewTimeFormat: true,
		BoltOptions:             &bbolt.Options{Timeout: 2 * time.Second, NoFreelistSync: true, FreelistType: bbolt.FreelistMapType},
	})
	switch {
	case errors.Is(err, bbolterrors.ErrTimeout):
		return nil, fmt.Errorf("open raft log %s: another process uses it: stop that daemon first", path)
	case err != nil:
		return nil, fmt.Errorf("open raft log %s: %w", path, err)
	}
	return &logStore{BoltStore: b, path: path, progress: p, reserve: r, cipher: c, die: die}, nil
}

// StoreLog implements raft.LogStore.
func (s *logStore) StoreLog(l *raft.Log) error { return s.StoreLogs([]*raft.Log{l}) }

// StoreLogs implements raft.LogStore. It returns when the entries are on the disk.
func (s *logStore) StoreLogs(logs []*raft.Log) error {
	sealed := make([]*raft.Log, len(logs))
	for i, l := range logs {
		c := *l
		c.Data = s.seal(l)
		sealed[i] = &c
	}
	if err := s.written("append to", func() error { return s.BoltStore.StoreLogs(sealed) }); err != nil {
		return err
	}
	for _, l := range logs {
		if l.Type == raft.LogCommand {
			s.progress.appended(l.Index)
		}
	}
	return nil
}

// GetLog implements raft.LogStore.
func (s *logStore) GetLog(index uint64, l *raft.Log) error {
	if err := s.BoltStore.GetLog(index, l); err != nil {
		if !errors.Is(err, raft.ErrLogNotFound) {
			s.die(ExitStorage, fmt.Errorf("read raft log %s: entry %d: %w", s.path, index, err))
		}
		return err
	}
	if err := s.unseal(index, l); err != nil {
		err = fmt.Errorf("read raft log %s: entry %d: %w: %s", s.path, index, err, damageAdvice)
		s.die(ExitStorage, err)
		return err
	}
	return nil
}

// DeleteRange implements raft.LogStore.
func (s *logStore) DeleteRange(lo, hi uint64) error {
	err := s.written("truncate", func() error { return s.BoltStore.DeleteRange(lo, hi) })
	if err == nil {
		s.progress.truncated(lo, hi)
	}
	return err
}

// Layouts of what the stable store holds: votes and terms. Bytes: sealVote, a CRC-32C of key and value, the value. Numbers: 8 bytes, then the
// checksum, so that versions of Skein without it read them. What is shorter, or begins otherwise, was written by such a version.
const (
	sealVote    = 1 // no address begins so
	numberBytes = 8
	sumBytes    = 4
)

// Set implements raft.StableStore.
func (s *logStore) Set(k, v []byte) error {
	sealed := append(binary.BigEndian.AppendUint32([]byte{sealVote}, voteSum(k, v)), v...)
	return s.written("write vote to", func() error { return s.BoltStore.Set(k, sealed) })
}

// SetUint64 implements raft.StableStore.
func (s *logStore) SetUint64(k []byte, v uint64) error {
	b := binary.BigEndian.AppendUint64(nil, v)
	b = binary.BigEndian.AppendUint32(b, voteSum(k, b))
	return s.written("write vote to", func() error { return s.BoltStore.Set(k, b) })
}

// Get implements raft.StableStore.
func (s *logStore) Get(k []byte) ([]byte, error) {
	b, err := s.BoltStore.Get(k)
	if err != nil || len(b) == 0 || b[0] != sealVote {
		return b, err
	}
	if len(b) < 1+sumBytes || binary.BigEndian.Uint32(b[1:]) != voteSum(k, b[1+sumBytes:]) {
		return nil, s.voteDamaged(k)
	}
	return b[1+sumBytes:], nil
}

// GetUint64 implements raft.StableStore.
func (s *logStore) GetUint64(k []byte) (uint64, error) {
	b, err := s.BoltStore.Get(k)
	if err != nil {
		return 0, err
	}
	if len(b) != numberBytes && (len(b) != numberBytes+sumBytes || binary.BigEndian.Uint32(b[numberBytes:]) != voteSum(k, b[:numberBytes])) {
		return 0, s.voteDamaged(k)
	}
	return binary.BigEndian.Uint64(b), nil
}

// voteDamaged ends the process: with another term or vote than its own this manager could vote twice.
func (s *logStore) voteDamaged(k []byte) error {
	err := fmt.Errorf("read raft log %s: %s does not match its checksum: the file is damaged: %s", s.path, k, damageAdvice)
	s.die(ExitStorage, err)
	return err
}

func voteSum(k, v []byte) uint32 {
	table := crc32.MakeTable(crc32.Castagnoli)
	return crc32.Update(crc32.Update(0, table, k), table, v)
}

// written runs a write. A full disk is given the reserve once and else is an error raft retries: nothing was written. Any other failure
// leaves open what the disk holds (a failed fsync may have dropped pages), so the process ends.
func (s *logStore) written(doing string, write func() error) error {
	err := s.faulty(write)
	if errors.Is(err, syscall.ENOSPC) && s.reserve.release() {
		err = s.faulty(write)
	}
	if err == nil || errors.Is(err, syscall.ENOSPC) || errors.Is(err, bbolterrors.ErrDatabaseNotOpen) {
		return err
	}
	err = fmt.Errorf("%s raft log %s: %w", doing, s.path, err)
	s.die(ExitStorage, err)
	return err
}

func (s *logStore) faulty(write func() error) error {
	if s.fault != nil {
		if err := s.fault(); err != nil {
			return err
		}
	}
	return write()
}

// Layouts of an entry's data in the file. 1: CRC-32C of index, term, type and data, then the data. 2: the data encrypted, bound to index,
// term and type.
const (
	sealCRC    = 1
	sealCipher = 2
)

func (s *logStore) seal(l *raft.Log) []byte {
	if s.cipher != nil {
		return append([]byte{sealCipher}, s.cipher.Seal(l.Data, place(l))...)
	}
	out := make([]byte, 0, 5+len(l.Data))
	out = append(out, sealCRC)
	out = binary.BigEndian.AppendUint32(out, checksum(l, l.Data))
	return append(out, l.Data...)
}

func (s *logStore) unseal(index uint64, l *raft.Log) error {
	if l.Index != index {
		return fmt.Errorf("it says that it is entry %d: the file is damaged", l.Index)
	}
	switch {
	case len(l.Data) >= 5 && l.Data[0] == sealCRC:
		sum, data := binary.BigEndian.Uint32(l.Data[1:]), l.Data[5:]
		if checksum(l, data) != sum {
			return errors.New("its checksum does not match: the file is damaged")
		}
		l.Data = data
		return nil
	case len(l.Data) > 1 && l.Data[0] == sealCipher:
		if s.cipher == nil {
			return errors.New("it is encrypted, and the keys are gone")
		}
		data, err := s.cipher.Unseal(l.Data[1:], place(l))
		if err == nil {
			l.Data = data
		}
		return err
	}
	return errors.New("its layout is unknown: it is damaged, or was written by a newer version of skein")
}

// place is what an entry's data is bound to.
func place(l *raft.Log) []byte {
	head := binary.BigEndian.AppendUint64(nil, l.Index)
	head = binary.BigEndian.AppendUint64(head, l.Term)
	return append(head, byte(l.Type))
}

func checksum(l *raft.Log, data []byte) uint32 {
	table := crc32.MakeTable(crc32.Castagnoli)
	return crc32.Update(crc32.Update(0, table, place(l)), table, data)
}
