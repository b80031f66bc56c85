package sandbox

import (
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"skein/runtime"
	"skein/runtime/rootfs"
	"skein/runtime/zygote"
)

// placed is where a container's program stands when it is in its namespaces.
type placed struct {
	fd    int                 // the next of the request's descriptors
	trees map[int]zygote.Slot // mounts taken from other containers or made before, by index in Spec.Mounts
	user  bool                // in a user namespace other than the host's
	// ownNet: the network namespace is made together with the user namespace, whose it is then.
	ownNet bool
	// early: the parameters of the network namespace are set already.
	early bool
}

// place brings the child into its namespaces. A pid namespace that is joined holds only children of who joins it, and in a user namespace
// one has no rights over the host's: then a second child, a sibling of the first, goes on in the namespaces of flags.
func (out *Output) place(p *zygote.Program, s *specs.Spec, join []NamespacePath, flags uint64, fd int) (placed, error) {
	out.Flags = flags &^ unix.CLONE_NEWCGROUP
	pl := placed{trees: map[int]zygote.Slot{}}
	if err := pl.sharedMounts(p, s, join, fd); err != nil {
		return pl, err
	}
	newUser := flags&unix.CLONE_NEWUSER != 0
	out.Forks, pl.user = newUser, newUser
	pl.ownNet = flags&unix.CLONE_NEWNET != 0
	for _, n := range join { // the user namespace comes last
		if n.Type == specs.UserNamespace {
			pl.asHost(p, s)
			pl.user = true
		}
		out.Forks = out.Forks || n.Type == specs.PIDNamespace || n.Type == specs.UserNamespace
		p.Do("join "+string(n.Type)+" namespace "+n.Path, unix.SYS_SETNS, fd, uintptr(fullCloneFlag(n.Type)))
		p.Do("close", unix.SYS_CLOSE, fd)
		fd++
	}
	pl.fd = fd
	if newUser {
		pl.asHost(p, s)
	}
	if out.Forks {
		out.PID = p.KeptSlot()
		goOn(p, out.PID, out.Flags)
		out.Flags = 0
	}
	if newUser {
		out.Maps = true
		p.Gate(zygote.FileFD(3))
	}
	if pl.user {
		p.Do("setgid 0", unix.SYS_SETRESGID, 0, 0, 0)
		p.Do("setuid 0", unix.SYS_SETRESUID, 0, 0, 0)
	}
	return pl, nil
}

// asHost does what belongs to the network namespace, which is the host's to change, before the child gives up its rights over it.
func (pl *placed) asHost(p *zygote.Program, s *specs.Spec) {
	if pl.ownNet {
		return // the first child is still in the host's
	}
	pl.early = true
	for i, m := range s.Mounts {
		if m.Type == "sysfs" {
			pl.trees[i] = p.KeptSlot()
			rootfs.MakeSysfs(p, pl.trees[i], m)
		}
	}
	for _, n := range sysctlNames(s) {
		if isNetSysctl(n) {
			writeSysctl(p, unix.AT_FDCWD, "/proc/sys/", n, s.Linux.Sysctl[n])
		}
	}
}

// goOn makes a second child in new namespaces that continues the program; the first ends. Where the pid namespace was joined
// its processes see the second with all its privileges, see DESIGN.md.
func goOn(p *zygote.Program, pid zygote.Slot, flags uint64) {
	args, size := p.CloneArgs(flags | unix.CLONE_PARENT | unix.CLONE_CLEAR_SIGHAND)
	i := p.Fork(pid, "clone3", unix.SYS_CLONE3, args, size)
	skip := p.Try("go on", unix.SYS_GETPID)
	p.SkipOnSuccess(i)
	p.Exit(0)
	p.SkipOnSuccess(skip)
	p.Do("setsid", unix.SYS_SETSID)
}

// sharedMounts clones what other containers have mounted where this one wants it too (see runtime.ContainerPath). The other is entered by
// the handle of its process, the path is resolved without links, and nothing is executed in between.
func (pl *placed) sharedMounts(p *zygote.Program, s *specs.Spec, join []NamespacePath, fd int) error {
	for i, m := range s.Mounts {
		if !strings.HasPrefix(m.Source, runtime.ContainerPath) {
			continue
		}
		n := slices.IndexFunc(join, func(n NamespacePath) bool { return n.Path == m.Source })
		if n < 0 {
			return fmt.Errorf("mount %s of %s: only of a container whose namespaces are joined: %w", m.Destination, m.Source, errdefs.ErrInvalidArgument)
		}
		tree := p.KeptSlot()
		end := p.Scope()
		own := p.Get("open own mounts", unix.SYS_OPENAT, unix.AT_FDCWD, "/proc/self/ns/mnt", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		how := p.Words(unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0, unix.RESOLVE_NO_SYMLINKS|unix.RESOLVE_NO_MAGICLINKS)
		p.Do("see the mounts of "+m.Source, unix.SYS_SETNS, fd+n, unix.CLONE_NEWNS)
		dir := p.Get("open "+m.Destination+" of "+m.Source, unix.SYS_OPENAT2, unix.AT_FDCWD, m.Destination, how, 24)
		p.GetInto(tree, "share "+m.Destination+" of "+m.Source, unix.SYS_OPEN_TREE, dir, "", rootfs.CloneTree|unix.AT_EMPTY_PATH)
		p.Do("close", unix.SYS_CLOSE, dir)
		p.Do("see own mounts", unix.SYS_SETNS, own, unix.CLONE_NEWNS)
		p.Do("close", unix.SYS_CLOSE, own)
		end()
		pl.trees[i] = tree
	}
	return nil
}
