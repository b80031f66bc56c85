package overlay

import (
	"errors"
	"os"
	"strings"
)

const (
	forwarding4 = "ipv4/ip_forward"
	reversePath = "/rp_filter"
)

// changeHost sets kernel settings of the node that are not of our own devices, and keeps what they were (see saveSysctls).
func (d *Driver) changeHost(set map[string]string) error {
	was := map[string]string{}
	for k, v := range set {
		key := strings.TrimSuffix(k, "?")
		if is, err := d.host.ReadSysctl(key); err == nil && is != v {
			was[key] = is
		}
	}
	if len(was) > 0 && !d.dry {
		if err := d.saveSysctls(was); err != nil {
			return err
		}
	}
	return d.host.Sysctl(set)
}

// giveBack sets what was kept of the settings that match to what it was. Devices that are gone are left out.
func (d *Driver) giveBack(match func(key string) bool) error {
	was, err := d.savedSysctls()
	if err != nil || len(was) == 0 {
		return err
	}
	set := map[string]string{}
	for k, v := range was {
		if match(k) {
			set[k+"?"] = v
			delete(was, k)
		}
	}
	if len(set) == 0 {
		return nil
	}
	if err := d.host.Sysctl(set); err != nil {
		return err
	}
	if len(was) > 0 {
		return d.writeSysctls(was)
	}
	if err := os.Remove(d.sysctlFile()); !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// giveBackCluster ends what the mesh changed. What bridges need stays.
func (d *Driver) giveBackCluster(bridges int) error {
	return d.giveBack(func(key string) bool {
		return strings.HasSuffix(key, reversePath) || key == forwarding4 && bridges == 0
	})
}
