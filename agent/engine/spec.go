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
	if err := setDevices(spec, hc); err != nil {
		return runtime.Config{}, err
	}
	if err := e.setNamespaces(spec, hc); err != nil {
		return runtime.Config{}, err
	}
	setNetns(spec, netns)
	if len(hc.Sysctls) > 0 {
		spec.Linux.Sysctl = hc.Sysctls
	}
	setResources(spec, &hc.Resources)
	if hc.OomScoreAdj != 0 {
		p.OOMScoreAdj = &hc.OomScoreAdj
	}
	for _, u := range hc.Ulimits {
		p.Rlimits = append(p.Rlimits, specs.POSIXRlimit{Type: "RLIMIT_" + strings.ToUpper(u.Name), Soft: uint64(u.Soft), Hard: uint64(u.Hard)})
	}
	if err := e.addMounts(spec, r); err != nil {
		return runtime.Config{}, err
	}
	plan, err := planLog(hc.LogConfig)
	if err != nil {
		return runtime.Config{}, err
	}
	cfg := runtime.Config{ID: r.ID, Spec: spec, Rootfs: rootfs, Subpaths: subpaths(r.Volumes), OpenStdin: r.Config.OpenStdin, Init: hc.Init != nil && *hc.Init}
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

func setResources(spec *specs.Spec, r *container.Resources) {
	res := spec.Linux.Resources
	if res == nil {
		res = &specs.LinuxResources{}
		spec.Linux.Resources = res
	}
	if r.Memory > 0 || r.MemoryReservation > 0 {
		res.Memory = &specs.LinuxMemory{}
		if r.Memory > 0 {
			res.Memory.Limit = &r.Memory
			swap := r.MemorySwap
			if swap == 0 {
				swap = 2 * r.Memory // docker's default: as much swap as memory
			}
			res.Memory.Swap = &swap
		}
		if r.MemoryReservation > 0 {
			res.Memory.Reservation = &r.MemoryReservation
		}
		res.Memory.DisableOOMKiller = r.OomKillDisable
	}
	period, quota := uint64(r.CPUPeriod), r.CPUQuota
	if r.NanoCPUs > 0 {
		period, quota = 100000, r.NanoCPUs/10000
	}
	if period != 0 || quota != 0 || r.CPUShares != 0 || r.CpusetCpus != "" || r.CpusetMems != "" {
		res.CPU = &specs.LinuxCPU{Cpus: r.CpusetCpus, Mems: r.CpusetMems}
		if period != 0 {
			res.CPU.Period = &period
		}
		if quota != 0 {
			res.CPU.Quota = &quota
		}
		if r.CPUShares != 0 {
			s := uint64(r.CPUShares)
			res.CPU.Shares = &s
		}
	}
	if r.PidsLimit != nil && *r.PidsLimit != 0 { // 0 is what docker's command line sends without a wish, -1 is no limit
		res.Pids = &specs.LinuxPids{Limit: r.PidsLimit}
	}
}

func parseSize(s string) (int64, error) { return units.RAMInBytes(s) }
