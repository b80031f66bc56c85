package engine

import (
	"bytes"
	"context"
	"io"
	"slices"
	"strings"

	"skein/runtime"
)

// maxDetachKeys bounds the sequence that ends an attachment.
const maxDetachKeys = 16

// parseKeys reads docker's notation: single characters and ctrl-X, separated by commas. Empty means ctrl-p, ctrl-q.
func parseKeys(s string) ([]byte, error) {
	if s == "" {
		return []byte{16, 17}, nil
	}
	var out []byte
	for _, k := range strings.Split(s, ",") {
		c, ctrl := strings.CutPrefix(strings.ToLower(k), "ctrl-")
		switch {
		case len(k) == 1:
			out = append(out, k[0])
		case ctrl && len(c) == 1 && (c[0] >= 'a' && c[0] <= 'z'):
			out = append(out, c[0]-'a'+1)
		case ctrl && len(c) == 1 && strings.Contains("@[\\]^_", c):
			out = append(out, c[0]-'@')
		default:
			return nil, invalid("Invalid detach keys (%s) provided: want characters and ctrl-<a-z, @, [, \\, ], ^, _> separated by commas", s)
		}
	}
	if len(out) > maxDetachKeys {
		return nil, invalid("Invalid detach keys (%s) provided: more than %d", s, maxDetachKeys)
	}
	return out, nil
}

// attachDetachable joins streams with a process until it ends, or until the keys come in from a terminal's client.
func (e *Engine) attachDetachable(ctx context.Context, id, execID string, tty bool, keys string, st runtime.Streams) (detached bool, err error) {
	if !tty || st.Stdin == nil {
		return false, e.cfg.Supervisor.Attach(ctx, id, execID, st)
	}
	k, err := parseKeys(keys)
	if err != nil {
		return false, err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	over := make(chan struct{})
	defer close(over)
	r := &keyReader{in: st.Stdin, keys: k, over: over, found: make(chan struct{})}
	r.detach = func() { close(r.found); cancel() }
	st.Stdin = r
	err = e.cfg.Supervisor.Attach(ctx, id, execID, st)
	select {
	case <-r.found:
		return true, nil
	default:
		return false, err
	}
}

// keyReader passes a client's input on until the keys come in. It holds back what may be their beginning.
type keyReader struct {
	in     io.Reader
	keys   []byte
	seen   int    // how many of the keys came last
	out    []byte // to be read
	detach func()
	found  chan struct{} // closed by detach
	over   <-chan struct{}
}

// Read waits for the end of the attachment once the keys came in: its end must not look like the end of the input.
func (k *keyReader) Read(p []byte) (int, error) {
	for len(k.out) == 0 {
		if k.seen == len(k.keys) {
			k.detach()
			<-k.over
			return 0, io.EOF
		}
		n, err := k.in.Read(p)
		for _, b := range p[:n] {
			if k.next(b); k.seen == len(k.keys) {
				break
			}
		}
		if err != nil && len(k.out) == 0 && k.seen < len(k.keys) {
			return 0, err
		}
	}
	n := copy(p, k.out)
	k.out = slices.Delete(k.out, 0, n)
	return n, nil
}

// next takes one byte: seen grows, or what cannot be the keys' beginning any more may be read.
func (k *keyReader) next(b byte) {
	last := append(slices.Clone(k.keys[:k.seen]), b)
	for k.seen++; k.seen > 0; k.seen-- {
		if bytes.Equal(k.keys[:k.seen], last[len(last)-k.seen:]) {
			break
		}
	}
	k.out = append(k.out, last[:len(last)-k.seen]...)
}
