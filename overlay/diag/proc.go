package diag

import (
	"bufio"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// listProc reads /proc/PID/net instead.
func (n *Namespace) listProc(protocol byte, states []byte) ([]Socket, error) {
	name := "tcp"
	if protocol == unix.IPPROTO_UDP {
		name = "udp"
	}
	var out []Socket
	for _, file := range []string{name, name + "6"} {
		f, err := os.Open(fmt.Sprintf("/proc/%d/net/%s", n.pid, file))
		if errors.Is(err, os.ErrNotExist) && file != name { // IPv6 may be off
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("list sockets: %w", err)
		}
		list, err := readProc(f)
		f.Close()
		if err != nil {
			return nil, fmt.Errorf("list sockets: %w", err)
		}
		out = append(out, slices.DeleteFunc(list, func(s Socket) bool { return !slices.Contains(states, s.State) })...)
	}
	return out, nil
}

// readProc reads a table such as /proc/net/tcp: "sl local_address rem_address st tx_queue:rx_queue …". Lines that are none are left out.
func readProc(r io.Reader) ([]Socket, error) {
	var out []Socket
	sc := bufio.NewScanner(r)
	for sc.Scan() {
		f := strings.Fields(sc.Text())
		if len(f) < 5 {
			continue
		}
		local, ok1 := procAddr(f[1])
		remote, ok2 := procAddr(f[2])
		state, err := strconv.ParseUint(f[3], 16, 8)
		if !ok1 || !ok2 || err != nil {
			continue
		}
		s := Socket{Local: local, Remote: remote, State: byte(state)}
		tx, rx, _ := strings.Cut(f[4], ":")
		if n, err := strconv.ParseUint(tx, 16, 32); err == nil {
			s.Unsent = uint32(n)
		}
		if n, err := strconv.ParseUint(rx, 16, 32); err == nil {
			s.Unread = uint32(n)
		}
		out = append(out, s)
	}
	return out, sc.Err()
}

// procAddr reads "0100007F:1F90": words of four bytes in the machine's order, little-endian on all that Skein runs on.
func procAddr(text string) (netip.AddrPort, bool) {
	host, port, ok := strings.Cut(text, ":")
	b, err := hex.DecodeString(host)
	n, perr := strconv.ParseUint(port, 16, 16)
	if !ok || err != nil || perr != nil || (len(b) != 4 && len(b) != 16) {
		return netip.AddrPort{}, false
	}
	for w := 0; w < len(b); w += 4 {
		slices.Reverse(b[w : w+4])
	}
	a, _ := netip.AddrFromSlice(b)
	return netip.AddrPortFrom(a.Unmap(), uint16(n)), true
}
