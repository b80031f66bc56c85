package rootfs

import (
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"skein/runtime/zygote"
)

// AddTerminal makes the terminal whose master open puts into the slot the controlling terminal and descriptors 0-2 of the process. The
// peer is opened from the master's handle, never by a path of the container.
func AddTerminal(p *zygote.Program, master zygote.Slot, open func(), size *specs.Box, uid uint32) {
	OpenTerminal(p, master, open, size, uid)
	TakeTerminal(p)
}

// TakeTerminal makes the terminal that is standard input the one that controls the process, a session's leader.
func TakeTerminal(p *zygote.Program) {
	p.Do("controlling terminal", unix.SYS_IOCTL, 0, unix.TIOCSCTTY, 0)
}

// OpenTerminal is AddTerminal without TakeTerminal.
func OpenTerminal(p *zygote.Program, master zygote.Slot, open func(), size *specs.Box, uid uint32) {
	open()
	p.Do("unlock terminal", unix.SYS_IOCTL, master, unix.TIOCSPTLCK, p.Words(0))
	slave := p.Get("open terminal", unix.SYS_IOCTL, master, unix.TIOCGPTPEER, unix.O_RDWR|unix.O_NOCTTY)
	if size != nil && size.Height > 0 && size.Width > 0 {
		ws := uint64(uint16(size.Height)) | uint64(uint16(size.Width))<<16
		p.Do("terminal size", unix.SYS_IOCTL, master, unix.TIOCSWINSZ, p.Words(ws))
	}
	if uid != 0 {
		p.Do("terminal owner", unix.SYS_FCHOWN, slave, uintptr(uid), uintptr(^uint32(0)))
	}
	for fd := range 3 {
		p.Do("terminal as stdio", unix.SYS_DUP3, slave, fd, 0)
	}
	p.Do("close", unix.SYS_CLOSE, slave)
}
