package dns

import (
	"bytes"
	"net/netip"
	"os"
	"strings"
)

// Conf is a resolv.conf as far as Skein reads it.
type Conf struct {
	Nameservers []netip.Addr
	Search      []string
	Options     []string
}

// Where the resolvers of a node are written down: the second file is systemd-resolved's, which has the real ones where the first names
// only its stub.
const (
	hostConf    = "/etc/resolv.conf"
	managedConf = "/run/systemd/resolve/resolv.conf"
)

// ReadConf reads resolv.conf; what cannot be read or understood is left out.
func ReadConf(path string) Conf {
	b, _ := os.ReadFile(path)
	return ParseConf(b)
}

// ParseConf reads the text of a resolv.conf.
func ParseConf(b []byte) Conf {
	var c Conf
	for line := range bytes.Lines(b) {
		fields := strings.Fields(string(line))
		if len(fields) < 2 {
			continue
		}
		switch fields[0] {
		case "nameserver":
			if a, err := netip.ParseAddr(fields[1]); err == nil {
				c.Nameservers = append(c.Nameservers, a.Unmap())
			}
		case "domain":
			c.Search = fields[1:2]
		case "search": // the last line counts
			c.Search = fields[1:]
		case "options":
			c.Options = append(c.Options, fields[1:]...)
		}
	}
	return c
}

// Text writes the file.
func (c Conf) Text() []byte {
	var b bytes.Buffer
	for _, a := range c.Nameservers {
		b.WriteString("nameserver " + a.String() + "\n")
	}
	if len(c.Search) > 0 {
		b.WriteString("search " + strings.Join(c.Search, " ") + "\n")
	}
	if len(c.Options) > 0 {
		b.WriteString("options " + strings.Join(c.Options, " ") + "\n")
	}
	return b.Bytes()
}

// HostConf is the node's own resolv.conf; where that names nothing but systemd-resolved's stub, the file behind it. If there is none
// the stub it is: it can be asked from the node's network.
func HostConf(files ...string) Conf {
	if len(files) == 0 {
		files = []string{hostConf, managedConf}
	}
	var first Conf
	for i, file := range files {
		c := ReadConf(file)
		if i == 0 {
			first = c
		}
		if len(c.Nameservers) > 0 && !onlyStub(c) {
			return c
		}
		if len(first.Nameservers) == 0 {
			first = c
		}
	}
	return first
}

func onlyStub(c Conf) bool {
	for _, a := range c.Nameservers {
		if a != netip.AddrFrom4([4]byte{127, 0, 0, 53}) {
			return false
		}
	}
	return true
}

// HostResolvers are the node's resolvers, at most as many as are asked.
func HostResolvers(files ...string) []netip.AddrPort {
	var out []netip.AddrPort
	for _, a := range HostConf(files...).Nameservers {
		if len(out) < maxUpstreams {
			out = append(out, netip.AddrPortFrom(a, 53))
		}
	}
	return out
}
