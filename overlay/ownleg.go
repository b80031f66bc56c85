package overlay

import (
	"fmt"
	"strconv"
	"strings"

	"skein/overlay/link"
)

// legAliasPrefix begins the description of a container's devices on single-host networks. Users choose the addresses and names of these,
// so they are told by it.
const legAliasPrefix = "skein leg "

func legAlias(network string) string { return legAliasPrefix + tag(network) }

// ownLeg is what a plan has for a leg on a single-host network.
type ownLeg struct {
	alias   string
	leg     BridgeLeg
	macvlan *Macvlan
	parent  int // device that carries a macvlan
}

// find looks for the container's end of a leg.
func (p plan) find(links map[string]link.Link) (link.Link, bool) {
	if p.own == nil {
		return byMAC(links, p.mac)
	}
	for _, l := range links {
		if l.Alias == p.own.alias {
			return l, true
		}
	}
	if p.own.macvlan != nil {
		return link.Link{}, false
	}
	return byMAC(links, p.mac)
}

// surplusOwn tells that a device is a leg on a single-host network that no plan has.
func surplusOwn(l link.Link, plans []plan) bool {
	if !strings.HasPrefix(l.Alias, legAliasPrefix) {
		return false
	}
	for _, p := range plans {
		if p.own != nil && p.own.alias == l.Alias {
			return false
		}
	}
	return true
}

// innerName is how a new device is called in the container.
func (p plan) innerName(links map[string]link.Link) (string, error) {
	switch {
	case p.own == nil:
		return freeName(links), nil
	case p.own.leg.Device != "":
		if _, taken := links[p.own.leg.Device]; taken {
			return "", fmt.Errorf("the container has a device %s already: choose another name", p.own.leg.Device)
		}
		return p.own.leg.Device, nil
	case p.own.leg.DevicePrefix == "":
		return freeName(links), nil
	}
	for i := 0; ; i++ {
		name := p.own.leg.DevicePrefix + strconv.Itoa(i)
		if _, taken := links[name]; !taken {
			return name, nil
		}
	}
}

// ready prepares a device in the container before it comes up.
func (p plan) ready(ns *link.NS, conn *link.Conn, inner link.Link) error {
	if p.own == nil {
		return nil
	}
	if inner.Alias != p.own.alias {
		if err := conn.Do([]link.Message{link.SetAlias(inner.Index, p.own.alias)}); err != nil {
			return fmt.Errorf("name %s: %w", inner.Name, err)
		}
	}
	set := map[string]string{}
	if p.own.leg.Addr6.IsValid() && !inner.Up { // later its users may have turned it off
		set["ipv6/conf/"+inner.Name+"/disable_ipv6"] = "0"
	}
	if !inner.Up {
		for k, v := range p.own.leg.Sysctls {
			set[fmt.Sprintf(k, inner.Name)] = v
		}
	}
	if len(set) == 0 {
		return nil
	}
	return ns.Sysctl(set)
}
