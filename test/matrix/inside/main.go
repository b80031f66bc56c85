// Command inside is the service of the matrix: it tells every client which task answers and from where the client seems to come, and on
// request asks another address the same question from where it runs.
package main

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"time"
)

const wait = 3 * time.Second

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// run serves every port, TCP and UDP, IPv4 and IPv6.
func run(ports []string) error {
	host, err := os.Hostname()
	if err != nil {
		return err
	}
	failed := make(chan error)
	for _, p := range ports {
		l, err := net.Listen("tcp", ":"+p)
		if err != nil {
			return err
		}
		u, err := net.ListenPacket("udp", ":"+p)
		if err != nil {
			return err
		}
		go func() { failed <- serveTCP(l, host) }()
		go func() { failed <- serveUDP(u, host) }()
	}
	return <-failed
}

func serveTCP(l net.Listener, host string) error {
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go answer(c, host) // ends with the client
	}
}

// answer reads lines: "?" is answered with this host's name and the client's address, "ask NETWORK ADDRESS" with what that address answers.
func answer(c net.Conn, host string) {
	defer c.Close()
	r := bufio.NewReader(c)
	for {
		line, err := r.ReadString('\n')
		if err != nil {
			return
		}
		reply := host + " " + plain(c.RemoteAddr())
		if f := strings.Fields(line); len(f) == 3 && f[0] == "ask" {
			if reply, err = ask(f[1], f[2]); err != nil {
				reply = "error " + err.Error()
			}
		}
		if _, err := io.WriteString(c, reply+"\n"); err != nil {
			return
		}
	}
}

func serveUDP(u net.PacketConn, host string) error {
	buf := make([]byte, 1500)
	for {
		_, from, err := u.ReadFrom(buf)
		if err != nil {
			return err
		}
		_, _ = u.WriteTo([]byte(host+" "+plain(from)+"\n"), from) // a lost answer is the client's to notice
	}
}

func ask(network, addr string) (string, error) {
	c, err := net.DialTimeout(network, addr, wait)
	if err != nil {
		return "", err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(wait))
	if _, err := io.WriteString(c, "?\n"); err != nil {
		return "", err
	}
	line, err := bufio.NewReader(c).ReadString('\n')
	return strings.TrimSpace(line), err
}

// plain writes IPv4 addresses of dual-stack sockets as such.
func plain(a net.Addr) string {
	ap, err := netip.ParseAddrPort(a.String())
	if err != nil {
		return a.String()
	}
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port()).String()
}
