package engine

import (
	"net/netip"
	"os"
	"slices"
	"strings"

	"skein/overlay/dns"
)

// ownResolver is where the names of networks are answered inside a container.
var ownResolver = netip.AddrFrom4([4]byte{127, 0, 0, 11})

// resolvConf is a container's /etc/resolv.conf: the node's, with what the user chose instead, and with our resolver where the container's
// networks have names.
func resolvConf(r record) []byte {
	hc := r.HostConfig
	chosen := len(hc.DNS)+len(hc.DNSSearch)+len(hc.DNSOptions) > 0
	if hc.NetworkMode.IsHost() && !chosen {
		host, err := os.ReadFile("/etc/resolv.conf") // the stub that it may name answers there
		if err == nil {
			return host
		}
	}
	return containerConf(r, dns.HostConf()).Text()
}

func containerConf(r record, host dns.Conf) dns.Conf {
	hc, c := r.HostConfig, host
	if len(hc.DNS) > 0 {
		c.Nameservers = hc.DNS
	}
	if len(hc.DNSSearch) > 0 {
		c.Search = slices.DeleteFunc(slices.Clone(hc.DNSSearch), func(s string) bool { return s == "." }) // "." alone: none
	}
	if len(hc.DNSOptions) > 0 {
		c.Options = hc.DNSOptions
	}
	switch {
	case r.Sandbox.DNS:
		c.Nameservers = []netip.Addr{ownResolver}
		if !slices.ContainsFunc(c.Options, func(o string) bool { return strings.HasPrefix(o, "ndots:") }) {
			c.Options = append(slices.Clone(c.Options), "ndots:0") // names of networks have dots, and are not to be asked for with every search domain first
		}
	case len(hc.DNS) == 0 && !hc.NetworkMode.IsHost():
		c.Nameservers = usable(host)
	}
	return c
}

// usable are the node's resolvers that a container without names reaches by itself.
func usable(host dns.Conf) []netip.Addr {
	return slices.DeleteFunc(slices.Clone(host.Nameservers), func(a netip.Addr) bool { return a.IsLoopback() || a.Is6() })
}

// needsForwarder tells that a container on the default bridge reaches none of the node's resolvers, so that ours has to ask them.
func needsForwarder(r record) bool {
	if len(r.HostConfig.DNS) > 0 {
		return false
	}
	host := dns.HostConf()
	return len(host.Nameservers) > 0 && len(usable(host)) == 0
}

// dnsNames are a container's names on a network that users made, in docker's order.
func dnsNames(r record, aliases []string) []string {
	var out []string
	for _, n := range slices.Concat([]string{r.Name}, aliases, []string{r.ID[:12], r.Config.Hostname}) {
		if n != "" && !slices.Contains(out, n) {
			out = append(out, n)
		}
	}
	return out
}
