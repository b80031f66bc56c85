// Package load is clients that use a service without a pause and hide nothing: no request is repeated, every failure is told with its kind
// and the instant at which its connection was made. Used by the program test/flow from outside a cluster, and by its app from inside.
package load

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Kinds of clients.
const (
	KeepAlive = "keep-alive" // one connection, a request after the other, for as long as the server lets it
	Fresh     = "fresh"      // a connection for each request
	Stream    = "stream"     // a connection for each answer, which takes its time
)

const (
	// startWithin is the time over which clients begin.
	startWithin = 200 * time.Millisecond
	dialTime    = 5 * time.Second
	answerTime  = 5 * time.Second // of a quick answer, and between two pieces of a stream
)

// Failure is one request that got no whole answer.
type Failure struct {
	Kind   string    `json:"kind"`
	From   string    `json:"from"` // who asked
	Target string    `json:"target"`
	Class  string    `json:"class"`  // refused, reset, eof, timeout, unreachable, resolve, answer, other
	Phase  string    `json:"phase"`  // dial, before, within: before its answer began, or within it
	Reused bool      `json:"reused"` // the connection had served a request before
	Server string    `json:"server"` // who answered on this connection, as far as known
	Local  string    `json:"local"`  // the client's address
	Begun  time.Time `json:"begun"`
	At     time.Time `json:"at"`
	Err    string    `json:"err"`
}

func (f Failure) String() string {
	return fmt.Sprintf("%s %s→%s %s in %s (reused %v, server %q, from %s, asked %s, failed after %v): %s", f.Kind, f.From, f.Target, f.Class, f.Phase, f.Reused, f.Server,
		f.Local, f.Begun.UTC().Format("15:04:05.000"), f.At.Sub(f.Begun).Round(time.Millisecond), f.Err)
}

// Idle reports whether a server merely closed a kept connection while the next request was on its way. HTTP cannot tell the client in
// time, so clients repeat such a request (RFC 9112, section 9.3.1); no balancer below HTTP can prevent it.
func (f Failure) Idle() bool {
	return f.Kind == KeepAlive && f.Reused && f.Phase == "before" && (f.Class == "eof" || f.Class == "reset")
}

// Counts of one kind of client.
type Counts struct {
	Sent   int `json:"sent"`
	Failed int `json:"failed"`
	Idle   int `json:"idle"` // kept connections that ended under a request, which was repeated
}

// Config of a Load.
type Config struct {
	From    string
	Targets []string       // HOST:PORT
	Clients map[string]int // of each kind for each target
	Pause   time.Duration  // between two requests of a client
	Stream  time.Duration  // of a stream
	Failed  func(Failure)  // called from many goroutines
}

// Load is running clients.
type Load struct {
	cfg    Config
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu     sync.Mutex
	counts map[string]Counts
}

// Start has the clients ask until Stop.
func Start(cfg Config) *Load {
	ctx, cancel := context.WithCancel(context.Background())
	l := &Load{cfg: cfg, cancel: cancel, counts: map[string]Counts{}}
	for _, target := range cfg.Targets {
		for kind, n := range cfg.Clients {
			for range n {
				c := &client{l: l, kind: kind, target: target}
				l.wg.Go(func() { c.run(ctx) })
			}
		}
	}
	return l
}

// Counts returns what was done so far, by kind.
func (l *Load) Counts() map[string]Counts {
	l.mu.Lock()
	defer l.mu.Unlock()
	out := map[string]Counts{}
	for k, c := range l.counts {
		out[k] = c
	}
	return out
}

// Stop lets requests under way end, and returns when they have.
func (l *Load) Stop() map[string]Counts {
	l.cancel()
	l.wg.Wait()
	return l.Counts()
}

// client is one of them; its fields belong to its goroutine.
type client struct {
	l      *Load
	kind   string
	target string

	conn   net.Conn
	r      *bufio.Reader
	reused bool
	server string
}

func (c *client) run(ctx context.Context) {
	defer c.close()
	pause := time.NewTimer(time.Duration(rand.Int64N(int64(min(c.l.cfg.Pause, startWithin)) + 1)))
	defer pause.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-pause.C:
		}
		f := c.ask()
		if f != nil && f.Idle() {
			c.note(f, true)
			f = c.ask()
		}
		c.note(f, false)
		pause.Reset(c.l.cfg.Pause)
	}
}

func (c *client) note(f *Failure, idle bool) {
	c.l.mu.Lock()
	n := c.l.counts[c.kind]
	switch {
	case idle:
		n.Idle++
	case f != nil:
		n.Failed++
		n.Sent++
	default:
		n.Sent++
	}
	c.l.counts[c.kind] = n
	c.l.mu.Unlock()
	if f != nil {
		c.l.cfg.Failed(*f)
	}
}

func (c *client) close() {
	if c.conn != nil {
		c.conn.Close()
		c.conn = nil
	}
}

// ask does one request; nil when it was answered.
func (c *client) ask() *Failure {
	f := &Failure{Kind: c.kind, From: c.l.cfg.From, Target: c.target, Begun: time.Now(), Phase: "dial"}
	err := c.exchange(f)
	if err == nil && c.kind == KeepAlive {
		return nil
	}
	c.close()
	if err == nil {
		return nil
	}
	f.At, f.Err, f.Class = time.Now(), err.Error(), classify(err)
	return f
}

func (c *client) exchange(f *Failure) error {
	if c.conn != nil && ended(c.conn) { // told in time: nobody would use it
		c.close()
	}
	if c.conn == nil {
		conn, err := (&net.Dialer{Timeout: dialTime}).Dial("tcp", c.target)
		if err != nil {
			return err
		}
		c.conn, c.r, c.reused, c.server = conn, bufio.NewReader(conn), false, ""
	}
	f.Reused, f.Server, f.Local, f.Phase = c.reused, c.server, c.conn.LocalAddr().String(), "before"
	path := "/"
	if c.kind == Stream {
		path = "/stream?d=" + c.l.cfg.Stream.String()
	}
	if err := c.conn.SetDeadline(time.Now().Add(answerTime)); err != nil {
		return err
	}
	if _, err := io.WriteString(c.conn, "GET "+path+" HTTP/1.1\r\nHost: flow\r\n\r\n"); err != nil {
		return err
	}
	if _, err := c.r.Peek(1); err != nil {
		return err
	}
	f.Phase = "within"
	resp, err := http.ReadResponse(c.r, nil)
	if err != nil {
		return err
	}
	body, err := c.body(resp)
	if err != nil {
		return err
	}
	fields := strings.Fields(body)
	if resp.StatusCode != http.StatusOK || len(fields) < 3 {
		return answerError(fmt.Sprintf("status %s, body %.100q", resp.Status, body))
	}
	c.server, c.reused = fields[len(fields)-3], true
	if resp.Close {
		c.close()
	}
	return nil
}

// ended reports whether the server closed a connection on which nothing is expected.
func ended(conn net.Conn) bool {
	raw, err := conn.(*net.TCPConn).SyscallConn()
	if err != nil {
		return true
	}
	over := true
	err = raw.Control(func(fd uintptr) {
		_, _, err := unix.Recvfrom(int(fd), make([]byte, 1), unix.MSG_PEEK|unix.MSG_DONTWAIT)
		over = err != unix.EAGAIN
	})
	return over || err != nil
}

// body reads the whole answer; each piece must come in time.
func (c *client) body(resp *http.Response) (string, error) {
	defer resp.Body.Close()
	var out strings.Builder
	buf := make([]byte, 4096)
	for {
		n, err := resp.Body.Read(buf)
		out.Write(buf[:n])
		if errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
			return out.String(), nil
		}
		if err != nil {
			return out.String(), err
		}
		if err := c.conn.SetDeadline(time.Now().Add(answerTime)); err != nil {
			return out.String(), err
		}
	}
}

// answerError is an answer that is none.
type answerError string

func (e answerError) Error() string { return string(e) }

func classify(err error) string {
	var dns *net.DNSError
	var answer answerError
	switch {
	case errors.As(err, &dns):
		return "resolve"
	case errors.As(err, &answer):
		return "answer"
	case errors.Is(err, syscall.ECONNREFUSED):
		return "refused"
	case errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
		return "reset"
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return "eof"
	case errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, syscall.ETIMEDOUT):
		return "timeout"
	case errors.Is(err, syscall.EHOSTUNREACH), errors.Is(err, syscall.ENETUNREACH):
		return "unreachable"
	}
	return "other"
}
