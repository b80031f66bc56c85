// Package sandbox compiles an OCI runtime configuration into the program that a container's first process, or an additional one, runs
// between clone3 and execve: groups, namespaces, the filesystem (package rootfs), limits, identity, capabilities, seccomp.
//
// What the specification asks and this package does not build is refused by name, never ignored. Privileges are dropped last, the
// seccomp filter at the very end (before the drop when no_new_privs is off, since installing it then needs a capability). A process
// gets only capabilities of the supervisor's own bounding set. Used by runtime/supervisor; the defaults also by agent/engine.
package sandbox

import (
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"skein/runtime"
	"skein/runtime/rootfs"
	"skein/runtime/zygote"
)

// Host is what the compiler must know of the machine; it is probed once.
type Host struct {
	Bounding       uint64
	LowerdirAppend bool
	FilesHard      uint64 // hard limit of open files
}

// Probe looks at this process and kernel.
func Probe() (Host, error) {
	h, err := ProbeProcess()
	h.LowerdirAppend = rootfs.Probe()
	return h, err
}

// ProbeProcess is Probe for containers whose root filesystem is mounted already: the kernel is not asked.
func ProbeProcess() (Host, error) {
	h := Host{Bounding: boundingSet()}
	var rl unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &rl); err != nil {
		return h, fmt.Errorf("read the limit of open files: %w", err)
	}
	h.FilesHard = rl.Max
	return h, nil
}

// Input is one container to compile.
type Input struct {
	Host   Host
	Spec   *specs.Spec
	Rootfs []runtime.Mount
	// Cgroups are shown inside; Tasks counts the v1 tasks files among the request's descriptors, which follow the gate.
	Cgroups []rootfs.CgroupDir
	Filter  Filter
	// FirstFile is the child's descriptor number of: the gate, then Tasks files, then the v2 directory (HasCgroup), then one per
	// namespace path in the order of Paths.
	Tasks     int
	HasCgroup bool
	// Init makes the process an init (package initproc), whose open file comes next, and its command a child of it.
	Init bool
	// HasRoot: the next descriptor is what rootfs.MountRoot made.
	HasRoot bool
	// Trees are prepared sources of bind mounts, whose descriptors come last.
	Trees []Tree
}

// Tree is a detached mount for the bind mount of that index in Spec.Mounts.
type Tree struct {
	Mount int
	Dir   bool
}

// Output is a compiled container: the rest of its zygote request, and where results will be.
type Output struct {
	Flags uint64
	Execs Execs
	// Forks: the container is a second child, whose pid is in the slot; the first ends at once.
	Forks bool
	PID   zygote.Slot
	// Maps: at its first gate the child waits for the maps of its user namespace.
	Maps bool
	// Console is the slot of the terminal's master descriptor, when the process has a terminal.
	Console zygote.Slot
}

// NamespacePath is a namespace to join.
type NamespacePath struct {
	Type specs.LinuxNamespaceType
	Path string
}

// cloneFlag is 0 for a type that is not known.
func cloneFlag(t specs.LinuxNamespaceType) uint64 {
	switch t {
	case specs.PIDNamespace:
		return unix.CLONE_NEWPID
	case specs.NetworkNamespace:
		return unix.CLONE_NEWNET
	case specs.MountNamespace:
		return unix.CLONE_NEWNS
	case specs.IPCNamespace:
		return unix.CLONE_NEWIPC
	case specs.UTSNamespace:
		return unix.CLONE_NEWUTS
	case specs.CgroupNamespace:
		return unix.CLONE_NEWCGROUP
	}
	return 0
}

// Namespaces splits the spec's list into those to make (clone flags) and those to join.
func Namespaces(s *specs.Spec) (make uint64, join []NamespacePath, err error) {
	var seen uint64
	for _, n := range s.Linux.Namespaces {
		f := fullCloneFlag(n.Type)
		switch {
		case f == 0:
			return 0, nil, fmt.Errorf("%s namespace: not built yet: %w", n.Type, errdefs.ErrNotImplemented)
		case seen&f != 0:
			return 0, nil, fmt.Errorf("%s namespace listed twice: %w", n.Type, errdefs.ErrInvalidArgument)
		case n.Path == "":
			make |= f
		case n.Type == specs.MountNamespace || n.Type == specs.CgroupNamespace:
			return 0, nil, fmt.Errorf("joining the %s namespace %s: not built yet: %w", n.Type, n.Path, errdefs.ErrNotImplemented)
		default:
			join = append(join, NamespacePath{n.Type, n.Path})
		}
		seen |= f
	}
	if make&unix.CLONE_NEWNS == 0 {
		return 0, nil, fmt.Errorf("a container needs a mount namespace of its own: %w", errdefs.ErrInvalidArgument)
	}
	slices.SortStableFunc(join, func(a, b NamespacePath) int { return joinRank(a.Type) - joinRank(b.Type) })
	return make, join, nil
}

// Flags are the clone flags of namespaces that are joined.
func Flags(join []NamespacePath) uint64 {
	var f uint64
	for _, n := range join {
		f |= fullCloneFlag(n.Type)
	}
	return f
}

// ownUser says whether the container gets a new user namespace.
func ownUser(s *specs.Spec) bool {
	return slices.ContainsFunc(s.Linux.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == specs.UserNamespace && n.Path == "" })
}

// InUser says whether the container is in a user namespace other than the host's.
func InUser(s *specs.Spec) bool {
	return slices.ContainsFunc(s.Linux.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == specs.UserNamespace })
}

// Check refuses what the compiler would not do.
func Check(s *specs.Spec) error {
	refuse := func(what string) error { return fmt.Errorf("%s: not built yet: %w", what, errdefs.ErrNotImplemented) }
	invalid := func(what string) error { return fmt.Errorf("%s: %w", what, errdefs.ErrInvalidArgument) }
	switch {
	case s == nil || s.Process == nil || s.Root == nil || s.Linux == nil:
		return invalid("spec without process, root or linux part")
	case len(s.Process.Args) == 0 || s.Process.Args[0] == "":
		return invalid("no command given: set arguments or use an image with a command")
	case s.Hooks != nil:
		return refuse("hooks")
	case ownUser(s) != (len(s.Linux.UIDMappings) > 0) || ownUser(s) != (len(s.Linux.GIDMappings) > 0):
		return invalid("linux.uidMappings, linux.gidMappings: a user namespace of the container's own needs both, and they need one")
	case s.Linux.RootfsPropagation != "" && s.Linux.RootfsPropagation != "private" && s.Linux.RootfsPropagation != "rprivate":
		return refuse("root propagation " + s.Linux.RootfsPropagation)
	case s.Process.ApparmorProfile != "" && s.Process.ApparmorProfile != "unconfined":
		return refuse("AppArmor profile " + s.Process.ApparmorProfile)
	case s.Process.SelinuxLabel != "" || s.Linux.MountLabel != "":
		return refuse("SELinux labels")
	case s.Linux.Personality != nil:
		return refuse("personality")
	case s.Linux.IntelRdt != nil:
		return refuse("Intel RDT")
	case s.Process.IOPriority != nil, s.Process.Scheduler != nil, s.Process.ExecCPUAffinity != nil:
		return refuse("I/O priority, scheduler policy or exec affinity")
	case len(s.Linux.TimeOffsets) > 0:
		return refuse("time offsets")
	}
	return nil
}

// Compile adds the whole program of a container's first process.
func Compile(p *zygote.Program, in Input) (Output, error) {
	var out Output
	s := in.Spec
	if err := Check(s); err != nil {
		return out, err
	}
	flags, join, err := Namespaces(s)
	if err != nil {
		return out, err
	}
	gate := zygote.FileFD(3)
	p.Enter()
	fd := gate + 1
	fd = joinGroups(p, fd, in.Tasks, in.HasCgroup)
	at, err := out.place(p, s, join, flags, fd)
	if err != nil {
		return out, err
	}
	if flags&unix.CLONE_NEWCGROUP != 0 {
		// Only now: the new namespace's root is the group the process is in.
		p.Do("unshare cgroup namespace", unix.SYS_UNSHARE, unix.CLONE_NEWCGROUP)
	}
	plan := rootfs.Plan{Spec: s, Rootfs: in.Rootfs, Cgroups: in.Cgroups, LowerdirAppend: in.Host.LowerdirAppend,
		Shared: at.trees, Mounted: func(b rootfs.Built) error { return sysctls(p, s, b, !at.early) }}
	in.prepared(&plan, at.fd)
	if at.user {
		in.Host, plan.BindDevices, plan.AttachAt = InUserNamespace(in.Host), true, "/usr" // where everybody may go; nothing of it is needed
	}
	fs, err := rootfs.Add(p, plan)
	if err != nil {
		return out, err
	}
	out.Console = fs.Console
	if err := identity(p, s, flags); err != nil {
		return out, err
	}
	if s.Process.Terminal {
		p.Gate(gate) // the supervisor takes the terminal's master before the program closes it
	}
	init := addInit(p, in.Init, at.fd, gate+1)
	// No directory is open when the working directory is entered: no way out by /proc/self/fd.
	p.Do("close all", unix.SYS_CLOSE_RANGE, gate+1+init.files(), uintptr(^uint32(0)), 0)
	chdir(p, s.Process.Cwd)
	if !s.Process.Terminal {
		p.Gate(gate)
	}
	out.Execs, err = drop(p, in.Host, s.Process, ending{filter: in.Filter, init: init})
	return out, err
}

// prepared says which descriptors are mounts that the supervisor made.
func (in Input) prepared(plan *rootfs.Plan, fd int) {
	if in.Init {
		fd++
	}
	if in.HasRoot {
		plan.Root = fd
		fd++
	}
	if len(in.Trees) == 0 {
		return
	}
	plan.Trees, plan.TreeDirs = map[int]int{}, map[int]bool{}
	for i, t := range in.Trees {
		plan.Trees[t.Mount], plan.TreeDirs[t.Mount] = fd+i, t.Dir
	}
}

// joinGroups moves the single-threaded child into its v1 groups through their tasks files, the cheap way, and closes all group handles.
func joinGroups(p *zygote.Program, fd, tasks int, v2 bool) int {
	for range tasks {
		p.Do("join cgroup", unix.SYS_WRITE, fd, p.String("0"), 1)
		p.Do("close", unix.SYS_CLOSE, fd)
		fd++
	}
	if v2 {
		p.Do("close", unix.SYS_CLOSE, fd)
		fd++
	}
	return fd
}

// identity names the machine the container believes to be and brings its loopback up.
func identity(p *zygote.Program, s *specs.Spec, flags uint64) error {
	if s.Hostname != "" || s.Domainname != "" {
		if flags&unix.CLONE_NEWUTS == 0 {
			return fmt.Errorf("hostname %q needs a UTS namespace of the container's own: %w", s.Hostname, errdefs.ErrInvalidArgument)
		}
	}
	if s.Hostname != "" {
		p.Do("sethostname", unix.SYS_SETHOSTNAME, s.Hostname, len(s.Hostname))
	}
	if s.Domainname != "" {
		p.Do("setdomainname", unix.SYS_SETDOMAINNAME, s.Domainname, len(s.Domainname))
	}
	if flags&unix.CLONE_NEWNET != 0 {
		defer p.Scope()()
		ifr := make([]byte, 40)
		copy(ifr, "lo")
		ifr[16] = unix.IFF_UP | unix.IFF_RUNNING
		sock := p.Get("socket", unix.SYS_SOCKET, unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		p.Do("loopback up", unix.SYS_IOCTL, sock, unix.SIOCSIFFLAGS, p.Bytes(ifr))
	}
	return nil
}

// sysctls writes namespaced kernel parameters through the container's own procfs; those of the network may have been written before.
func sysctls(p *zygote.Program, s *specs.Spec, fs rootfs.Built, net bool) error {
	if len(s.Linux.Sysctl) == 0 {
		return nil
	}
	if !fs.HasProc {
		return fmt.Errorf("sysctls need a proc mount on /proc: %w", errdefs.ErrInvalidArgument)
	}
	if err := CheckSysctls(s); err != nil {
		return err
	}
	for _, n := range sysctlNames(s) {
		if net || !isNetSysctl(n) {
			writeSysctl(p, fs.Proc, "sys/", n, s.Linux.Sysctl[n])
		}
	}
	return nil
}

func sysctlNames(s *specs.Spec) []string {
	names := make([]string, 0, len(s.Linux.Sysctl))
	for n := range s.Linux.Sysctl {
		names = append(names, n)
	}
	slices.Sort(names)
	return names
}

func isNetSysctl(name string) bool { return strings.HasPrefix(sysctlPath(name), "net/") }

func writeSysctl(p *zygote.Program, dir any, prefix, name, value string) {
	defer p.Scope()()
	f := p.Get("open sysctl "+name, unix.SYS_OPENAT, dir, prefix+sysctlPath(name), unix.O_WRONLY|unix.O_CLOEXEC, 0)
	p.Do("sysctl "+name+"="+value, unix.SYS_WRITE, f, p.String(value), len(value))
}

// CheckSysctls refuses kernel parameters that are not of a namespace of the spec.
func CheckSysctls(s *specs.Spec) error {
	for n, v := range s.Linux.Sysctl {
		if err := sysctlAllowed(n, v, s); err != nil {
			return err
		}
	}
	return nil
}

// sysctlPath turns a name into a path; with dots as separators a slash stands for a dot inside a name, and the other way round.
func sysctlPath(n string) string {
	if i := strings.IndexAny(n, "./"); i >= 0 && n[i] == '/' {
		return n
	}
	return strings.NewReplacer(".", "/", "/", ".").Replace(n)
}

func sysctlAllowed(name, value string, s *specs.Spec) error {
	has := func(t specs.LinuxNamespaceType) bool {
		return slices.ContainsFunc(s.Linux.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == t })
	}
	rel := sysctlPath(name)
	if rel != path.Clean(rel) || strings.HasPrefix(rel, "..") || strings.HasPrefix(rel, "/") || strings.ContainsAny(value, "\n\x00") {
		return fmt.Errorf("sysctl %q=%q is malformed: %w", name, value, errdefs.ErrInvalidArgument)
	}
	ns := specs.LinuxNamespaceType("")
	switch {
	case strings.HasPrefix(rel, "net/"):
		ns = specs.NetworkNamespace
	case slices.Contains([]string{"kernel/msgmax", "kernel/msgmnb", "kernel/msgmni", "kernel/sem", "kernel/shmall", "kernel/shmmax",
		"kernel/shmmni", "kernel/shm_rmid_forced"}, rel), strings.HasPrefix(rel, "fs/mqueue/"):
		ns = specs.IPCNamespace
	case rel == "kernel/domainname":
		ns = specs.UTSNamespace
	default:
		return fmt.Errorf("sysctl %q changes the whole host: only those of a namespace can be set: %w", name, errdefs.ErrInvalidArgument)
	}
	if !has(ns) {
		return fmt.Errorf("sysctl %q needs a %s namespace of the container's own: %w", name, ns, errdefs.ErrInvalidArgument)
	}
	return nil
}
