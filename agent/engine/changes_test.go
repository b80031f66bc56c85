package engine

import (
	"archive/tar"
	"bytes"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

var changeKinds = [...]string{"C", "A", "D"}

// layerDir makes files ("f"), directories ("d"), whiteouts ("w"), opaque directories ("o") and hard links ("l") named "kind path [old]".
func layerDir(t *testing.T, entries ...string) *os.File {
	t.Helper()
	dir := t.TempDir()
	old := time.Unix(1_000_000, 0)
	for _, e := range entries {
		f := strings.Fields(e)
		p := filepath.Join(dir, f[1])
		var err error
		switch f[0] {
		case "f":
			err = os.WriteFile(p, []byte(f[1]), 0o644)
		case "w":
			err = unix.Mknod(p, unix.S_IFCHR, 0)
		case "d", "o":
			err = os.Mkdir(p, 0o755)
		case "l":
			err = os.Link(filepath.Join(dir, f[2]), p)
		}
		if f[0] == "o" && err == nil {
			err = unix.Setxattr(p, "trusted.overlay.opaque", []byte("y"), 0)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, e := range entries { // what is not said to be new is as old as below
		if f := strings.Fields(e); f[0] == "d" && len(f) == 2 {
			if err := os.Chtimes(filepath.Join(dir, f[1]), old, old); err != nil {
				t.Fatal(err)
			}
		}
	}
	f, err := os.OpenFile(dir, unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func TestChanges(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root for whiteouts")
	}
	below := []string{"d etc", "f etc/passwd", "d bin", "f bin/sh", "f bin/ls", "d home", "f home/a", "f home/b", "d deep", "d deep/er", "f deep/er/x", "f now-dir", "d now-file"}
	for _, tc := range []struct {
		name  string
		upper []string
		want  string
	}{
		{"nothing", nil, ""},
		{"mount points of ours", []string{"d etc new", "f etc/hosts", "f etc/resolv.conf", "f etc/hostname", "d dev", "f dev/x", "d proc", "d sys"}, ""},
		{"a file beside them", []string{"d etc new", "f etc/hosts", "f etc/mine"}, "C /etc,A /etc/mine"},
		{"a changed file", []string{"d etc", "f etc/passwd"}, "C /etc/passwd"},
		{"a deleted file", []string{"d bin", "w bin/sh"}, "C /bin,D /bin/sh"},
		{"a deleted file that never was", []string{"d bin", "w bin/nope"}, ""},
		{"a new tree", []string{"d new", "d new/er", "f new/er/x"}, "A /new,A /new/er,A /new/er/x"},
		{"deep", []string{"d deep", "d deep/er", "f deep/er/y"}, "C /deep/er,A /deep/er/y"},
		{"a directory's time", []string{"d deep", "d deep/er new"}, "C /deep/er"},
		{"replaced directory", []string{"o home", "f home/a"}, "C /home,D /home/b,A /home/a"},
		{"kinds swapped", []string{"d now-dir", "f now-dir/x", "f now-file"}, "C /now-dir,A /now-dir/x,C /now-file"},
	} {
		up, low := layerDir(t, tc.upper...), layerDir(t, below...)
		var got []string
		d := &delta{ctx: t.Context(), each: func(c change) error { got = append(got, changeKinds[c.kind]+" "+c.path); return nil }}
		if err := d.dir("/", up, low, func() error { return nil }); err != nil {
			t.Fatal(err)
		}
		if s := strings.Join(got, ","); s != tc.want {
			t.Errorf("%s:\n got %s\nwant %s", tc.name, s, tc.want)
		}
	}
}

// TestPackerLinks exports files of two names and leaves out what is mounted.
func TestPackerLinks(t *testing.T) {
	root := layerDir(t, "d a", "f a/x", "l a/y a/x", "d m", "f m/inside")
	id, err := mountID(root)
	if err != nil {
		t.Fatal(err)
	}
	pack := func(mount uint64) []string {
		var b bytes.Buffer
		p := &packer{ctx: t.Context(), tw: tar.NewWriter(&b), mount: mount, links: map[inode]string{}}
		if err := p.entries(root, "", 0); err != nil {
			t.Fatal(err)
		}
		if err := p.tw.Close(); err != nil {
			t.Fatal(err)
		}
		var out []string
		tr := tar.NewReader(&b)
		for {
			h, err := tr.Next()
			if err == io.EOF {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			out = append(out, strings.TrimSpace(h.Name+" "+h.Linkname))
		}
		slices.Sort(out)
		return out
	}
	got := pack(id)
	if len(got) != 5 || !slices.Contains(got, "a/y a/x") && !slices.Contains(got, "a/x a/y") || !slices.Contains(got, "m/inside") {
		t.Errorf("%q", got)
	}
	if got := pack(id + 1); !slices.Equal(got, []string{"a/", "m/"}) { // everything is on another mount
		t.Errorf("of another mount: %q, want empty directories", got)
	}
}
