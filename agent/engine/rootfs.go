package engine

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"skein/runtime"
	"skein/runtime/handle"
)

const openDirectory = unix.O_DIRECTORY

// errNotDirectory is what openIn says of a file where a directory was asked for.
var errNotDirectory error = unix.ENOTDIR

// openIn opens a path inside root as a process with that root would: links and .. never lead out of it, and no link of /proc is followed.
func openIn(root *os.File, name string, flags int) (*os.File, error) {
	how := unix.OpenHow{Flags: uint64(flags | unix.O_CLOEXEC), Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS}
	return openHow(root, name, &how)
}

func openHow(dir *os.File, name string, how *unix.OpenHow) (*os.File, error) {
	fd, err := handle.Open(int(dir.Fd()), name, how)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: name, Err: err}
	}
	return os.NewFile(uintptr(fd), name), nil
}

// openImage opens the image's part of a root filesystem, without what the container changed.
func openImage(rootfs []runtime.Mount) (*os.File, error) {
	var lower []string
	for _, m := range rootfs {
		if m.Type == "bind" || m.Type == "rbind" {
			lower = append(lower, m.Source)
		}
		for _, o := range m.Options {
			if v, ok := strings.CutPrefix(o, "lowerdir="); ok {
				lower = append(lower, strings.Split(v, ":")...)
			}
		}
	}
	switch len(lower) {
	case 0:
		return nil, errors.New("the root filesystem has no layers")
	case 1:
		return os.OpenFile(lower[0], unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	}
	return detached(runtime.Mount{Type: "overlay", Options: []string{"lowerdir=" + strings.Join(lower, ":")}})
}

// openStopped opens the root filesystem of a container that does not run.
func openStopped(rootfs []runtime.Mount) (*os.File, error) {
	if len(rootfs) != 1 {
		return nil, fmt.Errorf("the root filesystem has %d parts", len(rootfs))
	}
	if m := rootfs[0]; m.Type == "bind" || m.Type == "rbind" {
		return os.OpenFile(m.Source, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	}
	return detached(rootfs[0])
}

// detached mounts an overlay nowhere: only the returned handle reaches it, and the mount is gone when it is closed, whoever dies.
func detached(m runtime.Mount) (*os.File, error) {
	fs, err := unix.Fsopen(m.Type, unix.FSOPEN_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", m.Type, err)
	}
	defer unix.Close(fs)
	// Directories go in by handle, whose names are short: fsconfig takes 255 bytes.
	var open []*os.File
	defer func() {
		for _, f := range open {
			f.Close()
		}
	}()
	name := func(dir string) (string, error) {
		f, err := os.OpenFile(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
		if err != nil {
			return "", err
		}
		open = append(open, f)
		return fmt.Sprintf("/proc/self/fd/%d", f.Fd()), nil
	}
	for _, o := range m.Options {
		key, value, hasValue := strings.Cut(o, "=")
		switch key {
		case "lowerdir":
			err = setLower(fs, strings.Split(value, ":"), name)
		case "upperdir", "workdir":
			if value, err = name(value); err == nil {
				err = unix.FsconfigSetString(fs, key, value)
			}
		case "volatile", "rw", "ro":
		default:
			if hasValue {
				err = unix.FsconfigSetString(fs, key, value)
			} else {
				err = unix.FsconfigSetFlag(fs, key)
			}
		}
		if err != nil {
			return nil, fmt.Errorf("%s option %s: %w", m.Type, key, err)
		}
	}
	if err := unix.FsconfigCreate(fs); err != nil {
		return nil, fmt.Errorf("make %s: %w", m.Type, err)
	}
	fd, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV)
	if err != nil {
		return nil, fmt.Errorf("mount %s: %w", m.Type, err)
	}
	return os.NewFile(uintptr(fd), "rootfs"), nil
}

// setLower gives the layers one by one, or in one string where the kernel (before 6.5) knows no other way.
func setLower(fs int, dirs []string, name func(string) (string, error)) error {
	names := make([]string, len(dirs))
	for i, d := range dirs {
		var err error
		if names[i], err = name(d); err != nil {
			return err
		}
	}
	for i, n := range names {
		err := unix.FsconfigSetString(fs, "lowerdir+", n)
		if i == 0 && errors.Is(err, unix.EINVAL) {
			return unix.FsconfigSetString(fs, "lowerdir", strings.Join(names, ":"))
		}
		if err != nil {
			return err
		}
	}
	return nil
}
