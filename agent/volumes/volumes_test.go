package volumes

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

func TestCreateRemove(t *testing.T) {
	dir := t.TempDir()
	s, err := New(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, bad := range []string{"", "a", "../x", "a/b", ".hidden", "-x"} {
		if _, _, err := s.Create(bad, nil, false); !errdefs.IsInvalidArgument(err) {
			t.Errorf("create %q: %v, want invalid", bad, err)
		}
	}
	if _, created, err := s.Create("data", map[string]string{"k": "v"}, false); err != nil || !created {
		t.Fatal(created, err)
	}
	if v, created, err := s.Create("data", nil, true); err != nil || created || v.Labels["k"] != "v" || v.Anonymous {
		t.Errorf("second create: %+v %v %v", v, created, err)
	}
	if err := os.WriteFile(s.Path("data")+"/f", []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	// A crash in the midst of a creation or a removal leaves no record.
	if err := os.MkdirAll(filepath.Join(dir, "half", dataDir), 0o755); err != nil {
		t.Fatal(err)
	}
	if s, err = New(dir); err != nil {
		t.Fatal(err)
	}
	if l := s.List(); len(l) != 1 || l[0].Name != "data" || s.Size("data") != 1 {
		t.Errorf("after a restart: %+v", l)
	}
	if _, err := os.Stat(filepath.Join(dir, "half")); !os.IsNotExist(err) {
		t.Errorf("the half volume is left: %v", err)
	}
	if err := s.Remove("data"); err != nil {
		t.Fatal(err)
	}
	if err := s.Remove("data"); !errdefs.IsNotFound(err) {
		t.Errorf("second remove: %v", err)
	}
	if left, _ := os.ReadDir(dir); len(left) != 0 {
		t.Errorf("left: %v", left)
	}
}

func TestPopulate(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("files of other owners need root")
	}
	src := t.TempDir()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(os.MkdirAll(src+"/sub/ro", 0o755))
	must(os.WriteFile(src+"/sub/ro/f", []byte("hello"), 0o640))
	must(os.Chown(src+"/sub/ro/f", 1000, 1001))
	must(os.Chmod(src+"/sub/ro", 0o555))
	must(os.Symlink("/etc/shadow", src+"/link"))
	must(unix.Mkfifo(src+"/pipe", 0o600))
	must(os.Chown(src, 33, 33))
	must(os.Chmod(src, 0o1777|os.ModeSticky))
	s, err := New(t.TempDir())
	must(err)
	_, _, err = s.Create("vol", nil, false)
	must(err)
	f, err := os.Open(src)
	must(err)
	defer f.Close()
	must(s.Populate("vol", f))
	p := s.Path("vol")
	if b, err := os.ReadFile(p + "/sub/ro/f"); err != nil || string(b) != "hello" {
		t.Errorf("file: %q %v", b, err)
	}
	var st unix.Stat_t
	must(unix.Stat(p+"/sub/ro/f", &st))
	if st.Uid != 1000 || st.Gid != 1001 || st.Mode&0o777 != 0o640 {
		t.Errorf("file is %d:%d %o", st.Uid, st.Gid, st.Mode)
	}
	must(unix.Stat(p, &st))
	if st.Uid != 33 || st.Mode&0o7777 != 0o1777 {
		t.Errorf("root is %d %o", st.Uid, st.Mode)
	}
	if l, err := os.Readlink(p + "/link"); err != nil || l != "/etc/shadow" {
		t.Errorf("link %q %v", l, err)
	}
	// What is not empty is not filled over.
	if _, err := f.Seek(0, 0); err != nil {
		t.Fatal(err)
	}
	if err := s.Populate("vol", f); err == nil {
		t.Error("a volume with data was replaced")
	}
	if empty, err := s.Empty("vol"); err != nil || empty {
		t.Errorf("empty: %v %v", empty, err)
	}
}
