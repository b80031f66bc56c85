package link

import (
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

const (
	operUp = 6 // IF_OPER_UP
	// activeWait is how long the kernel may take to activate a device whose carrier just came on; its work runs at least once a second.
	activeWait = 2 * time.Second
)

// AwaitActive waits until a device that is up and has its carrier sends packets. Of a pair, the kernel activates the end that was set up
// first some time after the other end was; until then it drops what that end is to send, the answer to a container's very first packet
// for instance. Kernels from 6.8 on do it here and now because they are asked for the device.
func (c *Conn) AwaitActive(name string) (Link, error) {
	deadline := time.Now().Add(activeWait)
	for wait := 100 * time.Microsecond; ; wait *= 2 {
		b := Attrs{b: ifinfo(0, 0, 0)}
		b.Str(unix.IFLA_IFNAME, name)
		_, body, err := c.Get(Message{Type: unix.RTM_GETLINK, Body: b.b})
		if err != nil {
			return Link{}, fmt.Errorf("find link %s: %w", name, err)
		}
		if operState(body) == operUp || time.Now().After(deadline) { // a device without carrier never becomes active
			return parseLink(body), nil
		}
		time.Sleep(min(wait, 10*time.Millisecond))
	}
}

func operState(b []byte) byte {
	if len(b) < unix.SizeofIfInfomsg {
		return 0
	}
	for t, v := range Parse(b[unix.SizeofIfInfomsg:]) {
		if t == unix.IFLA_OPERSTATE && len(v) > 0 {
			return v[0]
		}
	}
	return 0
}
