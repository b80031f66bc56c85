package attack

import (
	"archive/tar"
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

// victim is a directory of the host with a secret in it; check fails the test when anything there has changed.
func victim(t testing.TB) (dir string, check func()) {
	t.Helper()
	dir = filepath.Join(t.TempDir(), "victim")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	secret := filepath.Join(dir, "secret")
	if err := os.WriteFile(secret, []byte("of the host"), 0o640); err != nil {
		t.Fatal(err)
	}
	return dir, func() {
		t.Helper()
		es, err := os.ReadDir(dir)
		if err != nil || len(es) != 1 {
			t.Errorf("made or removed on the host: %v %v", es, err)
		}
		b, err := os.ReadFile(secret)
		var st unix.Stat_t
		serr := unix.Stat(secret, &st)
		if err != nil || serr != nil || string(b) != "of the host" || st.Mode != unix.S_IFREG|0o640 || st.Uid != 0 || st.Nlink != 1 {
			t.Errorf("changed on the host: %q mode %o owner %d links %d: %v %v", b, st.Mode, st.Uid, st.Nlink, err, serr)
		}
	}
}

// TestCopySwappedLink: CVE-2018-15664, CVE-2026-41568, CVE-2026-42306. A container exchanges a directory, of its root filesystem and of a
// volume, for a link to a path that only the host has, as fast as it can, while files are copied from and to below it. A copy that resolves
// its path first and opens it later, or mounts the container's volumes by path to copy from them, reads or writes the host's file in
// some of the rounds.
func TestCopySwappedLink(t *testing.T) {
	n := newNode(t)
	dir, check := victim(t)
	n.load("box", ocispec.ImageConfig{})
	vol := map[string]any{"Binds": []string{"data:/data"}}
	swaps := []string{"mkdir", dir} // where the link leads in the container
	for _, at := range []string{"/box", "/data"} {
		swaps = append(swaps, "mkdir", at+"/real", "symlink", dir, at+"/link")
	}
	n.run("setup", "box", vol, append(swaps, "sleep")...)
	for _, at := range []string{"/box", "/data"} {
		n.appears("setup", at+"/link")
		n.must("PUT", "/containers/setup/archive?path="+at+"/real", bytes.NewReader(tarOf(t, entry(tar.TypeReg, "secret", "inside"))))
		n.startExec(n.exec("setup", "/inside", "swap", at+"/real", at+"/link"))
	}
	for i := range manyRounds(150) {
		at := []string{"/box", "/data"}[i%2]
		if code, body := n.call("GET", "/containers/setup/archive?path="+at+"/real/secret", nil); code == 200 && strings.Contains(body, "of the host") {
			t.Fatalf("round %d: the host's file was copied out of the container", i)
		}
		n.call("GET", "/containers/setup/archive?path="+at, nil)
		body := tarOf(t, entry(tar.TypeReg, "secret", "evil"), entry(tar.TypeReg, fmt.Sprintf("new%d", i%8), "evil"), entry(tar.TypeDir, "d/", ""))
		n.call("PUT", "/containers/setup/archive?path="+at+"/real", bytes.NewReader(body))
		n.call("PUT", "/containers/setup/archive?path="+at, bytes.NewReader(tarOf(t, entry(tar.TypeReg, "real/secret", "evil"), entry(tar.TypeReg, "link/x", "evil"))))
		if i%64 == 0 {
			check()
		}
	}
	check()
}

// TestCopyAttributesByHandle: CVE-2021-32760 for docker cp. While root copies a file of root's into a directory that a user of the container
// owns, that user exchanges the new name for a file of his. Extraction that sets owner and mode by name gives the user's program to root,
// with the setuid bit on.
func TestCopyAttributesByHandle(t *testing.T) {
	n := newNode(t)
	n.load("box", ocispec.ImageConfig{})
	n.run("box", "box", map[string]any{"SecurityOpt": []string{"no-new-privileges=false"}}, "mkdir", "/tmp/d", "sleep")
	n.appears("box", "/tmp/d")
	n.must("PUT", "/containers/box/archive?path=/tmp/d", bytes.NewReader(tarOf(t, tar.Header{Typeflag: tar.TypeReg, Name: "mine", Linkname: "evil", Mode: 0o755, Uid: 1000, Gid: 1000})))
	n.startExec(n.exec("box", "/inside", "swap", "/tmp/d/mine", "/tmp/d/tool"))
	for i := range manyRounds(300) {
		n.call("PUT", "/containers/box/archive?path=/tmp/d", bytes.NewReader(tarOf(t, tar.Header{Typeflag: tar.TypeReg, Name: "tool", Linkname: "good", Mode: 0o4755})))
		for _, name := range []string{"mine", "tool"} {
			code, body := n.call("GET", "/containers/box/archive?path=/tmp/d/"+name, nil)
			if code != 200 {
				continue
			}
			h, err := tar.NewReader(strings.NewReader(body)).Next()
			if err == nil && strings.Contains(body, "evil") && (h.Uid != 1000 || h.Mode&0o4000 != 0) {
				t.Fatalf("round %d: the container's own file became %d:%o", i, h.Uid, h.Mode)
			}
		}
		n.must("PUT", "/containers/box/archive?path=/tmp/d", bytes.NewReader(tarOf(t, tar.Header{Typeflag: tar.TypeReg, Name: "mine", Linkname: "evil", Mode: 0o755, Uid: 1000, Gid: 1000})))
	}
}

// TestCopyRunsNothing: CVE-2019-14271, CVE-2026-41567. An image whose libraries and decompressors, found by every usual path, would leave a
// mark: copying in both directions, compressed and not, and by the names of users, runs none of them. A copy helper that changes its root
// into the container and then loads a library there, or a decompressor found in PATH, leaves the mark.
func TestCopyRunsNothing(t *testing.T) {
	n := newNode(t)
	prog, err := os.ReadFile(inside(t))
	if err != nil {
		t.Fatal(err)
	}
	var trap []tar.Header
	for _, d := range []string{"usr/bin/", "bin/", "usr/local/bin/", "sbin/", "usr/sbin/"} {
		for _, p := range []string{"unpigz", "pigz", "gzip", "xz", "unxz", "zstd", "bzip2", "tar", "sh", "docker-untar", "chroot"} {
			trap = append(trap, entry(tar.TypeReg, d+p, "#!/inside mkdir /mark\n"))
		}
	}
	for _, d := range []string{"lib/", "lib/x86_64-linux-gnu/", "usr/lib/", "lib64/"} {
		for _, p := range []string{"libnss_files.so.2", "libc.so.6", "libnss_dns.so.2", "ld-linux-x86-64.so.2"} {
			trap = append(trap, entry(tar.TypeReg, d+p, string(prog)))
		}
	}
	trap = append(trap, entry(tar.TypeReg, "etc/passwd", "app:x:1000:1000::/:/bin/sh\n"), entry(tar.TypeReg, "etc/nsswitch.conf", "passwd: files evil\n"))
	n.load("trap", ocispec.ImageConfig{User: "app"}, tarOf(t, trap...))
	n.run("up", "trap", nil, "sleep")
	n.create("down", "trap", nil, "sleep")
	plain := tarOf(t, tar.Header{Typeflag: tar.TypeReg, Name: "f", Linkname: "x", Mode: 0o644, Uname: "app", Gname: "app"})
	var gz, zs bytes.Buffer
	g := gzip.NewWriter(&gz)
	g.Write(plain)
	g.Close()
	z, err := zstd.NewWriter(&zs)
	if err != nil {
		t.Fatal(err)
	}
	z.Write(plain)
	z.Close()
	t.Setenv("PATH", "/bin:"+os.Getenv("PATH"))
	for _, c := range []string{"up", "down"} {
		for kind, b := range map[string][]byte{"plain": plain, "gzip": gz.Bytes(), "zstd": zs.Bytes()} {
			n.must("PUT", "/containers/"+c+"/archive?path=/tmp&copyUIDGID=1", bytes.NewReader(b))
			if body := n.must("GET", "/containers/"+c+"/archive?path=/tmp/f", nil); !strings.Contains(body, "x") {
				t.Errorf("%s %s: did not come back", c, kind)
			}
		}
		for kind, b := range map[string]string{"xz": "\xfd7zXZ\x00\x00\x04", "bzip2": "BZh91AY&SY"} {
			if code, body := n.call("PUT", "/containers/"+c+"/archive?path=/tmp", strings.NewReader(b+strings.Repeat("\x00", 600))); code != 400 {
				t.Errorf("%s: %d %s, want it refused by name", kind, code, body)
			}
		}
		if code, _ := n.call("HEAD", "/containers/"+c+"/archive?path=/mark", nil); code != 404 {
			t.Errorf("%s: a program of the container ran", c)
		}
	}
}
