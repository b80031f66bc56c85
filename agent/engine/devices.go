package engine

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/moby/moby/api/types/container"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// maxDevices bounds the device nodes of one container.
const maxDevices = 1000

var deviceRule = regexp.MustCompile(`^([acb]) ([0-9]+|\*):([0-9]+|\*) ([rwm]{1,3})$`)

// checkDevices refuses what no state of the host could make right. That a device is there is asked at each start.
func checkDevices(hc *container.HostConfig) error {
	if len(hc.DeviceRequests) > 0 {
		d := hc.DeviceRequests[0]
		return invalid("could not select device driver %q with capabilities: %v: this engine has no device drivers and no CDI: name the devices' nodes with --device",
			d.Driver, d.Capabilities)
	}
	for _, d := range hc.Devices {
		if d.PathOnHost == "" || !filepath.IsAbs(d.PathOnHost) || d.PathInContainer != "" && !filepath.IsAbs(d.PathInContainer) {
			return invalid("invalid device %q: %q is not an absolute path", d.PathOnHost, d.PathInContainer)
		}
		if strings.Trim(d.CgroupPermissions, "rwm") != "" || len(d.CgroupPermissions) > 3 {
			return invalid("invalid device %q: bad mode specified: %s", d.PathOnHost, d.CgroupPermissions)
		}
	}
	for _, r := range hc.DeviceCgroupRules {
		if _, err := parseDeviceRule(r); err != nil {
			return err
		}
	}
	return nil
}

func parseDeviceRule(s string) (specs.LinuxDeviceCgroup, error) {
	f := deviceRule.FindStringSubmatch(s)
	if f == nil {
		return specs.LinuxDeviceCgroup{}, invalid("invalid device cgroup rule format: '%s'", s)
	}
	out := specs.LinuxDeviceCgroup{Allow: true, Type: f[1], Access: f[4]}
	for _, x := range []struct {
		text string
		to   **int64
	}{{f[2], &out.Major}, {f[3], &out.Minor}} {
		if x.text == "*" {
			continue
		}
		n, err := strconv.ParseInt(x.text, 10, 32)
		if err != nil {
			return out, invalid("invalid device cgroup rule format: '%s': %v", s, err)
		}
		*x.to = &n
	}
	return out, nil
}

// setDevices adds the container's device nodes and what its group may do with devices. Where each is on the host goes into nodes.
func setDevices(spec *specs.Spec, hc *container.HostConfig, nodes map[string]string) error {
	l := deviceList{spec.Linux, nodes}
	if hc.Privileged {
		l.Resources.Devices = []specs.LinuxDeviceCgroup{{Allow: true, Access: "rwm"}}
		if err := l.addTree("/dev", "/dev", ""); err != nil {
			return fmt.Errorf("list the host's devices: %w", err)
		}
	}
	for _, d := range hc.Devices {
		inside, access := d.PathInContainer, d.CgroupPermissions
		if inside == "" {
			inside = d.PathOnHost
		}
		if access == "" {
			access = "rwm"
		}
		if hc.Privileged {
			if inside == d.PathOnHost {
				continue
			}
			access = ""
		}
		if err := l.add(d.PathOnHost, filepath.Clean(inside), access); err != nil {
			return invalid("error gathering device information while adding custom device %q: %v", d.PathOnHost, err)
		}
	}
	if hc.Privileged {
		return nil
	}
	for _, s := range hc.DeviceCgroupRules {
		r, err := parseDeviceRule(s)
		if err != nil {
			return err
		}
		l.Resources.Devices = append(l.Resources.Devices, r)
	}
	return nil
}

// deviceList is a container's devices, and where each is on the host.
type deviceList struct {
	*specs.Linux
	nodes map[string]string
}

var errNotDevice = errors.New("not a device node")

// add adds a node of the host, or all nodes below a directory. Without an access nothing is added to the group's rules.
func (l deviceList) add(host, inside, access string) error {
	st, err := os.Stat(host)
	if err != nil {
		return errors.Unwrap(err) // the reason alone, as docker
	}
	if !st.IsDir() {
		return l.addNode(host, inside, access)
	}
	before := len(l.Devices)
	if err := l.addTree(host, inside, access); err != nil {
		return err
	}
	if len(l.Devices) == before {
		return errNotDevice
	}
	return nil
}

// addNode adds one device under its name in the container; a later one takes an earlier one's place.
func (l deviceList) addNode(host, inside, access string) error {
	var st unix.Stat_t
	if err := unix.Stat(host, &st); err != nil {
		return err
	}
	typ := map[uint32]string{unix.S_IFCHR: "c", unix.S_IFBLK: "b"}[st.Mode&unix.S_IFMT]
	if typ == "" {
		return errNotDevice
	}
	mode := os.FileMode(st.Mode & 0o777)
	d := specs.LinuxDevice{Path: inside, Type: typ, Major: int64(unix.Major(st.Rdev)), Minor: int64(unix.Minor(st.Rdev)), FileMode: &mode, UID: &st.Uid, GID: &st.Gid}
	if len(l.Devices) >= maxDevices {
		return fmt.Errorf("more than %d devices: name fewer", maxDevices)
	}
	l.Devices = append(slices.DeleteFunc(l.Devices, func(o specs.LinuxDevice) bool { return o.Path == inside }), d)
	l.nodes[inside] = host
	if access != "" {
		l.Resources.Devices = append(l.Resources.Devices, specs.LinuxDeviceCgroup{Allow: true, Type: typ, Major: &d.Major, Minor: &d.Minor, Access: access})
	}
	return nil
}

// addTree adds the nodes below a directory. What a container has of its own, and what is no device, is left out; links are not
// followed.
func (l deviceList) addTree(host, inside, access string) error {
	return filepath.WalkDir(host, func(p string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil // unplugged meanwhile
		}
		if err != nil {
			return err
		}
		if d.IsDir() {
			switch d.Name() {
			case "pts", "shm", "fd", "mqueue", ".lxc", ".lxd-mounts", ".udev":
				return fs.SkipDir
			}
			return nil
		}
		if d.Type()&fs.ModeDevice == 0 || p == "/dev/console" || p == "/dev/ptmx" {
			return nil
		}
		err = l.addNode(p, filepath.Join(inside, strings.TrimPrefix(p, host)), access)
		if errors.Is(err, unix.ENOENT) {
			return nil
		}
		return err
	})
}
