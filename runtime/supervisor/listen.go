package supervisor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	goruntime "runtime"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"skein/runtime"
)

func (s *server) listen(st *state) (*net.UnixListener, error) {
	if st.sameProcess() {
		f := os.NewFile(uintptr(st.Listener), "listener")
		defer f.Close()
		l, err := net.FileListener(f)
		if err != nil {
			return nil, err
		}
		return l.(*net.UnixListener), nil
	}
	if err := os.MkdirAll(filepath.Dir(s.cfg.SocketPath), 0o755); err != nil {
		return nil, err
	}
	if err := os.Remove(s.cfg.SocketPath); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	old := unix.Umask(0o177) // the socket is never accessible to others, not even before chmod
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: s.cfg.SocketPath, Net: "unix"})
	unix.Umask(old)
	return l, err
}

// notifyReady tells the process that waits for the socket, if there is one.
func notifyReady() {
	var fd int
	if _, err := fmt.Sscanf(os.Getenv(readyEnv), "%d", &fd); err != nil || fd < 3 {
		return
	}
	f := os.NewFile(uintptr(fd), "ready")
	_, _ = f.Write([]byte{1})
	f.Close()
}

// accept takes in clients until ctx is done.
func (s *server) accept(ctx context.Context) error {
	defer context.AfterFunc(ctx, func() { s.listener.Close() })()
	s.conns.Go(func() { s.orphans.run(ctx, s.zygote.PID) })
	s.door.join()
	for {
		conn, err := s.listener.AcceptUnix()
		if err != nil {
			if ctx.Err() != nil {
				break
			}
			if errors.Is(err, os.ErrDeadlineExceeded) { // the others wait meanwhile
				s.door.park()
				_ = s.listener.SetDeadline(time.Time{})
				continue
			}
			if errors.Is(err, unix.EMFILE) || errors.Is(err, unix.ENFILE) || errors.Is(err, unix.ECONNABORTED) {
				s.log.Error("cannot accept a client", "error", err)
				time.Sleep(100 * time.Millisecond) // nothing tells when descriptors are free again
				continue
			}
			return fmt.Errorf("accept on %s: %w", s.cfg.SocketPath, err)
		}
		w := newWire(conn)
		select {
		case s.slots <- struct{}{}:
		default:
			_ = w.writeJSON(frameResponse, toResponse(fmt.Errorf("%d clients are connected: %w", maxConns, errdefs.ErrUnavailable)))
			w.close()
			continue
		}
		s.gate.enter()
		s.conns.Go(func() {
			defer func() { <-s.slots }()
			s.serve(ctx, w)
		})
	}
	s.conns.Wait()
	s.work.Wait()
	s.zygote.Close()
	return nil
}

// serve answers one request. Work is counted when it begins, and is not when it has become a stream or ended.
func (s *server) serve(ctx context.Context, w *wire) {
	free := sync.OnceFunc(s.gate.leave)
	defer free()
	defer w.close()
	if err := checkPeer(w.conn); err != nil {
		_ = w.writeJSON(frameResponse, toResponse(err))
		return
	}
	_ = w.conn.SetReadDeadline(time.Now().Add(requestLimit))
	kind, b, fds, err := w.read()
	_ = w.conn.SetReadDeadline(time.Time{})
	if err != nil {
		closeFDs(fds)
		return
	}
	var r request
	if err := json.Unmarshal(b, &r); err != nil || kind != frameRequest {
		closeFDs(fds)
		_ = w.writeJSON(frameResponse, toResponse(fmt.Errorf("malformed request: %w", errdefs.ErrInvalidArgument)))
		return
	}
	if r.Op != "storefd" && r.Op != "upgrade" {
		closeFDs(fds)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if r.Op != "attach" && r.Op != "upgrade" { // the peer says nothing more: reading ends when it leaves
		left := make(chan struct{})
		go func() {
			defer close(left)
			_, _, extra, _ := w.read()
			closeFDs(extra)
			cancel()
		}()
		defer func() {
			w.close()
			<-left
		}()
	}
	resp, done, err := s.dispatch(ctx, w, &r, fds, free)
	if done {
		return
	}
	if err != nil {
		resp = toResponse(err)
	}
	if err := w.writeJSON(frameResponse, resp); err != nil && ctx.Err() == nil {
		s.log.Debug("client left before its answer", "op", r.Op, "error", err)
	}
}

// checkPeer lets in nobody but the user this process runs as.
func checkPeer(c *net.UnixConn) error {
	rc, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var cred *unix.Ucred
	cerr := rc.Control(func(fd uintptr) { cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	if err = errors.Join(cerr, err); err != nil {
		return err
	}
	if int(cred.Uid) != os.Geteuid() {
		return fmt.Errorf("user %d may not use this supervisor: %w", cred.Uid, errdefs.ErrPermissionDenied)
	}
	return nil
}

// dispatch runs one request; done means that everything was answered already.
func (s *server) dispatch(ctx context.Context, w *wire, r *request, fds []int, free func()) (resp response, done bool, err error) {
	switch r.Op {
	case "hello":
		return response{StateDir: s.cfg.StateDir, PID: os.Getpid(), Build: s.build, Routines: goruntime.NumGoroutine()}, false, nil
	case "create":
		return resp, false, s.create(r.Config)
	case "list":
		return response{States: s.list()}, false, nil
	case "events":
		return resp, true, s.events(ctx, w, r.After, free)
	case "keep":
		return resp, true, s.keeper.serve(ctx, s, w, free)
	case "storefd":
		return resp, false, s.store.put(r.Name, fds)
	case "loadfds":
		if err := s.store.send(w, r.Name); err != nil {
			return resp, false, err
		}
		return resp, true, nil
	case "releasefd":
		return resp, false, s.store.release(r.Name)
	case "upgrade":
		return resp, false, s.upgrade(w, fds)
	case "shutdown":
		return resp, false, s.shutdown(r.Force)
	}
	c, err := s.get(r.ID)
	if err != nil {
		return resp, false, err
	}
	switch r.Op {
	case "start":
		resp.PID, err = c.start(ctx)
	case "signal":
		err = c.signal(r.ExecID, r.Signal)
	case "pause":
		err = c.pause(ctx)
	case "resume":
		err = c.resume()
	case "update":
		err = c.update(r.Resources)
	case "delete":
		err = c.delete()
	case "state":
		resp.States = []runtime.State{c.state()}
	case "exec":
		resp.PID, err = c.exec(r.Process)
	case "resize":
		err = c.resize(r)
	case "attach":
		if err = c.attach(w, r, free); err == nil {
			return resp, true, nil
		}
	default:
		err = fmt.Errorf("operation %q: %w", r.Op, errdefs.ErrNotImplemented)
	}
	return resp, false, err
}
