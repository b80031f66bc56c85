package rootfs

import (
	"fmt"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

func TestOptions(t *testing.T) {
	for _, tc := range []struct {
		in   []string
		want options
	}{
		{[]string{"rbind", "rprivate", "ro", "nosuid"}, options{bind: true, recursive: true, set: unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NOSUID}},
		{[]string{"ro", "rw"}, options{clr: unix.MOUNT_ATTR_RDONLY}},
		{[]string{"bind", "rro"}, options{bind: true, recSet: unix.MOUNT_ATTR_RDONLY}},
		{[]string{"relatime"}, options{clr: unix.MOUNT_ATTR__ATIME}},
		{[]string{"size=1m", "noswap"}, options{data: []option{{key: "size", value: "1m"}, {key: "noswap", flag: true}}}},
		{[]string{"", "defaults", "async", "silent", "nomand"}, options{}},
		{[]string{"nosymfollow", "noatime", "symfollow", "norelatime"}, options{clr: unix.MOUNT_ATTR_NOSYMFOLLOW | unix.MOUNT_ATTR__ATIME}},
		{[]string{"rbind", "rsymfollow", "rnostrictatime", "rnodiratime"}, options{bind: true, recursive: true, recSet: unix.MOUNT_ATTR_NODIRATIME,
			recClr: unix.MOUNT_ATTR_NOSYMFOLLOW | unix.MOUNT_ATTR__ATIME}},
		{[]string{"sync", "lazytime"}, options{data: []option{{key: "sync", flag: true}, {key: "lazytime", flag: true}}}},
		{[]string{"rslave", "idmap"}, options{prop: unix.MS_SLAVE, propRec: true, idmap: true}},
		{[]string{"shared", "private", "tmpcopyup"}, options{copyUp: true}},
	} {
		got, err := parseOptions(tc.in)
		if err != nil || fmt.Sprint(got) != fmt.Sprint(tc.want) {
			t.Errorf("%q: %+v %v, want %+v", tc.in, got, err, tc.want)
		}
	}
}

func TestCommonDir(t *testing.T) {
	for _, tc := range []struct {
		in   []string
		want string
	}{
		{[]string{"/a/b/c", "/a/b/d"}, "/a/b"}, {[]string{"/a/b/c", "/a/bc/d"}, "/a"}, {[]string{"/a", "/b"}, ""}, {nil, ""}, {[]string{"/a/b"}, "/a"},
	} {
		if got := commonDir(tc.in); got != tc.want {
			t.Errorf("%q: %q, want %q", tc.in, got, tc.want)
		}
	}
}

// TestProbe: what the probe promises is true of this kernel.
func TestProbe(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	fd, err := unix.Fsopen("overlay", unix.FSOPEN_CLOEXEC)
	if err != nil {
		t.Skip(err)
	}
	defer unix.Close(fd)
	for range 2 {
		if err := unix.FsconfigSetString(fd, "lowerdir+", t.TempDir()); err != nil {
			if Probe() {
				t.Errorf("lowerdir+ promised: %v", err)
			}
			return
		}
	}
	if err := unix.FsconfigCreate(fd); (err == nil) != Probe() {
		t.Errorf("lowerdir+ promised: %v; create: %v", Probe(), err)
	}
}
