package dev

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

const bridgeName = "br0"

// makeNetns creates a named namespace where `ip netns` finds it.
func makeNetns(name string) error {
	if err := os.MkdirAll(netnsDir, 0o755); err != nil {
		return err
	}
	path := filepath.Join(netnsDir, name)
	if mounted(path) {
		return nil
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDONLY, 0o444)
	if err != nil {
		return fmt.Errorf("network namespace %s: %w", name, err)
	}
	f.Close()
	err = onThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		return unix.Mount("/proc/thread-self/ns/net", path, "", unix.MS_BIND, "")
	})
	if err != nil {
		_ = os.Remove(path)
		return fmt.Errorf("network namespace %s: %w", name, err)
	}
	return nil
}

// removeNetns deletes a named namespace; what lives in it goes when its last process does. Idempotent.
func removeNetns(name string) error {
	path := filepath.Join(netnsDir, name)
	for unix.Unmount(path, unix.MNT_DETACH) == nil {
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("network namespace %s: %w", name, err)
	}
	return nil
}

func mounted(path string) bool {
	var st unix.Statfs_t
	return unix.Statfs(path, &st) == nil && st.Type == unix.NSFS_MAGIC
}

// onThread runs f on a thread that is thrown away, because f changes its namespaces.
func onThread(f func() error) error {
	ch := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		ch <- f()
	}()
	return <-ch
}

// within opens a netlink handle inside the named namespace.
func within(name string, f func(*netlink.Handle) error) error {
	ns, err := netns.GetFromPath(filepath.Join(netnsDir, name))
	if err != nil {
		return fmt.Errorf("network namespace %s: %w", name, err)
	}
	defer ns.Close()
	h, err := netlink.NewHandleAt(ns)
	if err != nil {
		return fmt.Errorf("network namespace %s: %w", name, err)
	}
	defer h.Close()
	return f(h)
}

// buildFabric makes the bridge's namespace and the machine's own leg.
func (c *Cluster) buildFabric() error {
	if err := makeNetns(c.fabric()); err != nil {
		return err
	}
	err := within(c.fabric(), func(h *netlink.Handle) error {
		br := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: bridgeName}}
		if err := h.LinkAdd(br); err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("bridge: %w", err)
		}
		return linkUp(h, bridgeName)
	})
	if err != nil {
		return err
	}
	host, err := netlink.NewHandle()
	if err != nil {
		return err
	}
	defer host.Close()
	if err := c.cable(host, c.hostDevice(), "host"); err != nil {
		return err
	}
	return errors.Join(address(host, c.hostDevice(), netip.PrefixFrom(c.hostAddr(), c.Subnet.Bits())),
		address(host, c.hostDevice(), netip.PrefixFrom(c.HostAddr6(), c.subnet6().Bits())))
}

// cable joins a device in the handle's namespace to a port of the bridge.
func (c *Cluster) cable(h *netlink.Handle, device, port string) error {
	if _, err := h.LinkByName(device); err == nil {
		return nil
	}
	fabric, err := netns.GetFromPath(filepath.Join(netnsDir, c.fabric()))
	if err != nil {
		return err
	}
	defer fabric.Close()
	v := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: device}, PeerName: port, PeerNamespace: netlink.NsFd(fabric)}
	if err := h.LinkAdd(v); err != nil {
		return fmt.Errorf("cable %s: %w", port, err)
	}
	return within(c.fabric(), func(f *netlink.Handle) error {
		br, err := f.LinkByName(bridgeName)
		if err != nil {
			return err
		}
		p, err := f.LinkByName(port)
		if err != nil {
			return err
		}
		if err := f.LinkSetMaster(p, br); err != nil {
			return fmt.Errorf("cable %s: %w", port, err)
		}
		return f.LinkSetUp(p)
	})
}

// buildHost makes a node's namespace and cable.
func (c *Cluster) buildHost(n *Node) error {
	if err := makeNetns(n.Namespace); err != nil {
		return err
	}
	return within(n.Namespace, func(h *netlink.Handle) error {
		if err := linkUp(h, "lo"); err != nil {
			return err
		}
		if err := c.cable(h, "eth0", c.port(n)); err != nil {
			return err
		}
		a, err := netip.ParseAddr(n.Address)
		if err != nil {
			return err
		}
		err = address(h, "eth0", netip.PrefixFrom(c.Addr6(n), c.subnet6().Bits()))
		if !c.IPv6 {
			err = errors.Join(err, address(h, "eth0", netip.PrefixFrom(a, c.Subnet.Bits())))
		}
		return err
	})
}

// setCable cuts or heals a node's link at the bridge's end.
func (c *Cluster) setCable(n *Node, up bool) error {
	return within(c.fabric(), func(h *netlink.Handle) error {
		p, err := h.LinkByName(c.port(n))
		if err != nil {
			return fmt.Errorf("link of node %s: %w", n.Name, err)
		}
		if up {
			return h.LinkSetUp(p)
		}
		return h.LinkSetDown(p)
	})
}

func linkUp(h *netlink.Handle, name string) error {
	l, err := h.LinkByName(name)
	if err != nil {
		return fmt.Errorf("device %s: %w", name, err)
	}
	return h.LinkSetUp(l)
}

func address(h *netlink.Handle, device string, p netip.Prefix) error {
	l, err := h.LinkByName(device)
	if err != nil {
		return err
	}
	a := &netlink.Addr{IPNet: &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}}
	if p.Addr().Is6() {
		a.Flags = unix.IFA_F_NODAD // nobody else is there to have it
	}
	if err := h.AddrReplace(l, a); err != nil {
		if p.Addr().Is6() && (errors.Is(err, unix.EACCES) || errors.Is(err, unix.EOPNOTSUPP)) {
			return nil // this machine has IPv6 switched off
		}
		return fmt.Errorf("address %s on %s: %w", p, device, err)
	}
	return h.LinkSetUp(l)
}

// removeDevice deletes a device of the machine's own namespace. Idempotent.
func removeDevice(name string) error {
	l, err := netlink.LinkByName(name)
	if err != nil {
		var missing netlink.LinkNotFoundError
		if errors.As(err, &missing) {
			return nil
		}
		return err
	}
	return netlink.LinkDel(l)
}

// freeSubnet finds a /24 of 198.18.0.0/16 that no device of the machine uses.
func freeSubnet() (netip.Prefix, error) {
	addrs, err := netlink.AddrList(nil, netlink.FAMILY_V4)
	if err != nil {
		return netip.Prefix{}, err
	}
	for i := range 256 {
		p := netip.PrefixFrom(netip.AddrFrom4([4]byte{198, subnetSecond, byte(i), 0}), 24)
		busy := false
		for _, a := range addrs {
			if ip, ok := netip.AddrFromSlice(a.IP.To4()); ok && p.Contains(ip) {
				busy = true
			}
		}
		if !busy {
			return p, nil
		}
	}
	return netip.Prefix{}, errors.New("no /24 of 198.18.0.0/16 is free: take clusters down with `skein dev down`")
}
