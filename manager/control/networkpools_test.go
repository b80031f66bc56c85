package control_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/api/types/swarm"

	"skein/manager/api"
	"skein/manager/dispatcher"
	"skein/manager/store"
)

func (f *fixture) inspect(name string) network.Inspect {
	f.t.Helper()
	o, err := f.srv.GetNetwork(f.t.Context(), &api.GetRequest{Ref: name})
	return get[network.Inspect](f, o, err)
}

// What was asked for is shown again, in docker's words.
func TestNetworkRanges(t *testing.T) {
	f := setup(t)
	f.level(api.FeatureLevel)
	f.network(`{"Name":"n","Driver":"overlay","IPAM":{"Config":[
		{"Subnet":"172.28.0.0/16","IPRange":"172.28.5.0/24","Gateway":"172.28.5.254","AuxiliaryAddresses":{"printer":"172.28.5.5"}},
		{"Subnet":"172.29.0.0/16"},{"Subnet":"fd00:9::/64","Gateway":"fd00:9::99"}]}}`)
	n := f.inspect("n")
	if got := fmt.Sprintf("%v %+v", n.EnableIPv6, n.IPAM.Config); got != "true [{Subnet:172.28.0.0/16 IPRange:172.28.5.0/24 Gateway:172.28.5.254 AuxAddress:map[printer:172.28.5.5]} "+
		"{Subnet:172.29.0.0/16 IPRange:invalid Prefix Gateway:invalid IP AuxAddress:map[]} {Subnet:fd00:9::/64 IPRange:invalid Prefix Gateway:fd00:9::99 AuxAddress:map[]}]" {
		t.Errorf("shown as %s", got)
	}
	f.create(`{"Name":"web","TaskTemplate":{"ContainerSpec":{"Image":"x"},"Networks":[{"Target":"n"}]}}`)
	if v := f.service("web").Endpoint.VirtualIPs; len(v) != 1 || v[0].Addr.String() != "172.28.5.0/16" {
		t.Errorf("VIP %v", v)
	}
	f.network(`{"Name":"four","Driver":"overlay","EnableIPv6":false}`)
	if n := f.inspect("four"); n.EnableIPv6 || len(n.IPAM.Config) != 1 || n.IPAM.Config[0].Gateway.String() != "10.0.16.1" {
		t.Errorf("without IPv6: %+v", n)
	}
	grows := func(name string) (ok bool) {
		f.st.View(func(tx store.ReadTx) { ok = !tx.NetworkByName(name).NoGrowth })
		return ok
	}
	f.network(`{"Name":"still","Labels":{"skein.network.grow":"off"}}`)
	f.network(`{"Name":"more","Labels":{"skein.network.grow":"on"},"IPAM":{"Config":[{"Subnet":"172.28.0.0/16","IPRange":"172.28.5.0/24"}]}}`)
	if grows("n") || !grows("four") || grows("still") || !grows("more") {
		t.Error("which networks grow")
	}
}

// A service may not be on two networks that look alike.
func TestServiceOnTwinNetworks(t *testing.T) {
	f := setup(t)
	f.level(api.FeatureLevel)
	for _, name := range []string{"left", "right"} {
		f.network(`{"Name":"` + name + `","IPAM":{"Config":[{"Subnet":"172.28.0.0/24"}]}}`)
	}
	_, err := f.srv.CreateService(t.Context(), &api.CreateRequest{SpecJson: []byte(`{"Name":"web","TaskTemplate":{"ContainerSpec":{"Image":"x"},"Networks":[{"Target":"left"},{"Target":"right"}]}}`)})
	if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "left (172.28.0.0/24") || !strings.Contains(err.Error(), "right (172.28.0.0/24") {
		t.Errorf("a service on both: %v", err)
	}
}

func TestSubnetOfANodesRoute(t *testing.T) {
	f := setup(t)
	f.level(api.FeatureLevel)
	f.facts = []dispatcher.NodeFacts{
		{NodeID: "a", Hostname: "alpha", NodeFacts: &api.NodeFacts{Routes: []*api.FactRoute{{Prefix: "192.0.2.0/24", Device: "eth0"}, {Prefix: "10.0.0.0/19", Device: "vpn0"}}}},
		{NodeID: "b", Hostname: "beta", NodeFacts: &api.NodeFacts{Routes: []*api.FactRoute{{Prefix: "172.28.3.0/24", Device: "vpn0"}, {Prefix: "fd00:1::/32"}}}},
	}
	for subnet, parts := range map[string][]string{
		"172.28.0.0/16": {"172.28.3.0/24", "vpn0", "beta", "skein.network.overlap"},
		"192.0.2.64/26": {"192.0.2.0/24", "eth0", "alpha"},
		"fd00:1:2::/64": {"fd00:1::/32", "beta"},
	} {
		_, err := f.srv.CreateNetwork(t.Context(), &api.CreateRequest{SpecJson: []byte(`{"Name":"n","IPAM":{"Config":[{"Subnet":"` + subnet + `"}]}}`)})
		if !errdefs.IsConflict(err) {
			t.Errorf("%s: %v", subnet, err)
			continue
		}
		for _, p := range parts {
			if !strings.Contains(err.Error(), p) {
				t.Errorf("%s: %v does not say %q", subnet, err, p)
			}
		}
	}
	f.network(`{"Name":"free"}`) // a chosen one keeps clear
	if n := f.inspect("free"); n.IPAM.Config[0].Subnet.String() != "10.0.32.0/20" {
		t.Errorf("chosen subnet: %v", n.IPAM.Config[0])
	}
	f.network(`{"Name":"n","Labels":{"skein.network.overlap":"allow"},"IPAM":{"Config":[{"Subnet":"172.28.0.0/16"}]}}`)
}

func TestPortOfAHostProcess(t *testing.T) {
	f := setup(t)
	f.level(api.FeatureLevel)
	f.facts = []dispatcher.NodeFacts{{NodeID: "a", Hostname: "alpha", NodeFacts: &api.NodeFacts{Ports: []*api.FactPort{
		{Protocol: "tcp", Port: 8080, Holder: "nginx", Pid: 77}, {Protocol: "udp", Port: 53, Holder: "container abc"}, {Protocol: "tcp", Port: 30000, Holder: "x"}}}}}
	spec := func(ports string) []byte {
		return []byte(`{"Name":"web","TaskTemplate":{"ContainerSpec":{"Image":"x"}},"EndpointSpec":{"Ports":[` + ports + `]}}`)
	}
	for ports, want := range map[string]string{
		`{"TargetPort":80,"PublishedPort":8080}`:                   "port 8080/tcp is already in use on node alpha by nginx (pid 77)",
		`{"TargetPort":80,"PublishedPort":53,"Protocol":"udp"}`:    "port 53/udp is already in use on node alpha by container abc:",
		`{"TargetPort":80},{"TargetPort":1,"PublishedPort":8080}`:  "nginx",
		`{"TargetPort":80,"PublishedPort":4789,"Protocol":"udp"}`:  "port 4789/udp is one on which nodes exchange",
		`{"TargetPort":80,"PublishedPort":51841,"Protocol":"udp"}`: "port 51841/udp is one on which nodes exchange",
	} {
		if _, err := f.srv.CreateService(t.Context(), &api.CreateRequest{SpecJson: spec(ports)}); !errdefs.IsConflict(err) || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", ports, err, want)
		}
	}
	f.create(string(spec(`{"TargetPort":80},{"TargetPort":80,"PublishedPort":8080,"Protocol":"udp"},{"TargetPort":9,"PublishedPort":8080,"PublishMode":"host"}`)))
	svc := f.service("web")
	if p := svc.Endpoint.Ports[0]; p.PublishedPort != 30001 {
		t.Errorf("a port that a process has was chosen: %v", p)
	}
	f.facts[0].Ports = append(f.facts[0].Ports, &api.FactPort{Protocol: "udp", Port: 8080, Holder: "late"})
	update := func(ports string) error {
		svc := f.service("web")
		_, err := f.srv.UpdateService(t.Context(), &api.UpdateRequest{Ref: "web", Version: svc.Version.Index, SpecJson: spec(ports)})
		return err
	}
	f.ok(update(`{"TargetPort":81,"PublishedPort":8080,"Protocol":"udp"}`)) // it has it
	if err := update(`{"TargetPort":81,"PublishedPort":8080}`); !errdefs.IsConflict(err) || !strings.Contains(err.Error(), "nginx (pid 77)") {
		t.Errorf("an update to a port that is held: %v", err)
	}
	if svc.Spec.EndpointSpec.Ports[0].PublishMode != swarm.PortConfigPublishModeIngress && svc.Spec.EndpointSpec.Ports[0].PublishMode != "" {
		t.Errorf("%v", svc.Spec.EndpointSpec.Ports)
	}
}
