package engine

import (
	"errors"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"testing"

	cerrdefs "github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/network"

	"skein/agent/dockerapi"
	"skein/agent/task"
	"skein/manager/api"
	"skein/overlay"
)

func prefix(s string) netip.Prefix { return netip.MustParsePrefix(s) }
func ip(s string) netip.Addr       { return netip.MustParseAddr(s) }

func (b *bench) network(req network.CreateRequest) *localNetwork {
	b.t.Helper()
	made, err := b.e.NetworkCreate(b.t.Context(), req)
	if err != nil {
		b.t.Fatal(err)
	}
	l, err := b.e.nets.find(made.ID)
	if err != nil {
		b.t.Fatal(err)
	}
	return l
}

func ipam(c ...network.IPAMConfig) *network.IPAM { return &network.IPAM{Config: c} }

func TestPools(t *testing.T) {
	b := newBench(t)
	on := true
	l := b.network(network.CreateRequest{Name: "ranged", IPAM: ipam(network.IPAMConfig{Subnet: prefix("10.5.0.0/16"), IPRange: prefix("10.5.7.0/30"),
		AuxAddress: map[string]netip.Addr{"printer": ip("10.5.7.1")}})})
	if l.Pools[0].Gateway != ip("10.5.7.0") {
		t.Errorf("gateway %s, want the range's first", l.Pools[0].Gateway)
	}
	for i, want := range []string{"10.5.7.2", "10.5.7.3"} {
		if got, err := b.e.nets.take(l, string(rune('a'+i)), netip.Addr{}, netip.Addr{}); err != nil || got.addr4 != netip.PrefixFrom(ip(want), 16) {
			t.Errorf("%d: %v %v, want %s", i, got, err, want)
		}
	}
	if _, err := b.e.nets.take(l, "c", netip.Addr{}, netip.Addr{}); !cerrdefs.IsConflict(err) {
		t.Errorf("full range: %v", err)
	}
	if got, err := b.e.nets.take(l, "c", ip("10.5.200.1"), netip.Addr{}); err != nil || got.addr4.Addr() != ip("10.5.200.1") {
		t.Errorf("beside the range: %v %v", got, err)
	}
	if in := b.e.inspectNetwork(l); in.Status == nil || in.Status.IPAM.Subnets[prefix("10.5.0.0/16")] != (network.SubnetStatus{IPsInUse: 7, DynamicIPsAvailable: 0}) {
		t.Errorf("status %+v", in.Status)
	}
	// chosen ones keep clear of the node's routes (172.18.5.0/24 in the fake) and of each other
	two, three := b.network(network.CreateRequest{Name: "two", EnableIPv6: &on}), b.network(network.CreateRequest{Name: "three", EnableIPv6: &on})
	if two.Pools[0].Subnet != prefix("172.19.0.0/16") || two.Pools[1].Subnet.Bits() != 64 || !two.Pools[1].Subnet.Addr().IsPrivate() || two.Pools[1].Gateway != two.Pools[1].Subnet.Addr().Next() {
		t.Errorf("chosen: %+v", two.Pools)
	}
	if two.Pools[1].Subnet == three.Pools[1].Subnet || two.Pools[0].Subnet == three.Pools[0].Subnet {
		t.Errorf("chosen twice: %+v", three.Pools)
	}
	b.restart()
	if again, err := b.e.nets.find("two"); err != nil || again.Pools[1].Subnet != two.Pools[1].Subnet {
		t.Errorf("after a restart: %+v %v", again, err)
	}
}

func TestNetworkRequests(t *testing.T) {
	b := newBench(t)
	on, off := true, false
	b.network(network.CreateRequest{Name: "taken", IPAM: ipam(network.IPAMConfig{Subnet: prefix("10.1.0.0/16")})})
	b.network(network.CreateRequest{Name: "vlan", Driver: "macvlan", Options: map[string]string{"parent": "eth7"}, IPAM: ipam(network.IPAMConfig{Subnet: prefix("10.7.0.0/24")},
		network.IPAMConfig{Subnet: prefix("10.7.1.0/24")})})
	for _, c := range []struct {
		req  network.CreateRequest
		want string
	}{
		{network.CreateRequest{Name: "bridge"}, "operation is not permitted on predefined bridge network"},
		{network.CreateRequest{Name: "taken"}, "network with name taken already exists"},
		{network.CreateRequest{Name: "n", Driver: "host"}, `only one instance of "host" network is allowed`},
		{network.CreateRequest{Name: "n", Driver: "weave"}, "no plugins"},
		{network.CreateRequest{Name: "n", Options: map[string]string{"x": "y"}}, "option x"},
		{network.CreateRequest{Name: "n", Options: map[string]string{optICC: "perhaps"}}, "failed to parse " + optICC},
		{network.CreateRequest{Name: "n", Options: map[string]string{optGatewayMode4: "isolated"}}, "can only be used for an internal network"},
		{network.CreateRequest{Name: "n", Options: map[string]string{optBridgeName: "a-name-that-is-too-long"}}, "device name"},
		{network.CreateRequest{Name: "n", Driver: "macvlan", Options: map[string]string{"macvlan_mode": "odd"}}, "requested macvlan mode 'odd' is not valid"},
		{network.CreateRequest{Name: "n", Driver: "macvlan", Options: map[string]string{"parent": "eth7"}}, "network vlan is already using parent interface eth7"},
		{network.CreateRequest{Name: "n", EnableIPv4: &off}, "IPv4 or IPv6 must be enabled"},
		{network.CreateRequest{Name: "n", IPAM: ipam(network.IPAMConfig{Subnet: prefix("10.1.2.0/24")})}, "Pool overlaps with other one on this address space"},
		{network.CreateRequest{Name: "n", IPAM: ipam(network.IPAMConfig{Subnet: prefix("10.2.0.1/24")})}, "invalid subnet 10.2.0.1/24: it should be 10.2.0.0/24"},
		{network.CreateRequest{Name: "n", IPAM: ipam(network.IPAMConfig{Subnet: prefix("10.2.0.0/24"), Gateway: ip("10.3.0.1")})},
			"invalid gateway 10.3.0.1: parent subnet 10.2.0.0/24 doesn't contain this address"},
		{network.CreateRequest{Name: "n", IPAM: ipam(network.IPAMConfig{Subnet: prefix("10.2.0.0/24"), IPRange: prefix("10.3.0.0/28")})}, "doesn't contain ip-range"},
		{network.CreateRequest{Name: "n", EnableIPv6: &on, IPAM: ipam(network.IPAMConfig{Subnet: prefix("fd00::/64"), Gateway: ip("10.3.0.1")})}, "parent subnet is an IPv6 block"},
		{network.CreateRequest{Name: "n", IPAM: ipam(network.IPAMConfig{Subnet: prefix("10.2.0.0/24")}, network.IPAMConfig{Subnet: prefix("10.3.0.0/24")})},
			"bridge driver doesn't support multiple subnets"},
		{network.CreateRequest{Name: "n", ConfigFrom: &network.ConfigReference{Network: "taken"}}, `configuration network "taken" does not exist`},
	} {
		if _, err := b.e.NetworkCreate(t.Context(), c.req); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%+v: %v, want %q", c.req, err, c.want)
		}
	}
	if n := len(b.e.nets.byID); n != 5 {
		t.Errorf("%d networks are left, want 5", n)
	}
}

func TestConfigOnlyNetworks(t *testing.T) {
	b := newBench(t)
	b.network(network.CreateRequest{Name: "cfg", ConfigOnly: true, IPAM: ipam(network.IPAMConfig{Subnet: prefix("10.8.0.0/24")}), Options: map[string]string{"parent": "eth7"}})
	if len(b.net.bridges) != 1 {
		t.Errorf("a configuration has a device: %+v", b.net.bridges)
	}
	l := b.network(network.CreateRequest{Name: "net", Driver: "macvlan", ConfigFrom: &network.ConfigReference{Network: "cfg"}})
	if l.Device != "eth7" || l.Pools[0].Subnet != prefix("10.8.0.0/24") || b.e.inspectNetwork(l).ConfigFrom.Network != "cfg" {
		t.Errorf("%+v", l)
	}
	if err := b.e.NetworkRemove(t.Context(), "cfg"); err == nil || !strings.Contains(err.Error(), "in use") {
		t.Errorf("rm of a configuration in use: %v", err)
	}
	hc := container.HostConfig{NetworkMode: "cfg"}
	req := container.CreateRequest{Config: &container.Config{Image: "busybox"}, HostConfig: &hc}
	if _, err := b.e.ContainerCreate(t.Context(), "one", req, ""); err == nil || !strings.Contains(err.Error(), "configuration only") {
		t.Errorf("container on a configuration: %v", err)
	}
	for _, n := range []string{"net", "cfg"} {
		if err := b.e.NetworkRemove(t.Context(), n); err != nil {
			t.Error(err)
		}
	}
}

// What a user chose for a container on a network is kept over its runs, and ports are published in both families on the network that leads out.
func TestEndpointSettings(t *testing.T) {
	b := newBench(t)
	on := true
	b.network(network.CreateRequest{Name: "a", IPAM: ipam(network.IPAMConfig{Subnet: prefix("10.1.0.0/24")})})
	b.network(network.CreateRequest{Name: "b", EnableIPv6: &on, IPAM: ipam(network.IPAMConfig{Subnet: prefix("10.2.0.0/24")}, network.IPAMConfig{Subnet: prefix("fd00:2::/64")})})
	hc := publish("8080-8090")
	hc.NetworkMode = "b"
	mac := network.HardwareAddr{2, 0x11, 0x22, 0x33, 0x44, 0x55}
	nc := &network.NetworkingConfig{EndpointsConfig: map[string]*network.EndpointSettings{
		"a": {GwPriority: 1, DriverOpts: map[string]string{optEndpointIfname: "front0", optEndpointSysctls: "net.ipv4.conf.IFNAME.log_martians=1"}},
		"b": {MacAddress: mac, Links: []string{"other:o"}, IPAMConfig: &network.EndpointIPAMConfig{IPv4Address: ip("10.2.0.9"), IPv6Address: ip("fd00:2::9"), LinkLocalIPs: []netip.Addr{ip("169.254.7.7")}}},
	}}
	made, err := b.e.ContainerCreate(t.Context(), "one", container.CreateRequest{Config: &container.Config{Image: "busybox"}, HostConfig: &hc, NetworkingConfig: nc}, "")
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := b.e.ContainerStart(t.Context(), made.ID); err != nil {
			t.Fatal(err)
		}
		legs := b.net.boxes[made.ID].Bridges
		if len(legs) != 2 || legs[0].Addr6 != prefix("fd00:2::9/64") || legs[0].Addr4 != prefix("10.2.0.9/24") || legs[0].MAC != mac.String() || legs[0].LinkLocal[0] != ip("169.254.7.7") ||
			legs[0].Links[0] != (overlay.DNSLink{Alias: "o", Target: "other"}) || legs[1].Device != "front0" || legs[1].Sysctls["ipv4/conf/%s/log_martians"] != "1" {
			t.Fatalf("legs %+v", legs)
		}
		want4, want6 := overlay.HostPort{HostIP: ip("0.0.0.0"), Published: 8080, Target: 80, Protocol: "tcp"}, overlay.HostPort{HostIP: ip("::"), Published: 8080, Target: 80, Protocol: "tcp"}
		if len(legs[0].Ports) != 1 || legs[0].Ports[0] != want6 || len(legs[1].Ports) != 1 || legs[1].Ports[0] != want4 {
			t.Errorf("ports %+v and %+v: a has priority, b alone has IPv6", legs[1].Ports, legs[0].Ports)
		}
		in, err := b.e.ContainerInspect(t.Context(), made.ID, false)
		if err != nil {
			t.Fatal(err)
		}
		e := in.NetworkSettings.Networks["b"]
		if e.GlobalIPv6Address != ip("fd00:2::9") || e.GlobalIPv6PrefixLen != 64 || e.IPv6Gateway != ip("fd00:2::1") || e.MacAddress.String() != mac.String() || len(e.EndpointID) != 64 {
			t.Errorf("inspect %+v", e)
		}
		if in.NetworkSettings.Networks["a"].MacAddress.String() == "" {
			t.Error("no MAC address is shown")
		}
		// Without a, IPv4 goes out by b; the port stays.
		if err := b.e.NetworkDisconnect(t.Context(), "a", network.DisconnectRequest{Container: "one"}); err != nil {
			t.Fatal(err)
		}
		if legs := b.net.boxes[made.ID].Bridges; len(legs) != 1 || len(legs[0].Ports) != 2 || legs[0].Ports[0] != want4 || legs[0].Ports[1] != want6 {
			t.Errorf("after disconnect: %+v", legs)
		}
		if err := b.e.NetworkConnect(t.Context(), "a", network.ConnectRequest{Container: "one", EndpointConfig: nc.EndpointsConfig["a"]}); err != nil {
			t.Fatal(err)
		}
		if err := b.e.ContainerStop(t.Context(), made.ID, dockerapi.StopOptions{}); err != nil {
			t.Fatal(err)
		}
		b.restart()
		if n := len(b.e.ports.holder); n != 0 {
			t.Errorf("%d ports are held by nobody", n)
		}
	}
	for _, bad := range []*network.EndpointSettings{
		{IPAMConfig: &network.EndpointIPAMConfig{IPv4Address: ip("10.3.0.1")}}, {IPAMConfig: &network.EndpointIPAMConfig{LinkLocalIPs: []netip.Addr{ip("10.3.0.1")}}},
		{MacAddress: network.HardwareAddr{1, 2, 3, 4, 5, 6}}, {DriverOpts: map[string]string{"x": "y"}}, {DriverOpts: map[string]string{optEndpointSysctls: "net.ipv4.ip_forward=1"}},
		{DriverOpts: map[string]string{optEndpointIfname: "a/b"}}, {Links: []string{"a:b:c"}},
	} {
		if err := b.e.NetworkConnect(t.Context(), "bridge", network.ConnectRequest{Container: "one", EndpointConfig: bad}); err == nil {
			t.Errorf("accepted: %+v", bad)
		}
	}
}

func TestHostAddresses(t *testing.T) {
	b := newBench(t)
	at := func(host string) container.HostConfig {
		hc := publish("8080")
		hc.PortBindings[network.MustParsePort("80/tcp")][0].HostIP = ip(host)
		return hc
	}
	b.run("one", at("127.0.0.1"))
	b.run("two", at("192.0.2.1"))
	for host, want := range map[string]string{"0.0.0.0": "port is already allocated", "127.0.0.1": "container one has it", "::1": "has no IPv6 address"} {
		if err := b.e.ContainerStart(t.Context(), b.create("c-"+strings.ReplaceAll(host, ":", "-"), at(host))); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", host, err, want)
		}
	}
	hc := publish("8081")
	hc.PortBindings[network.MustParsePort("81/tcp")] = []network.PortBinding{{HostPort: "8081"}}
	if err := b.e.ContainerStart(t.Context(), b.create("twice", hc)); err == nil || !strings.Contains(err.Error(), "port is already allocated") {
		t.Errorf("one port for two: %v", err)
	}
	// An internal network publishes nothing.
	b.network(network.CreateRequest{Name: "shut", Internal: true})
	hc = publish("8082")
	hc.NetworkMode = "shut"
	if legs := b.net.boxes[b.run("inner", hc)].Bridges; len(legs[0].Ports) != 0 || legs[0].Gateway4.IsValid() {
		t.Errorf("internal: %+v", legs)
	}
}

func TestLegacyLinks(t *testing.T) {
	b := newBench(t)
	db := b.run("db", container.HostConfig{})
	web := b.run("web", container.HostConfig{Links: []string{"db:store"}})
	line := func() string {
		f, err := os.ReadFile(b.e.containerDir(web) + "/hosts")
		if err != nil {
			t.Fatal(err)
		}
		for _, l := range strings.Split(string(f), "\n") {
			if strings.Contains(l, "\tstore ") {
				return l
			}
		}
		return ""
	}
	if want := "172.17.0.2\tstore " + db[:12] + " db"; line() != want {
		t.Errorf("hosts has %q, want %q", line(), want)
	}
	if in, err := b.e.ContainerInspect(t.Context(), web, false); err != nil || len(in.HostConfig.Links) != 1 || in.HostConfig.Links[0] != "/db:/web/store" {
		t.Errorf("inspect: %v %v", in.HostConfig.Links, err)
	}
	if err := b.e.ContainerRestart(t.Context(), db, dockerapi.StopOptions{}); err != nil {
		t.Fatal(err)
	}
	if now := b.record(db).Sandbox.Bridges[0].Addr4.Addr().String(); !strings.HasPrefix(line(), now+"\t") {
		t.Errorf("db is at %s now, hosts has %q", now, line())
	}
	if err := b.e.ContainerStop(t.Context(), db, dockerapi.StopOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := b.e.ContainerRestart(t.Context(), web, dockerapi.StopOptions{}); err == nil || !strings.Contains(err.Error(), "Cannot link to a non running container: /db AS /web/store") {
		t.Errorf("link to a stopped one: %v", err)
	}
	req := container.CreateRequest{Config: &container.Config{Image: "busybox"}, HostConfig: &container.HostConfig{Links: []string{"nobody:x"}}}
	if _, err := b.e.ContainerCreate(t.Context(), "", req, ""); !cerrdefs.IsInvalidArgument(err) {
		t.Errorf("link to nobody: %v", err)
	}
}

// A task whose port in mode host is somebody else's on this node is rejected with who has it.
func TestModeHostPorts(t *testing.T) {
	b := newBench(t)
	b.run("mine", publish("8080"))
	b.net.inUse[portKey{"tcp", 9090}] = true
	for port, want := range map[uint32]string{8080: "container mine has it", 9090: "other (pid 7)", 9091: ""} {
		id := "task" + strconv.Itoa(int(port))
		ctl, err := b.e.Controller(&api.Assignment{TaskId: id, ServiceName: id, Slot: 1, SpecJson: []byte(`{"ContainerSpec":{"Image":"busybox"}}`),
			Ports: []*api.PortConfig{{Protocol: "tcp", Target: 80, Published: port}}}, nil, nil)
		if err != nil {
			t.Fatal(err)
		}
		if err := ctl.Prepare(t.Context()); err != nil {
			t.Fatal(err)
		}
		err = ctl.Start(t.Context())
		var fatal task.Fatal
		if want == "" && err != nil || want != "" && (!errors.As(err, &fatal) || !strings.Contains(err.Error(), want)) {
			t.Errorf("port %d: %v, want %q", port, err, want)
		}
	}
}
