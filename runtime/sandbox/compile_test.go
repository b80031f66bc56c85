package sandbox

import (
	"flag"
	"os"
	"path/filepath"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"

	"skein/runtime"
	"skein/runtime/rootfs"
	"skein/runtime/zygote"
)

var rewrite = flag.Bool("update", false, "rewrite the golden files")

// TestGolden shows what a container's program does, one system call a line; review the difference.
func TestGolden(t *testing.T) {
	for name, change := range map[string]func(*specs.Spec){
		"default": func(*specs.Spec) {},
		"rich": func(s *specs.Spec) {
			s.Process.Terminal = true
			s.Process.Cwd = "/srv/app"
			s.Process.User = specs.User{UID: 1000, GID: 1000, AdditionalGids: []uint32{7}}
			s.Process.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 10, Hard: 20}}
			s.Process.NoNewPrivileges = false
			s.Root.Readonly = true
			s.Linux.Sysctl = map[string]string{"net.core.somaxconn": "1024"}
			s.Linux.Namespaces[2].Path = "/run/netns/x"
			s.Linux.Devices = []specs.LinuxDevice{{Path: "/dev/net/tun", Type: "c", Major: 10, Minor: 200}}
			s.Mounts = append(s.Mounts, specs.Mount{Destination: "/a/b", Type: "bind", Source: "/dev/null", Options: []string{"bind", "ro"}})
		},
	} {
		t.Run(name, func(t *testing.T) {
			pool, err := zygote.NewPool(2)
			if err != nil {
				t.Fatal(err)
			}
			p, err := pool.Program()
			if err != nil {
				t.Fatal(err)
			}
			p.Trace()
			s := DefaultSpec()
			s.Process.Args = []string{"web", "-v"}
			s.Root.Path = "/state/web/root"
			s.Hostname = "web"
			change(s)
			out, err := Compile(p, Input{Host: Host{Bounding: 1<<41 - 1, LowerdirAppend: true, FilesHard: 4096}, Spec: s,
				Rootfs:  []runtime.Mount{{Type: "overlay", Options: []string{"lowerdir=/l/2:/l/1", "upperdir=/u", "workdir=/w"}}},
				Cgroups: []rootfs.CgroupDir{{Controller: "memory", Path: "/sys/fs/cgroup/memory/skein/web"}, {Path: "/sys/fs/cgroup/unified/skein/web"}},
				Filter:  Filter{Code: make([]byte, 16)}, Tasks: 1, HasCgroup: true})
			if err != nil || p.Err() != nil {
				t.Fatal(err, p.Err())
			}
			if out.Flags&0x20000 == 0 {
				t.Error("no mount namespace")
			}
			got := p.Dump()
			path := filepath.Join("testdata", name+".golden")
			if *rewrite {
				if err := os.MkdirAll("testdata", 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if got != string(want) {
				t.Errorf("the program changed; run with -update and review %s\n%s", path, got)
			}
		})
	}
}

func TestSysctls(t *testing.T) {
	s := DefaultSpec()
	for name, ok := range map[string]bool{
		"net.core.somaxconn": true, "net/ipv4/ip_forward": true, "net.ipv4.conf.eth0/1.forwarding": true, "kernel.shmmax": true,
		"fs.mqueue.msg_max": true, "kernel.domainname": true, "kernel.hostname": false, "kernel.core_pattern": false, "vm.swappiness": false,
		"net/../kernel/core_pattern": false, "net.ipv4/../../kernel": false, "net//x": false, "": false,
	} {
		if err := sysctlAllowed(name, "1", s); (err == nil) != ok {
			t.Errorf("%q: %v, want allowed %v", name, err, ok)
		}
	}
	if sysctlAllowed("net.core.somaxconn", "1\n2", s) == nil {
		t.Error("a value of two lines is allowed")
	}
}
