package engine

import (
	"os"
	"slices"
	"strings"
	"testing"

	cerrdefs "github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/blkiodev"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"
	"github.com/opencontainers/runtime-spec/specs-go"

	"skein/manager/api"
	"skein/runtime/sandbox"
)

// TestRefusedHostConfigs: what cannot be done is refused before anything is made, by name.
func TestRefusedHostConfigs(t *testing.T) {
	b := newBench(t)
	for name, tc := range map[string]refusal{
		"unknown capability":   {container.HostConfig{CapAdd: []string{"net_raw", "nope"}}, `invalid CapAdd: unknown capability: "CAP_NOPE"`},
		"unknown drop":         {container.HostConfig{CapDrop: []string{"CAP_X"}}, `invalid CapDrop: unknown capability: "CAP_X"`},
		"security option":      {container.HostConfig{SecurityOpt: []string{"bogus"}}, `invalid --security-opt 1: "bogus"`},
		"security key":         {container.HostConfig{SecurityOpt: []string{"a=b"}}, `invalid --security-opt 2: "a=b"`},
		"nnp":                  {container.HostConfig{SecurityOpt: []string{"no-new-privileges=perhaps"}}, `no-new-privileges=perhaps`},
		"apparmor profile":     {container.HostConfig{SecurityOpt: []string{"apparmor=web"}}, `"apparmor=web": this node's engine loads no AppArmor profiles`},
		"label":                {container.HostConfig{SecurityOpt: []string{"label=level:s0"}}, `"label=level:s0": this node's engine sets no SELinux labels`},
		"seccomp not JSON":     {container.HostConfig{SecurityOpt: []string{"seccomp=/no/file.json"}}, `seccomp`},
		"seccomp notify":       {container.HostConfig{SecurityOpt: []string{`seccomp={"defaultAction":"SCMP_ACT_NOTIFY"}`}}, `SCMP_ACT_NOTIFY`},
		"gpus":                 {container.HostConfig{Resources: container.Resources{DeviceRequests: []container.DeviceRequest{{Capabilities: [][]string{{"gpu"}}}}}}, `could not select device driver "" with capabilities: [[gpu]]`},
		"device mode":          {container.HostConfig{Resources: container.Resources{Devices: []container.DeviceMapping{{PathOnHost: "/dev/null", CgroupPermissions: "x"}}}}, `"/dev/null": bad mode specified: x`},
		"device relative":      {container.HostConfig{Resources: container.Resources{Devices: []container.DeviceMapping{{PathOnHost: "null"}}}}, `invalid device "null"`},
		"device cgroup rule":   {container.HostConfig{Resources: container.Resources{DeviceCgroupRules: []string{"c 1:3 rwx"}}}, `invalid device cgroup rule format: 'c 1:3 rwx'`},
		"device rule overrun":  {container.HostConfig{Resources: container.Resources{DeviceCgroupRules: []string{"c 99999999999:3 r"}}}, `invalid device cgroup rule format`},
		"pid mode":             {container.HostConfig{PidMode: "shared"}, `invalid PID mode: shared`},
		"pid of nobody":        {container.HostConfig{PidMode: "container:nope"}, `No such container: nope`},
		"net of nobody":        {container.HostConfig{NetworkMode: "container:nope"}, `No such container: nope`},
		"ipc mode":             {container.HostConfig{IpcMode: "bar"}, `invalid IPC mode: bar`},
		"ipc of nobody":        {container.HostConfig{IpcMode: "container:nope"}, `No such container: nope`},
		"uts mode":             {container.HostConfig{UTSMode: "container:x"}, `invalid UTS mode: container:x`},
		"cgroupns mode":        {container.HostConfig{CgroupnsMode: "x"}, `invalid cgroup namespace mode: x`},
		"shm size":             {container.HostConfig{ShmSize: -1}, `SHM size can not be less than 0`},
		"sysctl of the host":   {container.HostConfig{Sysctls: map[string]string{"vm.swappiness": "1"}}, `sysctl "vm.swappiness" changes the whole host`},
		"net sysctl, net host": {container.HostConfig{NetworkMode: "host", Sysctls: map[string]string{"net.core.somaxconn": "1"}}, `"net.core.somaxconn" needs a network namespace`},
		"ipc sysctl, ipc host": {container.HostConfig{IpcMode: "host", Sysctls: map[string]string{"kernel.msgmax": "1"}}, `"kernel.msgmax" needs a ipc namespace`},
		"sysctl of two lines":  {container.HostConfig{Sysctls: map[string]string{"kernel.msgmax": "1\n2"}}, `is malformed`},
		"sysctl path":          {container.HostConfig{Sysctls: map[string]string{"net/../kernel/core_pattern": "x"}}, `is malformed`},
		"storage size":         {container.HostConfig{StorageOpt: map[string]string{"size": "1G"}}, `invalid --storage-opt [size]: the overlay root filesystem has no quota`},
		"bind mode":            {container.HostConfig{Binds: []string{"/tmp:/x:bogus"}}, `invalid mode: bogus`},
		"bind modes":           {container.HostConfig{Binds: []string{"/tmp:/x:ro,rw"}}, `invalid mode: ro,rw`},
		"bind nocopy":          {container.HostConfig{Binds: []string{"/tmp:/x:nocopy"}}, `field VolumeOptions must not be specified`},
		"bind without source":  {container.HostConfig{Binds: []string{":/x"}}, `invalid volume specification: ':/x'`},
		"volume propagation":   {container.HostConfig{Binds: []string{"vol:/x:rshared"}}, `a volume has no propagation`},
		"source missing":       mounted(mount.Mount{Type: "bind", Source: "/no/such", Target: "/x"}, `invalid mount config for type "bind": bind source path does not exist: /no/such`),
		"source relative":      mounted(mount.Mount{Type: "bind", Source: "such", Target: "/x"}, `invalid mount path: 'such' mount path must be absolute`),
		"source empty":         mounted(mount.Mount{Type: "bind", Target: "/x"}, `field Source must not be empty`),
		"target relative":      mounted(mount.Mount{Type: "bind", Source: "/tmp", Target: "x"}, `invalid mount path: 'x' mount path must be absolute`),
		"target empty":         mounted(mount.Mount{Type: "volume", Source: "vol"}, `field Target must not be empty`),
		"target root":          mounted(mount.Mount{Type: "bind", Source: "/tmp", Target: "/."}, `destination can't be '/'`),
		"foreign options":      mounted(mount.Mount{Type: "bind", Source: "/tmp", Target: "/x", TmpfsOptions: &mount.TmpfsOptions{}}, `field TmpfsOptions must not be specified`),
		"propagation":          mounted(mount.Mount{Type: "bind", Source: "/tmp", Target: "/x", BindOptions: &mount.BindOptions{Propagation: "x"}}, `invalid propagation mode: x`),
		"rro not ro":           mounted(mount.Mount{Type: "bind", Source: "/tmp", Target: "/x", BindOptions: &mount.BindOptions{ReadOnlyForceRecursive: true}}, `ReadOnlyForceRecursive needs ReadOnly`),
		"rro and shared":       mounted(mount.Mount{Type: "bind", Source: "/tmp", Target: "/x", ReadOnly: true, BindOptions: &mount.BindOptions{ReadOnlyForceRecursive: true, Propagation: "rshared"}}, `rprivate, not rshared`),
		"rro not recursive":    mounted(mount.Mount{Type: "bind", Source: "/tmp", Target: "/x", ReadOnly: true, BindOptions: &mount.BindOptions{ReadOnlyForceRecursive: true, NonRecursive: true}}, `mount options conflict`),
		"subpath out":          mounted(mount.Mount{Type: "volume", Source: "vol", Target: "/x", VolumeOptions: &mount.VolumeOptions{Subpath: "../x"}}, `subpath must be a relative path within the volume`),
		"subpath absolute":     mounted(mount.Mount{Type: "volume", Source: "vol", Target: "/x", VolumeOptions: &mount.VolumeOptions{Subpath: "/x"}}, `subpath must be a relative path within the volume`),
		"subpath anonymous":    mounted(mount.Mount{Type: "volume", Target: "/x", VolumeOptions: &mount.VolumeOptions{Subpath: "x"}}, `must not set Subpath when using anonymous volumes`),
		"npipe":                mounted(mount.Mount{Type: "npipe", Source: "x", Target: "/x"}, `"npipe"`),
		"tmpfs source":         mounted(mount.Mount{Type: "tmpfs", Source: "x", Target: "/x"}, `field Source must not be specified`),
		"tmpfs size":           mounted(mount.Mount{Type: "tmpfs", Target: "/x", TmpfsOptions: &mount.TmpfsOptions{SizeBytes: -1}}, `size -1 is negative`),
		"tmpfs mode":           mounted(mount.Mount{Type: "tmpfs", Target: "/x", TmpfsOptions: &mount.TmpfsOptions{Mode: 0o10000}}, `mode 10000`),
		"tmpfs option":         mounted(mount.Mount{Type: "tmpfs", Target: "/x", TmpfsOptions: &mount.TmpfsOptions{Options: [][]string{{"huge", "always"}}}}, `invalid tmpfs option ["huge=always"]`),
		"--tmpfs option":       {container.HostConfig{Tmpfs: map[string]string{"/x": "size=1x"}}, `invalid tmpfs option ["size=1x"]`},
		"--tmpfs flag":         {container.HostConfig{Tmpfs: map[string]string{"/x": "bogus"}}, `invalid tmpfs option ["bogus"]`},
		"--tmpfs target":       {container.HostConfig{Tmpfs: map[string]string{"x": ""}}, `invalid mount path: 'x' mount path must be absolute`},
		"--tmpfs root":         {container.HostConfig{Tmpfs: map[string]string{"/": ""}}, `destination can't be '/'`},
		"duplicate":            {container.HostConfig{Tmpfs: map[string]string{"/x": ""}, Binds: []string{"/tmp:/x"}}, `Duplicate mount point: /x`},
		"memory":               {container.HostConfig{Resources: container.Resources{Memory: 1}}, `Minimum memory limit allowed is 6MB`},
		"memory negative":      {container.HostConfig{Resources: container.Resources{Memory: -1}}, `Minimum memory limit allowed is 6MB`},
		"swap alone":           {container.HostConfig{Resources: container.Resources{MemorySwap: 1 << 30}}, `You should always set the Memory limit`},
		"swap below":           {container.HostConfig{Resources: container.Resources{Memory: 64 << 20, MemorySwap: 32 << 20}}, `Minimum memoryswap limit should be larger`},
		"swap negative":        {container.HostConfig{Resources: container.Resources{MemorySwap: -2}}, `invalid memoryswap limit -2`},
		"swappiness":           {container.HostConfig{Resources: container.Resources{MemorySwappiness: ptr(int64(101))}}, `Invalid value: 101, valid memory swappiness range is 0-100`},
		"reservation":          {container.HostConfig{Resources: container.Resources{MemoryReservation: -5}}, `Minimum memory reservation allowed is 6MB`},
		"reservation above":    {container.HostConfig{Resources: container.Resources{Memory: 10 << 20, MemoryReservation: 20 << 20}}, `Minimum memory limit can not be less than memory reservation limit`},
		"cpus":                 {container.HostConfig{Resources: container.Resources{NanoCPUs: 1 << 50}}, `range of CPUs is from 0.01 to`},
		"cpus negative":        {container.HostConfig{Resources: container.Resources{NanoCPUs: -1}}, `range of CPUs is from 0.01 to`},
		"cpus and period":      {container.HostConfig{Resources: container.Resources{NanoCPUs: 1e9, CPUPeriod: 10000}}, `Nano CPUs and CPU Period cannot both be set`},
		"cpus and quota":       {container.HostConfig{Resources: container.Resources{NanoCPUs: 1e9, CPUQuota: 10000}}, `Nano CPUs and CPU Quota cannot both be set`},
		"period":               {container.HostConfig{Resources: container.Resources{CPUPeriod: 10}}, `CPU cfs period can not be less than 1ms`},
		"quota":                {container.HostConfig{Resources: container.Resources{CPUQuota: 10}}, `CPU cfs quota can not be less than 1ms`},
		"quota negative":       {container.HostConfig{Resources: container.Resources{CPUQuota: -7}}, `invalid CPU cfs quota -7`},
		"shares":               {container.HostConfig{Resources: container.Resources{CPUShares: -2}}, `invalid CPU shares (-2): value must be a positive integer`},
		"realtime":             {container.HostConfig{Resources: container.Resources{CPURealtimePeriod: 10, CPURealtimeRuntime: 20}}, `cpu real-time runtime cannot be higher than cpu real-time period`},
		"realtime negative":    {container.HostConfig{Resources: container.Resources{CPURealtimeRuntime: -1}}, `invalid real-time CPU limit`},
		"cpuset":               {container.HostConfig{Resources: container.Resources{CpusetCpus: "0-8000"}}, `Requested CPUs are not available - requested 0-8000, available: `},
		"cpuset text":          {container.HostConfig{Resources: container.Resources{CpusetCpus: "0,a"}}, `Invalid value 0,a for cpuset cpus`},
		"cpuset backwards":     {container.HostConfig{Resources: container.Resources{CpusetCpus: "1-0"}}, `Invalid value 1-0 for cpuset cpus`},
		"cpuset endless":       {container.HostConfig{Resources: container.Resources{CpusetCpus: "0-4000000000"}}, `Invalid value 0-4000000000 for cpuset cpus`},
		"mems":                 {container.HostConfig{Resources: container.Resources{CpusetMems: "77"}}, `Requested memory nodes are not available - requested 77`},
		"blkio weight":         {container.HostConfig{Resources: container.Resources{BlkioWeight: 5}}, `Range of blkio weight is from 10 to 1000`},
		"blkio device weight":  {container.HostConfig{Resources: container.Resources{BlkioWeightDevice: []*blkiodev.WeightDevice{{Path: "/dev/null", Weight: 5}}}}, `Range of blkio weight is from 10 to 1000`},
		"blkio device":         {container.HostConfig{Resources: container.Resources{BlkioDeviceReadBps: []*blkiodev.ThrottleDevice{{Path: "/dev/nope", Rate: 1}}}}, `"/dev/nope": no such file or directory`},
		"blkio no block":       {container.HostConfig{Resources: container.Resources{BlkioDeviceWriteIOps: []*blkiodev.ThrottleDevice{{Path: "/dev/null", Rate: 1}}}}, `"/dev/null": not a block device`},
		"ulimit name":          {container.HostConfig{Resources: container.Resources{Ulimits: []*container.Ulimit{{Name: "nope"}}}}, `invalid ulimit type: nope`},
		"ulimit soft":          {container.HostConfig{Resources: container.Resources{Ulimits: []*container.Ulimit{{Name: "nofile", Soft: 2, Hard: 1}}}}, `ulimit soft limit must be less than or equal to hard limit: 2 > 1`},
		"ulimit negative":      {container.HostConfig{Resources: container.Resources{Ulimits: []*container.Ulimit{{Name: "nofile", Soft: -5, Hard: -5}}}}, `invalid ulimit nofile: -5:-5`},
		"cgroup parent":        {container.HostConfig{Resources: container.Resources{CgroupParent: "/a/../.."}}, `invalid cgroup parent "/a/../.."`},
		"cgroup root":          {container.HostConfig{Resources: container.Resources{CgroupParent: "/"}}, `invalid cgroup parent "/"`},
		"windows":              {container.HostConfig{Resources: container.Resources{CPUPercent: 1}}, `limits of Windows containers`},
		"oom score":            {container.HostConfig{OomScoreAdj: 1001}, `range for oom score adj is [-1000, 1000]`},
		"extra host":           {container.HostConfig{ExtraHosts: []string{"name"}}, `bad format for add-host: "name"`},
		"extra addr":           {container.HostConfig{ExtraHosts: []string{"name:1.2.3"}}, `invalid IP address in add-host: "1.2.3"`},
		"extra line":           {container.HostConfig{ExtraHosts: []string{"name:1.2.3.4\nx"}}, `bad format for add-host`},
	} {
		t.Run(name, func(t *testing.T) { b.refused(t, tc.hc, tc.want) })
	}
}

type refusal struct {
	hc   container.HostConfig
	want string
}

func mounted(m mount.Mount, want string) refusal {
	return refusal{container.HostConfig{Mounts: []mount.Mount{m}}, want}
}

// refused expects that a container with these wishes is not made.
func (b *bench) refused(t *testing.T, hc container.HostConfig, want string) {
	t.Helper()
	_, err := b.e.ContainerCreate(t.Context(), "xx", container.CreateRequest{Config: &container.Config{Image: "busybox"}, HostConfig: &hc}, "")
	if err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("%v, want %q", err, want)
	} else if !cerrdefs.IsInvalidArgument(err) && !cerrdefs.IsNotImplemented(err) && !cerrdefs.IsNotFound(err) {
		t.Errorf("%v is of no kind", err)
	}
	if n := len(b.e.all()); n != 0 {
		t.Errorf("%d containers were made", n)
	}
}

// specOf runs a container and returns what the runtime was given.
func (b *bench) specOf(t *testing.T, hc container.HostConfig) *specs.Spec {
	t.Helper()
	id := b.run("", hc)
	b.sup.mu.Lock()
	defer b.sup.mu.Unlock()
	return b.sup.configs[id].Spec
}

func TestCapabilities(t *testing.T) {
	held := sandbox.AllCaps()
	def := slices.DeleteFunc(sandbox.DefaultCaps(), func(c string) bool { return !slices.Contains(held, c) })
	without := func(list []string, c string) []string {
		return slices.DeleteFunc(slices.Clone(list), func(o string) bool { return o == c })
	}
	for name, tc := range map[string]struct {
		hc   container.HostConfig
		want []string
	}{
		"default":       {container.HostConfig{}, def},
		"add":           {container.HostConfig{CapAdd: []string{"net_admin"}}, append(slices.Clone(def), "CAP_NET_ADMIN")},
		"drop":          {container.HostConfig{CapDrop: []string{"CHOWN"}}, without(def, "CAP_CHOWN")},
		"add wins":      {container.HostConfig{CapAdd: []string{"CHOWN"}, CapDrop: []string{"CHOWN"}}, def},
		"all":           {container.HostConfig{CapAdd: []string{"all"}}, held},
		"all but one":   {container.HostConfig{CapAdd: []string{"ALL"}, CapDrop: []string{"CAP_SYS_ADMIN"}}, without(held, "CAP_SYS_ADMIN")},
		"none":          {container.HostConfig{CapDrop: []string{"ALL"}}, nil},
		"one":           {container.HostConfig{CapDrop: []string{"ALL"}, CapAdd: []string{"NET_RAW"}}, []string{"CAP_NET_RAW"}},
		"privileged":    {container.HostConfig{Privileged: true, CapDrop: []string{"ALL"}}, held},
		"unknown needs": {container.HostConfig{CapDrop: []string{"SYS_RESOURCE"}}, def},
	} {
		got, err := capabilities(&tc.hc)
		slices.Sort(got)
		slices.Sort(tc.want)
		if err != nil || !slices.Equal(got, tc.want) {
			t.Errorf("%s: %v %v, want %v", name, got, err, tc.want)
		}
	}
}

func TestSecuritySpec(t *testing.T) {
	b := newBench(t)
	s := b.specOf(t, container.HostConfig{})
	if s.Process.NoNewPrivileges || s.Linux.Seccomp == nil || len(s.Linux.MaskedPaths) == 0 || len(s.Linux.ReadonlyPaths) == 0 {
		t.Errorf("default: no_new_privs %v, filter %v, masks %v", s.Process.NoNewPrivileges, s.Linux.Seccomp != nil, s.Linux.MaskedPaths)
	}
	s = b.specOf(t, container.HostConfig{SecurityOpt: []string{"no-new-privileges", "seccomp=unconfined", "apparmor=unconfined", "label=disable", "label:disable"},
		MaskedPaths: []string{}, ReadonlyPaths: []string{}})
	if !s.Process.NoNewPrivileges || s.Linux.Seccomp != nil || len(s.Linux.MaskedPaths)+len(s.Linux.ReadonlyPaths) != 0 {
		t.Errorf("unconfined: %+v %+v", s.Process, s.Linux)
	}
	s = b.specOf(t, container.HostConfig{SecurityOpt: []string{`seccomp={"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["chmod"],"action":"SCMP_ACT_ERRNO"}]}`}})
	if f := s.Linux.Seccomp; f == nil || f.DefaultAction != specs.ActAllow || len(f.Syscalls) != 1 || f.Syscalls[0].Names[0] != "chmod" {
		t.Errorf("custom filter: %+v", f)
	}
	s = b.specOf(t, container.HostConfig{Privileged: true})
	if s.Linux.Seccomp != nil || len(s.Linux.MaskedPaths)+len(s.Linux.ReadonlyPaths) != 0 || len(s.Linux.Devices) < 5 || len(s.Linux.Resources.Devices) != 1 || !s.Linux.Resources.Devices[0].Allow {
		t.Errorf("privileged: %+v", s.Linux)
	}
	for _, m := range s.Mounts {
		if slices.Contains(m.Options, "ro") {
			t.Errorf("privileged: %s is read-only", m.Destination)
		}
	}
	if m := b.specOf(t, container.HostConfig{}).Mounts; !slices.ContainsFunc(m, func(m specs.Mount) bool { return m.Type == "sysfs" && slices.Contains(m.Options, "ro") }) {
		t.Errorf("a privileged container before made the next one's /sys writable: %v", m)
	}
}

func TestDevicesSpec(t *testing.T) {
	b := newBench(t)
	s := b.specOf(t, container.HostConfig{Resources: container.Resources{
		Devices:           []container.DeviceMapping{{PathOnHost: "/dev/null", PathInContainer: "/dev/x", CgroupPermissions: "r"}, {PathOnHost: "/dev/zero"}},
		DeviceCgroupRules: []string{"c 42:* rmw"},
	}})
	if d := s.Linux.Devices; len(d) != 2 || d[0].Path != "/dev/x" || d[0].Minor != 3 || d[1].Path != "/dev/zero" || *d[0].FileMode != 0o666 {
		t.Errorf("devices %+v", d)
	}
	r := s.Linux.Resources.Devices
	if n := len(r); r[n-3].Access != "r" || *r[n-3].Minor != 3 || r[n-2].Access != "rwm" || *r[n-1].Major != 42 || r[n-1].Minor != nil {
		t.Errorf("rules %+v", r)
	}
	for host, want := range map[string]string{"/dev/nope": "no such file or directory", "/proc/self": "not a device node", "/etc/hostname": "not a device node"} {
		id := b.create("", container.HostConfig{Resources: container.Resources{Devices: []container.DeviceMapping{{PathOnHost: host}}}})
		err := b.e.ContainerStart(t.Context(), id)
		if want = `error gathering device information while adding custom device "` + host + `": ` + want; err == nil || err.Error() != want {
			t.Errorf("%v, want %s", err, want)
		}
	}
}

func TestNamespacesSpec(t *testing.T) {
	b := newBench(t)
	donor := b.run("donor", container.HostConfig{IpcMode: "shareable"})
	paths := func(s *specs.Spec) map[specs.LinuxNamespaceType]string {
		out := map[specs.LinuxNamespaceType]string{}
		for _, n := range s.Linux.Namespaces {
			out[n.Type] = n.Path
		}
		return out
	}
	shm := func(s *specs.Spec) string {
		for _, m := range s.Mounts {
			if m.Destination == "/dev/shm" {
				return m.Type + " " + m.Source
			}
		}
		return ""
	}
	s := b.specOf(t, container.HostConfig{})
	if p := paths(s); len(p) != 6 || p["pid"] != "" || shm(s) != "tmpfs shm" || s.Hostname == "" {
		t.Errorf("default: %v, shm %s", p, shm(s))
	}
	s = b.specOf(t, container.HostConfig{PidMode: "host", IpcMode: "host", UTSMode: "host", CgroupnsMode: "host", NetworkMode: "host"})
	if p := paths(s); len(p) != 1 || shm(s) != "bind /dev/shm" || s.Hostname != "" {
		t.Errorf("host: %v, shm %s, hostname %q", p, shm(s), s.Hostname)
	}
	s = b.specOf(t, container.HostConfig{PidMode: "container:donor", IpcMode: "container:donor"})
	if p := paths(s); p["pid"] != "container:"+donor || p["ipc"] != "container:"+donor || shm(s) != "bind container:"+donor {
		t.Errorf("joined: %v, shm %s", p, shm(s))
	}
	if s = b.specOf(t, container.HostConfig{IpcMode: "none"}); shm(s) != "" {
		t.Errorf("ipc none: shm %s", shm(s))
	}
	if r := b.record(donor); r.HostConfig.CgroupnsMode != "private" || r.HostConfig.ShmSize != defaultShmSize {
		t.Errorf("inspect: %+v", r.HostConfig)
	}
	b.run("own", container.HostConfig{})
	b.create("gone", container.HostConfig{})
	for mode, want := range map[container.IpcMode]string{"container:own": "non-shareable IPC", "container:gone": "is not running"} {
		if err := b.e.ContainerStart(t.Context(), b.create("", container.HostConfig{IpcMode: mode})); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %s", mode, err, want)
		}
	}
	_, err := b.e.ContainerCreate(t.Context(), "", container.CreateRequest{Config: &container.Config{Image: "busybox", Hostname: "h"}, HostConfig: &container.HostConfig{UTSMode: "host"}}, "")
	if err == nil || err.Error() != "conflicting options: hostname and the UTS mode" {
		t.Error(err)
	}
}

func TestMountsSpec(t *testing.T) {
	b := newBench(t)
	dir := t.TempDir()
	bind := func(target string, ro bool, o *mount.BindOptions) mount.Mount {
		return mount.Mount{Type: mount.TypeBind, Source: dir, Target: target, ReadOnly: ro, BindOptions: o}
	}
	id := b.run("", container.HostConfig{
		Binds: []string{dir + ":/deep/er", dir + "/made:/ro:ro,rprivate", "vol:/vol:ro,nocopy"},
		Tmpfs: map[string]string{"/run": "exec,size=64m,mode=1770,uid=1,gid=2"},
		Mounts: []mount.Mount{
			bind("/deep", true, &mount.BindOptions{ReadOnlyNonRecursive: true}), bind("/flat", true, &mount.BindOptions{NonRecursive: true}),
			bind("/rro", true, &mount.BindOptions{ReadOnlyForceRecursive: true, Propagation: "rprivate"}), bind("/plain", false, nil),
			{Type: "tmpfs", Target: "/t", ReadOnly: true, TmpfsOptions: &mount.TmpfsOptions{SizeBytes: 4096, Mode: 0o1777, Options: [][]string{{"exec"}, {"nr_inodes", "10"}}}},
			{Type: "volume", Source: "vol", Target: "/part", VolumeOptions: &mount.VolumeOptions{Subpath: "a/b"}},
		},
		ShmSize: 1 << 20,
	})
	s, sub := b.sup.configs[id].Spec, b.sup.configs[id].Subpaths
	got, order := map[string]string{}, []string{}
	for _, m := range s.Mounts {
		got[m.Destination] = m.Type + " " + strings.Join(m.Options, ",")
		order = append(order, m.Destination)
	}
	for target, want := range map[string]string{
		"/deep": "bind rbind,ro,rprivate", "/deep/er": "bind rbind,rprivate", "/flat": "bind bind,ro,rprivate", "/rro": "bind rbind,rro,rprivate",
		"/plain": "bind rbind,rprivate", "/ro": "bind rbind,rro,rprivate", "/vol": "bind rbind,rprivate,rro", "/part": "bind rbind,rprivate",
		"/run": "tmpfs nosuid,nodev,noexec,exec,size=64m,mode=1770,uid=1,gid=2", "/t": "tmpfs nosuid,nodev,noexec,size=4096,mode=1777,exec,nr_inodes=10,ro",
		"/dev/shm": "tmpfs nosuid,noexec,nodev,mode=1777,size=1048576",
	} {
		if got[target] != want {
			t.Errorf("%s: %s, want %s", target, got[target], want)
		}
	}
	if slices.Index(order, "/deep") > slices.Index(order, "/deep/er") {
		t.Errorf("mounted in the order %v", order)
	}
	if len(sub) != 1 || sub["/part"] != "a/b" {
		t.Errorf("subpaths %v", sub)
	}
	if _, err := os.Stat(dir + "/made"); err != nil {
		t.Errorf("the source of -v was not made: %v", err)
	}
	info, err := b.e.ContainerInspect(t.Context(), id, false)
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range info.Mounts {
		if m.Destination == "/ro" && (m.Mode != "ro,rprivate" || m.RW || m.Propagation != "rprivate") {
			t.Errorf("inspect: %+v", m)
		}
	}
}

func TestMountOf(t *testing.T) {
	if at, _, err := mountOf("/proc/self/status"); err != nil || at != "/proc" {
		t.Errorf("%q %v, want /proc", at, err)
	}
	if got := unescapeMount(`/a\040b\134c`); got != `/a b\c` {
		t.Errorf("%q", got)
	}
	if err := checkPeers("/proc", mount.PropagationRPrivate); err != nil {
		t.Error(err)
	}
}

func ptr[T any](v T) *T { return &v }

func TestResourcesSpec(t *testing.T) {
	b := newBench(t)
	s := b.specOf(t, container.HostConfig{OomScoreAdj: 300, Resources: container.Resources{
		Memory: 64 << 20, MemoryReservation: 32 << 20, CPUShares: 512, CPUPeriod: 50000, CPUQuota: 25000, CpusetCpus: "0", CpusetMems: "0", PidsLimit: ptr(int64(9)),
		BlkioWeight: 100, Ulimits: []*container.Ulimit{{Name: "nofile", Soft: 10, Hard: 20}, {Name: "CORE", Soft: 0, Hard: 0}},
	}})
	r := s.Linux.Resources
	if m := r.Memory; *m.Limit != 64<<20 || *m.Swap != 128<<20 || *m.Reservation != 32<<20 {
		t.Errorf("memory %+v", m)
	}
	if c := r.CPU; *c.Shares != 512 || *c.Period != 50000 || *c.Quota != 25000 || c.Cpus != "0" || c.Mems != "0" {
		t.Errorf("cpu %+v", c)
	}
	if *r.Pids.Limit != 9 || *r.BlockIO.Weight != 100 || *s.Process.OOMScoreAdj != 300 {
		t.Errorf("pids %v, block I/O %+v, oom %v", *r.Pids.Limit, r.BlockIO, *s.Process.OOMScoreAdj)
	}
	if l := s.Process.Rlimits; len(l) != 2 || l[0] != (specs.POSIXRlimit{Type: "RLIMIT_NOFILE", Soft: 10, Hard: 20}) || l[1].Type != "RLIMIT_CORE" {
		t.Errorf("limits %+v", l)
	}
	r = b.specOf(t, container.HostConfig{Resources: container.Resources{NanoCPUs: 5e8, PidsLimit: ptr(int64(0)), MemorySwappiness: ptr(int64(-1))}}).Linux.Resources
	if *r.CPU.Quota != 50000 || *r.CPU.Period != 100000 || r.Memory != nil || r.Pids != nil || r.BlockIO != nil {
		t.Errorf("half a CPU: %+v", r)
	}
	id := b.run("parented", container.HostConfig{Resources: container.Resources{CgroupParent: "web/a"}})
	if p := b.sup.configs[id].CgroupParent; p != "/web/a" {
		t.Errorf("cgroup parent %q", p)
	}
}

func TestUpdateRules(t *testing.T) {
	b := newBench(t)
	id := b.run("", container.HostConfig{Resources: container.Resources{Memory: 64 << 20, NanoCPUs: 1e9}})
	update := func(r container.Resources) error {
		_, err := b.e.ContainerUpdate(t.Context(), id, container.UpdateConfig{Resources: r})
		return err
	}
	if err := update(container.Resources{Memory: 128 << 20, MemorySwap: 256 << 20, PidsLimit: ptr(int64(-1)), CpusetCpus: "0", CPUShares: 5, MemoryReservation: 10 << 20}); err != nil {
		t.Fatal(err)
	}
	if r := b.record(id).HostConfig.Resources; r.Memory != 128<<20 || r.MemorySwap != 256<<20 || *r.PidsLimit != -1 || r.CpusetCpus != "0" || r.CPUShares != 5 || r.NanoCPUs != 1e9 {
		t.Errorf("after the update: %+v", r)
	}
	for want, r := range map[string]container.Resources{
		"Memory limit should be smaller than already set memoryswap limit": {Memory: 1 << 30},
		"CPU Quota cannot be updated as NanoCPUs has already been set":     {CPUQuota: 5000},
		"Ulimits cannot be updated":                                        {Ulimits: []*container.Ulimit{{Name: "core"}}},
		"Devices cannot be updated":                                        {Devices: []container.DeviceMapping{{}}},
		"Requested CPUs are not available":                                 {CpusetCpus: "8000"},
	} {
		before := b.record(id).HostConfig.Resources
		if err := update(r); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %s", err, want)
		}
		if after := b.record(id).HostConfig.Resources; after.Memory != before.Memory || after.CPUQuota != before.CPUQuota || after.CpusetCpus != before.CpusetCpus {
			t.Errorf("a refused update changed %+v", after)
		}
	}
	b.sup.set("update", cerrdefs.ErrInternal)
	if err := update(container.Resources{CPUShares: 7}); err == nil || b.record(id).HostConfig.CPUShares != 5 {
		t.Errorf("an update that the kernel refused: %v, shares %d", err, b.record(id).HostConfig.CPUShares)
	}
}

// TestTaskConfinement: what a service's specification says of confinement reaches the container.
func TestTaskConfinement(t *testing.T) {
	b := newBench(t)
	spec := `{"ContainerSpec":{"Image":"busybox","CapabilityAdd":["CAP_NET_ADMIN"],"CapabilityDrop":["CAP_CHOWN"],"Ulimits":[{"Name":"nofile","Soft":5,"Hard":6}],
		"Sysctls":{"net.core.somaxconn":"99"},"Init":true,"ReadOnly":true,"OomScoreAdj":100,"Groups":["7"],"Hosts":["1.2.3.4 a b"],
		"Mounts":[{"Type":"volume","Source":"vol","Target":"/v","VolumeOptions":{"Subpath":"a"}},{"Type":"tmpfs","Target":"/t","TmpfsOptions":{"SizeBytes":4096,"Options":[["exec"]]}}],
		"Privileges":{"NoNewPrivileges":true,"Seccomp":{"Mode":"unconfined"},"AppArmor":{"Mode":"disabled"},"SELinuxContext":{"Disable":true}}},
		"Resources":{"Limits":{"MemoryBytes":67108864,"Pids":9},"SwapBytes":1048576,"MemorySwappiness":5}}`
	c, err := b.e.Controller(&api.Assignment{TaskId: "t1", ServiceName: "web", Slot: 1, SpecJson: []byte(spec)}, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	req, err := c.(*taskController).createRequest()
	if err != nil {
		t.Fatal(err)
	}
	hc := req.HostConfig
	if !hc.ReadonlyRootfs || !*hc.Init || hc.OomScoreAdj != 100 || hc.Sysctls["net.core.somaxconn"] != "99" || len(hc.Ulimits) != 1 || len(hc.Mounts) != 2 ||
		!slices.Equal(hc.GroupAdd, []string{"7"}) || !slices.Equal(hc.ExtraHosts, []string{"a:1.2.3.4", "b:1.2.3.4"}) || !slices.Equal(hc.CapAdd, []string{"CAP_NET_ADMIN"}) ||
		!slices.Equal(hc.CapDrop, []string{"CAP_CHOWN"}) || !slices.Equal(hc.SecurityOpt, []string{"no-new-privileges", "seccomp=unconfined", "apparmor=unconfined", "label=disable"}) {
		t.Errorf("%+v", hc)
	}
	if hc.Memory != 64<<20 || hc.MemorySwap != 65<<20 || *hc.MemorySwappiness != 5 || *hc.PidsLimit != 9 {
		t.Errorf("%+v", hc.Resources)
	}
	s := b.specOf(t, *hc)
	if !s.Process.NoNewPrivileges || s.Linux.Seccomp != nil || !s.Root.Readonly || slices.Contains(s.Process.Capabilities.Bounding, "CAP_CHOWN") {
		t.Errorf("%+v", s.Process)
	}
	for _, p := range []string{`{"SELinuxContext":{"Level":"s0"}}`, `{"Seccomp":{"Mode":"lax"}}`, `{"CredentialSpec":{"File":"x"}}`} {
		c, err := b.e.Controller(&api.Assignment{TaskId: "t2", SpecJson: []byte(`{"ContainerSpec":{"Image":"busybox","Privileges":` + p + `}}`)}, nil, nil)
		if err == nil {
			_, err = c.(*taskController).createRequest()
		}
		if !cerrdefs.IsNotImplemented(err) {
			t.Errorf("%s: %v", p, err)
		}
	}
}

// TestUserns: a daemon with maps puts containers into user namespaces, shows its own files through them and refuses what they exclude.
func TestUserns(t *testing.T) {
	b := newBench(t)
	m := []specs.LinuxIDMapping{{HostID: 100000, Size: 65536}}
	b.e.cfg.UserNS = &IDMaps{UIDs: m, GIDs: m}
	for name, tc := range map[string]refusal{
		"privileged": {container.HostConfig{Privileged: true}, "privileged mode is incompatible with user namespaces"},
		"net":        {container.HostConfig{NetworkMode: "host"}, "cannot share the host's network namespace when user namespaces are enabled"},
		"pid":        {container.HostConfig{PidMode: "host"}, "cannot share the host PID namespace when user namespaces are enabled"},
		"ipc":        {container.HostConfig{IpcMode: "host"}, "cannot share the host IPC namespace when user namespaces are enabled"},
		"mode":       {container.HostConfig{UsernsMode: "private"}, "invalid user namespace mode: private"},
	} {
		t.Run(name, func(t *testing.T) { b.refused(t, tc.hc, tc.want) })
	}
	user := func(s *specs.Spec) (path string, ok bool) {
		for _, n := range s.Linux.Namespaces {
			if n.Type == specs.UserNamespace {
				return n.Path, true
			}
		}
		return "", false
	}
	donor := b.run("donor", container.HostConfig{IpcMode: "shareable"})
	own := b.run("own", container.HostConfig{UsernsMode: "host", IpcMode: "shareable"})
	s := b.specOf(t, container.HostConfig{Binds: []string{"vol:/vol", "/tmp:/host"}, Resources: container.Resources{Devices: []container.DeviceMapping{{PathOnHost: "/dev/zero", PathInContainer: "/dev/nil"}}}})
	if p, ok := user(s); !ok || p != "" || s.Linux.UIDMappings[0] != m[0] || len(s.Linux.Devices) != 0 {
		t.Errorf("%q %v %+v", p, ok, s.Linux)
	}
	for target, want := range map[string]bool{"/vol": true, "/etc/hosts": true, "/host": false, "/dev/nil": false} {
		i := slices.IndexFunc(s.Mounts, func(m specs.Mount) bool { return m.Destination == target })
		if i < 0 || slices.Contains(s.Mounts[i].Options, "idmap") != want {
			t.Errorf("%s: mount %d of %+v, want mapped %v", target, i, s.Mounts, want)
		}
	}
	if p, _ := user(b.specOf(t, container.HostConfig{PidMode: "container:donor", IpcMode: "container:donor"})); p != "container:"+donor {
		t.Errorf("joined: %q", p)
	}
	if _, ok := user(b.specOf(t, container.HostConfig{UsernsMode: "host"})); ok {
		t.Error("--userns=host is in a user namespace")
	}
	if err := b.e.ContainerStart(t.Context(), b.create("", container.HostConfig{PidMode: container.PidMode("container:" + own)})); err == nil || !strings.Contains(err.Error(), "--userns=host too") {
		t.Errorf("namespaces of a container in the host's: %v", err)
	}
}

func TestNetDefaults(t *testing.T) {
	b := newBench(t)
	if s := b.specOf(t, container.HostConfig{}).Linux.Sysctl; s["net.ipv4.ip_unprivileged_port_start"] != "0" || s["net.ipv4.ping_group_range"] != "0 2147483647" {
		t.Errorf("%v", s)
	}
	if s := b.specOf(t, container.HostConfig{Sysctls: map[string]string{"net/ipv4/ip_unprivileged_port_start": "1024"}}).Linux.Sysctl; len(s) != 2 || s["net/ipv4/ip_unprivileged_port_start"] != "1024" {
		t.Errorf("%v", s)
	}
	if s := b.specOf(t, container.HostConfig{NetworkMode: "host"}).Linux.Sysctl; len(s) != 0 {
		t.Errorf("%v", s)
	}
}
