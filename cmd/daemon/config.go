// Package daemon builds a node's daemon from its parts: engine, API, agent, and — while the node's role says so — manager. It knows
// everyone and decides nothing. Shutting it down, or killing it, leaves containers and their network running.
package daemon

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/docker/go-units"
	"github.com/moby/moby/api/types/swarm"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"skein/agent/engine"
)

// Config of a daemon. Every member is a flag, an environment variable SKEIN_<FLAG>, and a key of the config file, in this order of weight.
type Config struct {
	StateDir      string
	RunDir        string
	Socket        string
	SocketGroup   string
	ListenAddr    string
	AdvertiseAddr string
	DataPathAddr  string
	Hostname      string
	CgroupParent  string
	UsernsRemap   string
	Insecure      []string
	Mirrors       []string
	Labels        []string
	Generic       []string
	LogLevel      string
	DiskReserve   string

	reserve int64 // DiskReserve in bytes
	generic []swarm.GenericResource
}

const (
	envPrefix     = "SKEIN_"
	maxSocketPath = 103 // 107, and four for the name it is made under
)

func (c *Config) flags(f *pflag.FlagSet) {
	host, _ := os.Hostname()
	f.StringVar(&c.StateDir, "state-dir", "/var/lib/skein", "directory of everything that lasts: cluster state, certificates, images, containers")
	f.StringVar(&c.RunDir, "run-dir", "/run/skein", "directory of sockets and namespaces; emptied by a reboot")
	f.StringVar(&c.Socket, "socket", "", "unix socket of the Docker Engine API (default RUN-DIR/skein.sock)")
	f.StringVar(&c.SocketGroup, "socket-group", "docker", "group that may use the socket, when it exists")
	f.StringVar(&c.ListenAddr, "listen-addr", "0.0.0.0:2377", "address for other nodes, used once the node is in a cluster: gRPC, Raft and gossip streams over TCP in mutual TLS, memberlist's encrypted packets over UDP")
	f.StringVar(&c.AdvertiseAddr, "advertise-addr", "", "address or interface under which other nodes reach this one (default: chosen at init and join)")
	f.StringVar(&c.DataPathAddr, "data-path-addr", "", "address for VXLAN packets (default: the advertised one)")
	f.StringVar(&c.Hostname, "hostname", host, "name of this node")
	f.StringVar(&c.CgroupParent, "cgroup-parent", "/skein", "cgroup below which all of this node's groups are made")
	f.StringVar(&c.UsernsRemap, "userns-remap", "", "run containers in user namespaces with the ranges of USER[:GROUP] (or \"default\": dockremap) in /etc/subuid and /etc/subgid")
	f.StringSliceVar(&c.Insecure, "insecure-registry", nil, "registry (host:port or CIDR) that may be spoken to without TLS; loopback always may")
	f.StringSliceVar(&c.Mirrors, "registry-mirror", nil, "mirror of Docker Hub to ask first (URL)")
	f.StringSliceVar(&c.Labels, "label", nil, "engine label key=value, for placement constraints engine.labels.KEY")
	f.StringSliceVar(&c.Generic, "node-generic-resource", nil, "resource that services may reserve: KIND=ID once for each, or KIND=NUMBER (gpu=GPU-1, ssd=3)")
	f.StringVar(&c.LogLevel, "log-level", "info", "debug, info, warn or error")
	f.StringVar(&c.DiskReserve, "disk-reserve", "64m", "free space below which a manager takes no writes, so that a full disk cannot damage the log")
}

// load fills flags that were not given from the environment, then from the config file.
func load(f *pflag.FlagSet, file string, fileGiven bool) error {
	fromFile, err := readConfig(f, file, fileGiven)
	if err != nil {
		return err
	}
	var bad error
	f.VisitAll(func(fl *pflag.Flag) {
		if fl.Changed || bad != nil || fl.Name == "help" || fl.Name == "config" {
			return
		}
		env := envPrefix + strings.ToUpper(strings.ReplaceAll(fl.Name, "-", "_"))
		if v, ok := os.LookupEnv(env); ok {
			if err := fl.Value.Set(v); err != nil {
				bad = fmt.Errorf("environment variable %s=%q: %w", env, v, err)
			}
			return
		}
		if v, ok := fromFile[fl.Name]; ok {
			if err := setAny(fl, v); err != nil {
				bad = fmt.Errorf("config file %s: key %q: %w", file, fl.Name, err)
			}
		}
	})
	return bad
}

// readConfig reads the file, which need not be there unless it was asked for.
func readConfig(f *pflag.FlagSet, file string, given bool) (map[string]any, error) {
	b, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) && !given {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("config file: %w", err)
	}
	var keys map[string]any
	if err := json.Unmarshal(b, &keys); err != nil {
		return nil, fmt.Errorf("config file %s: %w: it must be one JSON object whose keys are flag names", file, err)
	}
	for _, key := range slices.Sorted(maps.Keys(keys)) {
		if f.Lookup(key) == nil || key == "help" || key == "config" {
			return nil, fmt.Errorf("config file %s: unknown key %q: see `skein daemon --help` for the names", file, key)
		}
	}
	return keys, nil
}

func setAny(fl *pflag.Flag, v any) error {
	sv, isSlice := fl.Value.(pflag.SliceValue)
	switch v := v.(type) {
	case string:
		return fl.Value.Set(v)
	case bool:
		return fl.Value.Set(strconv.FormatBool(v))
	case float64:
		return fl.Value.Set(strconv.FormatFloat(v, 'f', -1, 64))
	case []any:
		if !isSlice {
			return errors.New("wants one value, not a list")
		}
		out := make([]string, 0, len(v))
		for _, x := range v {
			text, ok := x.(string)
			if !ok {
				return fmt.Errorf("wants a list of strings, not %v", x)
			}
			out = append(out, text)
		}
		return sv.Replace(out)
	}
	if isSlice {
		return errors.New("wants a list of strings")
	}
	return errors.New("wants a string, a number or true or false")
}

func (c *Config) validate() error {
	if os.Geteuid() != 0 {
		return fmt.Errorf("the daemon needs root: it makes namespaces, mounts and network devices")
	}
	if c.Socket == "" {
		c.Socket = filepath.Join(c.RunDir, "skein.sock")
	}
	for _, p := range []struct {
		name string
		path *string
	}{{"state-dir", &c.StateDir}, {"run-dir", &c.RunDir}, {"socket", &c.Socket}, {"cgroup-parent", &c.CgroupParent}} {
		if !filepath.IsAbs(*p.path) {
			return fmt.Errorf("--%s %q: want an absolute path", p.name, *p.path)
		}
		*p.path = filepath.Clean(*p.path)
	}
	if len(c.Socket) > maxSocketPath {
		return fmt.Errorf("--socket %q: the path has %d bytes, the kernel takes %d", c.Socket, len(c.Socket), maxSocketPath)
	}
	if c.CgroupParent == "/" {
		return fmt.Errorf("--cgroup-parent: the root group belongs to the whole machine: name one of our own, as /skein")
	}
	if ap, err := netip.ParseAddrPort(c.ListenAddr); err != nil || ap.Port() == 0 {
		return fmt.Errorf("--listen-addr %q: want ADDRESS:PORT", c.ListenAddr)
	}
	if c.Hostname == "" || len(c.Hostname) > 63 || strings.ContainsFunc(c.Hostname, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return fmt.Errorf("--hostname %q: want 1 to 63 printable characters", c.Hostname)
	}
	var err error
	if c.reserve, err = units.RAMInBytes(c.DiskReserve); err != nil || c.reserve < 1 {
		return fmt.Errorf("--disk-reserve %q: want a size, as 64m", c.DiskReserve)
	}
	for _, l := range c.Labels {
		if k, _, ok := strings.Cut(l, "="); !ok || k == "" {
			return fmt.Errorf("--label %q: want key=value", l)
		}
	}
	if c.generic, err = engine.ParseGenericResources(c.Generic); err != nil {
		return fmt.Errorf("--node-generic-resource: %w", err)
	}
	if !slices.Contains([]string{"debug", "info", "warn", "error"}, c.LogLevel) {
		return fmt.Errorf("--log-level %q: want debug, info, warn or error", c.LogLevel)
	}
	return nil
}

func (c *Config) logger() *slog.Logger {
	var level slog.Level
	_ = level.UnmarshalText([]byte(c.LogLevel)) // validated
	return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level}))
}

// Command is `skein daemon`.
func Command(version string) *cobra.Command {
	var c Config
	var file string
	cmd := &cobra.Command{
		Use:   "daemon",
		Short: "Run this node",
		Long: `Run this node's daemon: containers, images and networks of this machine behind a Docker Engine API socket and, once it is in a
cluster (skein swarm init, skein swarm join), its agent and manager. Containers are children of a second process, the supervisor, and
go on when the daemon ends, is killed, or is replaced by a newer one.

Each flag can also be given in the environment (--state-dir as SKEIN_STATE_DIR) or in the config file, a JSON object whose keys are
flag names: {"insecure-registry": ["10.0.0.5:5000"], "log-level": "debug"}.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := load(cmd.Flags(), file, cmd.Flags().Changed("config")); err != nil {
				return err
			}
			if err := c.validate(); err != nil {
				return err
			}
			return Run(cmd.Context(), c, version)
		},
	}
	c.flags(cmd.Flags())
	cmd.Flags().StringVar(&file, "config", "/etc/skein/daemon.json", "config file")
	cmd.AddCommand(unitCommand())
	return cmd
}
