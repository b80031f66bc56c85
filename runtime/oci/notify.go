package oci

import (
	"encoding/json"
	"fmt"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"skein/runtime/zygote"
)

// listener is where the descriptor that answers for a seccomp filter goes.
type listener struct {
	Slot     zygote.Slot `json:"slot"`
	Path     string      `json:"path"`
	Metadata string      `json:"metadata,omitempty"`
}

// handOver takes the listener's descriptor number n from a process that waits and sends it to the agent, with what the specification
// says about the process.
func (l *listener) handOver(pid, n int, st specs.State) error {
	fd, err := fetchFD(pid, n)
	if err != nil {
		return fmt.Errorf("take the seccomp listener: %w", err)
	}
	defer unix.Close(fd)
	msg, err := json.Marshal(specs.ContainerProcessState{Version: specs.Version, Fds: []string{specs.SeccompFdName}, Pid: pid, Metadata: l.Metadata, State: st})
	if err != nil {
		return err
	}
	if err := sendFD(l.Path, msg, fd); err != nil {
		return fmt.Errorf("linux.seccomp.listenerPath %s: %w: %w", l.Path, err, errdefs.ErrFailedPrecondition)
	}
	return nil
}

// maxPreserved bounds descriptors that a process inherits from the caller.
const maxPreserved = 128

// checkPreserved makes sure that the caller has the descriptors: a number beside would be one of this process's own.
func checkPreserved(n int) error {
	if n < 0 || n > maxPreserved {
		return fmt.Errorf("preserve %d descriptors: want 0 to %d: %w", n, maxPreserved, errdefs.ErrInvalidArgument)
	}
	for i := range n {
		flags, err := unix.FcntlInt(uintptr(3+i), unix.F_GETFD, 0)
		if err != nil || flags&unix.FD_CLOEXEC != 0 { // everything that this process opens is closed at execve
			return fmt.Errorf("preserve %d descriptors: %d is not open: %w", n, 3+i, errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

func preserved(n int) []int {
	var out []int
	for i := range n {
		out = append(out, 3+i)
	}
	return out
}
