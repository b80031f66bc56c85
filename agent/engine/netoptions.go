package engine

import (
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"skein/overlay"
)

// Names of drivers of single-host networks.
const (
	driverBridge  = "bridge"
	driverMacvlan = "macvlan"
	driverHost    = "host"
	driverNull    = "null"
)

// Options of networks, as docker calls them.
const (
	optBridgeName    = "com.docker.network.bridge.name"
	optICC           = "com.docker.network.bridge.enable_icc"
	optMasquerade    = "com.docker.network.bridge.enable_ip_masquerade"
	optHostBinding   = "com.docker.network.bridge.host_binding_ipv4"
	optGatewayMode4  = "com.docker.network.bridge.gateway_mode_ipv4"
	optGatewayMode6  = "com.docker.network.bridge.gateway_mode_ipv6"
	optInhibit4      = "com.docker.network.bridge.inhibit_ipv4"
	optTrusted       = "com.docker.network.bridge.trusted_host_interfaces"
	optDefaultBridge = "com.docker.network.bridge.default_bridge"
	optMTU           = "com.docker.network.driver.mtu"
	optIfacePrefix   = "com.docker.network.container_iface_prefix"
	optHost4         = "com.docker.network.host_ipv4"
	optHost6         = "com.docker.network.host_ipv6"
	optEnable4       = "com.docker.network.enable_ipv4"
	optEnable6       = "com.docker.network.enable_ipv6"
	optParent        = "parent"
	optMode          = "macvlan_mode"

	modeIsolated = "isolated" // the gateway mode in which the node is not on the network itself
)

// netOptions are a network's options as they are meant.
type netOptions struct {
	bridge       overlay.Bridge // what the options say of it
	isolated4    bool
	isolated6    bool
	defaultHost  netip.Addr // where ports are published that name no address of the node
	ifacePrefix  string
	enable4      *bool
	enable6      *bool
	parent, mode string // macvlan
}

// parseOptions reads the options of a driver and refuses by name what would be ignored.
func parseOptions(driver string, opts map[string]string) (netOptions, error) {
	o := netOptions{}
	for _, k := range sortedKeys(opts) {
		known, err := o.common(k, opts[k])
		if !known {
			switch driver {
			case driverBridge:
				known, err = o.ofBridge(k, opts[k])
			case driverMacvlan:
				known, err = o.ofMacvlan(k, opts[k])
			}
		}
		if err != nil {
			return o, invalid("failed to parse %s value: %s (%v)", k, opts[k], err)
		}
		if !known {
			return o, notBuilt("network option %s of driver %s is not supported by this version of skein", k, driver)
		}
	}
	return o, nil
}

func (o *netOptions) common(k, v string) (known bool, err error) {
	switch k {
	case optMTU:
		o.bridge.MTU, err = strconv.Atoi(v)
		if err == nil && (o.bridge.MTU < 0 || o.bridge.MTU > 65535 || o.bridge.MTU > 0 && o.bridge.MTU < 68) {
			err = errors.New("not an MTU")
		}
	case optIfacePrefix:
		o.ifacePrefix, err = v, checkDeviceName(v, 11)
	case optEnable4:
		o.enable4, err = parseFlag(v)
	case optEnable6:
		o.enable6, err = parseFlag(v)
	default:
		return false, nil
	}
	return true, err
}

func (o *netOptions) ofBridge(k, v string) (known bool, err error) {
	var on *bool
	switch k {
	case optBridgeName:
		o.bridge.Name, o.bridge.External, err = v, true, checkDeviceName(v, 15)
	case optICC:
		on, err = parseFlag(v)
		o.bridge.Separate = on != nil && !*on
	case optMasquerade:
		on, err = parseFlag(v)
		o.bridge.Plain = on != nil && !*on
	case optInhibit4:
		on, err = parseFlag(v)
		o.bridge.Bare4 = o.bridge.Bare4 || on != nil && *on
	case optHostBinding:
		o.defaultHost, err = parseFour(v)
	case optHost4:
		o.bridge.Host4, err = parseFour(v)
	case optHost6:
		o.bridge.Host6, err = netip.ParseAddr(v)
		if err == nil && !o.bridge.Host6.Is6() {
			err = errors.New("not an IPv6 address")
		}
	case optGatewayMode4:
		o.bridge.Mode4, o.isolated4, err = gatewayMode(v)
		o.bridge.Bare4 = o.bridge.Bare4 || o.isolated4
	case optGatewayMode6:
		o.bridge.Mode6, o.isolated6, err = gatewayMode(v)
		o.bridge.Bare6 = o.isolated6
	case optTrusted:
		o.bridge.Trusted = v
		for _, name := range strings.Split(v, ":") {
			if e := checkDeviceName(name, 15); name != "" && e != nil {
				err = e
			}
		}
	default:
		return false, nil
	}
	return true, err
}

func (o *netOptions) ofMacvlan(k, v string) (known bool, err error) {
	switch k {
	case optParent:
		o.parent, err = v, checkDeviceName(v, 15)
	case optMode:
		o.mode = v
		switch v {
		case "", "bridge", "private", "vepa", "passthru":
		default:
			err = fmt.Errorf("requested macvlan mode '%s' is not valid, 'bridge' mode is the macvlan driver default", v)
		}
	default:
		return false, nil
	}
	return true, err
}

func parseFlag(v string) (*bool, error) {
	b, err := strconv.ParseBool(v)
	return &b, err
}

func parseFour(v string) (netip.Addr, error) {
	a, err := netip.ParseAddr(v)
	if err == nil && !a.Is4() {
		err = errors.New("not an IPv4 address")
	}
	return a, err
}

func gatewayMode(v string) (mode overlay.GatewayMode, isolated bool, err error) {
	switch v {
	case "nat":
	case string(overlay.ModeRouted), string(overlay.ModeUnprotected):
		mode = overlay.GatewayMode(v)
	case modeIsolated:
		isolated = true
	default:
		err = fmt.Errorf("unknown gateway mode %s", v)
	}
	return mode, isolated, err
}

// checkDeviceName refuses what the kernel or a path would take for something else.
func checkDeviceName(name string, most int) error {
	if name == "" || name == "." || name == ".." || len(name) > most || strings.ContainsAny(name, "/ :%*\t\n") {
		return fmt.Errorf("not a device name of at most %d characters", most)
	}
	return nil
}

// parentDevice splits a macvlan's parent: eth0.50 is VLAN 50 of eth0, which is made if it does not exist.
func parentDevice(name string) (on string, vlan uint16) {
	base, id, ok := strings.Cut(name, ".")
	n, err := strconv.ParseUint(id, 10, 12)
	if !ok || err != nil || n == 0 || n > 4094 || base == "" {
		return "", 0
	}
	return base, uint16(n)
}
