package main

import (
	"context"
	"fmt"
	"strings"

	cerrdefs "github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/swarm"
	"github.com/moby/moby/client"
)

// mark is the label that holds an object's value.
const mark = "linear"

// found is an object as it was read.
type found struct {
	value   string // empty: there is none
	id      string
	version swarm.Version
	spec    any
}

// kind is one sort of object. Names are unique among the objects of a kind; an object's full name begins with its kind's.
type kind struct {
	name   string
	create func(ctx context.Context, api *client.Client, name, value string) error // nil: the objects are always there
	read   func(ctx context.Context, api *client.Client, name string) (found, error)
	update func(ctx context.Context, api *client.Client, f found, value string) error // nil: cannot be changed
	remove func(ctx context.Context, api *client.Client, name string) error
	list   func(ctx context.Context, api *client.Client) (map[string]string, error) // name → value; an error when a name comes twice
}

func kinds() map[string]kind {
	return map[string]kind{"service": services(), "config": configs(), "network": networks(), "node": nodes()}
}

// versionMoves reports whether an update may be refused though nobody wrote: the cluster itself writes to services (the state of their
// rollout) and nodes.
func versionMoves(object string) bool {
	return strings.HasPrefix(object, "service/") || strings.HasPrefix(object, "node/")
}

// refusal maps an error to the result of a request that certainly did nothing.
func refusal(err error) string {
	switch {
	case err == nil:
		return resOK
	case cerrdefs.IsNotFound(err):
		return resMissing
	case strings.Contains(err.Error(), "out of sequence"):
		return resStale
	case cerrdefs.IsAlreadyExists(err), cerrdefs.IsConflict(err):
		return resExists
	}
	return resUnknown
}

// once fills a listing and refuses a name that comes twice.
func once(all map[string]string, name, value string) error {
	if old, twice := all[name]; twice {
		return fmt.Errorf("%w: %s is there twice, with %q and %q", errTwice, name, old, value)
	}
	all[name] = value
	return nil
}

func services() kind {
	spec := func(name, value string) swarm.ServiceSpec {
		none := uint64(0)
		return swarm.ServiceSpec{
			Annotations:  swarm.Annotations{Name: name, Labels: map[string]string{mark: value}},
			TaskTemplate: swarm.TaskSpec{ContainerSpec: &swarm.ContainerSpec{Image: "linear:none"}},
			Mode:         swarm.ServiceMode{Replicated: &swarm.ReplicatedService{Replicas: &none}},
		}
	}
	return kind{
		name: "service",
		create: func(ctx context.Context, api *client.Client, name, value string) error {
			_, err := api.ServiceCreate(ctx, client.ServiceCreateOptions{Spec: spec(name, value)})
			return err
		},
		read: func(ctx context.Context, api *client.Client, name string) (found, error) {
			r, err := api.ServiceInspect(ctx, name, client.ServiceInspectOptions{})
			return found{r.Service.Spec.Labels[mark], r.Service.ID, r.Service.Version, r.Service.Spec}, err
		},
		update: func(ctx context.Context, api *client.Client, f found, value string) error {
			s := f.spec.(swarm.ServiceSpec)
			s.Labels = map[string]string{mark: value}
			_, err := api.ServiceUpdate(ctx, f.id, client.ServiceUpdateOptions{Version: f.version, Spec: s})
			return err
		},
		remove: func(ctx context.Context, api *client.Client, name string) error {
			_, err := api.ServiceRemove(ctx, name, client.ServiceRemoveOptions{})
			return err
		},
		list: func(ctx context.Context, api *client.Client) (map[string]string, error) {
			r, err := api.ServiceList(ctx, client.ServiceListOptions{Filters: make(client.Filters).Add("label", mark)})
			all := map[string]string{}
			for _, s := range r.Items {
				if err == nil {
					err = once(all, s.Spec.Name, s.Spec.Labels[mark])
				}
			}
			return all, err
		},
	}
}

func configs() kind {
	return kind{
		name: "config",
		create: func(ctx context.Context, api *client.Client, name, value string) error {
			_, err := api.ConfigCreate(ctx, client.ConfigCreateOptions{Spec: swarm.ConfigSpec{
				Annotations: swarm.Annotations{Name: name, Labels: map[string]string{mark: value}}, Data: []byte("content of " + value)}})
			return err
		},
		read: func(ctx context.Context, api *client.Client, name string) (found, error) {
			r, err := api.ConfigInspect(ctx, name, client.ConfigInspectOptions{})
			return found{r.Config.Spec.Labels[mark], r.Config.ID, r.Config.Version, r.Config.Spec}, err
		},
		update: func(ctx context.Context, api *client.Client, f found, value string) error {
			s := f.spec.(swarm.ConfigSpec)
			s.Labels = map[string]string{mark: value}
			_, err := api.ConfigUpdate(ctx, f.id, client.ConfigUpdateOptions{Version: f.version, Spec: s})
			return err
		},
		remove: func(ctx context.Context, api *client.Client, name string) error {
			_, err := api.ConfigRemove(ctx, name, client.ConfigRemoveOptions{})
			return err
		},
		list: func(ctx context.Context, api *client.Client) (map[string]string, error) {
			r, err := api.ConfigList(ctx, client.ConfigListOptions{Filters: make(client.Filters).Add("label", mark)})
			all := map[string]string{}
			for _, c := range r.Items {
				if err == nil {
					err = once(all, c.Spec.Name, c.Spec.Labels[mark])
				}
			}
			return all, err
		},
	}
}

func networks() kind {
	return kind{
		name: "network",
		create: func(ctx context.Context, api *client.Client, name, value string) error {
			_, err := api.NetworkCreate(ctx, name, client.NetworkCreateOptions{Driver: "overlay", Labels: map[string]string{mark: value}})
			return err
		},
		read: func(ctx context.Context, api *client.Client, name string) (found, error) {
			r, err := api.NetworkInspect(ctx, name, client.NetworkInspectOptions{Scope: "swarm"})
			return found{value: r.Network.Labels[mark], id: r.Network.ID}, err
		},
		remove: func(ctx context.Context, api *client.Client, name string) error {
			_, err := api.NetworkRemove(ctx, name, client.NetworkRemoveOptions{})
			return err
		},
		list: func(ctx context.Context, api *client.Client) (map[string]string, error) {
			r, err := api.NetworkList(ctx, client.NetworkListOptions{Filters: make(client.Filters).Add("label", mark)})
			all := map[string]string{}
			for _, n := range r.Items {
				if err == nil {
					err = once(all, n.Name, n.Labels[mark])
				}
			}
			return all, err
		},
	}
}

// nodes are named by id and cannot be made or removed here.
func nodes() kind {
	return kind{
		name: "node",
		read: func(ctx context.Context, api *client.Client, name string) (found, error) {
			r, err := api.NodeInspect(ctx, name, client.NodeInspectOptions{})
			return found{r.Node.Spec.Labels[mark], r.Node.ID, r.Node.Version, r.Node.Spec}, err
		},
		update: func(ctx context.Context, api *client.Client, f found, value string) error {
			s := f.spec.(swarm.NodeSpec)
			s.Labels = map[string]string{mark: value}
			_, err := api.NodeUpdate(ctx, f.id, client.NodeUpdateOptions{Version: f.version, Spec: s})
			return err
		},
		list: func(ctx context.Context, api *client.Client) (map[string]string, error) {
			r, err := api.NodeList(ctx, client.NodeListOptions{})
			all := map[string]string{}
			for _, n := range r.Items {
				if err == nil {
					err = once(all, n.ID, n.Spec.Labels[mark])
				}
			}
			return all, err
		},
	}
}
