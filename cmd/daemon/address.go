package daemon

import (
	"fmt"
	"net"
	"net/netip"
	"sort"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"

	"skein/manager/api"
)

const defaultPort = 2377

// chooseAddress finds the address under which others reach this node: the wish (an address or a device, with or without port), else the
// machine's only global address. The port is empty when the wish has none.
func chooseAddress(wish, flag string) (a netip.Addr, port string, err error) {
	host, port, err := splitWish(wish, flag)
	if err != nil {
		return a, "", err
	}
	if a, err := netip.ParseAddr(host); err == nil && !a.IsUnspecified() {
		if a.IsMulticast() || a.Zone() != "" {
			return a, "", api.Errorf(errdefs.ErrInvalidArgument, "%s %s: not an address at which other nodes reach this one", flag, wish)
		}
		return a, port, nil
	} else if err == nil || host == "" {
		a, err := onlyAddress()
		return a, port, err
	}
	a, err = deviceAddress(host, flag)
	return a, port, err
}

// splitWish takes HOST, HOST:PORT, [V6] and [V6]:PORT apart.
func splitWish(wish, flag string) (host, port string, err error) {
	if _, err := netip.ParseAddr(wish); err == nil {
		return wish, "", nil
	}
	host, port, err = net.SplitHostPort(wish)
	if err != nil {
		return strings.TrimSuffix(strings.TrimPrefix(wish, "["), "]"), "", nil
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
		return "", "", api.Errorf(errdefs.ErrInvalidArgument, "%s %s: the port must be 1 to 65535", flag, wish)
	}
	return host, port, nil
}

// onlyAddress is the machine's address when it has only one.
func onlyAddress() (netip.Addr, error) {
	all, err := globalAddresses()
	if err != nil {
		return netip.Addr{}, err
	}
	switch len(all) {
	case 1:
		return all[0].addr, nil
	case 0:
		return netip.Addr{}, api.Errorf(errdefs.ErrInvalidArgument, "could not find an address to advertise: this machine has no global address: name one with --advertise-addr")
	}
	var texts []string
	for _, a := range all {
		texts = append(texts, fmt.Sprintf("%s on %s", a.addr, a.device))
	}
	return netip.Addr{}, api.Errorf(errdefs.ErrInvalidArgument, "could not choose an IP address to advertise since this system has multiple addresses (%s) - specify one with --advertise-addr", strings.Join(texts, ", "))
}

// deviceAddress is the only IPv4 address of a device, or where it has none its only global IPv6 address.
func deviceAddress(name, flag string) (netip.Addr, error) {
	ifi, err := net.InterfaceByName(name)
	if err != nil {
		return netip.Addr{}, api.Errorf(errdefs.ErrInvalidArgument, "%s %q is neither an IP address nor a network device of this machine", flag, name)
	}
	addrs, err := ifi.Addrs()
	if err != nil {
		return netip.Addr{}, fmt.Errorf("addresses of network device %s: %w", name, err)
	}
	var found, six []netip.Addr
	for _, a := range addrs {
		p, err := netip.ParsePrefix(a.String())
		switch {
		case err != nil:
		case p.Addr().Is4():
			found = append(found, p.Addr())
		case p.Addr().IsGlobalUnicast():
			six = append(six, p.Addr())
		}
	}
	if len(found) == 0 {
		found = six
	}
	switch len(found) {
	case 0:
		return netip.Addr{}, api.Errorf(errdefs.ErrInvalidArgument, "%s: network device %s has no address", flag, name)
	case 1:
		return found[0], nil
	}
	return netip.Addr{}, api.Errorf(errdefs.ErrInvalidArgument, "%s: network device %s has more than one address (%v): name one of them", flag, name, found)
}

type deviceAddr struct {
	addr   netip.Addr
	device string
}

// globalAddresses lists IPv4 addresses, or on a machine that has none the IPv6 addresses, of devices that are up and not ours.
func globalAddresses() ([]deviceAddr, error) {
	ifs, err := net.Interfaces()
	if err != nil {
		return nil, err
	}
	var out, six []deviceAddr
	for _, i := range ifs {
		if i.Flags&net.FlagUp == 0 || i.Flags&net.FlagLoopback != 0 || ownDevice(i.Name) {
			continue
		}
		addrs, err := i.Addrs()
		if err != nil {
			return nil, err
		}
		for _, a := range addrs {
			p, err := netip.ParsePrefix(a.String())
			switch {
			case err != nil || !p.Addr().IsGlobalUnicast():
			case p.Addr().Is4():
				out = append(out, deviceAddr{p.Addr(), i.Name})
			default:
				six = append(six, deviceAddr{p.Addr(), i.Name})
			}
		}
	}
	if len(out) == 0 {
		out = six
	}
	sort.Slice(out, func(i, j int) bool { return out[i].addr.Less(out[j].addr) })
	return out, nil
}

// ownDevice reports devices that carry container addresses.
func ownDevice(name string) bool {
	for _, p := range []string{"mesh0", "gw-", "vx-", "skein", "skb-", "docker", "br-", "veth"} {
		if strings.HasPrefix(name, p) {
			return true
		}
	}
	return false
}

// clientListen is what docker's command line sends when the user says nothing.
const clientListen = "0.0.0.0:2377"

// listenAddress merges the request's wish with the daemon's configuration.
func listenAddress(wish, configured string) (string, error) {
	if wish == "" || wish == clientListen {
		return configured, nil
	}
	const flag = "--listen-addr"
	host, port, err := splitWish(wish, flag)
	if err != nil {
		return "", err
	}
	if port == "" {
		port = strconv.Itoa(defaultPort)
	}
	if host == "" {
		host = "0.0.0.0"
	}
	a, err := netip.ParseAddr(host)
	if err != nil {
		if a, err = deviceAddress(host, flag); err != nil {
			return "", err
		}
	}
	return net.JoinHostPort(a.String(), port), nil
}

// dualStack turns a wish for all IPv4 addresses, which is what clients send by themselves, into one for all of both families.
func dualStack(listen string) string {
	if ap, err := netip.ParseAddrPort(listen); err == nil && ap.Addr() == netip.IPv4Unspecified() {
		return netip.AddrPortFrom(netip.IPv6Unspecified(), ap.Port()).String()
	}
	return listen
}

// localAddress is where this machine reaches a port that it listens on.
func localAddress(listen string) string {
	ap, err := netip.ParseAddrPort(listen)
	if err != nil || !ap.Addr().IsUnspecified() {
		return listen
	}
	host := "127.0.0.1"
	if ap.Addr().Is6() {
		host = "::1"
	}
	return net.JoinHostPort(host, strconv.Itoa(int(ap.Port())))
}

// remoteAddress completes the address of a manager to join. It may be a name.
func remoteAddress(s string) (string, error) {
	host, port, err := splitWish(s, "manager address")
	switch {
	case err != nil:
		return "", err
	case host == "" || strings.ContainsAny(host, "/[] "):
		return "", api.Errorf(errdefs.ErrInvalidArgument, "manager address %q: want HOST or HOST:PORT", s)
	case port == "":
		port = strconv.Itoa(defaultPort)
	}
	return net.JoinHostPort(host, port), nil
}
