package zygote

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// Pool holds the arenas of all programs: one mapping shared by supervisor, zygote and child, made before the zygote is forked, so that
// an address means the same in all three.
type Pool struct {
	mem  []byte
	file int // the memory's, kept for Keep; -1 for one that lives in a file of its own
	free chan int
}

// NewPool maps n arenas; memory is used only where programs were written.
func NewPool(n int) (*Pool, error) {
	fd, err := unix.MemfdCreate("programs", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("map %d program arenas: %w", n, err)
	}
	var m []byte
	if err = unix.Ftruncate(fd, int64(n)*arenaLen); err == nil {
		m, err = unix.Mmap(fd, 0, n*arenaLen, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_NORESERVE)
	}
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("map %d program arenas: %w", n, err)
	}
	p := &Pool{mem: m, file: fd, free: make(chan int, n)}
	for i := range n {
		p.free <- i
	}
	return p, nil
}

// Program takes an arena. A container that is created but not started keeps its arena, hence the bound.
func (p *Pool) Program() (*Program, error) {
	select {
	case i := <-p.free:
		m := p.mem[i*arenaLen : (i+1)*arenaLen : (i+1)*arenaLen]
		clear(m[:opsOff])
		return &Program{mem: m, pool: p, index: i, data: dataOff, strs: map[string]Addr{}}, nil
	default:
		return nil, fmt.Errorf("%d containers are being created or wait for their start: start or remove some", cap(p.free))
	}
}

func (p *Pool) put(g *Program) {
	// Environment and arguments may be secrets: drop the pages rather than leave them to the next child.
	clear(g.mem[:g.data])
	_ = unix.Madvise(g.mem, unix.MADV_REMOVE)
	g.mem = nil
	p.free <- g.index
}
