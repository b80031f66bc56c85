package dockerapi

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"sync"
	"time"
)

const (
	headerTimeout = 10 * time.Second // for a request's headers to arrive
	idleTimeout   = 2 * time.Minute  // of a kept-alive connection
	drainTimeout  = 3 * time.Second  // for answers under way when the daemon ends
	maxHeader     = 64 << 10
	maxConns      = 2000 // well below the descriptors a daemon may have; log followers and waits hold one each
	dialTimeout   = time.Second
)

// Serve answers on the listener until ctx is done, then ends streams and waits for handlers. It closes the listener.
func Serve(ctx context.Context, l net.Listener, h http.Handler, logger *slog.Logger) error {
	if logger == nil {
		logger = slog.New(slog.DiscardHandler)
	}
	base, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	var handlers sync.WaitGroup // hijacked connections too, which net/http forgets
	srv := &http.Server{
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			handlers.Add(1)
			defer handlers.Done()
			h.ServeHTTP(w, r)
		}),
		ReadHeaderTimeout: headerTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeader,
		BaseContext:       func(net.Listener) context.Context { return base },
		ErrorLog:          slog.NewLogLogger(logger.Handler(), slog.LevelDebug),
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		select {
		case <-ctx.Done():
		case <-base.Done():
			return
		}
		cancel() // ends streams and waits, so that Shutdown needs not wait for them
		sctx, done := context.WithTimeout(context.WithoutCancel(ctx), drainTimeout)
		defer done()
		if err := srv.Shutdown(sctx); err != nil {
			_ = srv.Close()
		}
	}()
	err := srv.Serve(limit(l, maxConns))
	if errors.Is(err, http.ErrServerClosed) {
		err = nil
	}
	cancel()
	<-ended
	return errors.Join(err, waitFor(&handlers))
}

// waitFor waits for handlers whose context is done already, but not for ever: a backend that does not look must not keep the daemon.
func waitFor(wg *sync.WaitGroup) error {
	done := make(chan struct{})
	go func() {
		wg.Wait()
		close(done)
	}()
	select {
	case <-done:
		return nil
	case <-time.After(drainTimeout):
		return errors.New("api: some requests did not end with the daemon")
	}
}

// ListenUnix listens on a socket that its owner and the group may use (0660). Without a group, or where it
// does not exist, that is the owner's. The path of a daemon that is gone is taken over; that of a living one is an error. The socket appears with its rights already set.
func ListenUnix(path, group string) (net.Listener, error) {
	if conn, err := net.DialTimeout("unix", path, dialTimeout); err == nil {
		conn.Close()
		return nil, fmt.Errorf("listen on %s: another daemon answers there: stop it, or choose another socket", path)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	gid := -1
	if group != "" {
		var err error
		if gid, err = lookupGroup(group); err != nil {
			return nil, fmt.Errorf("listen on %s: %w", path, err)
		}
	}
	tmp := path + ".new"
	if err := os.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: tmp, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	l.SetUnlinkOnClose(false)
	err = errors.Join(os.Chown(tmp, -1, gid), os.Chmod(tmp, 0o660))
	if err == nil {
		err = os.Rename(tmp, path)
	}
	if err != nil {
		l.Close()
		os.Remove(tmp)
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	return &unixListener{UnixListener: l, path: path}, nil
}

func lookupGroup(group string) (int, error) {
	if gid, err := strconv.Atoi(group); err == nil {
		return gid, nil
	}
	g, err := user.LookupGroup(group)
	var unknown user.UnknownGroupError
	if errors.As(err, &unknown) {
		return -1, nil // as docker does: only the owner may use the socket then
	}
	if err != nil {
		return 0, fmt.Errorf("group %q of the socket: %w", group, err)
	}
	return strconv.Atoi(g.Gid)
}

// unixListener removes its path when it is closed, once.
type unixListener struct {
	*net.UnixListener
	path string
	once sync.Once
}

func (l *unixListener) Close() error {
	l.once.Do(func() { os.Remove(l.path) })
	return l.UnixListener.Close()
}
