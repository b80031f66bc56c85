package rootfs

import (
	"errors"
	"fmt"
	"sync"

	"golang.org/x/sys/unix"
)

// Nulls makes null devices for standard streams: each is a node that nobody else has. Root in a container changes mode and owner of what
// it is given; of the host's /dev/null that would be the host's. The nodes are in a filesystem that is mounted nowhere.
type Nulls struct {
	mu  sync.Mutex // of the name
	dir int
}

// NewNulls mounts the filesystem.
func NewNulls() (*Nulls, error) {
	fail := func(err error) (*Nulls, error) { return nil, fmt.Errorf("make null devices: %w", err) }
	fs, err := unix.Fsopen("tmpfs", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return fail(err)
	}
	defer unix.Close(fs)
	err = errors.Join(unix.FsconfigSetString(fs, "size", "64k"), unix.FsconfigSetString(fs, "mode", "700"), unix.FsconfigCreate(fs))
	if err != nil {
		return fail(err)
	}
	dir, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NOEXEC)
	if err != nil {
		return fail(err)
	}
	return &Nulls{dir: dir}, nil
}

// Open makes a null device and opens it; it is gone with its last descriptor.
func (n *Nulls) Open() (int, error) {
	const name = "null"
	n.mu.Lock()
	defer n.mu.Unlock()
	if err := unix.Mknodat(n.dir, name, unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))); err != nil {
		return -1, fmt.Errorf("make a null device: %w", err)
	}
	fd, err := unix.Openat(n.dir, name, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
	if err == nil {
		err = unix.Fchmod(fd, 0o666)
	}
	if err = errors.Join(err, unix.Unlinkat(n.dir, name, 0)); err != nil {
		if fd >= 0 {
			unix.Close(fd)
		}
		return -1, fmt.Errorf("open a null device: %w", err)
	}
	return fd, nil
}

// Close lets go of the filesystem; devices that are open stay.
func (n *Nulls) Close() { unix.Close(n.dir) }

// IsNull says whether the descriptor is a null device.
func IsNull(fd int) bool {
	var st unix.Stat_t
	return unix.Fstat(fd, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFCHR && st.Rdev == unix.Mkdev(1, 3)
}
