package control_test

import (
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"skein/manager/api"
)

// TestIngressNetwork: it goes only without published ports, ports are published only with it, and there is one at most.
func TestIngressNetwork(t *testing.T) {
	f := setup(t)
	f.level(api.FeatureLevel)
	remove := func(name string) error {
		_, err := f.srv.RemoveNetwork(t.Context(), &api.RemoveRequest{Ref: name})
		return err
	}
	service := func(name string) error {
		_, err := f.srv.CreateService(t.Context(), &api.CreateRequest{SpecJson: []byte(`{"Name":"` + name + `","TaskTemplate":{"ContainerSpec":{"Image":"x"}},"EndpointSpec":{"Ports":[{"TargetPort":80,"PublishedPort":8080}]}}`)})
		return err
	}
	create := func(spec string) (*api.Created, error) {
		return f.srv.CreateNetwork(t.Context(), &api.CreateRequest{SpecJson: []byte(spec)})
	}
	f.ok(service("web"))
	if err := remove("ingress"); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "service web depends on it") {
		t.Errorf("with a published port: %v", err)
	}
	if _, err := create(`{"Name":"mine","Ingress":true}`); !errdefs.IsAlreadyExists(err) {
		t.Errorf("a second one: %v", err)
	}
	_, err := f.srv.RemoveService(t.Context(), &api.RemoveRequest{Ref: "web"})
	f.ok(err)
	f.ok(remove("ingress"))
	if err := service("web"); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "no ingress network is present") {
		t.Errorf("without it: %v", err)
	}
	if _, err := create(`{"Name":"mine","Ingress":true,"Options":{"encrypted":""}}`); !errdefs.IsNotImplemented(err) {
		t.Errorf("encrypted: %v", err)
	}
	got, err := create(`{"Name":"mine","Ingress":true,"IPAM":{"Config":[{"Subnet":"10.11.0.0/16"}]},"Options":{"com.docker.network.driver.mtu":"1200"}}`)
	f.ok(err)
	if len(got.Warnings) != 2 || !strings.Contains(got.Warnings[0], "subnet") {
		t.Errorf("warnings %q", got.Warnings)
	}
	f.ok(service("web"))
}
