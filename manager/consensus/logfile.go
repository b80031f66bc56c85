package consensus

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"

	"skein/manager/api"
)

// Of a bbolt file's two meta pages: the header of a page, and the fields that are looked at.
const (
	boltMagic    = 0xED0CDAED
	pageHeader   = 16
	atMagic      = pageHeader
	atPageSize   = pageHeader + 8
	atHighWater  = pageHeader + 40
	metaBytes    = pageHeader + 64
	maxPageBytes = 64 << 10
)

// CheckLog refuses a log in dir that is cut short: bbolt would not return an error but crash the process, in a goroutine of its own. A log
// that is not there yet is fine.
func CheckLog(dir string) error {
	path := filepath.Join(dir, "raft.db")
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("check raft log: %w", err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return fmt.Errorf("check raft log: %w", err)
	}
	var first [metaBytes]byte
	if _, err := io.ReadFull(f, first[:]); err != nil {
		if st.Size() == 0 {
			return nil // made, and nothing written: bbolt begins anew
		}
		return damaged(path, "it has %d bytes", st.Size())
	}
	page := int64(binary.NativeEndian.Uint32(first[atPageSize:]))
	if binary.NativeEndian.Uint32(first[atMagic:]) != boltMagic || page < 512 || page > maxPageBytes {
		return nil // bbolt tries the second meta page, and says it if that is no better
	}
	need := binary.NativeEndian.Uint64(first[atHighWater:])
	var second [metaBytes]byte
	if _, err := f.ReadAt(second[:], page); err == nil && binary.NativeEndian.Uint32(second[atMagic:]) == boltMagic {
		need = min(need, binary.NativeEndian.Uint64(second[atHighWater:])) // either may be the valid one
	}
	if st.Size()/page < int64(min(need, 1<<40)) {
		return damaged(path, "it should have %d pages of %d bytes, and has %d bytes", need, page, st.Size())
	}
	return nil
}

func damaged(path, why string, args ...any) error {
	return api.Errorf(errdefs.ErrDataLoss, "raft log %s is cut short: %s", path, fmt.Sprintf(why, args...))
}
