package overlay

import (
	"bufio"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"skein/overlay/link"
)

// PortHolder tells who uses a port of this node: a listening process (by name and pid, as far as they can be seen) or a port that is
// published here already (by the service's or container's id, pid 0).
func (d *Driver) PortHolder(proto string, port uint16) (name string, pid int, inUse bool) {
	if name, ok := d.publishedBy(proto, port); ok {
		return name, 0, true
	}
	inode, ok := listenInode(d.host, proto, port)
	if !ok {
		return "", 0, false
	}
	name, pid = socketOwner(inode)
	return name, pid, true
}

func (d *Driver) publishedBy(proto string, port uint16) (string, bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	want, _ := protocolNumber(proto)
	for _, p := range d.cfg.Mesh.Ports {
		if n, _ := protocolNumber(p.Protocol); n == want && p.Published == port && (!p.Local || d.hasBackendHere(p)) {
			return "service " + p.ServiceID, true
		}
	}
	for id, b := range d.boxes {
		for _, l := range b.spec.Bridges {
			for _, p := range l.Ports {
				if n, _ := protocolNumber(p.Protocol); n == want && p.Published == port {
					return "container " + id, true
				}
			}
		}
	}
	return "", false
}

// listenInode finds a listening TCP or bound UDP socket on the port.
func listenInode(ns *link.NS, proto string, port uint16) (inode string, found bool) {
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
				if len(c) > 9 && strings.HasSuffix(c[1], suffix) && c[3] == state {
					inode, found = c[9], true
				}
			}
			f.Close()
		}
		return nil
	})
	return inode, found
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
