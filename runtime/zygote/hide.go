package zygote

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A forked child has this program's file as /proc/self/exe until its execve. A container's command, or the interpreter a script names,
// may be exactly that path: the host's file would run inside, and could be written once it has ended. So a direct child, and the zygote
// before it forks any, lets go of the file: it runs the interpreter from a copy, unmaps the file, and takes an empty sealed one in its
// place.

const (
	mmMap     = 14 // PR_SET_MM_MAP
	codeBytes = 2048
)

// veil is what the child needs to let go of its executable file.
type veil struct {
	code     []byte // the interpreter's copy
	file     int    // what /proc/self/exe shall be
	segments [][2]uint64
	mm       []byte
}

// cloneRunAt is cloneRun for a copy of it at code.
//
//go:noescape
func cloneRunAt(args unsafe.Pointer, size uintptr, arena unsafe.Pointer, code unsafe.Pointer) (ret uintptr)

func newVeil() (*veil, error) {
	v := &veil{file: -1}
	if err := v.prepare(); err != nil {
		v.close()
		return nil, fmt.Errorf("hide the runtime's own file: %w", err)
	}
	return v, nil
}

func (v *veil) prepare() error {
	if unix.Getpagesize() < codeBytes {
		return errors.New("unexpected page size")
	}
	code, err := unix.Mmap(-1, 0, unix.Getpagesize(), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return err
	}
	v.code = code
	from := interpAddr()
	copy(code, unsafe.Slice((*byte)(*(*unsafe.Pointer)(unsafe.Pointer(&from))), codeBytes))
	if err := unix.Mprotect(code, unix.PROT_READ|unix.PROT_EXEC); err != nil {
		return err
	}
	if v.file, err = unix.MemfdCreate("none", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING); err != nil {
		return err
	}
	if _, err := unix.FcntlInt(uintptr(v.file), unix.F_ADD_SEALS, unix.F_SEAL_SEAL|unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_WRITE); err != nil {
		return err
	}
	if err := v.findSegments(); err != nil {
		return err
	}
	return v.readMM()
}

func (v *veil) close() {
	if v.file >= 0 {
		unix.Close(v.file)
	}
	if v.code != nil {
		_ = unix.Munmap(v.code)
	}
}

// findSegments lists where this program's file is mapped.
func (v *veil) findSegments() error {
	exe, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return err
	}
	maps, err := readProc("/proc/self/maps")
	if err != nil {
		return err
	}
	for line := range strings.Lines(maps) {
		if !strings.HasSuffix(line, " "+exe+"\n") {
			continue
		}
		span, _, _ := strings.Cut(line, " ")
		lo, hi, _ := strings.Cut(span, "-")
		a, err1 := strconv.ParseUint(lo, 16, 64)
		b, err2 := strconv.ParseUint(hi, 16, 64)
		if err := errors.Join(err1, err2); err != nil {
			return err
		}
		v.segments = append(v.segments, [2]uint64{a, b - a})
	}
	if len(v.segments) == 0 {
		return fmt.Errorf("%s is not mapped", exe)
	}
	return nil
}

// readProc reads a file of the kernel by plain calls: package os would make a poller for it.
func readProc(file string) (string, error) {
	fd, err := unix.Open(file, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", &os.PathError{Op: "open", Path: file, Err: err}
	}
	defer unix.Close(fd)
	b := make([]byte, 0, 8192)
	for {
		n, err := unix.Read(fd, b[len(b):cap(b)])
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return "", &os.PathError{Op: "read", Path: file, Err: err}
		case n == 0:
			return string(b), nil
		default:
			b = slices.Grow(b[:len(b)+n], 4096)
		}
	}
}

// readMM is the kernel's notion of this process's memory, to be given back unchanged but for the file.
func (v *veil) readMM() error {
	stat, err := readProc("/proc/self/stat")
	if err != nil {
		return err
	}
	f := strings.Fields(stat[strings.LastIndexByte(stat, ')')+1:])
	if len(f) < 50 {
		return errors.New("/proc/self/stat is malformed")
	}
	brk, _, _ := unix.RawSyscall(unix.SYS_BRK, 0, 0, 0)
	v.mm = make([]byte, 104)
	// Fields of stat, counted from its third, and the program break, in the order of struct prctl_mm_map.
	for i, n := range []int{23, 24, 42, 43, 44, -1, 25, 45, 46, 47, 48} {
		x := uint64(brk)
		if n >= 0 {
			if x, err = strconv.ParseUint(f[n], 10, 64); err != nil {
				return err
			}
		}
		binary.LittleEndian.PutUint64(v.mm[8*i:], x)
	}
	return nil
}

// add makes the child let go; exe is where v.file waits.
func (v *veil) add(p *Program, exe int) {
	for _, s := range v.segments {
		p.Do("unmap the runtime", unix.SYS_MUNMAP, uintptr(s[0]), uintptr(s[1]))
	}
	binary.LittleEndian.PutUint32(v.mm[100:], uint32(exe))
	p.Do("hide the runtime's file (needs a kernel with CONFIG_CHECKPOINT_RESTORE)", unix.SYS_PRCTL, unix.PR_SET_MM, mmMap, p.Bytes(v.mm), len(v.mm), 0)
}
