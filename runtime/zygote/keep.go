package zygote

import (
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Kept is a child at its gate as data, so that the supervisor's next program can lead it on. Descriptors are numbers of this process.
type Kept struct {
	PID    int    `json:"pid"`
	Ready  bool   `json:"ready"`
	Index  int    `json:"index"` // of the arena in the pool's memory
	Memory int    `json:"memory"`
	Reply  int    `json:"reply"`
	Record Record `json:"record"`
}

// Keep describes the child; its descriptors stay open until Close and Release.
func (c *Child) Keep() (Kept, error) {
	k := Kept{PID: c.PID, Ready: c.ready, Index: c.prog.index, Memory: c.prog.memory(), Record: c.prog.Record(0)}
	rc, err := c.reply.SyscallConn()
	if err == nil {
		err = rc.Control(func(fd uintptr) { k.Reply = int(fd) })
	}
	if err != nil {
		return k, fmt.Errorf("keep process %d: %w", c.PID, err)
	}
	k.Record.Base = uint64(c.prog.builtAt())
	return k, nil
}

// Resume continues a kept child. It takes Reply over and duplicates Memory, which several children may share.
func Resume(k Kept) (*Child, *Program, error) {
	if k.Index < 0 || k.PID <= 0 {
		return nil, nil, fmt.Errorf("kept process %d: arena %d", k.PID, k.Index)
	}
	file, err := unix.FcntlInt(uintptr(k.Memory), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return nil, nil, fmt.Errorf("memory of process %d: %w", k.PID, err)
	}
	m, err := unix.Mmap(file, int64(k.Index)*arenaLen, opsOff, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		unix.Close(file)
		return nil, nil, fmt.Errorf("memory of process %d: %w", k.PID, err)
	}
	p := &Program{mem: m, index: k.Index, file: file, built: uintptr(k.Record.Base), names: k.Record.Names}
	return &Child{PID: k.PID, prog: p, reply: os.NewFile(uintptr(k.Reply), "reply"), ready: k.Ready}, p, nil
}

// memory is the file that the program's arena lies in.
func (p *Program) memory() int {
	if p.pool != nil {
		return p.pool.file
	}
	return p.file
}

// builtAt is the arena's address in the process that built the program, and in its child.
func (p *Program) builtAt() uintptr {
	if p.built != 0 {
		return p.built
	}
	return uintptr(unsafe.Pointer(&p.mem[0]))
}

// drop lets go of a resumed program.
func (p *Program) drop() {
	_ = unix.Munmap(p.mem)
	unix.Close(p.file)
	p.mem = nil
}
