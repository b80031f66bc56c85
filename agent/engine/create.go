package engine

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	cerrdefs "github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"
	"github.com/moby/moby/api/types/network"

	"skein/overlay"
	"skein/runtime/image"
)

var validName = regexp.MustCompile(`^/?[a-zA-Z0-9][a-zA-Z0-9_.-]+$`)

// ContainerCreate makes a container from a local image; it starts nothing.
func (e *Engine) ContainerCreate(ctx context.Context, name string, req container.CreateRequest, platform string) (container.CreateResponse, error) {
	if req.Config == nil {
		return container.CreateResponse{}, invalid("config cannot be empty in order to create a container")
	}
	if platform != "" && platform != "linux/"+runtime.GOARCH {
		return container.CreateResponse{}, invalid("platform %s cannot run on this linux/%s node", platform, runtime.GOARCH)
	}
	img, err := e.cfg.Images.Get(ctx, req.Config.Image)
	if err != nil {
		if cerrdefs.IsNotFound(err) {
			return container.CreateResponse{}, notFound("No such image: %s", req.Config.Image)
		}
		return container.CreateResponse{}, err
	}
	c, warnings, err := e.create(name, req, img, nil)
	if err != nil {
		return container.CreateResponse{}, err
	}
	return container.CreateResponse{ID: c.rec.ID, Warnings: warnings}, nil
}

// taskPart is what a cluster task adds to a container's record: its id and the addresses it was given.
type taskPart struct {
	id       string
	sandbox  overlay.Sandbox
	networks map[string]*network.EndpointSettings
	ports    []overlay.HostPort
	files    []depFile
}

// create validates, merges the image's configuration, and writes the record. task is nil but for a cluster's task.
func (e *Engine) create(name string, req container.CreateRequest, img image.Image, task *taskPart) (*entry, []string, error) {
	if req.HostConfig == nil {
		req.HostConfig = &container.HostConfig{}
	}
	id := newContainerID()
	if name == "" {
		name = e.freeName()
	}
	if !validName.MatchString(name) {
		return nil, nil, invalid("Invalid container name (%s), only [a-zA-Z0-9][a-zA-Z0-9_.-] are allowed", name)
	}
	cfg, err := mergeImage(*req.Config, img)
	if err != nil {
		return nil, nil, err
	}
	hc := *req.HostConfig
	warnings, err := e.checkHostConfig(&hc)
	if err != nil {
		return nil, nil, err
	}
	if err := checkSources(&hc); err != nil {
		return nil, nil, err
	}
	if err := e.checkJoins(&hc); err != nil {
		return nil, nil, err
	}
	if cfg.Hostname, err = e.hostname(cfg.Hostname, id, &hc); err != nil {
		return nil, nil, err
	}
	rec := record{
		ID: id, Name: strings.TrimPrefix(name, "/"), Created: time.Now().UTC(), Image: img.ID.String(), Config: cfg, HostConfig: &hc,
		State: state{Status: container.StateCreated, Clean: true},
	}
	if task != nil {
		rec.Task, rec.Sandbox, rec.Networks, rec.Files, rec.HostPorts = task.id, task.sandbox, task.networks, task.files, task.ports
		rec.Sandbox.ID = id
	} else if rec.Networks, err = e.endpointSettings(&hc, req.NetworkingConfig); err != nil {
		return nil, nil, err
	} else if rec.Links, err = e.links(&hc); err != nil {
		return nil, nil, err
	}
	c := &entry{rec: rec, changed: make(chan struct{})}
	if err := e.registerWithVolumes(c); err != nil {
		return nil, nil, err
	}
	if err := os.MkdirAll(e.containerDir(id), 0o700); err == nil {
		err = e.update(c, func(*record) {})
	}
	if err != nil {
		e.unregister(c)
		_ = os.RemoveAll(e.containerDir(id))
		e.dropAnonymous(c.rec)
		return nil, nil, fmt.Errorf("create container %s: %w", rec.Name, err)
	}
	e.emit(rec, events.ActionCreate, nil)
	return c, warnings, nil
}

// hostname is the wished name, or docker's default: of the node or the other container when its network is shared, else the short id.
func (e *Engine) hostname(wish, id string, hc *container.HostConfig) (string, error) {
	switch target, shared := strings.CutPrefix(string(hc.NetworkMode), "container:"); {
	case shared:
		if wish != "" {
			return "", invalid("conflicting options: hostname and the network mode")
		}
		o, err := e.findJoined(target)
		if err != nil {
			return "", err
		}
		return o.snapshot().Config.Hostname, nil
	case wish != "" && hc.UTSMode.IsHost():
		return "", invalid("conflicting options: hostname and the UTS mode")
	case wish != "":
		return wish, nil
	case hc.NetworkMode == "host" || hc.UTSMode.IsHost():
		return e.cfg.Hostname, nil
	}
	return id[:12], nil
}

// mergeImage fills what the user left out from the image's configuration, as docker does.
func mergeImage(cfg container.Config, img image.Image) (*container.Config, error) {
	ic := img.Config.Config
	if cfg.User == "" {
		cfg.User = ic.User
	}
	if len(cfg.Entrypoint) == 0 && len(cfg.Cmd) == 0 {
		cfg.Cmd = ic.Cmd
	}
	if cfg.Entrypoint == nil {
		cfg.Entrypoint = ic.Entrypoint
	} else if len(cfg.Entrypoint) == 1 && cfg.Entrypoint[0] == "" {
		cfg.Entrypoint = nil
	}
	if len(cfg.Entrypoint)+len(cfg.Cmd) == 0 {
		return nil, invalid("no command specified: image %s has neither CMD nor ENTRYPOINT: name a command", cfg.Image)
	}
	if cfg.WorkingDir == "" {
		cfg.WorkingDir = ic.WorkingDir
	}
	if cfg.WorkingDir != "" && !path.IsAbs(cfg.WorkingDir) {
		return nil, invalid("the working directory '%s' is invalid, it needs to be an absolute path", cfg.WorkingDir)
	}
	cfg.Env = mergeEnv(ic.Env, cfg.Env)
	cfg.Healthcheck = mergeHealth(img.Docker.Healthcheck, cfg.Healthcheck)
	if err := checkHealth(cfg.Healthcheck); err != nil {
		return nil, err
	}
	if len(cfg.Shell) == 0 {
		cfg.Shell = img.Docker.Shell
	}
	if cfg.StopSignal == "" {
		cfg.StopSignal = ic.StopSignal
	}
	labels := maps.Clone(ic.Labels)
	if labels == nil {
		labels = map[string]string{}
	}
	maps.Copy(labels, cfg.Labels)
	cfg.Labels = labels
	for v := range ic.Volumes {
		if cfg.Volumes == nil {
			cfg.Volumes = map[string]struct{}{}
		}
		cfg.Volumes[v] = struct{}{}
	}
	for p := range ic.ExposedPorts {
		port, err := network.ParsePort(p)
		if err != nil {
			return nil, invalid("image %s exposes the invalid port %q: %v", cfg.Image, p, err)
		}
		if cfg.ExposedPorts == nil {
			cfg.ExposedPorts = network.PortSet{}
		}
		cfg.ExposedPorts[port] = struct{}{}
	}
	if _, err := parseSignal(cfg.StopSignal); err != nil {
		return nil, err
	}
	return &cfg, nil
}

// mergeHealth fills what the user's health check leaves to the image's.
func mergeHealth(image, user *container.HealthConfig) *container.HealthConfig {
	if image == nil || user == nil {
		return cmp.Or(user, image)
	}
	h := *user
	if len(h.Test) == 0 {
		h.Test = image.Test
	}
	h.Interval, h.Timeout = cmp.Or(h.Interval, image.Interval), cmp.Or(h.Timeout, image.Timeout)
	h.StartPeriod, h.StartInterval = cmp.Or(h.StartPeriod, image.StartPeriod), cmp.Or(h.StartInterval, image.StartInterval)
	h.Retries = cmp.Or(h.Retries, image.Retries)
	return &h
}

// checkHealth refuses intervals that would make the daemon do nothing but probe, also when an image wishes them.
func checkHealth(h *container.HealthConfig) error {
	if h == nil {
		return nil
	}
	for _, d := range []struct {
		name string
		d    time.Duration
	}{{"Interval", h.Interval}, {"Timeout", h.Timeout}, {"StartPeriod", h.StartPeriod}, {"StartInterval", h.StartInterval}} {
		if d.d != 0 && d.d < time.Millisecond {
			return invalid("%s in Healthcheck cannot be less than 1ms", d.name)
		}
	}
	if h.Retries < 0 {
		return invalid("Retries in Healthcheck cannot be negative")
	}
	return nil
}

// mergeEnv appends b's variables to a's, the later replacing the earlier; a bare name removes it.
func mergeEnv(a, b []string) []string {
	out := slices.Clone(a)
	at := make(map[string]int, len(a)+len(b)) // where a name was first; an image's list may be long
	for i, kv := range a {
		k, _, _ := strings.Cut(kv, "=")
		if _, twice := at[k]; !twice {
			at[k] = i
		}
	}
	gone := map[int]bool{}
	for _, kv := range b {
		k, _, hasValue := strings.Cut(kv, "=")
		i, there := at[k]
		switch {
		case hasValue && there:
			out[i] = kv
		case hasValue:
			at[k] = len(out)
			out = append(out, kv)
		case there:
			gone[i] = true
			delete(at, k)
		}
	}
	if len(gone) == 0 {
		return out
	}
	kept := out[:0]
	for i, kv := range out {
		if !gone[i] {
			kept = append(kept, kv)
		}
	}
	return kept
}

// checkHostConfig refuses by name what this engine cannot do, so that no wish is dropped in silence.
func (e *Engine) checkHostConfig(hc *container.HostConfig) (warnings []string, err error) {
	refuse := func(set bool, what string) {
		if set && err == nil {
			err = notBuilt("%s is not supported by this version of skein", what)
		}
	}
	refuse(hc.VolumeDriver != "", "--volume-driver")
	refuse(hc.Runtime != "" && hc.Runtime != "skein", "runtime "+strconv.Quote(hc.Runtime))
	if err != nil {
		return nil, err
	}
	if err := checkSecurity(hc); err != nil {
		return nil, err
	}
	if err := checkDevices(hc); err != nil {
		return nil, err
	}
	if err := checkExtraHosts(hc.ExtraHosts); err != nil {
		return nil, err
	}
	if err := checkNamespaces(hc); err != nil {
		return nil, err
	}
	if err := e.checkUserns(hc); err != nil {
		return nil, err
	}
	if err := container.ValidateRestartPolicy(hc.RestartPolicy); err != nil {
		return nil, invalid("%v", err)
	}
	if hc.AutoRemove && !hc.RestartPolicy.IsNone() {
		return nil, conflict("conflicting options: cannot specify both --restart and --rm")
	}
	warnings, err = checkResources(hc)
	if err != nil {
		return nil, err
	}
	if hc.LogConfig.Type == "" {
		hc.LogConfig.Type = logJSON
	}
	if _, err := planLog(hc.LogConfig); err != nil {
		return nil, err
	}
	if err := checkMounts(hc); err != nil {
		return nil, err
	}
	return warnings, nil
}

var adjectives = []string{"brisk", "calm", "dawn", "eager", "fleet", "grey", "high", "keen", "light", "north", "quiet", "swift", "tidal", "vivid", "wild", "young"}
var birds = []string{"avocet", "brent", "curlew", "dunlin", "eider", "gadwall", "heron", "knot", "lapwing", "merlin", "plover", "ruff", "skua", "teal", "whimbrel", "wigeon"}

// freeName invents a name that no container has.
func (e *Engine) freeName() string {
	e.mu.RLock()
	defer e.mu.RUnlock()
	for {
		n := adjectives[rand.IntN(len(adjectives))] + "_" + birds[rand.IntN(len(birds))]
		if _, taken := e.names[n]; taken {
			n = fmt.Sprintf("%s%d", n, rand.IntN(10000))
		}
		if _, taken := e.names[n]; !taken {
			return n
		}
	}
}

// emit publishes a container event with docker's attributes.
func (e *Engine) emit(r record, action events.Action, extra map[string]string) {
	attrs := maps.Clone(r.Config.Labels)
	if attrs == nil {
		attrs = map[string]string{}
	}
	attrs["image"], attrs["name"] = r.Config.Image, r.Name
	maps.Copy(attrs, extra)
	e.events.publish(events.Message{Type: events.ContainerEventType, Action: action, Actor: events.Actor{ID: r.ID, Attributes: attrs}})
}

var errGone = errors.New("container was removed")
