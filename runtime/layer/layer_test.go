package layer

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"
)

// tarOf makes an archive; the Linkname of a regular file is its content.
func tarOf(t testing.TB, hs ...*tar.Header) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range hs {
		h := *h
		data := ""
		if h.Typeflag == tar.TypeReg {
			data, h.Linkname = h.Linkname, ""
			h.Size = int64(len(data))
		}
		if h.Mode == 0 {
			h.Mode = 0o755
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte(data)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func e(typ byte, name, arg string) *tar.Header {
	return &tar.Header{Typeflag: typ, Name: name, Linkname: arg}
}

const (
	reg  = tar.TypeReg
	dir  = tar.TypeDir
	sym  = tar.TypeSymlink
	hard = tar.TypeLink
)

// tree lists a directory: "name kind[:detail]" a line.
func tree(t *testing.T, root string) string {
	t.Helper()
	var out []string
	err := filepath.Walk(root, func(p string, fi os.FileInfo, err error) error {
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(root, p)
		var st unix.Stat_t
		if err := unix.Lstat(p, &st); err != nil {
			return err
		}
		s := rel
		switch {
		case fi.IsDir():
			s += fmt.Sprintf(" dir:%o", st.Mode&0o7777)
			var b [8]byte
			if n, err := unix.Lgetxattr(p, opaqueXattr, b[:]); err == nil && string(b[:n]) == "y" {
				s += ":opaque"
			}
		case fi.Mode()&os.ModeSymlink != 0:
			l, _ := os.Readlink(p)
			s += " sym:" + l
		case isWhiteout(&st):
			s += " whiteout"
		case fi.Mode().IsRegular():
			b, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			s += " file:" + string(b)
		default:
			s += " " + fi.Mode().Type().String()
		}
		out = append(out, s)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return strings.Join(out[1:], "\n") // without the root
}

// sandbox is a directory with a victim beside the layer; check fails if anything but the layer changed.
func sandbox(t *testing.T) (dst string, check func()) {
	t.Helper()
	base := t.TempDir()
	dst = filepath.Join(base, "layer")
	for _, d := range []string{dst, filepath.Join(base, "victim")} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	secret := filepath.Join(base, "victim", "secret")
	if err := os.WriteFile(secret, []byte("untouched"), 0o640); err != nil {
		t.Fatal(err)
	}
	before := tree(t, filepath.Join(base, "victim"))
	return dst, func() {
		t.Helper()
		if after := tree(t, filepath.Join(base, "victim")); after != before {
			t.Errorf("outside changed: %q, was %q", after, before)
		}
		if fi, err := os.Stat(secret); err != nil || fi.Mode().Perm() != 0o640 {
			t.Errorf("outside changed: %v %v", fi, err)
		}
		if es, _ := os.ReadDir(base); len(es) != 2 {
			t.Errorf("something was made outside: %v", es)
		}
	}
}

func TestApply(t *testing.T) {
	needRoot(t)
	for _, c := range []struct {
		name    string
		entries []*tar.Header
		want    string
		wantErr error
	}{
		{"plain", []*tar.Header{e(dir, "a/", ""), e(reg, "a/f", "x"), e(hard, "a/g", "a/f"), e(sym, "l", "a/f")}, "a dir:755\na/f file:x\na/g file:x\nl sym:a/f", nil},
		{"implied parent", []*tar.Header{e(reg, "a/b/f", "x")}, "a dir:755\na/b dir:755\na/b/f file:x", nil},
		{"dot dot stays inside", []*tar.Header{e(reg, "../../victim/secret", "evil")}, "victim dir:755\nvictim/secret file:evil", nil},
		{"absolute stays inside", []*tar.Header{e(reg, "/etc/passwd", "evil")}, "etc dir:755\netc/passwd file:evil", nil},
		{"write through symlink", []*tar.Header{e(sym, "out", "../victim"), e(reg, "out/secret", "evil")}, "", errdefs.ErrInvalidArgument},
		{"write through absolute symlink", []*tar.Header{e(sym, "out", "/etc"), e(dir, "etc", ""), e(reg, "out/passwd", "in")}, "etc dir:755\netc/passwd file:in\nout sym:/etc", nil},
		{"write through chained symlinks", []*tar.Header{e(sym, "a", ".."), e(sym, "b", "a/.."), e(reg, "b/victim/secret", "evil")},
			"a sym:..\nb sym:a/..\nvictim dir:755\nvictim/secret file:evil", nil},
		{"write through leaf symlink", []*tar.Header{e(sym, "f", "../victim/secret"), e(reg, "f", "mine")}, "f file:mine", nil},
		{"directory over symlink", []*tar.Header{e(sym, "d", "../victim"), e(dir, "d/", ""), e(reg, "d/secret", "mine")}, "d dir:755\nd/secret file:mine", nil},
		{"symlink over directory", []*tar.Header{e(dir, "d/", ""), e(reg, "d/x", "1"), e(sym, "d", "../victim"), e(reg, "d/secret", "evil")}, "", errdefs.ErrInvalidArgument},
		{"hard link outside", []*tar.Header{e(hard, "f", "../victim/secret")}, "", errdefs.ErrInvalidArgument},
		{"hard link absolute", []*tar.Header{e(hard, "f", "/etc/hostname")}, "", errdefs.ErrInvalidArgument},
		{"hard link through symlink", []*tar.Header{e(sym, "out", "../victim"), e(hard, "f", "out/secret")}, "", errdefs.ErrInvalidArgument},
		{"hard link to symlink, then write", []*tar.Header{e(sym, "s", "../victim/secret"), e(hard, "h", "s"), e(reg, "h", "mine")}, "h file:mine\ns sym:../victim/secret", nil},
		{"file below file", []*tar.Header{e(reg, "f", "x"), e(reg, "f/g", "y")}, "", errdefs.ErrInvalidArgument},
		{"duplicate entries", []*tar.Header{e(reg, "f", "1"), e(reg, "f", "2"), e(dir, "f", ""), e(reg, "f/g", "3"), e(reg, "f", "4")}, "f file:4", nil},
		{"root as file", []*tar.Header{e(reg, ".", "x"), e(sym, "/", "/etc"), e(reg, "f", "x")}, "f file:x", nil},
		{"whiteout of dots", []*tar.Header{e(reg, ".wh...", "")}, "", errdefs.ErrInvalidArgument},
		{"whiteout of nothing", []*tar.Header{e(reg, ".wh.", "")}, "", errdefs.ErrInvalidArgument},
		{"whiteouts at the bottom", []*tar.Header{e(reg, ".wh.f", ""), e(reg, "d/.wh..wh..opq", ""), e(reg, ".wh..wh.plnk", "")}, "d dir:755", nil},
		{"odd names", []*tar.Header{e(reg, "new\nline", "1"), e(reg, "\xff\xfe", "2"), e(reg, "a b", "3")}, "a b file:3\nnew\nline file:1\n\xff\xfe file:2", nil},
		{"long component", []*tar.Header{e(reg, strings.Repeat("x", 300), "1")}, "", unix.ENAMETOOLONG},
		{"long path", []*tar.Header{e(reg, strings.Repeat("x/", 3000)+"f", "1")}, "", errdefs.ErrInvalidArgument},
		{"unknown type", []*tar.Header{e('V', "vol", "")}, "", errdefs.ErrInvalidArgument},
		{"fifo", []*tar.Header{e(tar.TypeFifo, "p", "")}, "p p---------", nil},
		{"device over a link", []*tar.Header{e(sym, "n", "../victim/secret"), {Typeflag: tar.TypeChar, Name: "n", Devmajor: 1, Devminor: 3, Mode: 0o4777}}, "n Dc---------", nil},
		{"device through a link", []*tar.Header{e(sym, "out", "../victim"), {Typeflag: tar.TypeBlock, Name: "out/n", Devmajor: 8}}, "", errdefs.ErrInvalidArgument},
		{"opaque on a link", []*tar.Header{e(sym, "out", "../victim"), e(reg, "out/.wh..wh..opq", "")}, "", errdefs.ErrInvalidArgument},
		{"whiteout through a link", []*tar.Header{e(sym, "out", "../victim"), e(reg, "out/.wh.secret", "")}, "", errdefs.ErrInvalidArgument},
		{"link to a link, hard", []*tar.Header{e(sym, "s", "../victim"), e(hard, "h", "s"), e(reg, "h/secret", "evil")}, "", errdefs.ErrInvalidArgument},
		{"hard link to itself", []*tar.Header{e(reg, "f", "x"), e(hard, "f", "f")}, "", errdefs.ErrInvalidArgument},
		{"hard link to a directory", []*tar.Header{e(dir, "d", ""), e(hard, "f", "d")}, "", unix.EPERM},
		{"names of other cases", []*tar.Header{e(reg, "f", "1"), e(reg, "F", "2"), e(dir, "D", ""), e(sym, "d", "../victim"), e(reg, "D/secret", "3")}, "D dir:755\nD/secret file:3\nF file:2\nd sym:../victim\nf file:1", nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			dst, check := sandbox(t)
			_, err := Apply(context.Background(), dst, bytes.NewReader(tarOf(t, c.entries...)), Options{})
			if !errors.Is(err, c.wantErr) {
				t.Fatalf("got error %v, want %v", err, c.wantErr)
			}
			if got := tree(t, dst); c.wantErr == nil && got != c.want {
				t.Errorf("got\n%s\nwant\n%s", got, c.want)
			}
			check()
		})
	}
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: owners and whiteouts")
	}
}

func TestApplyOverLower(t *testing.T) {
	needRoot(t)
	lower := t.TempDir()
	for _, d := range []string{"kept", "kept/deep", "gone", "opq", "opq/in"} {
		if err := os.Mkdir(filepath.Join(lower, d), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("kept", filepath.Join(lower, "link")); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(lower, 0o711); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name    string
		entries []*tar.Header
		want    string
	}{
		{"parents look like those below", []*tar.Header{e(reg, "kept/deep/f", "x")}, "kept dir:700\nkept/deep dir:700\nkept/deep/f file:x"},
		{"whiteout", []*tar.Header{e(reg, ".wh.gone", ""), e(reg, "kept/.wh.deep", "")}, "gone whiteout\nkept dir:700\nkept/deep whiteout"},
		{"whiteout, then the same as directory", []*tar.Header{e(reg, ".wh.gone", ""), e(dir, "gone", "")}, "gone dir:755:opaque"},
		{"whiteout, then something below", []*tar.Header{e(reg, ".wh.gone", ""), e(reg, "gone/f", "x")}, "gone dir:755:opaque\ngone/f file:x"},
		{"directory, then its whiteout", []*tar.Header{e(dir, "gone", ""), e(reg, "gone/f", "x"), e(reg, ".wh.gone", "")}, "gone dir:755:opaque\ngone/f file:x"},
		{"whiteout, then the same as file", []*tar.Header{e(reg, ".wh.gone", ""), e(reg, "gone", "x")}, "gone file:x"},
		{"opaque after its content", []*tar.Header{e(reg, "opq/new", "x"), e(reg, "opq/.wh..wh..opq", "")}, "opq dir:700:opaque\nopq/new file:x"},
		{"below a link of the lower layer", []*tar.Header{e(reg, "link/f", "x")}, "link dir:755\nlink/f file:x"},
		{"xattrs that steer overlayfs are dropped", []*tar.Header{{Typeflag: dir, Name: "opq", Mode: 0o755,
			PAXRecords: map[string]string{"SCHILY.xattr.trusted.overlay.opaque": "y", "SCHILY.xattr.trusted.overlay.redirect": "/victim"}}}, "opq dir:755"},
	} {
		t.Run(c.name, func(t *testing.T) {
			dst, check := sandbox(t)
			if _, err := Apply(context.Background(), dst, bytes.NewReader(tarOf(t, c.entries...)), Options{Lowers: []string{lower}}); err != nil {
				t.Fatal(err)
			}
			if got := tree(t, dst); got != c.want {
				t.Errorf("got\n%s\nwant\n%s", got, c.want)
			}
			if fi, _ := os.Stat(dst); fi.Mode().Perm() != 0o711 {
				t.Errorf("root: got mode %v, want that below", fi.Mode())
			}
			check()
		})
	}
}

func TestLowersHide(t *testing.T) {
	needRoot(t)
	top, bottom := t.TempDir(), t.TempDir()
	for _, d := range []string{"a/b", "w/b", "l/b", "o/b"} {
		if err := os.MkdirAll(filepath.Join(bottom, d), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Mknod(filepath.Join(top, "w"), unix.S_IFCHR, 0); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("a", filepath.Join(top, "l")); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(top, "o"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Setxattr(filepath.Join(top, "o"), opaqueXattr, []byte("y"), 0); err != nil {
		t.Skipf("no trusted attributes here: %v", err)
	}
	l, err := openLowers([]string{top, bottom})
	if err != nil {
		t.Fatal(err)
	}
	defer l.close()
	for name, want := range map[string]bool{"a/b": true, "w/b": false, "l/b": false, "o/b": false, "o": true, "none": false} {
		fd, err := l.open(name)
		if err != nil || (fd >= 0) != want {
			t.Errorf("open(%s): got %d, %v, want found = %t", name, fd, err, want)
		}
		if fd >= 0 {
			unix.Close(fd)
		}
	}
}

func TestMetadata(t *testing.T) {
	needRoot(t)
	dst, _ := sandbox(t)
	h := &tar.Header{Typeflag: reg, Name: "su", Mode: 0o4755, Uid: 1234, Gid: 70000, Linkname: "x",
		PAXRecords: map[string]string{"SCHILY.xattr.user.k": "v", "SCHILY.xattr.security.ima": "no",
			"SCHILY.xattr.security.capability": "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"}}
	if _, err := Apply(context.Background(), dst, bytes.NewReader(tarOf(t, h)), Options{}); err != nil {
		t.Fatal(err)
	}
	p := filepath.Join(dst, "su")
	var st unix.Stat_t
	if err := unix.Stat(p, &st); err != nil {
		t.Fatal(err)
	}
	if st.Mode&0o7777 != 0o4755 || st.Uid != 1234 || st.Gid != 70000 {
		t.Errorf("got mode %o owner %d:%d", st.Mode&0o7777, st.Uid, st.Gid)
	}
	b := make([]byte, 64)
	if n, err := unix.Getxattr(p, "security.capability", b); err != nil || n != 20 {
		t.Errorf("capability: %d, %v", n, err)
	}
	if n, err := unix.Getxattr(p, "user.k", b); err == nil && string(b[:n]) != "v" {
		t.Errorf("user.k: %q", b[:n])
	}
}

func TestBounds(t *testing.T) {
	needRoot(t)
	many := make([]*tar.Header, 50)
	for i := range many {
		many[i] = e(reg, fmt.Sprintf("d%d/f", i), "x")
	}
	full := errors.New("full")
	for _, c := range []struct {
		name string
		o    Options
		hs   []*tar.Header
		want error
	}{
		{"entries", Options{MaxEntries: 49}, many, errdefs.ErrInvalidArgument},
		{"bytes", Options{MaxBytes: 4096}, many, errdefs.ErrInvalidArgument},
		{"check", Options{Check: func() error { return full }}, many, full},
		{"within", Options{MaxEntries: 50}, many, nil},
	} {
		dst, _ := sandbox(t)
		if _, err := Apply(context.Background(), dst, bytes.NewReader(tarOf(t, c.hs...)), c.o); !errors.Is(err, c.want) {
			t.Errorf("%s: got %v, want %v", c.name, err, c.want)
		}
	}
	before := countFDs(t)
	dst, _ := sandbox(t)
	if _, err := Apply(context.Background(), dst, bytes.NewReader(tarOf(t, many...)), Options{Lowers: []string{t.TempDir()}}); err != nil {
		t.Fatal(err)
	}
	if after := countFDs(t); after != before {
		t.Errorf("got %d descriptors, had %d", after, before)
	}
}

func countFDs(t *testing.T) int {
	t.Helper()
	es, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(es)
}

// TestSparse: a few bytes that claim to be a file of petabytes end at the bound of what is written, in either of the forms of sparse files.
func TestSparse(t *testing.T) {
	needRoot(t)
	const size = 1 << 50
	var pax bytes.Buffer
	// The writer makes no sparse files: their records are put into a plain file's header, by hand.
	records := fmt.Sprintf("%d GNU.sparse.major=1\n%d GNU.sparse.minor=0\n", 22, 22)
	name := "GNU.sparse.name=f\n"
	records += fmt.Sprintf("%d %s", len(name)+3, name)
	real := fmt.Sprintf("GNU.sparse.realsize=%d\n", int64(size))
	records += fmt.Sprintf("%d %s", len(real)+3, real)
	for _, h := range []struct {
		typ  byte
		body string
	}{{tar.TypeXHeader, records}, {tar.TypeReg, "0\n" + strings.Repeat("\x00", 510)}} {
		pax.Write(rawHeader("PaxHeaders/f", h.typ, len(h.body)))
		pax.WriteString(h.body)
		pax.Write(make([]byte, (512-len(h.body)%512)%512))
	}
	pax.Write(make([]byte, 1024))
	h, err := tar.NewReader(bytes.NewReader(pax.Bytes())).Next()
	if err != nil || h.Size != size {
		t.Fatalf("the archive is not what the test wants: %+v %v", h, err)
	}
	dst, check := sandbox(t)
	_, err = Apply(context.Background(), dst, bytes.NewReader(pax.Bytes()), Options{MaxBytes: 1 << 20})
	if !errors.Is(err, errdefs.ErrInvalidArgument) {
		t.Errorf("got %v, want it refused", err)
	}
	if st, err := os.Stat(filepath.Join(dst, "f")); err == nil && st.Size() > 2<<20 {
		t.Errorf("%d bytes were written", st.Size())
	}
	check()
}

// rawHeader is a header of the oldest form with a checksum.
func rawHeader(name string, typ byte, size int) []byte {
	b := make([]byte, 512)
	copy(b, name)
	copy(b[100:], "0000644\x000000000\x000000000\x00")
	copy(b[124:], fmt.Sprintf("%011o\x00", size))
	copy(b[136:], "00000000000\x00")
	copy(b[148:], "        ")
	b[156] = typ
	copy(b[257:], "ustar\x0000")
	sum := 0
	for _, c := range b {
		sum += int(c)
	}
	copy(b[148:], fmt.Sprintf("%06o\x00 ", sum))
	return b
}

func TestTruncated(t *testing.T) {
	needRoot(t)
	b := tarOf(t, e(reg, "f", strings.Repeat("x", 4000)))
	for _, n := range []int{1, 511, 700, 2000} {
		dst, _ := sandbox(t)
		if _, err := Apply(context.Background(), dst, bytes.NewReader(b[:n]), Options{}); err == nil {
			t.Errorf("archive cut at %d: no error", n)
		}
	}
}

func TestDecompress(t *testing.T) {
	plain := tarOf(t, e(reg, "f", "hello"))
	var gz, zs bytes.Buffer
	g := gzip.NewWriter(&gz)
	g.Write(plain)
	g.Close()
	z, _ := zstd.NewWriter(&zs)
	z.Write(plain)
	z.Close()
	for name, b := range map[string][]byte{"plain": plain, "gzip": gz.Bytes(), "zstd": zs.Bytes()} {
		r, err := Decompress(bytes.NewReader(b))
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		var out bytes.Buffer
		if _, err := out.ReadFrom(r); err != nil || !bytes.Equal(out.Bytes(), plain) {
			t.Errorf("%s: %d bytes, %v", name, out.Len(), err)
		}
		r.Close()
	}
	for name, b := range map[string][]byte{"xz": []byte("\xfd7zXZ\x00...."), "bad gzip": []byte("\x1f\x8bnonsense")} {
		if _, err := Decompress(bytes.NewReader(b)); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func FuzzApply(f *testing.F) {
	f.Add(tarOf(f, e(dir, "a/", ""), e(reg, "a/f", "x"), e(hard, "g", "a/f"), e(sym, "l", "../.."), e(reg, "l/x", "y"), e(reg, ".wh.a", "")))
	lower := f.TempDir()
	f.Fuzz(func(t *testing.T, b []byte) {
		dst, check := sandbox(t)
		_, _ = Apply(context.Background(), dst, bytes.NewReader(b), Options{Lowers: []string{lower}, MaxEntries: 100, MaxBytes: 1 << 20})
		check()
	})
}
