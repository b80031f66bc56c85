package sandbox

import (
	"encoding/json"
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"skein/runtime/rootfs"
	"skein/runtime/zygote"
)

// CompleteInput is one container to compile with everything the OCI specification's Linux part offers, for a child that is forked
// directly (zygote.Direct).
type CompleteInput struct {
	Host    Host
	Spec    *specs.Spec
	Cgroups []rootfs.CgroupDir
	Filter  Filter
	// Preserve, Tasks, HasCgroup and Join say what the child's descriptors are after stdio and gate: those that the process keeps from 3
	// on, v1 tasks files, the v2 directory, one per namespace to join, in the order of Split, then the trees of bind mounts.
	Preserve  int
	Tasks     int
	HasCgroup bool
	Join      []NamespacePath
	// Trees are the indexes in Spec.Mounts of those trees.
	Trees []int
	// Steps asks for a stop before the root is entered, for hooks.
	Steps bool
	// NewKeyring gives the process a session keyring of its own.
	NewKeyring bool
}

// Gates are where a child waits for its parent's byte, in this order.
type Gates struct {
	Maps    bool // for its user namespace's maps
	Pivot   bool // before the host's root goes away
	Console bool // until the terminal was taken
}

// CompleteOutput is what the parent needs to drive the child.
type CompleteOutput struct {
	Flags   uint64 // for the fork
	Forks   bool   // the container is a second child; PID says which
	PID     zygote.Slot
	Gates   Gates
	CopyUps []rootfs.CopyUp
	Console zygote.Slot
	Execs   Execs
	// Late is the first op after the start gate.
	Late int
	// Listener is the slot of the filter's listener, when it has one; the program then has one more gate, after the start's.
	Listener zygote.Slot
}

func fullCloneFlag(t specs.LinuxNamespaceType) uint64 {
	switch t {
	case specs.UserNamespace:
		return unix.CLONE_NEWUSER
	case specs.TimeNamespace:
		return unix.CLONE_NEWTIME
	}
	return cloneFlag(t)
}

// Split divides the spec's namespaces into clone flags of those to make and the list of those to join, in the order in which they are
// joined: the user namespace last, since it gives up the right to join the host's.
func Split(s *specs.Spec) (flags uint64, join []NamespacePath, err error) {
	var seen uint64
	for i, n := range s.Linux.Namespaces {
		f := fullCloneFlag(n.Type)
		switch {
		case f == 0:
			return 0, nil, fmt.Errorf("linux.namespaces[%d]: type %q is unknown: %w", i, n.Type, errdefs.ErrInvalidArgument)
		case seen&f != 0:
			return 0, nil, fmt.Errorf("linux.namespaces[%d]: %s is listed twice: %w", i, n.Type, errdefs.ErrInvalidArgument)
		case n.Path == "":
			flags |= f
		case !path.IsAbs(n.Path):
			return 0, nil, fmt.Errorf("linux.namespaces[%d]: path %q is not absolute: %w", i, n.Path, errdefs.ErrInvalidArgument)
		default:
			join = append(join, NamespacePath{n.Type, n.Path})
		}
		seen |= f
	}
	slices.SortStableFunc(join, func(a, b NamespacePath) int { return joinRank(a.Type) - joinRank(b.Type) })
	return flags, join, nil
}

func joinRank(t specs.LinuxNamespaceType) int {
	return slices.Index([]specs.LinuxNamespaceType{specs.TimeNamespace, specs.NetworkNamespace, specs.IPCNamespace, specs.UTSNamespace, specs.CgroupNamespace,
		specs.PIDNamespace, specs.MountNamespace, specs.UserNamespace}, t)
}

// NamespaceFlag is the clone flag of a namespace's type, 0 for an unknown one.
func NamespaceFlag(t specs.LinuxNamespaceType) uint64 { return fullCloneFlag(t) }

// CompileComplete adds the program of a container's first process behind what EnterDirect added.
func CompileComplete(p *zygote.Program, in CompleteInput) (CompleteOutput, error) {
	var out CompleteOutput
	s := in.Spec
	flags, _, err := Split(s)
	if err != nil {
		return out, err
	}
	p.Enter()
	gate := zygote.FileFD(3)
	fd := joinGroups(p, gate+1+in.Preserve, in.Tasks, in.HasCgroup)
	if flags&unix.CLONE_NEWTIME != 0 {
		newTime(p, s.Linux.TimeOffsets)
	}
	fd = out.place(p, in.Join, flags, fd)
	newUser := flags&unix.CLONE_NEWUSER != 0
	host := in.Host
	inUser := newUser || slices.ContainsFunc(in.Join, func(n NamespacePath) bool { return n.Type == specs.UserNamespace })
	if newUser {
		out.Gates.Maps = true
		p.Gate(gate)
	}
	if inUser {
		host = InUserNamespace(host)
		p.Do("setgid 0", unix.SYS_SETRESGID, 0, 0, 0)
		p.Do("setuid 0", unix.SYS_SETRESUID, 0, 0, 0)
	}
	if flags&unix.CLONE_NEWCGROUP != 0 {
		p.Do("unshare cgroup namespace", unix.SYS_UNSHARE, unix.CLONE_NEWCGROUP)
	}
	trees := map[int]int{}
	for i, m := range in.Trees {
		trees[m] = fd + i
	}
	steps := func(b rootfs.Built) error {
		out.CopyUps = b.CopyUps
		if in.Steps || len(b.CopyUps) > 0 {
			out.Gates.Pivot = true
			p.Gate(gate)
		}
		return nil
	}
	detached := flags&unix.CLONE_NEWNS == 0 && !slices.ContainsFunc(in.Join, func(n NamespacePath) bool { return n.Type == specs.MountNamespace })
	plan := rootfs.Plan{Detached: detached, Spec: s, Cgroups: in.Cgroups, LowerdirAppend: in.Host.LowerdirAppend, Trees: trees, BindDevices: inUser, AnyMount: true,
		Mounted: func(b rootfs.Built) error { return sysctls(p, s, b, true) }, BeforePivot: steps}
	fs, err := rootfs.Add(p, plan)
	if err != nil {
		return out, err
	}
	out.Console = fs.Console
	named := flags
	if slices.ContainsFunc(in.Join, func(n NamespacePath) bool { return n.Type == specs.UTSNamespace }) {
		named |= unix.CLONE_NEWUTS // the config says what the shared namespace is called
	}
	if err := identity(p, s, named); err != nil {
		return out, err
	}
	if s.Process.Terminal {
		out.Gates.Console = true
		p.Gate(gate)
	}
	in.Host = host
	err = out.finish(p, in, gate)
	return out, err
}

// newTime makes a time namespace, which holds only children, and sets its clocks while it holds none.
func newTime(p *zygote.Program, offsets map[string]specs.LinuxTimeOffset) {
	p.Do("unshare time namespace", unix.SYS_UNSHARE, unix.CLONE_NEWTIME)
	if len(offsets) == 0 {
		return
	}
	defer p.Scope()()
	f := p.Get("open /proc/self/timens_offsets", unix.SYS_OPENAT, unix.AT_FDCWD, "/proc/self/timens_offsets", unix.O_WRONLY|unix.O_CLOEXEC, 0)
	for _, clock := range []string{"monotonic", "boottime"} {
		if o, ok := offsets[clock]; ok {
			v := fmt.Sprintf("%s %d %d", clock, o.Secs, o.Nanosecs)
			p.Do("linux.timeOffsets "+v, unix.SYS_WRITE, f, p.String(v), len(v))
		}
	}
	p.Do("close", unix.SYS_CLOSE, f)
}

// place brings the child into its namespaces. The pid namespace holds only children, and a user namespace's owner may not join others
// any more: then a second child goes on, a sibling of the first.
func (out *CompleteOutput) place(p *zygote.Program, join []NamespacePath, flags uint64, fd int) int {
	out.Flags = flags &^ (unix.CLONE_NEWCGROUP | unix.CLONE_NEWTIME)
	out.Forks = flags&unix.CLONE_NEWTIME != 0
	for _, n := range join {
		out.Forks = out.Forks || n.Type == specs.PIDNamespace || n.Type == specs.UserNamespace || flags&unix.CLONE_NEWUSER != 0
	}
	for _, n := range join {
		p.Do("join "+string(n.Type)+" namespace "+n.Path, unix.SYS_SETNS, fd, uintptr(fullCloneFlag(n.Type)))
		p.Do("close", unix.SYS_CLOSE, fd)
		fd++
	}
	if !out.Forks {
		return fd
	}
	out.PID = p.KeptSlot()
	goOn(p, out.PID, out.Flags)
	out.Flags = 0
	return fd
}

// finish adds what follows the root: the checks whose failure create should tell, the start gate, the loss of privileges, execve.
func (out *CompleteOutput) finish(p *zygote.Program, in CompleteInput, gate int) error {
	proc := in.Spec.Process
	if in.Spec.Linux.Personality != nil {
		d := map[specs.LinuxPersonalityDomain]int{specs.PerLinux: 0, specs.PerLinux32: 8}[in.Spec.Linux.Personality.Domain]
		p.Do("personality", unix.SYS_PERSONALITY, d)
	}
	if in.NewKeyring {
		newKeyring(p)
	}
	if err := memoryPolicy(p, in.Spec.Linux.MemoryPolicy); err != nil {
		return err
	}
	p.Do("close all", unix.SYS_CLOSE_RANGE, gate+1+in.Preserve, uintptr(^uint32(0)), 0)
	chdir(p, proc.Cwd)
	if len(proc.Args) > 0 {
		lookUp(p, proc)
	}
	p.Gate(gate)
	out.Late = p.Ops()
	if len(proc.Args) == 0 {
		p.Exit(0)
		return nil
	}
	end := ending{filter: in.Filter}
	if in.Filter.Notify {
		out.Listener = p.KeptSlot()
		end.listener = out.Listener
	}
	end.preserve(p, gate, in.Preserve)
	var err error
	out.Execs, err = drop(p, in.Host, proc, end)
	return err
}

// lookUp ends the child when its command is not there or cannot be executed; the kernel has the last word at execve.
func lookUp(p *zygote.Program, proc *specs.Process) {
	paths := candidates(proc)
	found := make([]int, 0, len(paths))
	for _, c := range paths {
		found = append(found, p.Try("look for "+c, unix.SYS_FACCESSAT, unix.AT_FDCWD, c, 1))
	}
	last := proc.Args[0]
	name := fmt.Sprintf("exec: %q: stat %s", last, last)
	if !strings.Contains(last, "/") {
		name = fmt.Sprintf("exec: %q: executable file not found in $PATH", last)
	}
	if len(paths) > 0 {
		last = paths[len(paths)-1]
	}
	p.Do(name, unix.SYS_FACCESSAT, unix.AT_FDCWD, last, 1)
	for _, i := range found {
		p.SkipOnSuccess(i)
	}
}

func candidates(proc *specs.Process) []string {
	cmd := proc.Args[0]
	if strings.Contains(cmd, "/") {
		return []string{cmd}
	}
	search := DefaultPath
	for _, v := range proc.Env {
		if s, ok := strings.CutPrefix(v, "PATH="); ok {
			search = s
		}
	}
	var out []string
	for dir := range strings.SplitSeq(search, ":") {
		if path.IsAbs(dir) && len(out) < maxPathEntries {
			out = append(out, path.Join(dir, cmd))
		}
	}
	return out
}

type execsRecord struct {
	Command string
	Slots   []int
	Paths   []string
}

// MarshalJSON keeps the candidates for a process that did not start the child.
func (e Execs) MarshalJSON() ([]byte, error) {
	r := execsRecord{Command: e.Command, Paths: e.paths}
	for _, s := range e.slots {
		r.Slots = append(r.Slots, int(s))
	}
	return json.Marshal(r)
}

// UnmarshalJSON undoes MarshalJSON.
func (e *Execs) UnmarshalJSON(b []byte) error {
	var r execsRecord
	if err := json.Unmarshal(b, &r); err != nil {
		return err
	}
	if len(r.Slots) != len(r.Paths) {
		return fmt.Errorf("%d results for %d candidates: %w", len(r.Slots), len(r.Paths), errdefs.ErrInvalidArgument)
	}
	e.Command, e.paths = r.Command, r.Paths
	for _, s := range r.Slots {
		e.slots = append(e.slots, zygote.Slot(s))
	}
	return nil
}

// FailedIn is Failed for a program of which only the result file is left.
func (e Execs) FailedIn(r *zygote.Result) (int, error) {
	if len(e.slots) == 0 {
		return 0, nil
	}
	return e.failed(r.Slot)
}

// CompileHook adds the program of a hook that runs in a container's namespaces, behind what EnterDirect added. Descriptors after
// stdio: a pidfd of the container's process.
func CompileHook(p *zygote.Program, namespaces uint64, file string, args, env []string) (pid zygote.Slot, e Execs) {
	pid = p.KeptSlot()
	p.Enter()
	fd := zygote.FileFD(3)
	p.Do("join the container's namespaces", unix.SYS_SETNS, fd, uintptr(namespaces))
	a, size := p.CloneArgs(unix.CLONE_PARENT | unix.CLONE_CLEAR_SIGHAND)
	fork := p.Fork(pid, "clone3", unix.SYS_CLONE3, a, size)
	p.Do("setsid", unix.SYS_SETSID)
	p.Do("chdir /", unix.SYS_CHDIR, "/")
	p.Do("close on exec", unix.SYS_CLOSE_RANGE, 3, uintptr(^uint32(0)), unix.CLOSE_RANGE_CLOEXEC)
	p.Do("signal mask", unix.SYS_RT_SIGPROCMASK, unix.SIG_SETMASK, p.Words(0), 0, 8)
	s := p.KeptSlot()
	p.TryInto(s, "execve "+file, unix.SYS_EXECVE, p.String(file), p.Strings(args), p.Strings(env))
	e = Execs{Command: file, slots: []zygote.Slot{s}, paths: []string{file}}
	p.Exit(127)
	p.SkipOnSuccess(fork)
	p.Exit(0)
	return pid, e
}

// InUserNamespace is the host as a process of a user namespace other than ours meets it: it starts with all capabilities, over what the
// namespace owns.
func InUserNamespace(h Host) Host {
	h.Bounding = 1<<len(capNames()) - 1
	return h
}
