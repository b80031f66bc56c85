package sandbox

import (
	"encoding/json"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"

	"skein/runtime"
	"skein/runtime/rootfs"
	"skein/runtime/zygote"
)

// FuzzSpec: whatever a configuration says, it is refused or compiled; neither check nor compiler panics, and what the check of the engine's
// containers lets through compiles or fails with a reason. (The OCI command's checks are fuzzed in runtime/oci.)
func FuzzSpec(f *testing.F) {
	s := DefaultSpec()
	s.Process.Args, s.Root.Path = []string{"web"}, "/state/root"
	b, err := json.Marshal(s)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	for _, c := range []string{`{}`, `null`, `{"process":{},"root":{},"linux":{}}`, `{"process":{"args":[""],"cwd":"/","rlimits":[{"type":"RLIMIT_NOFILE","hard":1}],"consoleSize":{}},"root":{"path":"/"},"linux":{"resources":{},"seccomp":{}}}`,
		`{"process":{"args":["a"],"cwd":"x","capabilities":{"bounding":["CAP_X"]}},"root":{"path":"r"},"mounts":[{"destination":"/../..","type":"bind","source":"","options":["rbind","size=1","idmap"]},{"destination":"","type":"cgroup"}],"linux":{"namespaces":[{"type":"mount"},{"type":"x"},{"type":"pid","path":"/p"}],"devices":[{"path":"x","type":"z","major":-1}],"sysctl":{"net..x":"\n"},"maskedPaths":["",".."],"readonlyPaths":["/"]}}`,
		`{"process":{"args":["a"],"cwd":"/","terminal":true,"ioPriority":{},"scheduler":{},"oomScoreAdj":9999,"selinuxLabel":"x"},"root":{"path":"/r"},"linux":{"uidMappings":[{"size":4294967295}],"rootfsPropagation":"x","intelRdt":{},"personality":{},"timeOffsets":{"boottime":{}}}}`} {
		f.Add([]byte(c))
	}
	pool, err := zygote.NewPool(2)
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var s specs.Spec
		if json.Unmarshal(b, &s) != nil {
			return
		}
		if Check(&s) != nil {
			return
		}
		p, err := pool.Program()
		if err != nil {
			t.Fatal(err)
		}
		defer p.Release()
		_, _ = Compile(p, Input{Host: Host{Bounding: 1<<41 - 1, LowerdirAppend: true, FilesHard: 4096}, Spec: &s,
			Rootfs:  []runtime.Mount{{Type: "overlay", Options: []string{"lowerdir=/l/2:/l/1", "upperdir=/u", "workdir=/w"}}},
			Cgroups: []rootfs.CgroupDir{{Controller: "memory", Path: "/sys/fs/cgroup/memory/skein/web"}}, Filter: Filter{Code: make([]byte, 16)}, Tasks: 1, HasCgroup: true})
		_ = p.Err()
	})
}

// FuzzSeccomp: a filter is refused or compiled, within what the kernel takes.
func FuzzSeccomp(f *testing.F) {
	b, err := json.Marshal(DefaultSeccomp(DefaultCaps()))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	for _, c := range []string{`{}`, `{"defaultAction":"SCMP_ACT_ERRNO","architectures":["SCMP_ARCH_X86_64","SCMP_ARCH_X86"],"syscalls":[{"names":["read","nosuch",""],"action":"SCMP_ACT_ALLOW","args":[{"index":5,"value":18446744073709551615,"valueTwo":1,"op":"SCMP_CMP_MASKED_EQ"}]}]}`,
		`{"defaultAction":"SCMP_ACT_ALLOW","defaultErrnoRet":4096,"flags":["X"],"listenerPath":"/x","syscalls":[{"names":["clone3"],"action":"SCMP_ACT_NOTIFY","errnoRet":1},{"names":["kill"],"action":"SCMP_ACT_TRACE","args":[{"index":7,"op":"SCMP_CMP_LT"}]}]}`} {
		f.Add([]byte(c))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var s specs.LinuxSeccomp
		if json.Unmarshal(b, &s) != nil {
			return
		}
		checked := CheckSeccomp(&s)
		out, err := CompileSeccomp(&s)
		if err == nil && checked == nil && (len(out.Code)%8 != 0 || len(out.Code)/8 > 4096) {
			t.Errorf("a filter of %d bytes", len(out.Code))
		}
	})
}
