package engine

import (
	"net/netip"
	"slices"
	"strings"

	"github.com/moby/moby/api/types/network"

	"skein/overlay"
)

// Driver options of a container on a network.
const (
	optEndpointIfname  = "com.docker.network.endpoint.ifname"
	optEndpointSysctls = "com.docker.network.endpoint.sysctls"
)

// endpoint checks what a user wishes of one network and keeps it.
func endpoint(l *localNetwork, s *network.EndpointSettings) (*network.EndpointSettings, error) {
	var errs []string
	predefined := l.Name == defaultBridge || l.Driver == driverHost || l.Driver == driverNull
	c := s.IPAMConfig
	if c != nil && predefined && (c.IPv4Address.IsValid() || c.IPv6Address.IsValid()) {
		errs = append(errs, "user specified IP address is supported on user defined networks only")
	}
	if predefined && len(s.Aliases) > 0 {
		errs = append(errs, "network-scoped alias is supported only for containers in user defined networks")
	}
	if c != nil && !predefined {
		errs = append(errs, l.checkWished(c)...)
	}
	if c != nil {
		for _, a := range c.LinkLocalIPs {
			if !a.IsLinkLocalUnicast() {
				errs = append(errs, "invalid link-local IP address: "+a.String())
			}
		}
	}
	if len(s.MacAddress) > 0 && (len(s.MacAddress) != 6 || s.MacAddress[0]&1 != 0) {
		errs = append(errs, "invalid MAC address "+s.MacAddress.String()+": want one of a single Ethernet station")
	}
	if _, err := endpointLinks(s.Links); err != nil {
		errs = append(errs, err.Error())
	}
	if _, err := legOptions(s.DriverOpts); err != nil {
		errs = append(errs, err.Error())
	}
	if len(s.Links) > 0 && l.Name == defaultBridge {
		errs = append(errs, "links on the default bridge network are the container's: use HostConfig.Links (docker run --link)")
	}
	switch len(errs) {
	case 0:
	case 1:
		return nil, invalid("invalid endpoint settings:\n%s", errs[0])
	default:
		return nil, invalid("invalid endpoint settings:\n* %s", strings.Join(errs, "\n* "))
	}
	return wished(l.ID, s), nil
}

// wished is the part of an endpoint's settings that a user chose.
func wished(networkID string, s *network.EndpointSettings) *network.EndpointSettings {
	return &network.EndpointSettings{NetworkID: networkID, Aliases: s.Aliases, IPAMConfig: s.IPAMConfig, GwPriority: s.GwPriority, Links: s.Links,
		DriverOpts: s.DriverOpts, MacAddress: s.MacAddress}
}

// checkWished refuses addresses that the network cannot have.
func (l *localNetwork) checkWished(c *network.EndpointIPAMConfig) []string {
	var errs []string
	for _, a := range []netip.Addr{c.IPv4Address, c.IPv6Address} {
		if !a.IsValid() {
			continue
		}
		static, within := false, false
		for _, p := range l.Pools {
			if p.six() == a.Is6() && !p.Auto {
				static, within = true, within || p.Subnet.Contains(a)
			}
		}
		switch {
		case !static:
			errs = append(errs, "user specified IP address is supported only when connecting to networks with user configured subnets")
		case !within:
			errs = append(errs, "no configured subnet or ip-range contain the IP address "+a.String())
		}
	}
	if c.IPv4Address.Is6() {
		errs = append(errs, "invalid IPv4 address: "+c.IPv4Address.String())
	}
	if c.IPv6Address.Is4() {
		errs = append(errs, "invalid IPv6 address: "+c.IPv6Address.String())
	}
	return errs
}

// legOptions reads the driver options of a container's place on a network into a leg.
func legOptions(opts map[string]string) (overlay.BridgeLeg, error) {
	var leg overlay.BridgeLeg
	for _, k := range sortedKeys(opts) {
		switch v := opts[k]; k {
		case optEndpointIfname:
			if err := checkDeviceName(v, 15); err != nil || v == "lo" {
				return leg, invalid("invalid interface name %q in %s: not a name for a device of a container", v, k)
			}
			leg.Device = v
		case optEndpointSysctls:
			leg.Sysctls = map[string]string{}
			for _, one := range strings.Split(v, ",") {
				key, value, err := deviceSysctl(one)
				if err != nil {
					return leg, err
				}
				leg.Sysctls[key] = value
			}
		default:
			return leg, notBuilt("driver option %s of an endpoint is not supported by this version of skein", k)
		}
	}
	return leg, nil
}

// deviceSysctl turns net.ipv4.conf.IFNAME.log_martians=1 into a path with %s in the device's place.
func deviceSysctl(text string) (key, value string, err error) {
	key, value, ok := strings.Cut(strings.TrimSpace(text), "=")
	f := strings.SplitN(key, ".", 5)
	if !ok || len(f) != 5 || f[0] != "net" || f[1] != "ipv4" && f[1] != "ipv6" && f[1] != "mpls" || f[3] != "IFNAME" && f[3] != "ifname" ||
		strings.ContainsAny(key, "/%") || strings.Contains(key, "..") {
		return "", "", invalid("unrecognised network interface sysctl '%s'; represent 'net.X.Y.ethN.Z=V' as 'net.X.Y.IFNAME.Z=V', 'X' must be 'ipv4', 'ipv6' or 'mpls'", text)
	}
	return f[1] + "/" + f[2] + "/%s/" + f[4], value, nil
}

// endpointLinks are names that a container alone has for others of a user-defined network.
func endpointLinks(links []string) ([]overlay.DNSLink, error) {
	var out []overlay.DNSLink
	for _, s := range links {
		target, alias, err := parseLink(s)
		if err != nil {
			return nil, err
		}
		out = append(out, overlay.DNSLink{Alias: alias, Target: target})
	}
	return out, nil
}

// bridgeSandbox allocates addresses and ports on the container's single-host networks. What it has taken when it fails is for the caller to release.
func (e *Engine) bridgeSandbox(r record) (overlay.Sandbox, map[string]*network.EndpointSettings, error) {
	sb := overlay.Sandbox{ID: r.ID, SearchDNS: r.HostConfig.DNSSearch}
	nets := map[string]*network.EndpointSettings{}
	for _, d := range r.HostConfig.DNS {
		sb.Upstreams = append(sb.Upstreams, netip.AddrPortFrom(d, 53))
	}
	for _, name := range e.deviceOrder(r) {
		s := *r.Networks[name]
		if clusterID(s.NetworkID) {
			continue // see place
		}
		l, err := e.nets.find(s.NetworkID)
		if err != nil {
			return sb, nil, err
		}
		if l.Driver == driverNull {
			nets[name] = &s
			continue
		}
		leg, settings, err := e.bridgeLeg(r, s)
		if err != nil {
			return sb, nil, err
		}
		sb.DNS = sb.DNS || len(leg.Names) > 0
		sb.Bridges, nets[name] = append(sb.Bridges, leg), settings
	}
	if err := e.publish(r, &sb, nil); err != nil {
		return sb, nil, err
	}
	sb.DNS = sb.DNS || len(sb.Bridges) > 0 && needsForwarder(r)
	return sb, nets, nil
}

// deviceOrder lists a container's networks as its devices are numbered: that of its mode first.
func (e *Engine) deviceOrder(r record) []string {
	names := sortedKeys(r.Networks)
	mode := string(r.HostConfig.NetworkMode)
	if l, err := e.nets.find(mode); err == nil {
		mode = l.Name
	}
	if i := slices.Index(names, mode); i > 0 {
		names = slices.Insert(slices.Delete(names, i, i+1), 0, mode)
	}
	return names
}

// bridgeLeg allocates the container's addresses on one network. Names are answered on networks that users made.
func (e *Engine) bridgeLeg(r record, s network.EndpointSettings) (overlay.BridgeLeg, *network.EndpointSettings, error) {
	l, err := e.nets.find(s.NetworkID)
	if err != nil {
		return overlay.BridgeLeg{}, nil, err
	}
	if l.ConfigOnly {
		return overlay.BridgeLeg{}, nil, errf(errDenied, "%s is a configuration only network", l.Name)
	}
	leg, err := legOptions(s.DriverOpts)
	if err != nil {
		return leg, nil, err
	}
	var want4, want6 netip.Addr
	if c := s.IPAMConfig; c != nil {
		want4, want6, leg.LinkLocal = c.IPv4Address, c.IPv6Address, c.LinkLocalIPs
	}
	got, err := e.nets.take(l, r.ID, want4, want6)
	if err != nil {
		return leg, nil, err
	}
	leg.BridgeID, leg.Addr4, leg.Addr6, leg.Priority = l.ID, got.addr4, got.addr6, s.GwPriority
	leg.DevicePrefix = l.settings().ifacePrefix
	if len(s.MacAddress) > 0 {
		leg.MAC = s.MacAddress.String()
	}
	s.DNSNames = nil
	if l.Name != defaultBridge {
		leg.Names = dnsNames(r, s.Aliases)
		s.DNSNames = leg.Names
		if leg.Links, err = endpointLinks(s.Links); err != nil {
			return leg, nil, err
		}
	}
	s.EndpointID, s.MacAddress = endpointOf(r.ID, l.ID), network.HardwareAddr(overlay.StationOf(leg))
	s.IPAddress, s.IPPrefixLen = got.addr4.Addr(), max(got.addr4.Bits(), 0)
	s.GlobalIPv6Address, s.GlobalIPv6PrefixLen = got.addr6.Addr(), max(got.addr6.Bits(), 0)
	s.Gateway, s.IPv6Gateway = netip.Addr{}, netip.Addr{}
	if !l.Internal {
		leg.Gateway4, leg.Gateway6 = got.via4, got.via6
		s.Gateway, s.IPv6Gateway = got.via4, got.via6
	}
	return leg, &s, nil
}
