package engine

import (
	"bufio"
	"context"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/registry"
	"github.com/moby/moby/api/types/swarm"
	"github.com/moby/moby/api/types/system"
	"golang.org/x/sys/unix"
)

func toString(v any) string { return fmt.Sprint(v) }

// Info describes node and engine; the Swarm part is the router's.
func (e *Engine) Info(ctx context.Context) (system.Info, error) {
	in := system.Info{
		ID: e.id, Name: e.cfg.Hostname, ServerVersion: e.cfg.Version, Driver: "overlayfs", LoggingDriver: logJSON, CgroupDriver: "cgroupfs",
		CgroupVersion: cgroupVersion(), MemoryLimit: true, SwapLimit: true, CPUCfsPeriod: true, CPUCfsQuota: true, CPUShares: true, CPUSet: true, PidsLimit: true,
		IPv4Forwarding: true, OomKillDisable: cgroupVersion() == "1", NGoroutines: runtime.NumGoroutine(), NFd: openFiles(), SystemTime: time.Now().Format(time.RFC3339Nano), NEventsListener: e.events.listeners(),
		KernelVersion: kernelVersion(), OperatingSystem: osRelease("PRETTY_NAME"), OSVersion: osRelease("VERSION_ID"), OSType: "linux", Architecture: machine(),
		IndexServerAddress: "https://index.docker.io/v1/", NCPU: runtime.NumCPU(), MemTotal: memTotal(), DockerRootDir: e.cfg.StateDir, Labels: orEmpty(e.cfg.Labels),
		DefaultRuntime: "skein", InitBinary: "docker-init", Runtimes: map[string]system.RuntimeWithStatus{"skein": {}}, LiveRestoreEnabled: true,
		SecurityOptions: []string{"name=seccomp,profile=builtin", "name=cgroupns"},
		Plugins:         system.PluginsInfo{Volume: []string{"local"}, Network: []string{"bridge", "host", "null", "overlay"}, Log: []string{logJSON, logLocal}},
		RegistryConfig:  &registry.ServiceConfig{IndexConfigs: map[string]*registry.IndexInfo{}},
	}
	if e.cfg.UserNS != nil {
		in.SecurityOptions = append(in.SecurityOptions, "name=userns")
	}
	for _, s := range append([]string{"127.0.0.0/8", "::1/128"}, e.cfg.Insecure...) {
		if p, err := netip.ParsePrefix(s); err == nil {
			in.RegistryConfig.InsecureRegistryCIDRs = append(in.RegistryConfig.InsecureRegistryCIDRs, p)
		} else {
			in.RegistryConfig.IndexConfigs[s] = &registry.IndexInfo{Name: s}
		}
	}
	for _, c := range e.all() {
		in.Containers++
		switch c.snapshot().State.Status {
		case container.StateRunning:
			in.ContainersRunning++
		case container.StatePaused:
			in.ContainersPaused++
		default:
			in.ContainersStopped++
		}
	}
	list, err := e.cfg.Images.List(ctx)
	in.Images = len(list)
	return in, err
}

// Version is the engine's version; API versions are the router's to fill in.
func (e *Engine) Version(context.Context) (system.VersionResponse, error) {
	return system.VersionResponse{
		Platform: system.PlatformInfo{Name: "Skein"}, Version: e.cfg.Version, Os: "linux", Arch: runtime.GOARCH, GoVersion: runtime.Version(), KernelVersion: kernelVersion(),
		Components: []system.ComponentVersion{{Name: "Engine", Version: e.cfg.Version}},
	}, nil
}

// Describe is the node's description for managers (task.Executor).
func (e *Engine) Describe(context.Context) ([]byte, error) {
	labels := map[string]string{}
	for _, l := range e.cfg.Labels {
		k, v, _ := strings.Cut(l, "=")
		labels[k] = v
	}
	return mustJSON(swarm.NodeDescription{
		Hostname:  e.cfg.Hostname,
		Platform:  swarm.Platform{Architecture: machine(), OS: "linux"},
		Resources: swarm.Resources{NanoCPUs: int64(runtime.NumCPU()) * 1e9, MemoryBytes: memTotal(), GenericResources: e.cfg.Generic},
		Engine: swarm.EngineDescription{EngineVersion: e.cfg.Version, Labels: labels, Plugins: []swarm.PluginDescription{
			{Type: "Volume", Name: "local"}, {Type: "Network", Name: "overlay"}, {Type: "Network", Name: "bridge"}, {Type: "Log", Name: logJSON}, {Type: "Log", Name: logLocal},
		}},
	}), nil
}

func kernelVersion() string {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return ""
	}
	return unix.ByteSliceToString(u.Release[:])
}

func machine() string {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return runtime.GOARCH
	}
	return unix.ByteSliceToString(u.Machine[:])
}

func cgroupVersion() string {
	if _, err := os.Stat("/sys/fs/cgroup/cgroup.controllers"); err == nil {
		return "2"
	}
	return "1"
}

func osRelease(key string) string {
	f, err := os.Open("/etc/os-release")
	if err != nil {
		return "linux"
	}
	defer f.Close()
	sc := bufio.NewScanner(f)
	for sc.Scan() {
		if v, ok := strings.CutPrefix(sc.Text(), key+"="); ok {
			return strings.Trim(v, `"`)
		}
	}
	return "linux"
}

func memTotal() int64 {
	var si unix.Sysinfo_t
	if unix.Sysinfo(&si) != nil {
		return 0
	}
	return int64(si.Totalram) * int64(si.Unit)
}

func openFiles() int {
	d, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return 0
	}
	return len(d)
}
