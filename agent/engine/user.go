package engine

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"skein/runtime"
)

// maxAccountFile bounds what is read of an image's passwd and group files, which are the image's word only.
const maxAccountFile = 1 << 20

// maxGroups bounds the groups of one process; the kernel takes 65,536, and each is a part of what starts the process.
const maxGroups = 16384

// resolveUser turns docker's USER ("name", "uid", "user:group") into ids, looking names up in the image's own files, and returns the
// home directory. Ids outside 32 bits and unknown names are errors.
func resolveUser(rootfs []runtime.Mount, user string, groupAdd []string) (specs.User, string, error) {
	layers := layerDirs(rootfs)
	name, group, hasGroup := strings.Cut(user, ":")
	out := specs.User{}
	home := "/"
	if name == "" {
		name = "0"
	}
	uid, numeric, err := parseID(name)
	if err != nil {
		return out, "", invalid("user %q: %v", user, err)
	}
	found := false
	err = accountLines(layers, "etc/passwd", func(f []string) bool {
		if len(f) < 6 || f[0] != name && !(numeric && f[2] == name) {
			return false
		}
		u, ok1, err1 := parseID(f[2])
		g, ok2, err2 := parseID(f[3])
		if err1 != nil || err2 != nil || !ok1 || !ok2 {
			return false
		}
		out.UID, out.GID, home, found = u, g, f[5], true
		name = f[0]
		return true
	})
	if err != nil {
		return out, "", invalid("user %q: %v", user, err)
	}
	if !found {
		if !numeric {
			return out, "", invalid("unable to find user %s: no matching entries in passwd file", name)
		}
		out.UID = uid
	}
	if hasGroup && group != "" {
		if out.GID, err = lookupGroup(layers, group); err != nil {
			return out, "", err
		}
	} else if found {
		err = accountLines(layers, "etc/group", func(f []string) bool {
			if len(f) >= 4 && contains(strings.Split(f[3], ","), name) {
				if g, ok, err := parseID(f[2]); ok && err == nil && g != out.GID {
					out.AdditionalGids = append(out.AdditionalGids, g)
				}
			}
			return false
		})
		if err != nil {
			return out, "", invalid("user %q: %v", user, err)
		}
	}
	if len(out.AdditionalGids)+len(groupAdd) >= maxGroups {
		return out, "", invalid("user %q: is in more than %d groups", user, maxGroups)
	}
	for _, g := range groupAdd {
		gid, err := lookupGroup(layers, g)
		if err != nil {
			return out, "", err
		}
		out.AdditionalGids = append(out.AdditionalGids, gid)
	}
	// The primary group is also a supplementary one, so that a program which changes the first keeps what denies it something.
	if !slices.Contains(out.AdditionalGids, out.GID) {
		out.AdditionalGids = append([]uint32{out.GID}, out.AdditionalGids...)
	}
	if home == "" {
		home = "/"
	}
	if out.UID == 0 && !found {
		home = "/root"
	}
	return out, home, nil
}

func lookupGroup(layers []string, group string) (uint32, error) {
	gid, numeric, err := parseID(group)
	if err != nil {
		return 0, invalid("group %q: %v", group, err)
	}
	if numeric {
		return gid, nil
	}
	found := false
	err = accountLines(layers, "etc/group", func(f []string) bool {
		if len(f) >= 3 && f[0] == group {
			if g, ok, err := parseID(f[2]); ok && err == nil {
				gid, found = g, true
			}
		}
		return found
	})
	if err != nil {
		return 0, invalid("group %q: %v", group, err)
	}
	if !found {
		return 0, invalid("unable to find group %s: no matching entries in group file", group)
	}
	return gid, nil
}

// parseID reads a 31-bit id as the kernel's tools do; text that is no number is not an error.
func parseID(s string) (id uint32, numeric bool, err error) {
	if s == "" {
		return 0, false, nil
	}
	for i, r := range s {
		if r < '0' || r > '9' {
			if r == '-' && i == 0 && len(s) > 1 {
				continue
			}
			return 0, false, nil
		}
	}
	v, err := strconv.ParseInt(s, 10, 64)
	if err != nil || v < 0 || v > math.MaxInt32 {
		return 0, true, errors.New("uids and gids must be in range 0-2147483647")
	}
	return uint32(v), true, nil
}

// layerDirs are the directories of the root filesystem, uppermost first.
func layerDirs(mounts []runtime.Mount) []string {
	var out []string
	for _, m := range mounts {
		if m.Type == "bind" || m.Type == "rbind" {
			out = append(out, m.Source)
		}
		for _, o := range m.Options {
			if v, ok := strings.CutPrefix(o, "upperdir="); ok {
				out = append([]string{v}, out...)
			}
			if v, ok := strings.CutPrefix(o, "lowerdir="); ok {
				out = append(out, filepath.SplitList(v)...)
			}
		}
	}
	return out
}

// accountLines calls f with the fields of each line of an account file until it returns true. The file is opened by handle inside
// its layer: links that lead out of it are not followed, and only a regular file is read.
func accountLines(layers []string, name string, f func([]string) bool) error {
	for _, dir := range layers {
		done, err := layerLines(dir, name, f)
		if done || err != nil {
			return err
		}
	}
	return nil
}

func layerLines(dir, name string, f func([]string) bool) (found bool, err error) {
	root, err := os.OpenFile(dir, unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		return false, err
	}
	defer root.Close()
	file, hidden, err := openAccounts(root, name)
	if file == nil {
		return hidden, err
	}
	defer file.Close()
	sc := bufio.NewScanner(io.LimitReader(file, maxAccountFile))
	for sc.Scan() {
		line := strings.TrimSpace(sc.Text())
		if line == "" || line[0] == '#' {
			continue
		}
		if f(strings.Split(line, ":")) {
			return true, nil
		}
	}
	if err := sc.Err(); err != nil {
		return true, fmt.Errorf("read /%s of the image: %w", name, err)
	}
	return true, nil
}

// openAccounts opens a regular file of one layer, or tells whether what is there instead hides the files of lower layers. A running
// container may change its layer meanwhile, so the handle is looked at before anything is opened: opening a named pipe waits, opening a device acts.
func openAccounts(root *os.File, name string) (file *os.File, hidden bool, err error) {
	h, err := openIn(root, name, unix.O_PATH)
	if errors.Is(err, fs.ErrNotExist) {
		if link, err := openIn(root, name, unix.O_PATH|unix.O_NOFOLLOW); err == nil { // a dangling link
			link.Close()
			return nil, true, nil
		}
		return nil, isOpaque(root, path.Dir(name)), nil
	}
	if err != nil {
		return nil, true, nil // a file or a whiteout where a directory should be, links in a circle
	}
	defer h.Close()
	st, err := h.Stat()
	if err != nil || !st.Mode().IsRegular() { // a whiteout is a character device: the file is gone
		return nil, true, err
	}
	if st.Size() > maxAccountFile {
		return nil, true, errors.New("/" + name + " of the image is larger than 1 MiB")
	}
	file, err = os.Open(fmt.Sprintf("/proc/self/fd/%d", h.Fd()))
	return file, true, err
}

// isOpaque tells whether a directory of a layer hides that of the layers below.
func isOpaque(root *os.File, dir string) bool {
	d, err := openIn(root, dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW)
	if err != nil {
		return false
	}
	defer d.Close()
	var b [1]byte
	n, err := unix.Fgetxattr(int(d.Fd()), "trusted.overlay.opaque", b[:])
	return err == nil && n == 1 && b[0] == 'y'
}
