package consensus

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"

	"skein/manager/api"
)

// The layout of a bbolt file, as far as it is looked at. A page begins with its number (8 bytes), flags (2), the number of elements (2) and
// of further pages that belong to it (4). The first two pages hold a meta each; the valid one with the higher transaction counts.
const (
	boltMagic   = 0xED0CDAED
	pageHeader  = 16
	atMagic     = pageHeader
	atPageSize  = pageHeader + 8
	atRoot      = pageHeader + 16
	atHighWater = pageHeader + 40 // the first page that was never used
	atTxn       = pageHeader + 48
	atChecksum  = pageHeader + 56
	metaBytes   = pageHeader + 64

	pageBranch   = 1
	pageLeaf     = 2
	elementBytes = 16 // of a page's table of keys
	leafBucket   = 1  // an element's flag: its value is a bucket
	bucketBytes  = 16 // of a bucket's head: number of its root page, 0 if the page follows; a sequence
	maxDepth     = 24
	maxPageBytes = 64 << 10
)

// CheckLog refuses a log in dir that is cut short or whose pages do not hang together: bbolt would crash the process, in a goroutine of its
// own, or show a part of what was there. What is in the entries is checked when they are read. A log that is not there yet is fine.
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
	if st.Size() == 0 {
		return nil // made, and nothing written: bbolt begins anew
	}
	c := &logCheck{file: f, size: st.Size()}
	if err := c.run(); err != nil {
		return api.Errorf(errdefs.ErrDataLoss, "raft log %s is damaged: %v", path, err)
	}
	return nil
}

// logCheck walks through the pages of a bbolt file.
type logCheck struct {
	file io.ReaderAt
	size int64
	page uint64 // bytes
	high uint64 // pages
	seen map[uint64]bool
}

func (c *logCheck) run() error {
	root, txn := uint64(0), uint64(0)
	for _, page := range []int64{0, c.secondMeta()} {
		m := make([]byte, metaBytes)
		if _, err := c.file.ReadAt(m, page); err != nil {
			return fmt.Errorf("it is cut short: it has %d bytes, and its heads are incomplete", c.size)
		}
		if !validMeta(m) { // the other may be older: bbolt would go on without the newest entries
			return fmt.Errorf("one of its two heads, at byte %d, is not valid", page)
		}
		if t := binary.NativeEndian.Uint64(m[atTxn:]); c.page == 0 || t > txn {
			c.page, c.high, root, txn = uint64(binary.NativeEndian.Uint32(m[atPageSize:])), binary.NativeEndian.Uint64(m[atHighWater:]), binary.NativeEndian.Uint64(m[atRoot:]), t
		}
	}
	if uint64(c.size)/c.page < c.high {
		return fmt.Errorf("it is cut short: it should have %d pages of %d bytes, and has %d bytes", c.high, c.page, c.size)
	}
	c.seen = map[uint64]bool{}
	return c.tree(root, nil, nil, 0, true)
}

// secondMeta is where the second meta page should be: after the first one's page, whose size depends on the machine.
func (c *logCheck) secondMeta() int64 {
	var b [metaBytes]byte
	for page := int64(512); page <= maxPageBytes; page *= 2 {
		if _, err := c.file.ReadAt(b[:], page); err == nil && binary.NativeEndian.Uint32(b[atMagic:]) == boltMagic {
			return page
		}
	}
	return int64(os.Getpagesize())
}

func validMeta(m []byte) bool {
	h := fnv.New64a()
	h.Write(m[atMagic:atChecksum])
	page := binary.NativeEndian.Uint32(m[atPageSize:])
	return binary.NativeEndian.Uint32(m[atMagic:]) == boltMagic && h.Sum64() == binary.NativeEndian.Uint64(m[atChecksum:]) && page >= 512 && page <= maxPageBytes
}

// tree checks a page and what is below it. Its keys must be from low on and below high; nil: no bound.
func (c *logCheck) tree(no uint64, low, high []byte, depth int, buckets bool) error {
	if depth > maxDepth {
		return fmt.Errorf("page %d: the tree is too deep", no)
	}
	b, err := c.read(no)
	if err != nil {
		return err
	}
	flags := binary.NativeEndian.Uint16(b[8:])
	list, err := elements(b)
	if err != nil {
		return fmt.Errorf("page %d: %w", no, err)
	}
	for i, e := range list {
		if bytes.Compare(e.key, low) < 0 || (high != nil && bytes.Compare(e.key, high) >= 0) || (i > 0 && bytes.Compare(list[i-1].key, e.key) >= 0) {
			return fmt.Errorf("page %d: its keys are not in order", no)
		}
		next := high
		if i+1 < len(list) {
			next = list[i+1].key
		}
		switch {
		case flags == pageBranch:
			err = c.tree(e.page, e.key, next, depth+1, buckets)
		case e.flags == leafBucket && buckets:
			err = c.bucket(e.value, depth)
		case e.flags != 0:
			err = fmt.Errorf("page %d: an element has the flags %d", no, e.flags)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// bucket checks a bucket within the root bucket; there are none within others.
func (c *logCheck) bucket(value []byte, depth int) error {
	if len(value) < bucketBytes {
		return errors.New("the head of a bucket is cut short")
	}
	if root := binary.NativeEndian.Uint64(value); root != 0 {
		return c.tree(root, nil, nil, depth+1, false)
	}
	inline := value[bucketBytes:]
	if len(inline) < pageHeader || binary.NativeEndian.Uint16(inline[8:]) != pageLeaf {
		return errors.New("a bucket without pages is damaged")
	}
	list, err := elements(inline)
	for i, e := range list {
		if e.flags != 0 || (i > 0 && bytes.Compare(list[i-1].key, e.key) >= 0) {
			err = errors.New("a bucket without pages is damaged")
		}
	}
	return err
}

// read returns a page with those that belong to it. No page belongs to two places.
func (c *logCheck) read(no uint64) ([]byte, error) {
	if no < 2 || no >= c.high {
		return nil, fmt.Errorf("it refers to page %d of %d", no, c.high)
	}
	head := make([]byte, pageHeader)
	if _, err := c.file.ReadAt(head, int64(no*c.page)); err != nil {
		return nil, fmt.Errorf("page %d: %w", no, err)
	}
	more := uint64(binary.NativeEndian.Uint32(head[12:]))
	flags := binary.NativeEndian.Uint16(head[8:])
	switch {
	case binary.NativeEndian.Uint64(head) != no:
		return nil, fmt.Errorf("page %d says that it is page %d", no, binary.NativeEndian.Uint64(head))
	case flags != pageBranch && flags != pageLeaf:
		return nil, fmt.Errorf("page %d has the flags %d", no, flags)
	case more >= c.high-no:
		return nil, fmt.Errorf("page %d is longer than the file", no)
	}
	for i := no; i <= no+more; i++ {
		if c.seen[i] {
			return nil, fmt.Errorf("page %d is used twice", i)
		}
		c.seen[i] = true
	}
	b := make([]byte, (1+more)*c.page)
	if _, err := c.file.ReadAt(b, int64(no*c.page)); err != nil {
		return nil, fmt.Errorf("page %d: %w", no, err)
	}
	return b, nil
}

// element is one entry of a page's table.
type element struct {
	key, value []byte
	flags      uint32 // of a leaf
	page       uint64 // of a branch
}

// elements reads a page's table. Keys and values follow it without gaps, so that a wrong count or length is seen.
func elements(b []byte) ([]element, error) {
	leaf := binary.NativeEndian.Uint16(b[8:]) == pageLeaf
	n := int(binary.NativeEndian.Uint16(b[10:]))
	next := uint64(pageHeader + n*elementBytes)
	if next > uint64(len(b)) || (n == 0 && !leaf) {
		return nil, fmt.Errorf("it cannot have %d elements", n)
	}
	out := make([]element, n)
	for i := range out {
		at := pageHeader + i*elementBytes
		t := b[at : at+elementBytes]
		var pos, keyLen, valueLen uint64
		if leaf {
			out[i].flags = binary.NativeEndian.Uint32(t)
			pos, keyLen, valueLen = uint64(binary.NativeEndian.Uint32(t[4:])), uint64(binary.NativeEndian.Uint32(t[8:])), uint64(binary.NativeEndian.Uint32(t[12:]))
		} else {
			pos, keyLen = uint64(binary.NativeEndian.Uint32(t)), uint64(binary.NativeEndian.Uint32(t[4:]))
			out[i].page = binary.NativeEndian.Uint64(t[8:])
		}
		if uint64(at)+pos != next || next+keyLen+valueLen > uint64(len(b)) || keyLen == 0 {
			return nil, fmt.Errorf("element %d of %d is not where it should be", i, n)
		}
		out[i].key, out[i].value = b[next:next+keyLen], b[next+keyLen:next+keyLen+valueLen]
		next += keyLen + valueLen
	}
	return out, nil
}
