package overlay

import (
	"bufio"
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"skein/overlay/link"
)

// hostProtocol is protocolNumber for ports of this node's containers, which may also be of SCTP.
func hostProtocol(name string) (byte, bool) {
	if name == "sctp" {
		return unix.IPPROTO_SCTP, true
	}
	return protocolNumber(name)
}

// SCTP tells whether this node's kernel can publish ports of SCTP.
func (d *Driver) SCTP() bool {
	_, err := d.host.ReadSysctl("netfilter/nf_conntrack_sctp_timeout_established")
	return err == nil
}

// PortHolder tells who uses a port of this node: a listening process (by name and pid, as far as they can be seen) or a port that is
// published here already (by the service's or container's id, pid 0).
func (d *Driver) PortHolder(proto string, port uint16) (name string, pid int, inUse bool) {
	if name, ok := d.publishedBy(proto, port); ok {
		return name, 0, true
	}
	inode, ok := listenInode(d.host, proto, netip.Addr{}, port)
	if !ok {
		return "", 0, false
	}
	name, pid = socketOwner(inode)
	return name, pid, true
}

func (d *Driver) publishedBy(proto string, port uint16) (string, bool) {
	if name, ok := d.meshHolder(proto, port); ok {
		return name, true
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	want, _ := hostProtocol(proto)
	for id, b := range d.boxes {
		for _, l := range b.spec.Bridges {
			for _, p := range l.Ports {
				if n, _ := hostProtocol(p.Protocol); n == want && p.Published == port {
					return "container " + id, true
				}
			}
		}
	}
	return "", false
}

// meshHolder finds the service that is published on the port of all addresses.
func (d *Driver) meshHolder(proto string, port uint16) (string, bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	want, _ := hostProtocol(proto)
	for _, p := range d.cfg.Mesh.Ports {
		if n, _ := hostProtocol(p.Protocol); n == want && p.Published == port && (!p.Local || d.hasBackendHere(p)) {
			return "service " + p.ServiceID, true
		}
	}
	return "", false
}

// PortFree tells whether a container may be published on a port at an address of this node (0.0.0.0 or ::: at all of the family). The
// error, a conflict or an invalid argument, names who holds it. Ports of other containers are for the caller to keep apart.
func (d *Driver) PortFree(proto string, at netip.Addr, port uint16) error {
	if name, ok := d.meshHolder(proto, port); ok {
		return fmt.Errorf("%s publishes it in the cluster: %w", name, errdefs.ErrConflict)
	}
	return d.PortUnbound(proto, at, port)
}

// PortUnbound tells, as PortFree does, whether no process of this node holds a port.
func (d *Driver) PortUnbound(proto string, at netip.Addr, port uint16) error {
	err := d.host.Do(func() error { return tryBind(proto, at, port) })
	switch {
	case err == nil || errors.Is(err, unix.EPROTONOSUPPORT): // no process of this node speaks the protocol
		return nil
	case errors.Is(err, unix.EADDRNOTAVAIL):
		return fmt.Errorf("cannot assign requested address: %s is not an address of this node: %w", at, errdefs.ErrInvalidArgument)
	case !errors.Is(err, unix.EADDRINUSE):
		return fmt.Errorf("look at the port: %w", err)
	}
	if inode, ok := listenInode(d.host, proto, at, port); ok {
		if name, pid := socketOwner(inode); pid != 0 {
			return fmt.Errorf("address already in use: %s (pid %d) of this host listens on it: %w", name, pid, errdefs.ErrConflict)
		}
	}
	return fmt.Errorf("address already in use by a process of this host that cannot be seen from here: %w", errdefs.ErrConflict)
}

// tryBind binds a port for a moment, which the kernel refuses exactly if a process holds it.
func tryBind(proto string, at netip.Addr, port uint16) error {
	kind, number := unix.SOCK_STREAM, unix.IPPROTO_TCP
	switch proto {
	case "udp":
		kind, number = unix.SOCK_DGRAM, unix.IPPROTO_UDP
	case "sctp":
		number = unix.IPPROTO_SCTP
	}
	family := unix.AF_INET
	var sa unix.Sockaddr = &unix.SockaddrInet4{Port: int(port), Addr: netip.IPv4Unspecified().As4()}
	if at.Is4() {
		sa = &unix.SockaddrInet4{Port: int(port), Addr: at.As4()}
	} else if at.Is6() {
		family, sa = unix.AF_INET6, &unix.SockaddrInet6{Port: int(port), Addr: at.As16()}
	}
	fd, err := unix.Socket(family, kind|unix.SOCK_CLOEXEC, number)
	if errors.Is(err, unix.EAFNOSUPPORT) {
		return nil
	}
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if family == unix.AF_INET6 {
		if err := unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1); err != nil {
			return err
		}
	}
	if kind == unix.SOCK_STREAM { // connections that are closing hold nothing
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
			return err
		}
	}
	return unix.Bind(fd, sa)
}

// listenInode finds a listening TCP or bound UDP socket on the port whose address meets at (invalid: any).
func listenInode(ns *link.NS, proto string, at netip.Addr, port uint16) (inode string, found bool) {
	const tcpListen, udpUnconnected = "0A", "07"
	state := tcpListen
	if proto == "udp" {
		state = udpUnconnected
	} else {
		proto = "tcp"
	}
	suffix := fmt.Sprintf(":%04X", port)
	_ = ns.Do(func() error {
		for _, file := range []string{proto, proto + "6"} {
			f, err := os.Open("/proc/thread-self/net/" + file)
			if err != nil {
				continue
			}
			sc := bufio.NewScanner(f)
			for sc.Scan() {
				c := strings.Fields(sc.Text())
				if len(c) > 9 && strings.HasSuffix(c[1], suffix) && c[3] == state && meets(at, procAddr(c[1])) {
					inode, found = c[9], true
				}
			}
			f.Close()
		}
		return nil
	})
	return inode, found
}

// meets tells that sockets bound to the two addresses would get in each other's way.
func meets(a, b netip.Addr) bool {
	if !a.IsValid() || !b.IsValid() || a == b {
		return true
	}
	if a.Is4() && b == netip.IPv6Unspecified() {
		return true // a socket of both families
	}
	return a.Is4() == b.Is4() && (a.IsUnspecified() || b.IsUnspecified())
}

// procAddr reads an address as /proc/net has it: words of four bytes in the machine's order.
func procAddr(s string) netip.Addr {
	text, _, _ := strings.Cut(s, ":")
	b, err := hex.DecodeString(text)
	if err != nil || len(b)%4 != 0 {
		return netip.Addr{}
	}
	for i := 0; i < len(b); i += 4 {
		b[i], b[i+1], b[i+2], b[i+3] = b[i+3], b[i+2], b[i+1], b[i]
	}
	a, _ := netip.AddrFromSlice(b)
	return a.Unmap()
}

// socketOwner looks for the process that has the socket open.
func socketOwner(inode string) (name string, pid int) {
	target := "socket:[" + inode + "]"
	procs, _ := filepath.Glob("/proc/[0-9]*")
	for _, p := range procs {
		fds, err := os.ReadDir(p + "/fd")
		if err != nil {
			continue
		}
		for _, fd := range fds {
			if l, err := os.Readlink(p + "/fd/" + fd.Name()); err != nil || l != target {
				continue
			}
			comm, _ := os.ReadFile(p + "/comm")
			pid, _ := strconv.Atoi(filepath.Base(p))
			return strings.TrimSpace(string(comm)), pid
		}
	}
	return "", 0
}
