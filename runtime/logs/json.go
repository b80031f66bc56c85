package logs

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"time"
	"unicode/utf8"
)

// maxRecord bounds one line of a json-file log: 16 KiB of text, every byte escaped.
const maxRecord = 8*maxLine + 256

// jsonFormat is one JSON object per line, the format of Docker's json-file driver.
type jsonFormat struct{}

// appendRecord encodes one line. The text is escaped as encoding/json does without HTML escaping; invalid UTF-8 becomes U+FFFD.
func (jsonFormat) appendRecord(out, text []byte, stream string, t time.Time) []byte {
	out = append(out, `{"log":"`...)
	out = appendEscaped(out, text)
	out = append(out, `","stream":"`...)
	out = append(out, stream...)
	out = append(out, `","time":"`...)
	out = t.UTC().AppendFormat(out, time.RFC3339Nano)
	return append(out, "\"}\n"...)
}

// next reads one line; its length is told also when it is no record (torn by a crash, or foreign), which ok says.
func (jsonFormat) next(br *bufio.Reader) (l Line, n int, ok bool, err error) {
	var long []byte
	for {
		b, err := br.ReadSlice('\n')
		n += len(b)
		if err == nil && long == nil {
			l, ok = parseJSON(b)
			return l, n, ok, nil
		}
		if n <= maxRecord {
			long = append(long, b...)
		}
		switch {
		case err == nil:
			if n <= maxRecord {
				l, ok = parseJSON(long)
			}
			return l, n, ok, nil
		case !errors.Is(err, bufio.ErrBufferFull):
			return l, n, false, err
		}
	}
}

func parseJSON(b []byte) (Line, bool) {
	var rec struct {
		Log    string    `json:"log"`
		Stream string    `json:"stream"`
		Time   time.Time `json:"time"`
	}
	if json.Unmarshal(bytes.TrimSpace(b), &rec) != nil {
		return Line{}, false
	}
	return Line{Stream: rec.Stream, Time: rec.Time, Text: []byte(rec.Log)}, true
}

// tail finds where the last n lines before end begin; left counts those that are missing.
func (jsonFormat) tail(f io.ReaderAt, end int64, n int) (pos int64, left int, err error) {
	buf := make([]byte, 32<<10)
	for hi := end; hi > 0; {
		lo := max(0, hi-int64(len(buf)))
		b := buf[:hi-lo]
		if _, err := f.ReadAt(b, lo); err != nil && !errors.Is(err, io.EOF) {
			return 0, 0, err
		}
		for i := len(b) - 1; i >= 0; i-- {
			if b[i] == '\n' && lo+int64(i) != end-1 {
				if n--; n == 0 {
					return lo + int64(i) + 1, 0, nil
				}
			}
		}
		hi = lo
	}
	if end > 0 {
		n--
	}
	return 0, max(n, 0), nil
}

// repair ends a line that a crash left torn; readers skip it.
func (jsonFormat) repair(f *os.File, size int64) (int64, error) {
	var last [1]byte
	if size == 0 {
		return 0, nil
	}
	if _, err := f.ReadAt(last[:], size-1); err != nil || last[0] == '\n' {
		return size, err
	}
	n, err := f.WriteString("\n")
	return size + int64(n), err
}

func appendEscaped(out, b []byte) []byte {
	const hex = "0123456789abcdef"
	for i := 0; i < len(b); {
		c := b[i]
		switch {
		case c == '"' || c == '\\':
			out = append(out, '\\', c)
		case c >= 0x20 && c < utf8.RuneSelf:
			out = append(out, c)
		case c == '\n':
			out = append(out, '\\', 'n')
		case c == '\r':
			out = append(out, '\\', 'r')
		case c == '\t':
			out = append(out, '\\', 't')
		case c < 0x20:
			out = append(out, '\\', 'u', '0', '0', hex[c>>4], hex[c&15])
		default:
			r, n := utf8.DecodeRune(b[i:])
			switch {
			case r == utf8.RuneError && n == 1:
				out = append(out, `\ufffd`...)
			case r == '\u2028' || r == '\u2029':
				out = append(out, `\u202`...)
				out = append(out, hex[r&15])
			default:
				out = append(out, b[i:i+n]...)
			}
			i += n
			continue
		}
		i++
	}
	return out
}
