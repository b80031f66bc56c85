package engine

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	cerrdefs "github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"

	"skein/agent/dockerapi"
	"skein/runtime"
	"skein/runtime/layer"
	"skein/runtime/sandbox"
)

// FuzzCreate: whatever a client wishes, the container is refused or made, described and removed.
func FuzzCreate(f *testing.F) {
	for _, s := range []string{
		`{"Image":"busybox","HostConfig":{}}`, `{"Image":"busybox","HostConfig":null,"Volumes":{"":{},"/x":{},"rel":{}},"ExposedPorts":{"80/tcp":{}},"Env":["","=","A"],"StopSignal":"99"}`,
		`{"Image":"busybox","User":"4294967296:x","HostConfig":{"Binds":["a:/b","/a:/b:ro,z","::","a"],"PortBindings":{"80/tcp":[{"HostPort":"x"},{"HostIp":"1.2.3.4","HostPort":"70000"}]},"Memory":-1,"NanoCpus":-1,"PidsLimit":-7,"Ulimits":[{"Name":"","Hard":-1}],"Tmpfs":{"":"size=x"},"Mounts":[{"Type":"tmpfs","Target":"/","TmpfsOptions":{"SizeBytes":-1,"Mode":99999}}],"SecurityOpt":["seccomp={","x"],"Sysctls":{"a\nb":"c"},"NetworkMode":"container:","IpcMode":"container:x","RestartPolicy":{"Name":"on-failure","MaximumRetryCount":-1},"LogConfig":{"Type":"json-file","Config":{"max-size":"-1"}},"Devices":[{}],"Dns":["x"],"ExtraHosts":["a"],"ShmSize":-1,"GroupAdd":[""],"CapAdd":["ALL",""],"Links":["a"],"VolumesFrom":["x:y"],"CpusetCpus":"0-","OomScoreAdj":5000}}`,
		`{"Image":"busybox","Healthcheck":{"Test":["CMD-SHELL"],"Interval":-1},"Hostname":"a/b","Domainname":"` + strings.Repeat("x", 300) + `","WorkingDir":"x","NetworkingConfig":{"EndpointsConfig":{"bridge":{"IPAMConfig":{"IPv4Address":"1.2.3.4"},"Aliases":[""]},"":null}}}`,
	} {
		f.Add([]byte(s), "name")
	}
	f.Fuzz(func(t *testing.T, b []byte, name string) {
		var req container.CreateRequest
		if json.Unmarshal(b, &req) != nil {
			return
		}
		x := newBench(t)
		out, err := x.e.ContainerCreate(t.Context(), name, req, "")
		if err != nil {
			return
		}
		in, err := x.e.ContainerInspect(t.Context(), out.ID, false)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := json.Marshal(in); err != nil {
			t.Fatal(err)
		}
		if err := x.e.ContainerRemove(t.Context(), out.ID, true, true); err != nil {
			t.Fatal(err)
		}
		if l, err := x.e.ContainerList(t.Context(), dockerapi.ListOptions{All: true}); err != nil || len(l) != 0 {
			t.Errorf("left: %v %v", l, err)
		}
	})
}

// FuzzUnpack: whatever archive is copied into a container, nothing outside of the directory is made or changed, and no device is made in it.
func FuzzUnpack(f *testing.F) {
	archive := func(hs ...tar.Header) []byte {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		for _, h := range hs {
			body := "text"
			if h.Typeflag == tar.TypeReg {
				h.Size = int64(len(body))
			}
			if err := w.WriteHeader(&h); err != nil {
				f.Fatal(err)
			}
			if h.Typeflag == tar.TypeReg {
				_, _ = io.WriteString(w, body)
			}
		}
		_ = w.Close()
		return b.Bytes()
	}
	f.Add(archive(tar.Header{Typeflag: tar.TypeDir, Name: "d/", Mode: 0o755}, tar.Header{Typeflag: tar.TypeReg, Name: "d/f", Mode: 0o4755, Uid: 7},
		tar.Header{Typeflag: tar.TypeSymlink, Name: "l", Linkname: "../.."}, tar.Header{Typeflag: tar.TypeReg, Name: "l/x", Mode: 0o644}), false)
	f.Add(archive(tar.Header{Typeflag: tar.TypeSymlink, Name: "d", Linkname: "/"}, tar.Header{Typeflag: tar.TypeLink, Name: "h", Linkname: "d/etc/passwd"},
		tar.Header{Typeflag: tar.TypeChar, Name: "c", Devmajor: 1, Devminor: 3}), true)
	f.Add([]byte("\x1f\x8b\x08\x00nonsense"), false)
	f.Fuzz(func(t *testing.T, b []byte, keep bool) {
		base := t.TempDir()
		victim := filepath.Join(base, "victim")
		if err := os.WriteFile(victim, []byte("untouched"), 0o640); err != nil {
			t.Fatal(err)
		}
		dir, err := os.Open(t.TempDir())
		if err != nil {
			t.Fatal(err)
		}
		defer dir.Close()
		in, err := layer.Decompress(bytes.NewReader(b))
		if err != nil {
			return
		}
		defer in.Close()
		u := &unpacker{ctx: t.Context(), dir: dir, o: dockerapi.ArchiveOptions{NoOverwriteDirNonDir: keep}}
		_ = u.all(tar.NewReader(io.LimitReader(in, 4<<20)))
		if st, err := os.Stat(victim); err != nil || st.Mode() != 0o640 || st.Size() != 9 {
			t.Errorf("changed outside: %v %v", st, err)
		}
		_ = filepath.Walk(dir.Name(), func(p string, st os.FileInfo, err error) error {
			if err == nil && st.Mode()&(os.ModeDevice|os.ModeNamedPipe) != 0 {
				t.Errorf("made %s: %v", p, st.Mode())
			}
			return nil
		})
	})
}

// FuzzAccounts: whatever an image's files of users and groups hold, a user is found with ids in range or refused.
func FuzzAccounts(f *testing.F) {
	f.Add([]byte("root:x:0:0::/root:/bin/sh\napp:x:7:8::/app:\n"), []byte("g:x:9:app,root\n"), "app:g", "g")
	f.Add([]byte(":::\n#\n-1:x:4294967296:-1:::\nx"), []byte("::,,\n\x00"), "-1:", "99999999999")
	f.Fuzz(func(t *testing.T, passwd, group []byte, user, add string) {
		dir := t.TempDir()
		if err := os.Mkdir(filepath.Join(dir, "etc"), 0o755); err != nil {
			t.Fatal(err)
		}
		for name, b := range map[string][]byte{"passwd": passwd, "group": group} {
			if err := os.WriteFile(filepath.Join(dir, "etc", name), b, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		u, _, err := resolveUser([]runtime.Mount{{Type: "bind", Source: dir}}, user, []string{add})
		if err == nil && (u.UID > 1<<31-1 || u.GID > 1<<31-1 || len(u.AdditionalGids) > maxGroups) {
			t.Errorf("user %q: %+v", user, u)
		}
	})
}

// FuzzSeccompProfile: a profile of a client's is refused or compiled.
func FuzzSeccompProfile(f *testing.F) {
	f.Add(`{"defaultAction":"SCMP_ACT_ERRNO","archMap":[{"architecture":"SCMP_ARCH_X86_64","subArchitectures":["SCMP_ARCH_X86"]}],"syscalls":[{"names":["read"],"action":"SCMP_ACT_ALLOW","includes":{"caps":["CAP_SYS_ADMIN"],"minKernel":"4.8"},"excludes":{"arches":["s390"]}}]}`)
	f.Add(`{"defaultAction":"","syscalls":[{"name":"x","names":["y"]}]}`)
	f.Fuzz(func(t *testing.T, profile string) {
		flt, err := seccompFilter(profile, false, sandbox.DefaultCaps())
		if err != nil || flt == nil {
			return
		}
		_, _ = sandbox.CompileSeccomp(flt)
	})
}

// sparse is an archive of 2 KiB with one file that claims to have size bytes.
func sparse(size int64) []byte {
	header := func(typ byte, n int) []byte {
		b := make([]byte, 512)
		for at, s := range map[int]string{0: "f", 100: "0000644", 108: "0000000", 116: "0000000", 124: fmt.Sprintf("%011o", n), 136: "00000000000", 148: "        ", 156: string(typ), 257: "ustar\x0000"} {
			copy(b[at:], s)
		}
		sum := 0
		for _, c := range b {
			sum += int(c)
		}
		copy(b[148:], fmt.Sprintf("%06o\x00 ", sum))
		return b
	}
	size10 := fmt.Sprintf("GNU.sparse.realsize=%d\n", size)
	records := "22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n21 GNU.sparse.name=f\n" + fmt.Sprintf("%d %s", len(size10)+3, size10)
	out := append(header(tar.TypeXHeader, len(records)), records...)
	out = append(out, make([]byte, 512-len(records))...)
	out = append(append(out, header(tar.TypeReg, 512)...), "0\n"...)
	return append(out, make([]byte, 510+1024)...)
}

// TestSparseCopy: a file that claims more bytes than the archive has is refused before it fills the disk.
func TestSparseCopy(t *testing.T) {
	b := newBench(t)
	id := b.create("one", container.HostConfig{})
	raw := sparse(1 << 50)
	if h, err := tar.NewReader(bytes.NewReader(raw)).Next(); err != nil || h.Size != 1<<50 {
		t.Fatalf("the archive is not what the test wants: %+v %v", h, err)
	}
	err := b.e.ArchivePut(t.Context(), id, "/", dockerapi.ArchiveOptions{}, bytes.NewReader(raw))
	if !cerrdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "sparse") {
		t.Errorf("got %v, want it refused", err)
	}
}
