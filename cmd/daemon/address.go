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

// chooseAddress finds the address under which others reach this node: the wish (an address or a device, with or without port), else
// the machine's only global address.
func chooseAddress(wish string) (netip.Addr, error) {
	if wish != "" {
		host := wish
		if h, _, err := net.SplitHostPort(wish); err == nil {
			host = h
		}
		if a, err := netip.ParseAddr(host); err == nil {
			if a.IsUnspecified() {
				return chooseAddress("")
			}
			return a, nil
		}
		return deviceAddress(host)
	}
	all, err := globalAddresses()
	if err != nil {
		return netip.Addr{}, err
	}
	switch len(all) {
	case 1:
		return all[0].addr, nil
	case 0:
		return netip.Addr{}, api.Errorf(errdefs.ErrInvalidArgument, "could not find an address to advertise: this machine has no global IPv4 address: name one with --advertise-addr")
	}
	var texts []string
	for _, a := range all {
		texts = append(texts, fmt.Sprintf("%s on %s", a.addr, a.device))
	}
	return netip.Addr{}, api.Errorf(errdefs.ErrInvalidArgument, "could not choose an IP address to advertise since this system has multiple addresses (%s) - specify one with --advertise-addr", strings.Join(texts, ", "))
}

func deviceAddress(name string) (netip.Addr, error) {
	ifi, err := net.InterfaceByName(name)
	if err != nil {
		return netip.Addr{}, api.Errorf(errdefs.ErrInvalidArgument, "advertise address %q is neither an IP address nor a network device of this machine", name)
	}
	addrs, err := ifi.Addrs()
	if err != nil {
		return netip.Addr{}, err
	}
	for _, a := range addrs {
		if p, err := netip.ParsePrefix(a.String()); err == nil && p.Addr().Is4() {
			return p.Addr(), nil
		}
	}
	return netip.Addr{}, api.Errorf(errdefs.ErrInvalidArgument, "network device %s has no IPv4 address to advertise", name)
}

type deviceAddr struct {
	addr   netip.Addr
	device string
}

// globalAddresses lists IPv4 addresses of devices that are up and not ours.
func globalAddresses() ([]deviceAddr, error) {
	ifs, err := net.Interfaces()
	if err != nil {
		return nil, err
	}
	var out []deviceAddr
	for _, i := range ifs {
		if i.Flags&net.FlagUp == 0 || i.Flags&net.FlagLoopback != 0 || ownDevice(i.Name) {
			continue
		}
		addrs, err := i.Addrs()
		if err != nil {
			return nil, err
		}
		for _, a := range addrs {
			if p, err := netip.ParsePrefix(a.String()); err == nil && p.Addr().Is4() && p.Addr().IsGlobalUnicast() {
				out = append(out, deviceAddr{p.Addr(), i.Name})
			}
		}
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

// listenAddress merges the request's wish with the daemon's configuration.
func listenAddress(wish, configured string) (string, error) {
	if wish == "" {
		return configured, nil
	}
	host, port, err := net.SplitHostPort(wish)
	if err != nil {
		host, port = wish, strconv.Itoa(defaultPort)
	}
	if host == "" {
		host = "0.0.0.0"
	}
	a, err := netip.ParseAddr(host)
	if err != nil {
		if a, err = deviceAddress(host); err != nil {
			return "", err
		}
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
		return "", api.Errorf(errdefs.ErrInvalidArgument, "listen address %q: the port must be 1 to 65535", wish)
	}
	return net.JoinHostPort(a.String(), port), nil
}

// advertised is host:port of this node's port as others reach it.
func advertised(addr netip.Addr, listen string) string {
	_, port, err := net.SplitHostPort(listen)
	if err != nil {
		port = strconv.Itoa(defaultPort)
	}
	return net.JoinHostPort(addr.String(), port)
}
