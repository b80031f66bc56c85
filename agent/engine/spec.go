package engine

import (
	"context"
	"os"
	"path/filepath"
	"strings"

	units "github.com/docker/go-units"
	"github.com/moby/moby/api/types/container"
	"github.com/opencontainers/runtime-spec/specs-go"

	"skein/runtime"
	"skein/runtime/sandbox"
)

// runtimeConfig puts the runtime's configuration together: image, user's wishes, defaults.
func (e *Engine) runtimeConfig(ctx context.Context, r record, rootfs []runtime.Mount, netns string) (runtime.Config, error) {
	dir := e.containerDir(r.ID)
	spec := sandbox.DefaultSpec()
	hc := r.HostConfig
	spec.Root.Path = filepath.Join(dir, "rootfs")
	spec.Root.Readonly = hc.ReadonlyRootfs
	if err := os.MkdirAll(spec.Root.Path, 0o700); err != nil {
		return runtime.Config{}, err
	}
	spec.Hostname = r.Config.Hostname
	spec.Domainname = r.Config.Domainname
	p := spec.Process
	p.Terminal = r.Config.Tty
	if p.Terminal {
		p.ConsoleSize = box(&hc.ConsoleSize)
	}
	p.Args = append(append([]string{}, r.Config.Entrypoint...), r.Config.Cmd...)
	p.Cwd = r.Config.WorkingDir
	if p.Cwd == "" {
		p.Cwd = "/"
	}
	user, home, err := resolveUser(rootfs, r.Config.User, hc.GroupAdd)
	if err != nil {
		return runtime.Config{}, err
	}
	p.User = user
	p.Env = processEnv(r.Config, home)
	if err := setSecurity(spec, hc); err != nil {
		return runtime.Config{}, err
	}
	nodes := map[string]string{}
	if err := setDevices(spec, hc, nodes); err != nil {
		return runtime.Config{}, err
	}
	if err := e.setNamespaces(spec, hc); err != nil {
		return runtime.Config{}, err
	}
	setNetns(spec, netns)
	if len(hc.Sysctls) > 0 {
		spec.Linux.Sysctl = hc.Sysctls
	}
	if err := setResources(spec, &hc.Resources); err != nil {
		return runtime.Config{}, err
	}
	if hc.OomScoreAdj != 0 {
		p.OOMScoreAdj = &hc.OomScoreAdj
	}
	p.Rlimits = rlimits(hc.Ulimits)
	setNetDefaults(spec, hc)
	if err := e.addMounts(spec, r); err != nil {
		return runtime.Config{}, err
	}
	if err := e.setUserns(spec, hc, nodes); err != nil {
		return runtime.Config{}, err
	}
	plan, err := planLog(hc.LogConfig)
	if err != nil {
		return runtime.Config{}, err
	}
	cfg := runtime.Config{ID: r.ID, Spec: spec, Rootfs: rootfs, Subpaths: subpaths(r.Volumes), CgroupParent: cgroupParent(hc), OpenStdin: r.Config.OpenStdin, Init: hc.Init != nil && *hc.Init}
	plan.apply(&cfg, e.logPath(r))
	return cfg, nil
}

func processEnv(cfg *container.Config, home string) []string {
	base := []string{"PATH=" + sandbox.DefaultPath, "HOSTNAME=" + cfg.Hostname}
	if cfg.Tty {
		base = append(base, "TERM=xterm")
	}
	env := mergeEnv(base, cfg.Env)
	for _, kv := range env {
		if strings.HasPrefix(kv, "HOME=") {
			return env
		}
	}
	return append(env, "HOME="+home)
}

// setNetns joins the namespace by path; empty shares the node's.
func setNetns(spec *specs.Spec, path string) {
	out := spec.Linux.Namespaces[:0]
	for _, ns := range spec.Linux.Namespaces {
		if ns.Type != specs.NetworkNamespace {
			out = append(out, ns)
		}
	}
	if path != "" {
		out = append(out, specs.LinuxNamespace{Type: specs.NetworkNamespace, Path: path})
	}
	spec.Linux.Namespaces = out
}

func parseSize(s string) (int64, error) { return units.RAMInBytes(s) }
