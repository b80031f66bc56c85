// Package initproc is the first process of a container with --init: a program of a few hundred bytes that starts nothing itself.
//
// The container's program (package sandbox) forks before it executes the command: the child becomes the command, the parent this
// program, which reaps orphans, passes every signal on to the command, and ends with the command's exit code, 128+n for signal n. It is
// executed from a sealed file in memory, so the container can neither change it nor reach a file of the host by /proc/1/exe. It must be
// started with all signals blocked and the command's pid in an eventfd at PIDFile.
package initproc

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	// Path is what the process calls itself, as engines' own init programs do; there is no such file in the container.
	Path = "/sbin/docker-init"
	// PIDFile is the descriptor of the eventfd whose counter is the command's pid; the assembly knows it.
	PIDFile = 9

	loadAddr = 0x400000
	headers  = 64 + 2*56
	maxCode  = 512
)

// program is not called: its text is copied.
func program()

func programAddr() uintptr

// Open makes the sealed file, to be executed by execveat with AT_EMPTY_PATH.
func Open() (fd int, err error) {
	image, err := build()
	if err != nil {
		return -1, fmt.Errorf("build the init program: %w", err)
	}
	flags := unix.MFD_CLOEXEC | unix.MFD_ALLOW_SEALING
	fd, err = unix.MemfdCreate("docker-init", flags|unix.MFD_EXEC)
	if errors.Is(err, unix.EINVAL) { // Linux before 6.3
		fd, err = unix.MemfdCreate("docker-init", flags)
	}
	if err != nil {
		return -1, fmt.Errorf("make the init program's file: %w", err)
	}
	if _, err = unix.Write(fd, image); err == nil {
		err = unix.Fchmod(fd, 0o555)
	}
	if err == nil {
		_, err = unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_SEAL|unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_WRITE)
	}
	if err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("write the init program: %w", err)
	}
	return fd, nil
}

// build is the program as an ELF file of one read-only executable segment and a stack that is not executable.
func build() ([]byte, error) {
	machine, end := uint16(62), []byte{0xcc, 0xcc, 0xcc, 0xcc} // x86-64
	if runtime.GOARCH == "arm64" {
		machine, end = 183, []byte{0, 0, 0x20, 0xd4, 0, 0, 0x20, 0xd4}
	}
	from := programAddr()
	code := unsafe.Slice((*byte)(*(*unsafe.Pointer)(unsafe.Pointer(&from))), maxCode)
	n := bytes.Index(code, end)
	if n < 0 {
		return nil, errors.New("its end is not found")
	}
	code = code[:n+len(end)]
	size := uint64(headers + len(code))
	b := []byte{0x7f, 'E', 'L', 'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0}
	le := binary.LittleEndian
	b = le.AppendUint16(b, 2) // executable
	b = le.AppendUint16(b, machine)
	b = le.AppendUint32(b, 1)
	b = le.AppendUint64(b, loadAddr+headers) // entry
	b = le.AppendUint64(b, 64)               // program headers
	b = le.AppendUint64(b, 0)
	b = le.AppendUint32(b, 0)
	for _, v := range []uint16{64, 56, 2, 0, 0, 0} {
		b = le.AppendUint16(b, v)
	}
	segment := func(kind, flags uint32, addr, size, align uint64) {
		b = le.AppendUint32(b, kind)
		b = le.AppendUint32(b, flags)
		for _, v := range []uint64{0, addr, addr, size, size, align} {
			b = le.AppendUint64(b, v)
		}
	}
	segment(1, 5, loadAddr, size, 0x10000)
	segment(0x6474e551, 6, 0, 0, 16)
	return append(b, code...), nil
}
