package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const askWait = 5 * time.Second

// protocols are those by which nodes can be reached.
func (w *world) protocols() []string {
	if w.opts.ipv6 {
		return []string{"tcp6", "udp6"}
	}
	return []string{"tcp4", "tcp6", "udp4", "udp6"}
}

// outside stands for the machine itself as a client; others are numbers of nodes.
const outside = -1

// service is a published port and where it answers.
type service struct {
	name string
	port int
	only int // the only entry node, or -1
}

func (s service) entry(node int) bool { return s.only < 0 || s.only == node }

func (w *world) services() []service {
	out := []service{{"spread", spreadPort, -1}, {"spread's second port", secondPort, -1}, {"host mode", hostPort, len(w.Nodes) - 1}}
	for i := range w.Nodes {
		out = append(out, service{"on-" + w.Nodes[i].Name, pinnedPort + i + 1, -1})
	}
	return out
}

func (w *world) nodeAddr(network string, node int) netip.Addr {
	if strings.HasSuffix(network, "6") {
		return w.Addr6(w.Nodes[node])
	}
	a, _ := netip.ParseAddr(w.Nodes[node].Address) // made by package dev
	return a
}

func (w *world) address(network string, node, port int) string {
	return netip.AddrPortFrom(w.nodeAddr(network, node), uint16(port)).String()
}

// client is the address that a task should see of an outside client.
func (w *world) client(network string) string {
	if strings.HasSuffix(network, "6") {
		return w.HostAddr6().String()
	}
	return w.HostAddr().String()
}

// dial connects from the machine or from a node.
func (w *world) dial(from int, d net.Dialer, network, to string) (c net.Conn, err error) {
	d.Timeout = askWait
	if from == outside {
		return d.Dial(network, to)
	}
	err = w.spaces[from].Do(func() (err error) { c, err = d.Dial(network, to); return err })
	return c, err
}

// ask asks once over a new connection which task answers and whom it sees: "host address:port".
func (w *world) ask(from int, network, to string) (string, error) {
	c, err := w.dial(from, net.Dialer{}, network, to)
	if err != nil {
		return "", err
	}
	defer c.Close()
	return question(c, "?")
}

func question(c net.Conn, what string) (string, error) {
	_ = c.SetDeadline(time.Now().Add(askWait))
	if _, err := io.WriteString(c, what+"\n"); err != nil {
		return "", err
	}
	line, err := bufio.NewReader(c).ReadString('\n')
	line = strings.TrimSpace(line)
	if rest, failed := strings.CutPrefix(line, "error "); err == nil && failed {
		err = errors.New(rest)
	}
	return line, err
}

// seen is the address of an answer.
func seen(answer string) string {
	_, at, _ := strings.Cut(answer, " ")
	ap, err := netip.ParseAddrPort(at)
	if err != nil {
		return answer
	}
	return ap.Addr().String()
}

// tally counts requests and keeps the first failures.
type tally struct {
	total, wrong, failed atomic.Int64
	mu                   sync.Mutex
	first                []string
}

func (t *tally) fail(n *atomic.Int64, format string, a ...any) {
	n.Add(1)
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.first) < 5 {
		t.first = append(t.first, fmt.Sprintf(format, a...))
	}
}

func (w *world) report(what string, t *tally) (broken int) {
	w.say("%-60s %7d requests, %d failed, %d saw another address", what, t.total.Load(), t.failed.Load(), t.wrong.Load())
	for _, f := range t.first {
		w.say("    %s", f)
	}
	return int(t.failed.Load() + t.wrong.Load())
}

// run goes through the whole matrix and returns how many requests were not answered as promised.
func run(ctx context.Context, o options, say func(string, ...any)) (broken int, err error) {
	w, err := newWorld(ctx, o, say)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, w.down()) }()
	for _, p := range w.protocols() {
		broken += w.fromOutside(ctx, p)
	}
	broken += w.fromNodes() + w.fromContainers()
	for _, p := range w.protocols() {
		broken += w.sameTuple(p)
	}
	return broken, ctx.Err()
}

// fromOutside asks through every node for every service, with the client's address kept.
func (w *world) fromOutside(ctx context.Context, network string) int {
	type cell struct {
		s     service
		entry int
	}
	var cells []cell
	for _, s := range w.services() {
		for entry := range w.Nodes {
			if s.entry(entry) {
				cells = append(cells, cell{s, entry})
			}
		}
	}
	t := &tally{}
	var next atomic.Int64
	var wg sync.WaitGroup
	begun := time.Now()
	for range w.opts.clients {
		wg.Go(func() {
			for ctx.Err() == nil {
				i := next.Add(1) - 1
				if i >= int64(w.opts.requests) {
					return
				}
				c := cells[i%int64(len(cells))]
				w.check(t, outside, network, w.address(network, c.entry, c.s.port), w.client(network), c.s.name+" through "+w.Nodes[c.entry].Name)
			}
		})
	}
	wg.Wait()
	return w.report(fmt.Sprintf("%s from outside, %d cells, %.1f s", network, len(cells), time.Since(begun).Seconds()), t)
}

// check asks once; want is the address that the task must see, or empty.
func (w *world) check(t *tally, from int, network, to, want, what string) {
	t.total.Add(1)
	answer, err := w.ask(from, network, to)
	switch {
	case err != nil:
		t.fail(&t.failed, "%s %s: %v", network, what, err)
	case want != "" && seen(answer) != want:
		t.fail(&t.wrong, "%s %s: the task saw %s", network, what, seen(answer))
	}
}

// fromNodes asks from processes of each node: localhost, their own addresses, the other nodes'.
func (w *world) fromNodes() int {
	t := &tally{}
	for from := range w.Nodes {
		for _, network := range w.protocols() {
			for _, s := range w.services() {
				var at []string
				if s.entry(from) {
					at = append(at, net.JoinHostPort(loopbackOf(network), fmt.Sprint(s.port)))
				}
				for entry := range w.Nodes {
					if s.entry(entry) {
						at = append(at, w.address(network, entry, s.port))
					}
				}
				for _, to := range at {
					w.check(t, from, network, to, "", fmt.Sprintf("%s at %s from a process of %s", s.name, to, w.Nodes[from].Name))
				}
			}
		}
	}
	return w.report("from processes of nodes, localhost among them", t)
}

func loopbackOf(network string) string {
	if strings.HasSuffix(network, "6") {
		return "::1"
	}
	return "127.0.0.1"
}

// fromContainers asks from the task on each node, which may be dealt to itself.
func (w *world) fromContainers() int {
	t := &tally{}
	for from := range w.Nodes {
		c, err := w.dial(outside, net.Dialer{}, "tcp6", w.address("tcp6", 0, controlPort+from+1))
		if err != nil {
			t.total.Add(1)
			t.fail(&t.failed, "control of the task on %s: %v", w.Nodes[from].Name, err)
			continue
		}
		for _, network := range w.protocols() {
			for _, s := range w.services() {
				for entry := range w.Nodes {
					if !s.entry(entry) {
						continue
					}
					t.total.Add(1)
					if _, err := question(c, "ask "+network+" "+w.address(network, entry, s.port)); err != nil {
						t.fail(&t.failed, "%s %s through %s from a task on %s: %v", network, s.name, w.Nodes[entry].Name, w.Nodes[from].Name, err)
					}
				}
			}
		}
		c.Close()
	}
	return w.report("from containers, to themselves among others", t)
}

// sameTuple opens flows from one client port through all nodes to one task; each lives beside the others.
func (w *world) sameTuple(network string) int {
	t := &tally{}
	for at := range w.Nodes {
		var flows []net.Conn
		port := 20000 + at // below those that the kernel gives to others
		for entry := range w.Nodes {
			dial := func() (net.Conn, error) {
				return w.dial(outside, fromPort(network, w.client(network), port), network, w.address(network, entry, pinnedPort+at+1))
			}
			c, err := dial()
			for tries := 0; entry == 0 && errors.Is(err, unix.EADDRINUSE) && tries < 20; tries++ {
				port += len(w.Nodes)
				c, err = dial()
			}
			if err != nil {
				t.total.Add(1)
				t.fail(&t.failed, "%s through %s: %v", network, w.Nodes[entry].Name, err)
				continue
			}
			defer c.Close()
			flows = append(flows, c)
		}
		for range 3 {
			for i, c := range flows {
				t.total.Add(1)
				answer, err := question(c, "?")
				if err != nil {
					t.fail(&t.failed, "%s flow %d to the task on %s: %v", network, i+1, w.Nodes[at].Name, err)
				} else if seen(answer) != w.client(network) {
					t.fail(&t.wrong, "%s flow %d: the task saw %s", network, i+1, seen(answer))
				}
			}
		}
	}
	return w.report(network+" from one client port through all nodes", t)
}

func fromPort(network, addr string, port int) net.Dialer {
	ap := netip.AddrPortFrom(netip.MustParseAddr(addr), uint16(port))
	d := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(ap), Control: func(_, _ string, r syscall.RawConn) error {
		return r.Control(func(fd uintptr) { _ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1) })
	}}
	if strings.HasPrefix(network, "udp") {
		d.LocalAddr = net.UDPAddrFromAddrPort(ap)
	}
	return d
}
