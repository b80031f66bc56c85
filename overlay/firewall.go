package overlay

import (
	"fmt"
	"slices"
)

// passFirewalls sees to it that firewalls of others which drop forwarded packets by default let containers' pass (nft.PassForward). With
// again false it looks only if our devices are others than the last time. Firewalls of the old kind (ip_tables without nft) are not
// changed; they are reported.
func (d *Driver) passFirewalls(again bool) error {
	var devices []string
	if d.have {
		devices = append(devices, meshDevice, gatewayPrefix+"*")
	}
	for _, b := range d.bridges {
		if b.Macvlan == nil {
			devices = append(devices, b.Name)
		}
	}
	slices.Sort(devices)
	if !again && slices.Equal(devices, d.passed) {
		return nil
	}
	changed, err := d.nft.PassForward(devices)
	if err != nil {
		d.passed = nil
		return err
	}
	d.passed = devices
	switch {
	case changed && len(devices) > 0:
		d.log.Warn("a firewall of this host drops forwarded packets by default: it was given rules that accept containers' packets", "devices", devices)
	case changed:
		d.log.Info("rules for containers' packets were taken out of this host's firewall")
	}
	if len(devices) == 0 {
		return nil
	}
	return d.oldFirewalls()
}

// oldFirewalls reports what drops containers' packets and is not ours to change.
func (d *Driver) oldFirewalls() error {
	var found []string
	err := d.host.Do(func() error {
		for _, f := range oldFamilies() {
			drops, err := f.dropsForward()
			if err != nil {
				return fmt.Errorf("read table filter of %s: %w", f.program, err)
			}
			if drops {
				found = append(found, f.program)
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	for _, program := range found {
		d.nft.Note("firewall rule", program+" filter FORWARD", fmt.Sprintf("drops containers' packets by its policy, and is not ours to change: run \"%s -I FORWARD -i '%s+' -j ACCEPT\" and the same with -o, also for %s and bridges",
			program, gatewayPrefix, meshDevice))
		if !slices.Contains(d.oldDrops, program) {
			d.log.Warn("this host's firewall drops containers' packets: let them pass", "table", program+" filter FORWARD", "policy", "DROP", "devices", d.passed)
		}
	}
	d.oldDrops = found
	return nil
}
