package supervisor

import (
	"context"
	"errors"
	"os"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// attach connects a client to a process until its output has ended or the client is gone.
func (c *container) attach(w *wire, r *request) error {
	p, err := c.find(r.ExecID)
	if err != nil {
		return err
	}
	if r.Stdin && p.stdin == nil {
		return c.errf(errdefs.ErrFailedPrecondition, "attach: standard input is not open")
	}
	sub := p.out.subscribe(r.Stdout, r.Stderr, w.close)
	defer p.out.unsubscribe(sub)
	if err := w.writeJSON(frameResponse, response{}); err != nil {
		return nil
	}
	p.out.release()
	ctx, cancel := context.WithCancel(context.Background())
	input := make(chan struct{})
	go func() {
		defer close(input)
		defer cancel()
		c.input(ctx, w, p, r)
	}()
	defer func() {
		cancel()
		w.close() // ends the reading side
		<-input
	}()
	for {
		select {
		case ch, ok := <-sub.chunks:
			if !ok {
				_ = w.writeJSON(frameResponse, response{})
				return nil
			}
			if w.write(ch.kind, ch.data) != nil {
				return nil
			}
		case <-ctx.Done():
			return nil
		}
	}
}

// input passes what the client sends to the process until the client is gone.
func (c *container) input(ctx context.Context, w *wire, p *process, r *request) {
	buf := make([]byte, maxChunk)
	for {
		kind, b, fds, err := w.read(buf)
		closeFDs(fds)
		if err != nil {
			return
		}
		switch {
		case kind == frameStdinEnd:
			if r.CloseStdin && r.Stdin && p.console == nil {
				p.stdin.Close()
			}
		case kind == frameStdin && r.Stdin:
			if !writeAll(ctx, p.stdin, b) {
				return
			}
		}
	}
}

// writeAll writes to a pipe or terminal whose reader may be slow, looking now and then whether the client is still there. False: the
// client is gone. A process that does not read any more swallows its input.
func writeAll(ctx context.Context, f *os.File, b []byte) bool {
	for len(b) > 0 {
		if ctx.Err() != nil {
			return false
		}
		_ = f.SetWriteDeadline(time.Now().Add(time.Second))
		n, err := f.Write(b)
		b = b[n:]
		if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			return true
		}
	}
	return true
}

func (c *container) resize(r *request) error {
	p, err := c.find(r.ExecID)
	if err != nil {
		return err
	}
	if p.console == nil {
		return c.errf(errdefs.ErrFailedPrecondition, "resize: the process has no terminal")
	}
	err = control(p.console, func(fd int) error {
		return unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &unix.Winsize{Row: r.Rows, Col: r.Cols})
	})
	if err != nil {
		return c.wrap("resize", err)
	}
	return nil
}
