package sandbox

import (
	"encoding/binary"
	"errors"
	"fmt"
	"path"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"skein/runtime/initproc"
	"skein/runtime/rootfs"
	"skein/runtime/zygote"
)

// maxPathEntries bounds the candidates tried for a command without a slash.
const maxPathEntries = 64

// Execs remembers the execve candidates of a program, to say what went wrong.
type Execs struct {
	Command string
	slots   []zygote.Slot
	paths   []string
}

// ending is how a program ends. With init, which is nil otherwise, the process becomes the init program, and a child of it the command.
type ending struct {
	filter Filter
	init   *initProgram
	// preserved counts the descriptors from 3 on that the process keeps.
	preserved int
	// listener, when set, is a slot for the filter's listener; the program then stops once more, by reply and gate, so that it is taken.
	listener    zygote.Slot
	reply, gate int
}

// drop adds everything from limits to execve: after it the process is the user's.
func drop(p *zygote.Program, h Host, proc *specs.Process, end ending) (Execs, error) {
	s, err := shed(p, h, proc, end)
	if err != nil {
		return Execs{}, err
	}
	if end.init == nil {
		unblock(p)
	}
	s.confine(p, end)
	if end.init == nil {
		execs := execve(p, proc)
		p.Exit(127)
		return execs, nil
	}
	end.init.split(p, proc.Terminal)
	execs := execve(p, proc)
	p.Exit(127)
	end.init.execute(p, proc)
	return execs, nil
}

// shedding is what a process that gave up its privileges has yet to give up when its filter is there.
type shedding struct{ keep, caps capSets }

// shed takes from the process all privileges that the user's program shall not have, but for what confine needs.
func shed(p *zygote.Program, h Host, proc *specs.Process, end ending) (shedding, error) {
	var s shedding
	if err := rlimits(p, h, proc.Rlimits); err != nil {
		return s, err
	}
	if err := scheduling(p, proc); err != nil {
		return s, err
	}
	caps, err := wanted(h, proc.Capabilities)
	if err != nil {
		return s, err
	}
	for i := range capNames() {
		if h.Bounding&^caps.bounding>>i&1 != 0 {
			p.Do("drop "+capNames()[i], unix.SYS_PRCTL, unix.PR_CAPBSET_DROP, i, 0, 0, 0)
		}
	}
	p.Do("clear ambient", unix.SYS_PRCTL, unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
	user(p, proc.User)
	// Without no_new_privs a filter needs CAP_SYS_ADMIN: that one is kept until it is installed, and capset is the only call the filter
	// must let pass besides execve.
	keep := caps
	if !proc.NoNewPrivileges && len(end.filter.Code) > 0 {
		keep.effective |= 1 << unix.CAP_SYS_ADMIN
		keep.permitted |= 1 << unix.CAP_SYS_ADMIN
	}
	p.Do("capset", unix.SYS_CAPSET, p.Bytes(capHeader()), p.Bytes(keep.data()))
	for i := range capNames() {
		if caps.ambient>>i&1 != 0 {
			p.Do("ambient "+capNames()[i], unix.SYS_PRCTL, unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_RAISE, i, 0, 0)
		}
	}
	p.Do("close on exec", unix.SYS_CLOSE_RANGE, 3+end.preserved, uintptr(^uint32(0)), unix.CLOSE_RANGE_CLOEXEC)
	if proc.NoNewPrivileges {
		p.Do("no new privileges", unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
	}
	return shedding{keep, caps}, nil
}

// confine puts the filter on.
func (s shedding) confine(p *zygote.Program, end ending) {
	install(p, end.filter, end)
	if s.keep != s.caps {
		p.Do("capset without CAP_SYS_ADMIN", unix.SYS_CAPSET, p.Bytes(capHeader()), p.Bytes(s.caps.data()))
	}
}

func unblock(p *zygote.Program) {
	p.Do("signal mask", unix.SYS_RT_SIGPROCMASK, unix.SIG_SETMASK, p.Words(0), 0, 8)
}

// initProgram is what becomes of a container's first process that has its command as a child: package initproc.
type initProgram struct {
	fd      int // open file of the program
	counter zygote.Slot
	pid     zygote.Slot
	fork    int
}

// addInit moves the init program's file from fd to the descriptor given and makes the counter the next; nil when it is not wanted.
func addInit(p *zygote.Program, wanted bool, fd, to int) *initProgram {
	if !wanted {
		return nil
	}
	i := &initProgram{fd: to, counter: p.KeptSlot()}
	if fd != to {
		p.Do("keep the init program", unix.SYS_DUP3, fd, to, unix.O_CLOEXEC)
	}
	p.Do("close", unix.SYS_CLOSE_RANGE, to+1, uintptr(^uint32(0)), 0)
	p.GetInto(i.counter, "eventfd", unix.SYS_EVENTFD2, 0, unix.EFD_CLOEXEC)
	return i
}

// files is how many descriptors it keeps.
func (i *initProgram) files() int {
	if i == nil {
		return 0
	}
	return 2
}

// split parts the command's process from init's. The command's side goes on, in a process group of its own, which gets the terminal.
// From here on only calls are made that every filter must let pass for any shell to work.
func (i *initProgram) split(p *zygote.Program, terminal bool) {
	own := p.KeptSlot()
	i.pid = p.KeptSlot()
	i.fork = p.Fork(i.pid, "fork the command", unix.SYS_CLONE, int(unix.SIGCHLD), 0, 0, 0, 0)
	p.GetInto(own, "getpid", unix.SYS_GETPID)
	p.Do("setpgid", unix.SYS_SETPGID, 0, 0)
	if terminal {
		p.Do("take the terminal", unix.SYS_IOCTL, 0, unix.TIOCSPGRP, p.SlotAddr(own))
	}
	unblock(p)
}

// execute adds init's side, which keeps all signals blocked.
func (i *initProgram) execute(p *zygote.Program, proc *specs.Process) {
	p.SkipOnSuccess(i.fork)
	p.Do("pass the command's pid", unix.SYS_WRITE, i.counter, p.SlotAddr(i.pid), 8)
	p.Do("pass the command's pid", unix.SYS_DUP3, i.counter, initproc.PIDFile, 0)
	argv := append([]string{initproc.Path, "--"}, proc.Args...)
	p.Do("execve "+initproc.Path, unix.SYS_EXECVEAT, i.fd, "", p.Strings(argv), p.Strings(proc.Env), unix.AT_EMPTY_PATH)
}

func install(p *zygote.Program, f Filter, end ending) {
	if len(f.Code) == 0 {
		return
	}
	prog := p.Words(uint64(len(f.Code)/8), uint64(p.Bytes(f.Code)))
	if !f.Notify {
		p.Do("seccomp", unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, uintptr(f.Flags), prog)
		return
	}
	p.GetInto(end.listener, "seccomp", unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, uintptr(f.Flags|unix.SECCOMP_FILTER_FLAG_NEW_LISTENER), prog)
	p.GateBy(end.reply, end.gate)
}

// user changes identity; capabilities are kept over the change and set exactly afterwards.
func user(p *zygote.Program, u specs.User) {
	umask := uint32(0o022)
	if u.Umask != nil {
		umask = *u.Umask
	}
	p.Do("umask", unix.SYS_UMASK, uintptr(umask))
	groups := make([]byte, 4*len(u.AdditionalGids))
	for i, g := range u.AdditionalGids {
		binary.LittleEndian.PutUint32(groups[4*i:], g)
	}
	if len(groups) == 0 {
		p.Do("setgroups", unix.SYS_SETGROUPS, 0, 0)
	} else {
		p.Do("setgroups", unix.SYS_SETGROUPS, len(u.AdditionalGids), p.Bytes(groups))
	}
	p.Do("keep capabilities", unix.SYS_PRCTL, unix.PR_SET_KEEPCAPS, 1, 0, 0, 0)
	p.Do("setgid", unix.SYS_SETRESGID, uintptr(u.GID), uintptr(u.GID), uintptr(u.GID))
	p.Do("setuid", unix.SYS_SETRESUID, uintptr(u.UID), uintptr(u.UID), uintptr(u.UID))
	p.Do("keep no capabilities", unix.SYS_PRCTL, unix.PR_SET_KEEPCAPS, 0, 0, 0, 0)
}

type capSets struct{ bounding, effective, permitted, inheritable, ambient uint64 }

// wanted intersects the sets with what this process may give away.
func wanted(h Host, c *specs.LinuxCapabilities) (capSets, error) {
	var s capSets
	if c == nil {
		return s, nil
	}
	for _, x := range []struct {
		to   *uint64
		from []string
	}{{&s.bounding, c.Bounding}, {&s.effective, c.Effective}, {&s.permitted, c.Permitted}, {&s.inheritable, c.Inheritable}, {&s.ambient, c.Ambient}} {
		bits, err := capBits(x.from)
		if err != nil {
			return s, err
		}
		*x.to = bits & h.Bounding
	}
	s.effective &= s.permitted
	s.ambient &= s.permitted & s.inheritable
	return s, nil
}

func capHeader() []byte {
	return binary.LittleEndian.AppendUint64(nil, unix.LINUX_CAPABILITY_VERSION_3) // pid 0
}

func (c capSets) data() []byte {
	var b []byte
	for _, shift := range []uint{0, 32} {
		for _, set := range []uint64{c.effective, c.permitted, c.inheritable} {
			b = binary.LittleEndian.AppendUint32(b, uint32(set>>shift))
		}
	}
	return b
}

// RlimitNumber is the kernel's number of a limit such as RLIMIT_NOFILE.
func RlimitNumber(name string) (int, bool) {
	n, ok := map[string]int{"RLIMIT_AS": unix.RLIMIT_AS, "RLIMIT_CORE": unix.RLIMIT_CORE, "RLIMIT_CPU": unix.RLIMIT_CPU,
		"RLIMIT_DATA": unix.RLIMIT_DATA, "RLIMIT_FSIZE": unix.RLIMIT_FSIZE, "RLIMIT_LOCKS": unix.RLIMIT_LOCKS,
		"RLIMIT_MEMLOCK": unix.RLIMIT_MEMLOCK, "RLIMIT_MSGQUEUE": unix.RLIMIT_MSGQUEUE, "RLIMIT_NICE": unix.RLIMIT_NICE,
		"RLIMIT_NOFILE": unix.RLIMIT_NOFILE, "RLIMIT_NPROC": unix.RLIMIT_NPROC, "RLIMIT_RSS": unix.RLIMIT_RSS,
		"RLIMIT_RTPRIO": unix.RLIMIT_RTPRIO, "RLIMIT_RTTIME": unix.RLIMIT_RTTIME, "RLIMIT_SIGPENDING": unix.RLIMIT_SIGPENDING,
		"RLIMIT_STACK": unix.RLIMIT_STACK}[name]
	return n, ok
}

// rlimits sets the asked limits; open files go back to the customary soft limit, which Go raised for the supervisor.
func rlimits(p *zygote.Program, h Host, list []specs.POSIXRlimit) error {
	files := false
	for _, l := range list {
		n, ok := RlimitNumber(l.Type)
		if !ok {
			return fmt.Errorf("limit %q is unknown: %w", l.Type, errdefs.ErrInvalidArgument)
		}
		if l.Soft > l.Hard {
			return fmt.Errorf("limit %s: soft %d is above hard %d: %w", l.Type, l.Soft, l.Hard, errdefs.ErrInvalidArgument)
		}
		files = files || n == unix.RLIMIT_NOFILE
		p.Do(fmt.Sprintf("set %s to %d:%d", l.Type, l.Soft, l.Hard), unix.SYS_PRLIMIT64, 0, n, p.Words(l.Soft, l.Hard), 0)
	}
	if !files {
		p.Do("set RLIMIT_NOFILE", unix.SYS_PRLIMIT64, 0, unix.RLIMIT_NOFILE, p.Words(min(1024, h.FilesHard), h.FilesHard), 0)
	}
	return nil
}

// execve tries the command, or its candidates in $PATH, inside the container.
func execve(p *zygote.Program, proc *specs.Process) Execs {
	e := Execs{Command: proc.Args[0]}
	argv, envp := p.Strings(proc.Args), p.Strings(proc.Env)
	if strings.Contains(e.Command, "/") {
		e.paths = []string{e.Command}
	} else {
		search := DefaultPath
		for _, v := range proc.Env {
			if s, ok := strings.CutPrefix(v, "PATH="); ok {
				search = s
			}
		}
		for dir := range strings.SplitSeq(search, ":") {
			if path.IsAbs(dir) && len(e.paths) < maxPathEntries {
				e.paths = append(e.paths, path.Join(dir, e.Command))
			}
		}
	}
	for _, c := range e.paths {
		s := p.KeptSlot()
		p.TryInto(s, "execve "+c, unix.SYS_EXECVE, p.String(c), argv, envp)
		e.slots = append(e.slots, s)
	}
	return e
}

// Failed says why none of the candidates ran, nil when the child ended for another reason, with the exit code engines give: 127 for a
// command that is not there, 126 for one that cannot be run.
func (e Execs) Failed(p *zygote.Program) (int, error) { return e.failed(p.Result) }

func (e Execs) failed(result func(zygote.Slot) int64) (int, error) {
	var found error
	where := e.Command
	for i, s := range e.slots {
		errno := unix.Errno(-result(s))
		switch {
		case errno == 0:
			return 0, nil // not reached
		case errno == unix.ENOENT || errno == unix.ENOTDIR:
		case found == nil || errors.Is(found, unix.EACCES):
			found, where = errno, e.paths[i]
		}
	}
	search := !strings.Contains(e.Command, "/")
	switch {
	case found == nil && search:
		return 127, fmt.Errorf("exec: %q: executable file not found in $PATH", e.Command)
	case found == nil:
		return 127, fmt.Errorf("exec: %q: stat %s: no such file or directory", e.Command, e.Command)
	case errors.Is(found, unix.ENOEXEC):
		return 126, fmt.Errorf("exec %s: exec format error", where)
	}
	return 126, fmt.Errorf("exec: %q: %w", where, found)
}

// preserve moves n descriptors behind the gate down to 3 and up, and reply pipe and gate out of their way.
func (e *ending) preserve(p *zygote.Program, gate, n int) {
	e.reply, e.gate, e.preserved = zygote.ReplyFD, gate, n
	if n == 0 {
		return
	}
	e.reply, e.gate = gate+1+n, gate+2+n
	p.Do("move reply pipe", unix.SYS_DUP3, zygote.ReplyFD, e.reply, unix.O_CLOEXEC)
	p.Do("move gate", unix.SYS_DUP3, gate, e.gate, unix.O_CLOEXEC)
	for i := range n { // upwards: each has been moved before its place is taken
		p.Do("preserve descriptor", unix.SYS_DUP3, gate+1+i, 3+i, 0)
	}
}

// newKeyring leaves the caller's session keyring, whose keys are not the container's. A kernel without keys has nothing to leave.
func newKeyring(p *zygote.Program) {
	p.Try("new session keyring", unix.SYS_KEYCTL, unix.KEYCTL_JOIN_SESSION_KEYRING, 0)
}

// ExecInput is an additional process for a running container.
type ExecInput struct {
	Host    Host
	Process *specs.Process
	Filter  Filter
	// Namespaces are the clone flags of those that differ from the supervisor's.
	Namespaces uint64
	Tasks      int
	HasCgroup  bool
	// Preserve counts the descriptors behind the gate that the process keeps, from 3 on.
	Preserve int
	// NewKeyring gives it a session keyring of its own.
	NewKeyring bool
	// User: the container is in a user namespace other than the supervisor's.
	User bool
}

// ExecOutput is where results will be: PID of the process (the first child only joins and ends), terminal master.
type ExecOutput struct {
	Execs   Execs
	PID     zygote.Slot
	Console zygote.Slot
	// Listener is the slot of a filter's listener, when it has one; the program then has one more gate, after the start's.
	Listener zygote.Slot
}

// CompileExec adds the program of an additional process. Descriptors after stdio: gate, those to preserve, tasks files, v2 directory, pidfd of the
// container's first process. The child joins the groups and namespaces, gives up all that the process shall not have, and clones once
// more into the pid namespace; the second child is the supervisor's too. Processes inside can see that one, and with CAP_SYS_PTRACE do
// what they like with it: it has no privilege that its program will not have, no directory open, and shares no memory.
func CompileExec(p *zygote.Program, in ExecInput) (ExecOutput, error) {
	var out ExecOutput
	var secret [8]byte
	if _, err := unix.Getrandom(secret[:], 0); err != nil { // crypto/rand brings its self-tests into the OCI command's start
		return out, fmt.Errorf("random number: %w", err)
	}
	mark := binary.LittleEndian.Uint64(secret[:]) | 1
	out.PID, out.Console = p.KeptSlot(), p.KeptSlot()
	p.EnterToPart()
	end := ending{filter: in.Filter.admitting(mark)}
	if in.Filter.Notify {
		out.Listener = p.KeptSlot()
		end.filter, end.listener = in.Filter, out.Listener
	}
	if err := in.join(p, out, &end); err != nil {
		return out, err
	}
	if in.User {
		in.Host = InUserNamespace(in.Host)
	}
	s, err := shed(p, in.Host, in.Process, end)
	if err != nil {
		return out, err
	}
	unblock(p)
	p.Seclude()
	if !in.Filter.Notify { // who listens gets the first word: that process cannot be this one
		p.Mark(mark)
		s.confine(p, end)
	}
	fork := p.Part(out.PID)
	p.Do("setsid", unix.SYS_SETSID)
	if in.Process.Terminal {
		rootfs.TakeTerminal(p)
	}
	p.GateBy(end.reply, end.gate)
	if in.Filter.Notify {
		s.confine(p, end)
	}
	out.Execs = execve(p, in.Process)
	p.Report(out.Execs.slots)
	p.Exit(127)
	p.Parted(fork, out.PID)
	return out, nil
}

// join brings the first child where the process shall be: groups, namespaces, terminal, working directory.
func (in ExecInput) join(p *zygote.Program, out ExecOutput, end *ending) error {
	gate := zygote.FileFD(3)
	a := in.Process.ExecCPUAffinity
	if a != nil {
		if err := affinity(p, "initial", a.Initial); err != nil {
			return err
		}
	}
	fd := joinGroups(p, gate+1+in.Preserve, in.Tasks, in.HasCgroup)
	p.Do("join the container's namespaces", unix.SYS_SETNS, fd, uintptr(in.Namespaces))
	p.Do("close", unix.SYS_CLOSE, fd)
	if in.User {
		p.Do("setgid 0", unix.SYS_SETRESGID, 0, 0, 0)
		p.Do("setuid 0", unix.SYS_SETRESUID, 0, 0, 0)
	}
	end.preserve(p, gate, in.Preserve)
	if in.Process.Terminal {
		how := p.Words(unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0, unix.RESOLVE_NO_MAGICLINKS)
		rootfs.OpenTerminal(p, out.Console, func() {
			p.GetInto(out.Console, "open /dev/pts/ptmx", unix.SYS_OPENAT2, unix.AT_FDCWD, "/dev/pts/ptmx", how, 24)
		}, in.Process.ConsoleSize, in.Process.User.UID)
	}
	if a != nil {
		if err := affinity(p, "final", a.Final); err != nil {
			return err
		}
	}
	if in.NewKeyring {
		newKeyring(p)
	}
	chdir(p, in.Process.Cwd)
	return nil
}

// chdir enters the working directory. It is found without magic links: none leads to a directory that this process, which may more than
// its program, has open or can reach through another process.
func chdir(p *zygote.Program, dir string) {
	defer p.Scope()()
	how := p.Words(unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0, unix.RESOLVE_NO_MAGICLINKS)
	fd := p.Get("chdir "+dir, unix.SYS_OPENAT2, unix.AT_FDCWD, dir, how, 24)
	p.Do("chdir "+dir, unix.SYS_FCHDIR, fd)
	p.Do("close", unix.SYS_CLOSE, fd)
}
