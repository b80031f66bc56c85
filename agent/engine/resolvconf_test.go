package engine

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/moby/moby/api/types/container"

	"skein/overlay/dns"
)

// resolv.conf is what dockerd makes of the node's and the user's wishes.
func TestContainerConf(t *testing.T) {
	host := "nameserver 192.0.2.53\nnameserver 127.0.0.1\nnameserver fd00::53\nsearch corp.example lan\noptions edns0 trust-ad\n"
	own := []netip.Addr{netip.MustParseAddr("198.51.100.53")}
	for _, c := range []struct {
		what, host string
		hc         container.HostConfig
		own        bool
		want       string
	}{
		{"a network with names", host, container.HostConfig{}, true, "nameserver 127.0.0.11|search corp.example lan|options edns0 trust-ad ndots:0"},
		{"nothing known of the node", "", container.HostConfig{}, true, "nameserver 127.0.0.11|options ndots:0"},
		{"the node's ndots", "options ndots:3", container.HostConfig{}, true, "nameserver 127.0.0.11|options ndots:3"},
		{"resolvers of its own", host, container.HostConfig{DNS: own}, true, "nameserver 127.0.0.11|search corp.example lan|options edns0 trust-ad ndots:0"},
		{"search domains of its own", host, container.HostConfig{DNSSearch: []string{"a.example", "b"}}, true, "nameserver 127.0.0.11|search a.example b|options edns0 trust-ad ndots:0"},
		{"no search domains", host, container.HostConfig{DNSSearch: []string{"."}}, true, "nameserver 127.0.0.11|options edns0 trust-ad ndots:0"},
		{"options of its own", host, container.HostConfig{DNSOptions: []string{"timeout:3"}}, true, "nameserver 127.0.0.11|search corp.example lan|options timeout:3 ndots:0"},
		{"ndots of its own", host, container.HostConfig{DNSOptions: []string{"ndots:2"}}, true, "nameserver 127.0.0.11|search corp.example lan|options ndots:2"},
		{"the default bridge", host, container.HostConfig{}, false, "nameserver 192.0.2.53|search corp.example lan|options edns0 trust-ad"},
		{"the default bridge, resolvers of its own", host, container.HostConfig{DNS: own, DNSSearch: []string{"x"}, DNSOptions: []string{"use-vc"}}, false, "nameserver 198.51.100.53|search x|options use-vc"},
		{"the node's network", host, container.HostConfig{NetworkMode: "host", DNSSearch: []string{"x"}}, false, "nameserver 192.0.2.53|nameserver 127.0.0.1|nameserver fd00::53|search x|options edns0 trust-ad"},
	} {
		r := record{HostConfig: &c.hc}
		r.Sandbox.DNS = c.own
		got := strings.ReplaceAll(strings.TrimSpace(string(containerConf(r, dns.ParseConf([]byte(c.host))).Text())), "\n", "|")
		if got != c.want {
			t.Errorf("%s: %s, want %s", c.what, got, c.want)
		}
	}
}

func TestDNSNames(t *testing.T) {
	r := record{ID: strings.Repeat("0123456789abcdef", 4), Name: "db", Config: &container.Config{Hostname: "0123456789ab"}}
	if got, want := dnsNames(r, []string{"alias", "db"}), []string{"db", "alias", "0123456789ab"}; !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	r.Config.Hostname = "host"
	if got, want := dnsNames(r, nil), []string{"db", "0123456789ab", "host"}; !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}
