package attack

import (
	"archive/tar"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// hostileImage loads an image of the hostile program and further layers.
func (n *node) hostileImage(name string, layers ...[]byte) {
	n.t.Helper()
	base, err := buildHostile()
	if err != nil {
		n.t.Fatal(err)
	}
	bin, err := os.ReadFile(filepath.Join(base, "hostile"))
	if err != nil {
		n.t.Fatal(err)
	}
	layers = append([][]byte{tarOf(n.t, entry(tar.TypeReg, "hostile", string(bin)))}, layers...)
	n.load(name, ocispec.ImageConfig{Entrypoint: []string{"/hostile"}}, layers...)
}

// startAs makes and starts a container with the given user.
func (n *node) startAs(name, img, user string, host map[string]any, args ...string) (int, string) {
	n.t.Helper()
	if host == nil {
		host = map[string]any{}
	}
	host["NetworkMode"] = "host"
	code, body := n.call("POST", "/containers/create?name="+name, map[string]any{"Image": img, "User": user, "Cmd": args, "HostConfig": host})
	if code >= 400 {
		return code, body
	}
	return n.call("POST", "/containers/"+name+"/start", nil)
}

// execAs runs a process as user and returns what it printed.
func (n *node) execAs(name, user string, args ...string) (int, string) {
	n.t.Helper()
	code, body := n.call("POST", "/containers/"+name+"/exec", map[string]any{"Cmd": args, "User": user, "AttachStdout": true, "AttachStderr": true, "Tty": false})
	if code >= 400 {
		return code, body
	}
	id := strings.Split(strings.TrimPrefix(strings.TrimSpace(body), `{"Id":"`), `"`)[0]
	return n.call("POST", "/exec/"+id+"/start", map[string]any{"Detach": false})
}

// TestCVE_2026_30892_2024_40635_2022_36109_2023_25173: users that are no number, overflow, or wrap round to root are errors, never another
// user; others are exactly what they say. Supplementary groups are the image's and hold the primary one, so that a program which changes
// its group cannot lose it. A parser that truncates to 32 bits, or leaves groups out or the caller's in, fails.
func TestCVE_2026_30892_2024_40635_2022_36109_2023_25173(t *testing.T) {
	n := newNode(t)
	n.hostileImage("users", tarOf(t, entry(tar.TypeDir, "etc/", ""),
		entry(tar.TypeReg, "etc/passwd", "root:x:0:0::/root:/bin/sh\nalice:x:1000:1001::/home:/bin/sh\nwrap:x:4294967296:0::/:\nminus:x:-1:0::/:\n1234:x:77:77::/:\n"),
		entry(tar.TypeReg, "etc/group", "root:x:0:\nwheel:x:10:root\nusers:x:100:alice\nextra:x:101:alice,bob\nhuge:x:4294967396:alice\n")))
	n.run("box", "users", nil, "sleep")
	for i, user := range []string{"x:y", "nobody-there", "2147483648", "4294967295", "4294967296", "-1", "-0x1", "18446744073709551616", "0:4294967296", "0:-1", "wrap", "minus", "0:nogroup", "1e3:0"} {
		if code, out := n.startAs(fmt.Sprintf("bad%d", i), "users", user, nil, "status"); code < 400 {
			t.Errorf("a container ran as %q: %s", user, n.output(fmt.Sprintf("bad%d", i)))
		} else if code == 500 {
			t.Errorf("%q: %d %s", user, code, out)
		}
		if code, out := n.execAs("box", user, "/hostile", "status"); code < 400 && strings.Contains(out, "status Uid") {
			t.Errorf("exec as %q: %s", user, out)
		}
	}
	for i, tc := range []struct {
		user             string
		uid, gid, groups string
	}{
		{"", "0", "0", "0 10"}, {"root", "0", "0", "0 10"}, {"0", "0", "0", "0 10"}, {"alice", "1000", "1001", "100 101 1001"}, {"1000", "1000", "1001", "100 101 1001"},
		{"alice:wheel", "1000", "10", "10"}, {"1000:1", "1000", "1", "1"}, {"2147483647", "2147483647", "0", "0"}, {"65534:65534", "65534", "65534", "65534"},
	} {
		want := []string{fmt.Sprintf("status Uid: %[1]s %[1]s %[1]s %[1]s", tc.uid), fmt.Sprintf("status Gid: %[1]s %[1]s %[1]s %[1]s", tc.gid), "status Groups: " + tc.groups + " ?"}
		name := fmt.Sprintf("good%d", i)
		if code, out := n.startAs(name, "users", tc.user, nil, "status"); code >= 400 {
			t.Errorf("%q: %s", tc.user, out)
			continue
		}
		n.waitEnd(name)
		lines(t, plain(n.output(name)), want...)
		_, out := n.execAs("box", tc.user, "/hostile", "status")
		lines(t, plain(out), want...)
	}
}

// plain takes the frames out of a stream of lines.
func plain(s string) string {
	var b strings.Builder
	for l := range strings.Lines(s) {
		if i := strings.Index(l, "status "); i > 0 {
			l = l[i:]
		}
		b.WriteString(l)
	}
	return b.String()
}

// TestCVE_2024_5154: an image whose mtab, hosts, hostname and resolv.conf are links to the host. What is made or mounted there by path is
// made on the host.
func TestCVE_2024_5154(t *testing.T) {
	n := newNode(t)
	outside := filepath.Join(n.dir, "outside")
	if err := os.Mkdir(outside, 0o777); err != nil {
		t.Fatal(err)
	}
	up := strings.Repeat("../", 20)
	layer := []tar.Header{entry(tar.TypeDir, "etc/", "")}
	for i, f := range []string{"mtab", "hosts", "hostname", "resolv.conf"} {
		layer = append(layer, entry(tar.TypeSymlink, "etc/"+f, []string{"", up}[i%2]+outside+"/"+f))
	}
	n.hostileImage("links", tarOf(t, layer...))
	if code, out := n.startAs("links", "links", "", nil, "read", "/etc/hosts", "read", "/etc/hostname", "create", "/etc/mtab"); code >= 400 {
		t.Logf("refused: %s", out)
	} else {
		n.waitEnd("links")
		if out := n.output("links"); !strings.Contains(out, "localhost") {
			t.Errorf("its hosts file is not the engine's: %s", out)
		}
	}
	empty(t, outside)
}
