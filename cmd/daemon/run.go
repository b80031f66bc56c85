package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"skein/agent/dockerapi"
	"skein/agent/engine"
	"skein/manager/api"
	"skein/overlay"
	"skein/runtime"
	"skein/runtime/image"
	"skein/runtime/supervisor"
)

// Run runs the daemon until ctx is done. Containers, their network and the supervisor live on.
func Run(ctx context.Context, cfg Config, version string) error {
	log := cfg.logger()
	quietLibraries(log)
	if err := makeDirs(cfg); err != nil {
		return err
	}
	unlock, err := lock(filepath.Join(cfg.StateDir, "daemon.lock"))
	if err != nil {
		return err
	}
	defer unlock()
	// Not dumpable: nothing of this node may read keys from our memory through /proc.
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("become non-dumpable: %w", err)
	}
	sup, err := ensureSupervisor(ctx, cfg, log)
	if err != nil {
		return err
	}
	defer sup.Close()
	images, err := image.Open(image.Config{Root: filepath.Join(cfg.StateDir, "images"), Insecure: cfg.Insecure, Mirrors: mirrors(cfg.Mirrors), Logger: log.With("component", "image")})
	if err != nil {
		return fmt.Errorf("image store: %w", err)
	}
	defer images.Close()
	network, err := overlay.New(overlay.Options{RunDir: cfg.RunDir, FDStore: sup, CryptPort: api.CryptPort,
		Logger: log.With("component", "overlay")})
	if err != nil {
		return fmt.Errorf("network: %w", err)
	}
	defer network.Close() // what removed containers leave goes before the process
	remap, err := idMaps(cfg.UsernsRemap, "/etc/subuid", "/etc/subgid")
	if err != nil {
		return err
	}
	eng, err := engine.New(engine.Config{
		StateDir: filepath.Join(cfg.StateDir, "engine"), RunDir: cfg.RunDir, Hostname: cfg.Hostname, Version: version, Images: images, Supervisor: sup, Network: network,
		Insecure: cfg.Insecure, Labels: cfg.Labels, Generic: cfg.generic, UserNS: remap, Logger: log.With("component", "engine"),
	})
	if err != nil {
		return err
	}
	member := newMembership(cfg, eng, network, log)
	eng.SetCluster(member)
	handler := dockerapi.New(dockerapi.Config{
		Containers: eng, Images: eng, Networks: eng, Volumes: eng, Archives: eng, Limits: eng, System: eng, Swarm: member, Logger: log.With("component", "api"), Version: version,
	})
	return serve(ctx, cfg, log, network, eng, member, func(ctx context.Context, l net.Listener) error {
		return dockerapi.Serve(ctx, l, handler, log.With("component", "api"))
	})
}

// serve runs all parts. The data plane starts first; the API opens once engine and membership are as they were before the restart.
func serve(ctx context.Context, cfg Config, log *slog.Logger, network *overlay.Driver, eng *engine.Engine, member *membership, api func(context.Context, net.Listener) error) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return ended("network", network.Run(ctx)) })
	g.Go(func() error { return ended("engine", eng.Run(ctx)) })
	g.Go(func() error {
		select {
		case <-eng.Ready():
		case <-ctx.Done():
			return nil
		}
		if err := member.resume(ctx); err != nil {
			return err
		}
		l, err := dockerapi.ListenUnix(cfg.Socket, cfg.SocketGroup)
		if err != nil {
			return err
		}
		log.Info("ready", "socket", cfg.Socket, "hostname", cfg.Hostname)
		return ended("api", api(ctx, l))
	})
	g.Go(func() error {
		<-ctx.Done()
		member.stop()
		return nil
	})
	err := g.Wait()
	if errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}

// ended turns the end of a part into a reason; being told to end is none.
func ended(part string, err error) error {
	if err == nil || errors.Is(err, context.Canceled) {
		return nil
	}
	return fmt.Errorf("%s: %w", part, err)
}

func makeDirs(cfg Config) error {
	for _, d := range []string{cfg.StateDir, cfg.RunDir} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return fmt.Errorf("make directory: %w", err)
		}
	}
	return nil
}

// lock keeps a second daemon off the same state.
func lock(path string) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, fmt.Errorf("another daemon uses %s: stop it, or name another --state-dir", filepath.Dir(path))
	}
	return func() { f.Close() }, nil
}

// supervisorWait bounds how long the supervisor may take to answer.
const supervisorWait = 10 * time.Second

func ensureSupervisor(ctx context.Context, cfg Config, log *slog.Logger) (runtime.Supervisor, error) {
	exe, err := os.Executable()
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, supervisorWait)
	defer cancel()
	sup, err := supervisor.Ensure(ctx, exe, supervisor.Config{
		StateDir: filepath.Join(cfg.StateDir, "supervisor"), SocketPath: filepath.Join(cfg.RunDir, "supervisor.sock"), Cgroup: cfg.CgroupParent, Logger: log.With("component", "supervisor"),
		AdoptOrphans: true,
	})
	if err != nil {
		return nil, fmt.Errorf("supervisor: %w", err)
	}
	return sup, nil
}

func mirrors(list []string) map[string][]string {
	if len(list) == 0 {
		return nil
	}
	return map[string][]string{"docker.io": list}
}
