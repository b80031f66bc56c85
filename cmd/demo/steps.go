package demo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"sort"
	"strings"
	"time"

	"github.com/moby/moby/api/types/swarm"
	"github.com/moby/moby/client"

	"skein/cmd/dev"
)

const pollStep = 50 * time.Millisecond // of API and service, while something is waited for

func (s *show) up(ctx context.Context) (string, error) {
	c, err := dev.Up(ctx, dev.Options{Name: s.name, Managers: 3})
	if err != nil {
		return "", err
	}
	s.cluster = c
	return fmt.Sprintf("%d nodes on %s", len(c.Nodes), c.Subnet), nil
}

func (s *show) prepare(ctx context.Context) (string, error) {
	programs, err := compile(ctx)
	if err != nil {
		return "", err
	}
	if s.images, err = serveImages(s.cluster.HostAddr().String(), programs); err != nil {
		return "", err
	}
	return fmt.Sprintf("%s and %s", s.images.ref(versions[0]), s.images.ref(versions[1])), nil
}

// api is a client of a living manager.
func (s *show) api() (*client.Client, error) {
	for _, n := range s.cluster.Nodes {
		if n.PID != 0 {
			return n.Client()
		}
	}
	return nil, errors.New("no node lives")
}

func (s *show) deploy(ctx context.Context) (string, error) {
	api, err := s.api()
	if err != nil {
		return "", err
	}
	defer api.Close()
	replicas, delay := uint64(3), time.Duration(0)
	_, err = api.ServiceCreate(ctx, client.ServiceCreateOptions{Spec: swarm.ServiceSpec{
		Annotations:  swarm.Annotations{Name: serviceName},
		TaskTemplate: swarm.TaskSpec{ContainerSpec: &swarm.ContainerSpec{Image: s.images.ref(versions[0])}, RestartPolicy: &swarm.RestartPolicy{Delay: &delay}},
		Mode:         swarm.ServiceMode{Replicated: &swarm.ReplicatedService{Replicas: &replicas}},
		UpdateConfig: &swarm.UpdateConfig{Parallelism: 2, Order: swarm.UpdateOrderStartFirst, Monitor: time.Second, FailureAction: swarm.UpdateFailureActionRollback},
		EndpointSpec: &swarm.EndpointSpec{Ports: []swarm.PortConfig{{Protocol: "tcp", TargetPort: 8080, PublishedPort: publishedPort, PublishMode: swarm.PortConfigPublishModeIngress}}},
	}})
	if err != nil {
		return "", err
	}
	return s.awaitRunning(ctx, api, 3, nil)
}

// awaitRunning polls until n tasks run and nothing else is wanted, and says where. Tasks on nodes in dead do not count.
func (s *show) awaitRunning(ctx context.Context, api *client.Client, n int, dead map[string]bool) (string, error) {
	tick := time.NewTicker(pollStep)
	defer tick.Stop()
	last := ""
	for {
		tasks, err := api.TaskList(ctx, client.TaskListOptions{Filters: make(client.Filters).Add("service", serviceName)})
		if err == nil {
			perNode := map[string]int{}
			running := 0
			for _, t := range tasks.Items {
				if t.DesiredState == swarm.TaskStateRunning && t.Status.State == swarm.TaskStateRunning && !dead[t.NodeID] {
					perNode[t.NodeID]++
					running++
				}
			}
			if last = spreadText(perNode); running == n {
				return last, nil
			}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return "", fmt.Errorf("%d tasks did not run in time: %s", n, last)
		}
	}
}

func spreadText(perNode map[string]int) string {
	var counts []int
	for _, c := range perNode {
		counts = append(counts, c)
	}
	sort.Sort(sort.Reverse(sort.IntSlice(counts)))
	return "tasks per node: " + strings.Trim(strings.Join(strings.Fields(fmt.Sprint(counts)), " + "), "[]")
}

func (s *show) scale(ctx context.Context) (string, error) {
	api, err := s.api()
	if err != nil {
		return "", err
	}
	defer api.Close()
	if err := s.update(ctx, api, func(spec *swarm.ServiceSpec) { *spec.Mode.Replicated.Replicas = 10 }); err != nil {
		return "", err
	}
	return s.awaitRunning(ctx, api, 10, nil)
}

func (s *show) update(ctx context.Context, api *client.Client, change func(*swarm.ServiceSpec)) error {
	in, err := api.ServiceInspect(ctx, serviceName, client.ServiceInspectOptions{})
	if err != nil {
		return err
	}
	spec := in.Service.Spec
	change(&spec)
	_, err = api.ServiceUpdate(ctx, in.Service.ID, client.ServiceUpdateOptions{Version: in.Service.Version, Spec: spec})
	return err
}

// roll updates to version 2 while clients keep asking all nodes.
func (s *show) roll(ctx context.Context) (string, error) {
	api, err := s.api()
	if err != nil {
		return "", err
	}
	defer api.Close()
	load := startLoad(s.addresses())
	err = s.update(ctx, api, func(spec *swarm.ServiceSpec) { spec.TaskTemplate.ContainerSpec.Image = s.images.ref(versions[1]) })
	if err == nil {
		err = s.awaitUpdated(ctx, api)
	}
	s.load = load.stop()
	if err != nil {
		return "", err
	}
	if s.load.failed > 0 {
		return "", fmt.Errorf("%d of %d requests failed, the first with: %w", s.load.failed, s.load.sent, s.load.first)
	}
	if s.load.seen[versions[1]] == 0 {
		return "", errors.New("version 2 never answered")
	}
	return fmt.Sprintf("%d requests, none failed; answers: %d from v1, %d from v2", s.load.sent, s.load.seen[versions[0]], s.load.seen[versions[1]]), nil
}

func (s *show) awaitUpdated(ctx context.Context, api *client.Client) error {
	tick := time.NewTicker(pollStep)
	defer tick.Stop()
	for {
		in, err := api.ServiceInspect(ctx, serviceName, client.ServiceInspectOptions{})
		if err == nil && in.Service.UpdateStatus != nil {
			switch u := in.Service.UpdateStatus; u.State {
			case swarm.UpdateStateCompleted:
				return nil
			case swarm.UpdateStatePaused, swarm.UpdateStateRollbackStarted, swarm.UpdateStateRollbackPaused, swarm.UpdateStateRollbackCompleted:
				return fmt.Errorf("the update ended as %s: %s", u.State, u.Message)
			}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("the update did not complete in time: %w", ctx.Err())
		}
	}
}

// killNode kills everything of the last node.
func (s *show) killNode(ctx context.Context) (string, error) {
	api, err := s.api()
	if err != nil {
		return "", err
	}
	defer api.Close()
	victim := s.cluster.Nodes[len(s.cluster.Nodes)-1]
	id, err := s.nodeID(ctx, victim)
	if err != nil {
		return "", err
	}
	if err := s.cluster.Kill(victim); err != nil {
		return "", err
	}
	where, err := s.awaitRunning(ctx, api, 10, map[string]bool{id: true})
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("%s killed; %s", victim.Name, where), nil
}

func (s *show) nodeID(ctx context.Context, n *dev.Node) (string, error) {
	api, err := n.Client()
	if err != nil {
		return "", err
	}
	defer api.Close()
	info, err := api.Info(ctx, client.InfoOptions{})
	return info.Info.Swarm.NodeID, err
}

// addresses are the published port on every living node.
func (s *show) addresses() []string {
	var out []string
	for _, n := range s.cluster.Nodes {
		if n.PID != 0 {
			out = append(out, fmt.Sprintf("http://%s:%d/", n.Address, publishedPort))
		}
	}
	return out
}

// everybodyAnswers asks each node's port until every running task has answered there.
func (s *show) everybodyAnswers(ctx context.Context) (string, error) {
	api, err := s.api()
	if err != nil {
		return "", err
	}
	defer api.Close()
	in, err := api.ServiceInspect(ctx, serviceName, client.ServiceInspectOptions{})
	if err != nil {
		return "", err
	}
	want := int(*in.Service.Spec.Mode.Replicated.Replicas)
	all := map[string]bool{}
	for _, url := range s.addresses() {
		seen := map[string]bool{}
		for len(seen) < want {
			host, _, err := ask(ctx, url, true)
			if ctx.Err() != nil {
				return "", fmt.Errorf("%s: only %d of %d replicas answered: %s", url, len(seen), want, names(seen))
			}
			if err != nil {
				return "", fmt.Errorf("%s: %w", url, err)
			}
			seen[host], all[host] = true, true
		}
	}
	if len(all) > 3 {
		return fmt.Sprintf("%d host names on each of %d nodes", len(all), len(s.addresses())), nil
	}
	return names(all), nil
}

func names(m map[string]bool) string {
	var out []string
	for n := range m {
		out = append(out, n)
	}
	sort.Strings(out)
	return strings.Join(out, " ")
}

// ask does one request and returns the web app's host name and version.
func ask(ctx context.Context, url string, fresh bool) (host, version string, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return "", "", err
	}
	req.Close = fresh
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return "", "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, 4096))
	if err != nil {
		return "", "", err
	}
	f := strings.Fields(string(b))
	if resp.StatusCode != http.StatusOK || len(f) < 2 {
		return "", "", fmt.Errorf("status %s: %q", resp.Status, b)
	}
	return f[0], f[1], nil
}
