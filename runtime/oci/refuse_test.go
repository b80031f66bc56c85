package oci

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

func ptr[T any](v T) *T { return &v }

// refusal is a change of a good config and what the refusal must name.
type refusal struct {
	field  string
	change func(*specs.Spec)
}

func refusedProcess() []refusal {
	return []refusal{
		{"process.args", func(s *specs.Spec) { s.Process.Args = nil }},
		{"process.args", func(s *specs.Spec) { s.Process.Args = []string{"/inside", "a\x00b"} }},
		{"process.cwd", func(s *specs.Spec) { s.Process.Cwd = "tmp" }},
		{"process.env[1]", func(s *specs.Spec) { s.Process.Env = append(s.Process.Env[:1:1], "=x") }},
		{"process.env[0]", func(s *specs.Spec) { s.Process.Env = []string{"A=\x00"} }},
		{"process.capabilities.bounding", func(s *specs.Spec) { s.Process.Capabilities.Bounding = []string{"CAP_FLY"} }},
		{"process.capabilities.effective", func(s *specs.Spec) { s.Process.Capabilities.Effective = []string{"NET_RAW"} }},
		{"process.capabilities.permitted", func(s *specs.Spec) { s.Process.Capabilities.Permitted = []string{""} }},
		{"process.capabilities.inheritable", func(s *specs.Spec) { s.Process.Capabilities.Inheritable = []string{"cap_chown"} }},
		{"process.capabilities.ambient", func(s *specs.Spec) { s.Process.Capabilities.Ambient = []string{"CAP_ALL"} }},
		{"process.rlimits[0].type", func(s *specs.Spec) { s.Process.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_JOY"}} }},
		{"process.rlimits[1].type", func(s *specs.Spec) {
			s.Process.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_CORE"}, {Type: "RLIMIT_CORE"}}
		}},
		{"process.rlimits[0].soft", func(s *specs.Spec) { s.Process.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_CORE", Soft: 2, Hard: 1}} }},
		{"process.apparmorProfile", func(s *specs.Spec) { s.Process.ApparmorProfile = "strict" }},
		{"process.selinuxLabel", func(s *specs.Spec) { s.Process.SelinuxLabel = "a:b:c:d" }},
		{"process.oomScoreAdj", func(s *specs.Spec) { s.Process.OOMScoreAdj = ptr(1001) }},
		{"process.user.uid", func(s *specs.Spec) { s.Process.User.UID = 1<<32 - 1 }},
		{"process.user.gid", func(s *specs.Spec) { s.Process.User.GID = 1<<32 - 1 }},
		{"process.user.additionalGids", func(s *specs.Spec) { s.Process.User.AdditionalGids = []uint32{1<<32 - 1} }},
		{"process.user.umask", func(s *specs.Spec) { s.Process.User.Umask = ptr(uint32(0o1000)) }},
		{"process.consoleSize", func(s *specs.Spec) { s.Process.ConsoleSize = &specs.Box{Height: 1 << 16} }},
		{"process.terminal", func(s *specs.Spec) { s.Process.Terminal = true }},
		{"process.ioPriority.class", func(s *specs.Spec) { s.Process.IOPriority = &specs.LinuxIOPriority{Class: "IOPRIO_CLASS_LUCK"} }},
		{"process.ioPriority.priority", func(s *specs.Spec) {
			s.Process.IOPriority = &specs.LinuxIOPriority{Class: specs.IOPRIO_CLASS_BE, Priority: 8}
		}},
		{"process.scheduler.policy", func(s *specs.Spec) { s.Process.Scheduler = &specs.Scheduler{Policy: specs.SchedISO} }},
		{"process.scheduler.nice", func(s *specs.Spec) { s.Process.Scheduler = &specs.Scheduler{Policy: specs.SchedOther, Nice: 20} }},
		{"process.scheduler.priority", func(s *specs.Spec) { s.Process.Scheduler = &specs.Scheduler{Policy: specs.SchedFIFO} }},
		{"process.scheduler.priority", func(s *specs.Spec) { s.Process.Scheduler = &specs.Scheduler{Policy: specs.SchedOther, Priority: 1} }},
		{"process.scheduler.runtime", func(s *specs.Spec) { s.Process.Scheduler = &specs.Scheduler{Policy: specs.SchedDeadline, Deadline: 5} }},
		{"process.scheduler.flags[0]", func(s *specs.Spec) {
			s.Process.Scheduler = &specs.Scheduler{Policy: specs.SchedOther, Flags: []specs.LinuxSchedulerFlag{specs.SchedFlagUtilClampMin}}
		}},
		{"process.execCPUAffinity.initial", func(s *specs.Spec) { s.Process.ExecCPUAffinity = &specs.CPUAffinity{Initial: "3-1"} }},
		{"process.execCPUAffinity.final", func(s *specs.Spec) { s.Process.ExecCPUAffinity = &specs.CPUAffinity{Final: "all"} }},
	}
}

func refusedLinux() []refusal {
	ns := func(t specs.LinuxNamespaceType, path string) func(*specs.Spec) {
		return func(s *specs.Spec) {
			s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: t, Path: path})
		}
	}
	user := func(uids, gids []specs.LinuxIDMapping) func(*specs.Spec) {
		return func(s *specs.Spec) {
			ns(specs.UserNamespace, "")(s)
			s.Linux.UIDMappings, s.Linux.GIDMappings = uids, gids
			s.Process.User.UID = 70000
		}
	}
	all := []specs.LinuxIDMapping{{HostID: 100000, Size: 65536}}
	return []refusal{
		{"linux.namespaces[6]", ns("dream", "")},
		{"linux.namespaces[6]", ns(specs.PIDNamespace, "")},
		{"linux.namespaces[6]", ns(specs.UserNamespace, "proc/1/ns/user")},
		{"/no/such", ns(specs.TimeNamespace, "/no/such")},
		{"is not a uts namespace", func(s *specs.Spec) { s.Linux.Namespaces[4].Path = "/proc/self/ns/ipc" }},
		{"is not a uts namespace", func(s *specs.Spec) { s.Linux.Namespaces[4].Path = "/etc/passwd" }},
		{"linux.uidMappings", func(s *specs.Spec) { s.Linux.UIDMappings = all }},
		{"linux.uidMappings, linux.gidMappings", user(all, nil)},
		{"linux.uidMappings[0]", user([]specs.LinuxIDMapping{{}}, all)},
		{"linux.gidMappings[1]", user(all, append(all[:1:1], specs.LinuxIDMapping{ContainerID: 65535, HostID: 1, Size: 2}))},
		{"no root", user([]specs.LinuxIDMapping{{ContainerID: 1, HostID: 1, Size: 5}}, all)},
		{"process.user.uid", user(all, all)},
		{"linux.timeOffsets", func(s *specs.Spec) { s.Linux.TimeOffsets = map[string]specs.LinuxTimeOffset{"monotonic": {Secs: 1}} }},
		{"linux.timeOffsets: clock \"wall\"", func(s *specs.Spec) {
			ns(specs.TimeNamespace, "")(s)
			s.Linux.TimeOffsets = map[string]specs.LinuxTimeOffset{"wall": {Secs: 1}}
		}},
		{"linux.timeOffsets.boottime.nanosecs", func(s *specs.Spec) {
			ns(specs.TimeNamespace, "")(s)
			s.Linux.TimeOffsets = map[string]specs.LinuxTimeOffset{"boottime": {Nanosecs: 1e9}}
		}},
		{"hostname", func(s *specs.Spec) { s.Linux.Namespaces = append(s.Linux.Namespaces[:4:4], s.Linux.Namespaces[5]) }},
		{"hostname", func(s *specs.Spec) { s.Hostname = strings.Repeat("x", 65) }},
		{"domainname", func(s *specs.Spec) { s.Domainname = "a\nb" }},
		{"linux.sysctl: sysctl \"kernel.core_pattern\"", func(s *specs.Spec) { s.Linux.Sysctl = map[string]string{"kernel.core_pattern": "x"} }},
		{"linux.sysctl", func(s *specs.Spec) { s.Linux.Sysctl = map[string]string{"net.ipv4.ip_forward": "1\n2"} }},
		{"linux.sysctl", func(s *specs.Spec) {
			s.Linux.Sysctl = map[string]string{"net.ipv4.ip_forward": "1"}
			s.Mounts = s.Mounts[1:]
		}},
		{"linux.mountLabel", func(s *specs.Spec) { s.Linux.MountLabel = "a:b:c:d" }},
		{"linux.rootfsPropagation", func(s *specs.Spec) { s.Linux.RootfsPropagation = "loud" }},
		{"linux.personality", func(s *specs.Spec) { s.Linux.Personality = &specs.LinuxPersonality{Domain: "BSD"} }},
		{"linux.intelRdt", func(s *specs.Spec) { s.Linux.IntelRdt = &specs.LinuxIntelRdt{ClosID: "x"} }},
		{"linux.netDevices", func(s *specs.Spec) { s.Linux.NetDevices = map[string]specs.LinuxNetDevice{"eth0": {}} }},
		{"linux.memoryPolicy.mode", func(s *specs.Spec) { s.Linux.MemoryPolicy = &specs.LinuxMemoryPolicy{Mode: "MPOL_HOPE"} }},
		{"linux.memoryPolicy.nodes", func(s *specs.Spec) { s.Linux.MemoryPolicy = &specs.LinuxMemoryPolicy{Mode: specs.MpolBind} }},
		{"linux.memoryPolicy.flags[0]", func(s *specs.Spec) {
			s.Linux.MemoryPolicy = &specs.LinuxMemoryPolicy{Mode: specs.MpolBind, Nodes: "0", Flags: []specs.MemoryPolicyFlagType{"MPOL_F_X"}}
		}},
		{"linux.maskedPaths[0]", func(s *specs.Spec) { s.Linux.MaskedPaths = []string{"proc/kcore"} }},
		{"linux.readonlyPaths[0]", func(s *specs.Spec) { s.Linux.ReadonlyPaths = []string{""} }},
		{"linux.cgroupsPath", func(s *specs.Spec) { s.Linux.CgroupsPath = "/" }},
		{"linux.cgroupsPath", func(s *specs.Spec) { s.Linux.CgroupsPath = "/a/../../b" }},
		{"linux.cgroupsPath", func(s *specs.Spec) { s.Linux.CgroupsPath = "system.slice:skein:x" }},
		{"linux.devices[0].type", func(s *specs.Spec) { s.Linux.Devices = []specs.LinuxDevice{{Path: "/dev/x", Type: "q"}} }},
		{"linux.devices[0].path", func(s *specs.Spec) { s.Linux.Devices = []specs.LinuxDevice{{Path: "dev/x", Type: "c"}} }},
		{"linux.devices[0].major", func(s *specs.Spec) { s.Linux.Devices = []specs.LinuxDevice{{Path: "/dev/x", Type: "c", Major: -1}} }},
		{"linux.devices[0].fileMode", func(s *specs.Spec) {
			s.Linux.Devices = []specs.LinuxDevice{{Path: "/dev/x", Type: "c", FileMode: ptr(os.FileMode(0o1000000))}}
		}},
	}
}

func refusedFilters() []refusal {
	rule := func(r specs.LinuxSyscall) func(*specs.Spec) {
		return func(s *specs.Spec) {
			s.Linux.Seccomp = &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Syscalls: []specs.LinuxSyscall{r}}
		}
	}
	kill := []string{"kill"}
	return []refusal{
		{"linux.seccomp.defaultAction", func(s *specs.Spec) { s.Linux.Seccomp.DefaultAction = "SCMP_ACT_SING" }},
		{"linux.seccomp.defaultAction", func(s *specs.Spec) { s.Linux.Seccomp.DefaultAction = specs.ActNotify }},
		{"linux.seccomp.defaultAction", func(s *specs.Spec) { s.Linux.Seccomp.DefaultErrnoRet = ptr(uint(5000)) }},
		{"linux.seccomp.architectures[0]", func(s *specs.Spec) { s.Linux.Seccomp.Architectures = []specs.Arch{"SCMP_ARCH_PDP11"} }},
		{"linux.seccomp.flags[0]", func(s *specs.Spec) { s.Linux.Seccomp.Flags = []specs.LinuxSeccompFlag{"SECCOMP_FILTER_FLAG_NICE"} }},
		{"linux.seccomp.flags[0]", func(s *specs.Spec) {
			s.Linux.Seccomp.Flags = []specs.LinuxSeccompFlag{specs.LinuxSeccompFlagWaitKillableRecv}
		}},
		{"linux.seccomp.listenerPath", func(s *specs.Spec) { s.Linux.Seccomp.ListenerPath = "/run/agent" }},
		{"linux.seccomp.listenerPath", rule(specs.LinuxSyscall{Names: kill, Action: specs.ActNotify})},
		{"linux.seccomp.syscalls[0].names", rule(specs.LinuxSyscall{Names: []string{"write"}, Action: specs.ActNotify})},
		{"linux.seccomp.syscalls[0].names", rule(specs.LinuxSyscall{Action: specs.ActErrno})},
		{"linux.seccomp.syscalls[0].action", rule(specs.LinuxSyscall{Names: kill, Action: "SCMP_ACT_X"})},
		{"linux.seccomp.syscalls[0].action", rule(specs.LinuxSyscall{Names: kill, Action: specs.ActLog, ErrnoRet: ptr(uint(1))})},
		{"linux.seccomp.syscalls[0].args[0].index", rule(specs.LinuxSyscall{Names: kill, Action: specs.ActErrno, Args: []specs.LinuxSeccompArg{{Index: 6, Op: specs.OpEqualTo}}})},
		{"linux.seccomp.syscalls[0].args[0].op", rule(specs.LinuxSyscall{Names: kill, Action: specs.ActErrno, Args: []specs.LinuxSeccompArg{{Op: "SCMP_CMP_ISH"}}})},
	}
}

func refusedFiles() []refusal {
	mount := func(m specs.Mount) func(*specs.Spec) { return func(s *specs.Spec) { s.Mounts = append(s.Mounts, m) } }
	hook := func(h specs.Hook) func(*specs.Spec) {
		return func(s *specs.Spec) { s.Hooks = &specs.Hooks{Poststop: []specs.Hook{h}} }
	}
	return []refusal{
		{"ociVersion", func(s *specs.Spec) { s.Version = "2.0.0" }},
		{"ociVersion", func(s *specs.Spec) { s.Version = "" }},
		{"root.path", func(s *specs.Spec) { s.Root = nil }},
		{"root.path", func(s *specs.Spec) { s.Root.Path = "nosuch" }},
		{"root.path", func(s *specs.Spec) { s.Root.Path = "/etc/passwd" }},
		{"windows", func(s *specs.Spec) { s.Windows = &specs.Windows{} }},
		{"annotations", func(s *specs.Spec) { s.Annotations = map[string]string{"": "x"} }},
		{"mounts[7].destination", mount(specs.Mount{Destination: "x", Type: "tmpfs"})},
		{"mounts[7].destination", mount(specs.Mount{Destination: "/../", Type: "tmpfs"})},
		{"mounts[7].source", mount(specs.Mount{Destination: "/x", Type: "bind", Source: "/no/such"})},
		{"mounts[7].source", mount(specs.Mount{Destination: "/x", Type: "bind"})},
		{"mounts[7].type", mount(specs.Mount{Destination: "/x"})},
		{"mounts[7].type", mount(specs.Mount{Destination: "/x", Type: "nosuchfs"})},
		{"mounts[7].options", mount(specs.Mount{Destination: "/x", Type: "tmpfs", Options: []string{"size=lots"}})},
		{"mounts[7].options", mount(specs.Mount{Destination: "/x", Type: "tmpfs", Options: []string{"mode=999"}})},
		{"mounts[7].options", mount(specs.Mount{Destination: "/x", Type: "proc", Options: []string{"nosuch"}})},
		{"mounts[7].options", mount(specs.Mount{Destination: "/x", Type: "proc", Options: []string{"tmpcopyup"}})},
		{"mounts[7].uidMappings", mount(specs.Mount{Destination: "/x", Type: "bind", Source: "/etc", Options: []string{"idmap"}})},
		{"mounts[7]", mount(specs.Mount{Destination: "/x", Type: "tmpfs", Options: []string{"ridmap"}})},
		{"hooks.poststop[0].path", hook(specs.Hook{Path: "x"})},
		{"hooks.poststop[0].timeout", hook(specs.Hook{Path: "/x", Timeout: ptr(0)})},
		{"hooks.poststop[0].env[0]", hook(specs.Hook{Path: "/x", Env: []string{"x"}})},
	}
}

func refusedLimits() []refusal {
	limit := func(f func(*specs.LinuxResources)) func(*specs.Spec) {
		return func(s *specs.Spec) { f(s.Linux.Resources) }
	}
	mem := func(m specs.LinuxMemory) func(*specs.Spec) {
		return limit(func(r *specs.LinuxResources) { r.Memory = &m })
	}
	cpu := func(c specs.LinuxCPU) func(*specs.Spec) { return limit(func(r *specs.LinuxResources) { r.CPU = &c }) }
	io := func(b specs.LinuxBlockIO) func(*specs.Spec) {
		return limit(func(r *specs.LinuxResources) { r.BlockIO = &b })
	}
	huge := func(l ...specs.LinuxHugepageLimit) func(*specs.Spec) {
		return limit(func(r *specs.LinuxResources) { r.HugepageLimits = l })
	}
	return []refusal{
		{"linux.resources.memory.limit", mem(specs.LinuxMemory{Limit: ptr(int64(-7))})},
		{"linux.resources.memory.reservation", mem(specs.LinuxMemory{Limit: ptr(int64(8 << 20)), Reservation: ptr(int64(9 << 20))})},
		{"linux.resources.memory.swap", mem(specs.LinuxMemory{Limit: ptr(int64(8 << 20)), Swap: ptr(int64(1 << 20))})},
		{"linux.resources.memory.kernelTCP", mem(specs.LinuxMemory{KernelTCP: ptr(int64(-2))})},
		{"linux.resources.memory.swappiness", mem(specs.LinuxMemory{Swappiness: ptr(uint64(101))})},
		{"linux.resources.memory.useHierarchy", mem(specs.LinuxMemory{UseHierarchy: ptr(false)})},
		{"linux.resources.cpu.quota", cpu(specs.LinuxCPU{Quota: ptr(int64(-2))})},
		{"linux.resources.cpu.quota", cpu(specs.LinuxCPU{Quota: ptr(int64(10))})},
		{"linux.resources.cpu.period", cpu(specs.LinuxCPU{Period: ptr(uint64(5))})},
		{"linux.resources.cpu.burst", cpu(specs.LinuxCPU{Quota: ptr(int64(5000)), Burst: ptr(uint64(6000))})},
		{"linux.resources.cpu.idle", cpu(specs.LinuxCPU{Idle: ptr(int64(2))})},
		{"linux.resources.cpu.cpus", cpu(specs.LinuxCPU{Cpus: "both"})},
		{"linux.resources.cpu.mems", cpu(specs.LinuxCPU{Mems: "/"})},
		{"linux.resources.cpu.realtimeRuntime", cpu(specs.LinuxCPU{RealtimeRuntime: ptr(int64(-2))})},
		{"linux.resources.pids.limit", limit(func(r *specs.LinuxResources) { r.Pids = &specs.LinuxPids{Limit: ptr(int64(-2))} })},
		{"linux.resources.blockIO.weight", io(specs.LinuxBlockIO{Weight: ptr(uint16(5))})},
		{"linux.resources.blockIO.leafWeight", io(specs.LinuxBlockIO{LeafWeight: ptr(uint16(1001))})},
		{"linux.resources.blockIO.throttleReadBpsDevice[0]", func(s *specs.Spec) {
			d := specs.LinuxThrottleDevice{Rate: 1}
			d.Major = -1
			io(specs.LinuxBlockIO{ThrottleReadBpsDevice: []specs.LinuxThrottleDevice{d}})(s)
		}},
		{"linux.resources.hugepageLimits[0].pageSize", huge(specs.LinuxHugepageLimit{Pagesize: "2mb"})},
		{"linux.resources.hugepageLimits[1].pageSize", huge(specs.LinuxHugepageLimit{Pagesize: "2MB"}, specs.LinuxHugepageLimit{Pagesize: "2MB"})},
		{"linux.resources.network.priorities[0].name", limit(func(r *specs.LinuxResources) {
			r.Network = &specs.LinuxNetwork{Priorities: []specs.LinuxInterfacePriority{{Name: "a b"}}}
		})},
		{"linux.resources.rdma", limit(func(r *specs.LinuxResources) { r.Rdma = map[string]specs.LinuxRdma{"mlx0": {}} })},
		{"linux.resources.unified", limit(func(r *specs.LinuxResources) { r.Unified = map[string]string{"../memory.max": "1"} })},
		{"linux.resources.unified[nosuch.max]", limit(func(r *specs.LinuxResources) { r.Unified = map[string]string{"nosuch.max": "1"} })},
		{"linux.resources.devices[0].type", limit(func(r *specs.LinuxResources) { r.Devices = []specs.LinuxDeviceCgroup{{Type: "ab"}} })},
		{"linux.resources.devices[0].access", limit(func(r *specs.LinuxResources) { r.Devices = []specs.LinuxDeviceCgroup{{Access: "x"}} })},
		{"linux.resources.devices[0].major", limit(func(r *specs.LinuxResources) { r.Devices = []specs.LinuxDeviceCgroup{{Major: ptr(int64(-2))}} })},
	}
}

// TestRefused: what cannot be served is refused with the field's name and a kind, before anything is made.
func TestRefused(t *testing.T) {
	w := newWorld(t)
	var all []refusal
	for _, l := range [][]refusal{refusedProcess(), refusedLinux(), refusedFilters(), refusedFiles(), refusedLimits()} {
		all = append(all, l...)
	}
	before := w.mounts()
	for _, r := range all {
		s := w.spec("exit", "0")
		r.change(s)
		c, err := w.create(s)
		switch {
		case err == nil:
			t.Errorf("%s: accepted", r.field)
			_ = c.Delete(true)
		case !strings.Contains(err.Error(), r.field):
			t.Errorf("%s: %v", r.field, err)
		case !errdefs.IsInvalidArgument(err) && !errdefs.IsNotImplemented(err) && !errdefs.IsFailedPrecondition(err):
			t.Errorf("%s: no kind: %v", r.field, err)
		}
		// The root of all containers is made with the first of them: nothing has come so far.
		if _, err := os.Stat(w.Root); !errors.Is(err, os.ErrNotExist) {
			t.Fatalf("%s: something was made: %v", r.field, err)
		}
	}
	if after := w.mounts(); after != before {
		t.Errorf("%d mounts before, %d after", before, after)
	}
	w.clean()
	t.Logf("%d configs", len(all))
}

// TestRefusedDocument: what is wrong with the call or the document itself.
func TestRefusedDocument(t *testing.T) {
	w := newWorld(t)
	for doc, want := range map[string]string{
		"":  "JSON ends",
		"x": "JSON has",
		`{"ociVersion":"1.0.0","linux":{"resources":{"memory":{"limit":"1g"}}}}`: "linux.resources.memory.limit",
		`{"ociVersion":"1.0.0","process":{"user":{"uid":-1}}}`:                   "process.user.uid",
		`{"ociVersion":"1.0.0","process":{"noNewPrivileges":"yes"}}`:             "process.noNewPrivileges",
	} {
		if err := os.WriteFile(filepath.Join(w.bundle, configFile), []byte(doc), 0o644); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Create(CreateOptions{ID: "x", Bundle: w.bundle}); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v", doc, err)
		}
	}
	b, _ := json.Marshal(w.spec("exit", "0"))
	if err := os.WriteFile(filepath.Join(w.bundle, configFile), b, 0o644); err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{"", "..", "a/b", "ä", strings.Repeat("x", 300)} {
		if _, err := w.Create(CreateOptions{ID: id, Bundle: w.bundle}); !errdefs.IsInvalidArgument(err) {
			t.Errorf("id %q: %v", id, err)
		}
	}
	for _, n := range []int{-1, 1000, 60} {
		if _, err := w.Create(CreateOptions{ID: "x", Bundle: w.bundle, Preserve: n}); !errdefs.IsInvalidArgument(err) {
			t.Errorf("preserve %d: %v", n, err)
		}
	}
	if _, err := os.Stat(w.Root); !errors.Is(err, os.ErrNotExist) {
		t.Error("something was made")
	}
	_ = os.Remove(filepath.Join(w.bundle, configFile))
	if _, err := w.Create(CreateOptions{ID: "x", Bundle: w.bundle}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("no config: %v", err)
	}
}

// TestFailedCreate: what only the container's own set-up can find out leaves nothing either.
func TestFailedCreate(t *testing.T) {
	w := newWorld(t)
	for want, change := range map[string]func(*specs.Spec){
		"executable file not found in $PATH": func(s *specs.Spec) { s.Process.Args = []string{"nosuch"} },
		"linux.timeOffsets boottime": func(s *specs.Spec) {
			s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.TimeNamespace})
			s.Linux.TimeOffsets = map[string]specs.LinuxTimeOffset{"boottime": {Secs: -1 << 40}}
		},
		"linux.memoryPolicy MPOL_BIND 1000": func(s *specs.Spec) {
			s.Linux.MemoryPolicy = &specs.LinuxMemoryPolicy{Mode: specs.MpolBind, Nodes: "1000"}
		},
	} {
		s := w.spec("exit", "0")
		change(s)
		if c, err := w.create(s); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", want, err)
			if err == nil {
				_ = c.Delete(true)
			}
		}
		w.clean()
	}
	if err := unix.Access(w.Root, unix.F_OK); err != nil {
		t.Error(err)
	}
}
