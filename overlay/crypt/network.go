package crypt

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"sync/atomic"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/tun"
)

const tunPath = "/dev/net/tun"

// network is an encrypted network's device in its router namespace.
type network struct {
	id    string
	vni   uint32
	dev   tun.Device
	where atomic.Pointer[map[netip.Addr]uint32] // node of each endpoint elsewhere

	taken chan struct{} // a side has read what was there
	ended chan struct{} // closed by close
	done  chan struct{} // closed when nobody reads any more
}

// AddNetwork makes sure that a network's device exists: with this name, in the namespace that in enters. It does not bring it up. A device that an
// earlier daemon left is taken over.
func (t *Tunnel) AddNetwork(ctx context.Context, id, name string, vni uint32, in func(func() error) error) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return errClosed
	}
	if n := t.nets[id]; n != nil {
		if n.vni == vni && n.alive() {
			return nil
		}
		if err := t.removeNetwork(ctx, id); err != nil {
			return err
		}
	}
	fd := t.takeStored(tunPrefix + id)
	if fd >= 0 && deviceName(fd) != name {
		unix.Close(fd)
		fd = -1
	}
	if fd < 0 {
		if err := t.release(ctx, tunPrefix+id); err != nil {
			return err
		}
		var err error
		if fd, err = t.newDevice(ctx, id, name, in); err != nil {
			return err
		}
	}
	dev, _, err := tun.CreateUnmonitoredTUNFromFD(fd)
	if err != nil {
		unix.Close(fd)
		return fmt.Errorf("tunnel device of network %s: %w", id, err)
	}
	n := &network{id: id, vni: vni, dev: dev, taken: make(chan struct{}), ended: make(chan struct{}), done: make(chan struct{})}
	n.where.Store(&map[netip.Addr]uint32{})
	t.nets[id] = n
	t.setVNIs()
	go t.pump(n) // ends with close, which waits
	return nil
}

func (t *Tunnel) newDevice(ctx context.Context, id, name string, in func(func() error) error) (int, error) {
	var fd int
	err := in(func() (err error) {
		fd, err = openDevice(name)
		return err
	})
	if err != nil {
		return -1, fmt.Errorf("make tunnel device of network %s: %w", id, err)
	}
	if t.opts.Store != nil {
		if err := t.opts.Store.StoreFD(ctx, tunPrefix+id, fd); err != nil {
			unix.Close(fd)
			return -1, fmt.Errorf("keep tunnel device of network %s: %w", id, err)
		}
	}
	return fd, nil
}

// openDevice makes a TUN device in the calling thread's namespace. It lives as long as a descriptor of it.
func openDevice(name string) (int, error) {
	fd, err := unix.Open(tunPath, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return -1, fmt.Errorf("open %s: %w", tunPath, err)
	}
	req, err := unix.NewIfreq(name)
	if err == nil {
		req.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI | unix.IFF_VNET_HDR | unix.IFF_TUN_EXCL)
		err = unix.IoctlIfreq(fd, unix.TUNSETIFF, req)
	}
	if err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("create device %s: %w", name, err)
	}
	return fd, nil
}

// deviceName is the name of a descriptor's device, empty if that is gone.
func deviceName(fd int) string {
	req, err := unix.NewIfreq("")
	if err != nil || unix.IoctlIfreq(fd, unix.TUNGETIFF, req) != nil {
		return ""
	}
	return req.Name()
}

// alive tells whether the device was not deleted by somebody.
func (n *network) alive() bool {
	raw, err := n.dev.File().SyscallConn()
	if err != nil {
		return false
	}
	alive := false
	err = raw.Control(func(fd uintptr) { alive = deviceName(int(fd)) != "" })
	return err == nil && alive
}

func (t *Tunnel) setVNIs() {
	vnis := make(map[uint32]*network, len(t.nets))
	for _, n := range t.nets {
		vnis[n.vni] = n
	}
	t.vnis.Store(&vnis)
}

// SetEndpoints tells on which node each of a network's endpoints elsewhere is. The map must not be changed afterwards.
func (t *Tunnel) SetEndpoints(id string, where map[netip.Addr]uint32) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if n := t.nets[id]; n != nil && !maps.Equal(*n.where.Load(), where) {
		n.where.Store(&where)
	}
}

// RemoveNetwork deletes a network's device.
func (t *Tunnel) RemoveNetwork(ctx context.Context, id string) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.removeNetwork(ctx, id)
}

func (t *Tunnel) removeNetwork(ctx context.Context, id string) error {
	if n := t.nets[id]; n != nil {
		delete(t.nets, id)
		t.setVNIs()
		n.close()
	}
	return t.release(ctx, tunPrefix+id)
}

// Networks are the ids of all networks that have a device, those of an earlier daemon included.
func (t *Tunnel) Networks() []string {
	t.mu.Lock()
	defer t.mu.Unlock()
	var out []string
	for id := range t.nets {
		out = append(out, id)
	}
	for name := range t.stored {
		if len(name) > len(tunPrefix) && name[:len(tunPrefix)] == tunPrefix {
			out = append(out, name[len(tunPrefix):])
		}
	}
	return out
}

func (n *network) close() {
	close(n.ended)
	n.dev.Close()
	<-n.done
}

// pump has the sender read whenever there is something.
func (t *Tunnel) pump(n *network) {
	defer close(n.done)
	for {
		if err := n.awaitPacket(); err != nil {
			if !errors.Is(err, os.ErrClosed) {
				t.log.Debug("an encrypted network's device is gone", "network", n.id, "error", err)
			}
			return
		}
		if !t.handOver(n) {
			return
		}
	}
}

// handOver waits for a side that reads. It tells whether there is more to do.
func (t *Tunnel) handOver(n *network) bool {
	for {
		s := t.sender.Load()
		if s == nil { // between two configurations
			select {
			case <-n.ended:
				return false
			case <-t.awaitSender():
			}
			continue
		}
		select {
		case s.ready <- n:
			<-n.taken
			return true
		case <-s.closed:
		case <-n.ended:
			return false
		}
	}
}

// awaitPacket returns when the device has a packet.
func (n *network) awaitPacket() error {
	raw, err := n.dev.File().SyscallConn()
	if err != nil {
		return err
	}
	var fault error
	err = raw.Read(func(fd uintptr) bool {
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		if _, err := unix.Poll(p, 0); err != nil && !errors.Is(err, unix.EINTR) {
			fault = err
			return true
		}
		if p[0].Revents&(unix.POLLERR|unix.POLLNVAL) != 0 {
			fault = errdefs.ErrNotFound
			return true
		}
		return p[0].Revents&unix.POLLIN != 0
	})
	return errors.Join(err, fault)
}
