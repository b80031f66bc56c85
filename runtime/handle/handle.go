// Package handle opens names below a directory that others may change meanwhile.
//
// It guarantees nothing but the kernel's own rules (openat2(2), Linux 5.6): what a name may lead to is the caller's how.Resolve. Who uses it:
// everybody who walks a container's, an image's or a volume's files.
package handle

import (
	"errors"

	"golang.org/x/sys/unix"
)

// tries is how often a name is opened that the kernel could not resolve because something, anywhere on the host, was renamed or mounted
// while it went through ".." (EAGAIN).
const tries = 128

// Open opens name below dir and returns a file descriptor, which is the caller's to close. Errors are unix.Errno; EAGAIN says that the
// kernel could not resolve the name 128 times in a row.
func Open(dir int, name string, how *unix.OpenHow) (fd int, err error) {
	for range tries {
		fd, err = unix.Openat2(dir, name, how)
		if !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR) {
			break
		}
	}
	return fd, err
}
