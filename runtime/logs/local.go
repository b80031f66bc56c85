package logs

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"time"
)

// localFormat is a compact binary format, little endian:
//
//	byte 0   mark
//	byte 1   flags: 1 standard error, 2 a part of a line that goes on in a later record
//	2-3      length of the text
//	4-11     time in nanoseconds since 1970
//	12-      the text without its line feed
//	then     CRC-32C of all this, and once more the length of the text, so that it can be read backwards
//
// The mark tells it from json-file, whose lines begin with a brace.
type localFormat struct{}

const (
	localMark    = 0xa1
	localHead    = 12
	localTail    = 6
	flagStderr   = 1
	flagPart     = 2
	localLongest = localHead + maxLine + localTail
)

func castagnoli() *crc32.Table { return crc32.MakeTable(crc32.Castagnoli) }

func (localFormat) appendRecord(out, text []byte, stream string, t time.Time) []byte {
	flags := byte(flagPart)
	if n := len(text); n > 0 && text[n-1] == '\n' {
		flags, text = 0, text[:n-1]
	}
	if stream == "stderr" {
		flags |= flagStderr
	}
	from := len(out)
	out = append(out, localMark, flags)
	out = binary.LittleEndian.AppendUint16(out, uint16(len(text)))
	out = binary.LittleEndian.AppendUint64(out, uint64(t.UnixNano()))
	out = append(out, text...)
	out = binary.LittleEndian.AppendUint32(out, crc32.Checksum(out[from:], castagnoli()))
	return binary.LittleEndian.AppendUint16(out, uint16(len(text)))
}

var errDamaged = errors.New("damaged record")

// next reads one record. After a damaged one nothing in the file can be found: it gives an error other than the end of the file.
func (localFormat) next(br *bufio.Reader) (l Line, n int, ok bool, err error) {
	head, err := br.Peek(localHead)
	if err != nil {
		return l, 0, false, err
	}
	size := localHead + int(binary.LittleEndian.Uint16(head[2:])) + localTail
	if head[0] != localMark || size > localLongest {
		return l, 0, false, errDamaged
	}
	b, err := br.Peek(size)
	if err != nil {
		return l, 0, false, err
	}
	if l, err = parseLocal(b); err != nil {
		return l, 0, false, err
	}
	_, err = br.Discard(size)
	return l, size, true, err
}

func parseLocal(b []byte) (Line, error) {
	text := b[localHead : len(b)-localTail]
	if crc32.Checksum(b[:len(b)-localTail], castagnoli()) != binary.LittleEndian.Uint32(b[len(b)-localTail:]) {
		return Line{}, errDamaged
	}
	l := Line{Stream: "stdout", Time: time.Unix(0, int64(binary.LittleEndian.Uint64(b[4:]))).UTC(), Text: append([]byte(nil), text...)}
	if b[1]&flagStderr != 0 {
		l.Stream = "stderr"
	}
	if b[1]&flagPart == 0 {
		l.Text = append(l.Text, '\n')
	}
	return l, nil
}

// tail finds where the last n records before end begin; left counts those that are missing.
func (f localFormat) tail(r io.ReaderAt, end int64, n int) (pos int64, left int, err error) {
	buf := make([]byte, 4*localLongest)
	for end > 0 {
		lo := max(0, end-int64(len(buf)))
		b := buf[:end-lo]
		if _, err := r.ReadAt(b, lo); err != nil && !errors.Is(err, io.EOF) {
			return 0, 0, err
		}
		before := end
		for len(b) >= localHead+localTail {
			size := localHead + int(binary.LittleEndian.Uint16(b[len(b)-2:])) + localTail
			if size > len(b) {
				break
			}
			if _, err := parseLocal(b[len(b)-size:]); err != nil || b[len(b)-size] != localMark {
				return f.tailTorn(r, end, n)
			}
			b, end = b[:len(b)-size], end-int64(size)
			if n--; n == 0 {
				return end, 0, nil
			}
		}
		if end == before {
			return f.tailTorn(r, end, n)
		}
	}
	return 0, n, nil
}

// tailTorn is tail for a file whose end is not a record: it is being written, or a crash tore it. What comes before is found from the start.
func (f localFormat) tailTorn(r io.ReaderAt, end int64, n int) (pos int64, left int, err error) {
	good, err := f.lastGood(r, end)
	if err != nil || good == end {
		return 0, n, err
	}
	return f.tail(r, good, n)
}

// lastGood is where the last whole record ends.
func (f localFormat) lastGood(r io.ReaderAt, size int64) (int64, error) {
	br := bufio.NewReaderSize(io.NewSectionReader(r, 0, size), localLongest)
	good := int64(0)
	for {
		_, n, _, err := f.next(br)
		if errors.Is(err, io.EOF) || errors.Is(err, errDamaged) {
			return good, nil
		}
		if err != nil {
			return 0, err
		}
		good += int64(n)
	}
}

// repair cuts off what a crash left torn.
func (f localFormat) repair(file *os.File, size int64) (int64, error) {
	if _, left, err := f.tailWhole(file, size); err == nil && left {
		return size, nil
	}
	good, err := f.lastGood(file, size)
	if err != nil {
		return size, err
	}
	if err := file.Truncate(good); err != nil {
		return size, fmt.Errorf("cut off a torn record: %w", err)
	}
	return good, nil
}

// tailWhole says whether the file ends with a whole record, without reading more than that.
func (localFormat) tailWhole(r io.ReaderAt, size int64) (int64, bool, error) {
	if size == 0 {
		return 0, true, nil
	}
	var trailer [2]byte
	if size < localHead+localTail {
		return 0, false, nil
	}
	if _, err := r.ReadAt(trailer[:], size-2); err != nil {
		return 0, false, err
	}
	at := size - int64(localHead+int(binary.LittleEndian.Uint16(trailer[:]))+localTail)
	if at < 0 {
		return 0, false, nil
	}
	b := make([]byte, size-at)
	if _, err := r.ReadAt(b, at); err != nil {
		return 0, false, err
	}
	_, err := parseLocal(b)
	return at, err == nil && b[0] == localMark, nil
}
