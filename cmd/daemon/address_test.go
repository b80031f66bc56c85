package daemon

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/moby/moby/api/types/swarm"
)

func TestChooseAddress(t *testing.T) {
	for _, tc := range []struct{ wish, addr, port, err string }{
		{"192.0.2.7", "192.0.2.7", "", ""},
		{"192.0.2.7:4000", "192.0.2.7", "4000", ""},
		{"fd00::7", "fd00::7", "", ""},
		{"[fd00::7]", "fd00::7", "", ""},
		{"[fd00::7]:4000", "fd00::7", "4000", ""},
		{"lo", "127.0.0.1", "", ""},
		{"lo:4000", "127.0.0.1", "4000", ""},
		{"192.0.2.7:0", "", "", "the port must be 1 to 65535"},
		{"192.0.2.7:http", "", "", "the port must be 1 to 65535"},
		{"192.0.2.7:70000", "", "", "the port must be 1 to 65535"},
		{"nosuch0", "", "", `"nosuch0" is neither an IP address nor a network device`},
		{"224.0.0.1", "", "", "not an address at which other nodes reach this one"},
		{"fe80::1%lo", "", "", "not an address at which other nodes reach this one"},
	} {
		a, port, err := chooseAddress(tc.wish, "--advertise-addr")
		switch {
		case tc.err != "":
			if err == nil || !strings.Contains(err.Error(), tc.err) || !strings.Contains(err.Error(), "--advertise-addr") {
				t.Errorf("%s: %v, want %q and the flag", tc.wish, err, tc.err)
			}
		case err != nil || a.String() != tc.addr || port != tc.port:
			t.Errorf("%s: %v, port %q, %v, want %s, port %q", tc.wish, a, port, err, tc.addr, tc.port)
		}
	}
}

func TestListenAddress(t *testing.T) {
	const configured = "10.1.1.1:3000"
	for _, tc := range []struct{ wish, want, err string }{
		{"", configured, ""},
		{"0.0.0.0:2377", configured, ""}, // what the command line sends by itself
		{"0.0.0.0", "0.0.0.0:2377", ""},
		{"0.0.0.0:2400", "0.0.0.0:2400", ""},
		{":2400", "0.0.0.0:2400", ""},
		{"192.0.2.1", "192.0.2.1:2377", ""},
		{"[::]:2400", "[::]:2400", ""},
		{"lo:2400", "127.0.0.1:2400", ""},
		{"lo:0", "", "the port must be"},
		{"nosuch0", "", "neither an IP address nor a network device"},
	} {
		got, err := listenAddress(tc.wish, configured)
		if tc.err == "" && (err != nil || got != tc.want) {
			t.Errorf("%q: %q, %v, want %q", tc.wish, got, err, tc.want)
		}
		if tc.err != "" && (err == nil || !strings.Contains(err.Error(), tc.err)) {
			t.Errorf("%q: %v, want %q", tc.wish, err, tc.err)
		}
	}
}

func TestDualStack(t *testing.T) {
	for in, want := range map[string]string{"0.0.0.0:2377": "[::]:2377", "192.0.2.1:9": "192.0.2.1:9", "[::1]:9": "[::1]:9"} {
		if got := dualStack(in); got != want {
			t.Errorf("%s: %s, want %s", in, got, want)
		}
	}
}

func TestRemoteAddress(t *testing.T) {
	for in, want := range map[string]string{
		"192.0.2.1": "192.0.2.1:2377", "192.0.2.1:99": "192.0.2.1:99", "manager.example": "manager.example:2377", "manager.example:99": "manager.example:99",
		"fd00::1": "[fd00::1]:2377", "[fd00::1]": "[fd00::1]:2377", "[fd00::1]:99": "[fd00::1]:99",
		"": "", ":99": "", "tcp://192.0.2.1": "", "192.0.2.1:99999": "", "a b": "",
	} {
		got, err := remoteAddress(in)
		if got != want || (err == nil) != (want != "") {
			t.Errorf("%q: %q, %v, want %q", in, got, err, want)
		}
	}
}

func TestLocalAddress(t *testing.T) {
	for in, want := range map[string]string{"0.0.0.0:2377": "127.0.0.1:2377", "[::]:9": "[::1]:9", "192.0.2.1:5": "192.0.2.1:5"} {
		if got := localAddress(in); got != want {
			t.Errorf("%s: %s, want %s", in, got, want)
		}
	}
}

func TestOwnDevices(t *testing.T) {
	for name, want := range map[string]bool{"eth0": false, "mesh0": true, "docker0": true, "br-1234": true, "veth12": true, "bond0": false} {
		if ownDevice(name) != want {
			t.Errorf("%s: %v", name, !want)
		}
	}
}

func TestPools(t *testing.T) {
	prefix := netip.MustParsePrefix
	busy := busyRoutes{{prefix("10.1.0.0/16"), "the route to 10.1.0.0/16"}}
	if p, err := busy.choose("h", overlayPools); err != nil || p != prefix("10.128.0.0/10") {
		t.Errorf("with a route in the default pool: %v, %v", p, err)
	}
	busy = append(busy, route{prefix("10.128.0.0/9"), "the route to 10.128.0.0/9"})
	if p, err := busy.choose("h", overlayPools); err != nil || p != prefix("172.24.0.0/13") {
		t.Errorf("with 10.0.0.0/8 in use: %v, %v", p, err)
	}
	if p, err := busy.choose("h", meshPools); err != nil || p != prefix("100.64.0.0/10") {
		t.Errorf("mesh: %v, %v", p, err)
	}
	busy = append(busy, route{prefix("172.16.0.0/12"), "the route to 172.16.0.0/12"})
	if _, err := busy.choose("h", overlayPools); err == nil || !strings.Contains(err.Error(), "overlaps with the route to 172.16.0.0/12 of node h") {
		t.Errorf("all in use: %v", err)
	}
}

func TestFoundingPools(t *testing.T) {
	for _, tc := range []struct {
		pool string
		bits uint32
		want uint32
		err  string
	}{
		{"", 24, 0, ""}, // docker's command line by itself
		{"", 26, 26, ""},
		{"", 8, 0, "need a mask length from"},
		{"203.0.0.0/16", 24, 24, ""},
		{"203.0.0.0/16", 0, 0, ""}, // the default, /20
		{"203.0.0.0/22", 0, 26, ""},
		{"203.0.0.0/24", 24, 24, ""},
		{"203.0.0.0/16", 15, 0, "need a mask length from 16 to 29"},
		{"203.0.0.0/16", 30, 0, "need a mask length from 16 to 29"},
		{"203.0.1.0/16", 24, 0, "did you mean 203.0.0.0/16"},
		{"203.0.0.0/28", 29, 0, "prefix length from 8 to 24"},
		{"fd00::/48", 64, 0, "want an IPv4 prefix"},
		{"127.0.0.0/8", 24, 0, "no addresses for containers"},
		{"224.0.0.0/8", 24, 0, "no addresses for containers"},
	} {
		req := swarm.InitRequest{SubnetSize: tc.bits}
		if tc.pool != "" {
			req.DefaultAddrPool = []netip.Prefix{netip.MustParsePrefix(tc.pool)}
		}
		var f founding
		err := f.pools("h", req)
		switch {
		case tc.err != "":
			if err == nil || !strings.Contains(err.Error(), tc.err) {
				t.Errorf("%s with %d: %v, want %q", tc.pool, tc.bits, err, tc.err)
			}
		case err != nil || f.spec.OverlayBits != tc.want || !f.spec.MeshPool.IsValid() || f.spec.MeshPool.Overlaps(f.spec.OverlayPools[0]):
			t.Errorf("%s with %d: networks of /%d, want /%d; mesh %v, %v", tc.pool, tc.bits, f.spec.OverlayBits, tc.want, f.spec.MeshPool, err)
		}
	}
	// The default mesh pool gives way to the user's pool.
	var f founding
	if err := f.pools("h", swarm.InitRequest{DefaultAddrPool: []netip.Prefix{netip.MustParsePrefix("10.200.0.0/16")}}); err != nil {
		t.Skipf("this machine has a route there: %v", err)
	}
	if f.spec.MeshPool.String() != "100.64.0.0/10" {
		t.Errorf("mesh pool %v beside 10.200.0.0/16", f.spec.MeshPool)
	}
}

func TestFoundingSeveralPools(t *testing.T) {
	prefixes := func(all ...string) (out []netip.Prefix) {
		for _, s := range all {
			out = append(out, netip.MustParsePrefix(s))
		}
		return out
	}
	var f founding
	if err := f.pools("h", swarm.InitRequest{DefaultAddrPool: prefixes("203.0.0.0/16", "203.9.0.0/20"), SubnetSize: 26}); err != nil {
		t.Fatal(err)
	}
	if f.spec.OverlayBits != 26 || len(f.spec.OverlayPools) != 2 {
		t.Errorf("%+v", f.spec)
	}
	for want, all := range map[string][]netip.Prefix{
		"203.0.4.0/24 overlaps with --default-addr-pool 203.0.0.0/16": prefixes("203.0.0.0/16", "203.0.4.0/24"),
		"a mask length from 24": prefixes("203.0.0.0/16", "203.9.0.0/24"),
	} {
		if err := (&founding{}).pools("h", swarm.InitRequest{DefaultAddrPool: all, SubnetSize: 22}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v: %v", all, err)
		}
	}
}

func TestCheckInit(t *testing.T) {
	for _, tc := range []struct {
		req  swarm.InitRequest
		want string
	}{
		{swarm.InitRequest{}, ""},
		{swarm.InitRequest{DataPathPort: 4789, Availability: "drain"}, ""},
		{swarm.InitRequest{DataPathPort: 80}, "between 1024 and 49151"},
		{swarm.InitRequest{DataPathPort: 50000}, "between 1024 and 49151"},
		{swarm.InitRequest{Availability: "maybe"}, "invalid Availability"},
	} {
		if err := checkInit(tc.req); (err == nil) != (tc.want == "") || (err != nil && !strings.Contains(err.Error(), tc.want)) {
			t.Errorf("%+v: %v, want %q", tc.req, err, tc.want)
		}
	}
}
