package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/moby/moby/api/types/swarm"
	"github.com/moby/moby/client"

	"skein/cmd/dev"
	"skein/test/images"
	"skein/test/nemesis"
)

const (
	callTime  = 10 * time.Second // of one API call
	netName   = "front"
	webPort   = 8080 // of service web, mesh
	probePort = 9090 // of service probe, on each node itself
)

// world is a cluster with services whose truth is looked at.
type world struct {
	*nemesis.Rig
	nemesis *nemesis.Nemesis
	dir     string
	images  *http.Server
	image   string
	broken  int
}

func newWorld(ctx context.Context, o options) (w *world, err error) {
	w = &world{}
	if w.dir, err = os.MkdirTemp("", "skein-truth-"); err != nil {
		return nil, err
	}
	if w.Rig, err = nemesis.NewRig(ctx, nemesis.Options{Name: o.name, Managers: o.managers, Workers: o.workers, Binary: o.binary}); err != nil {
		return nil, errors.Join(err, os.RemoveAll(w.dir))
	}
	w.nemesis = nemesis.New(w.Rig)
	file, repo := filepath.Join(w.dir, "webapp"), ""
	if err = images.Build(ctx, file, "skein/cmd/demo/webapp"); err == nil {
		w.images, repo, err = images.Serve(w.HostAddr(), images.Program{Ref: "web:v1", Path: "/webapp", File: file})
	}
	if err != nil {
		return nil, errors.Join(err, w.close())
	}
	w.image = repo + "/web:v1"
	return w, nil
}

func (w *world) close() error {
	if w.images != nil {
		_ = w.images.Close()
	}
	return errors.Join(w.Rig.Close(), os.RemoveAll(w.dir))
}

// violate notes a broken promise.
func (w *world) violate(format string, args ...any) {
	w.broken++
	w.Say("BROKEN: "+format, args...)
}

// call tries a request at the managers in turn until one carries it out.
func (w *world) call(ctx context.Context, f func(context.Context, *client.Client) error) error {
	var err error
	for begun := time.Now(); time.Since(begun) < time.Minute && ctx.Err() == nil; nemesis.Sleep(ctx, 100*time.Millisecond) {
		for _, m := range w.Managers() {
			c, cancel := context.WithTimeout(ctx, callTime)
			err = f(c, w.Client(m))
			cancel()
			if err == nil {
				return nil
			}
		}
	}
	return errors.Join(err, ctx.Err())
}

func (w *world) createNetwork(ctx context.Context, name string, o client.NetworkCreateOptions) error {
	o.Driver = "overlay"
	return w.call(ctx, func(ctx context.Context, c *client.Client) error {
		_, err := c.NetworkCreate(ctx, name, o)
		if err != nil && strings.Contains(err.Error(), "already exists") {
			return nil
		}
		return err
	})
}

func (w *world) createService(ctx context.Context, s swarm.ServiceSpec) error {
	return w.call(ctx, func(ctx context.Context, c *client.Client) error {
		_, err := c.ServiceCreate(ctx, client.ServiceCreateOptions{Spec: s})
		if err != nil && strings.Contains(err.Error(), "already exists") {
			return nil
		}
		return err
	})
}

// spec is a service of the image on networks; replicas < 0: one task on each node.
func spec(name, image string, replicas int, on ...string) swarm.ServiceSpec {
	s := swarm.ServiceSpec{Annotations: swarm.Annotations{Name: name}}
	grace, delay := time.Second, 200*time.Millisecond
	s.TaskTemplate.ContainerSpec = &swarm.ContainerSpec{Image: image, StopGracePeriod: &grace}
	s.TaskTemplate.RestartPolicy = &swarm.RestartPolicy{Condition: swarm.RestartPolicyConditionAny, Delay: &delay}
	for _, n := range on {
		s.TaskTemplate.Networks = append(s.TaskTemplate.Networks, swarm.NetworkAttachmentConfig{Target: n})
	}
	if replicas < 0 {
		s.Mode.Global = &swarm.GlobalService{}
		return s
	}
	n := uint64(replicas)
	s.Mode.Replicated = &swarm.ReplicatedService{Replicas: &n}
	return s
}

func (w *world) scale(ctx context.Context, name string, replicas uint64) error {
	return w.call(ctx, func(ctx context.Context, c *client.Client) error {
		s, err := c.ServiceInspect(ctx, name, client.ServiceInspectOptions{})
		if err != nil {
			return err
		}
		s.Service.Spec.Mode.Replicated.Replicas = &replicas
		_, err = c.ServiceUpdate(ctx, name, client.ServiceUpdateOptions{Version: s.Service.Version, Spec: s.Service.Spec})
		return err
	})
}

// tasks lists tasks as any manager has them.
func (w *world) tasks(ctx context.Context) (list []swarm.Task, err error) {
	err = w.call(ctx, func(ctx context.Context, c *client.Client) error {
		r, err := c.TaskList(ctx, client.TaskListOptions{})
		list = r.Items
		return err
	})
	return list, err
}

// ask sends a request of ours to a node's daemon.
func ask(ctx context.Context, n *dev.Node, method, path string, into any) error {
	ctx, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	hc := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", n.Socket)
	}}}
	req, err := http.NewRequestWithContext(ctx, method, "http://skein"+path, nil)
	if err != nil {
		return err
	}
	res, err := hc.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil || res.StatusCode != http.StatusOK {
		return fmt.Errorf("%s %s: %s %s %v", method, path, res.Status, b, err)
	}
	return json.Unmarshal(b, into)
}

// get asks a URL once over a new connection and returns the lines of the answer, sorted.
func get(ctx context.Context, url string, limit time.Duration) ([]string, error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	hc := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	res, err := hc.Do(req)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil || res.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s: %s %s %v", url, res.Status, b, err)
	}
	lines := strings.Fields(string(b))
	slices.Sort(lines)
	return lines, nil
}
