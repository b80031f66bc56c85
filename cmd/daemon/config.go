// Package daemon builds a node's daemon from its parts: engine, API, agent, and — while the node's role says so — manager. It knows
// everyone and decides nothing. Shutting it down, or killing it, leaves containers and their network running.
package daemon

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
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
	Insecure      []string
	Mirrors       []string
	Labels        []string
	LogLevel      string
	DiskReserve   string
}

const envPrefix = "SKEIN_"

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
	f.StringSliceVar(&c.Insecure, "insecure-registry", nil, "registry (host:port or CIDR) that may be spoken to without TLS; loopback always may")
	f.StringSliceVar(&c.Mirrors, "registry-mirror", nil, "mirror of Docker Hub to ask first (URL)")
	f.StringSliceVar(&c.Labels, "label", nil, "engine label key=value, for placement constraints engine.labels.KEY")
	f.StringVar(&c.LogLevel, "log-level", "info", "debug, info, warn or error")
	f.StringVar(&c.DiskReserve, "disk-reserve", "64m", "free space below which a manager takes no writes, so that a full disk cannot damage the log")
}

// load fills flags that were not given from the environment, then from the config file.
func load(f *pflag.FlagSet, file string, fileGiven bool) error {
	fromFile := map[string]any{}
	b, err := os.ReadFile(file)
	switch {
	case err == nil:
		if err := json.Unmarshal(b, &fromFile); err != nil {
			return fmt.Errorf("config file %s: %w: it must be one JSON object whose keys are flag names", file, err)
		}
	case fileGiven || !os.IsNotExist(err):
		return fmt.Errorf("config file: %w", err)
	}
	for key := range fromFile {
		if f.Lookup(key) == nil {
			return fmt.Errorf("config file %s: unknown key %q: see `skein daemon --help` for the names", file, key)
		}
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

func setAny(fl *pflag.Flag, v any) error {
	if list, ok := v.([]any); ok {
		sv, isSlice := fl.Value.(pflag.SliceValue)
		if !isSlice {
			return fmt.Errorf("wants one value, not a list")
		}
		var out []string
		for _, x := range list {
			out = append(out, fmt.Sprint(x))
		}
		return sv.Replace(out)
	}
	if n, ok := v.(float64); ok {
		return fl.Value.Set(fmt.Sprintf("%.0f", n))
	}
	return fl.Value.Set(fmt.Sprint(v))
}

func (c *Config) validate() error {
	if os.Geteuid() != 0 {
		return fmt.Errorf("the daemon needs root: it makes namespaces, mounts and network devices")
	}
	if c.Socket == "" {
		c.Socket = filepath.Join(c.RunDir, "skein.sock")
	}
	for name, p := range map[string]*string{"state-dir": &c.StateDir, "run-dir": &c.RunDir, "socket": &c.Socket, "cgroup-parent": &c.CgroupParent} {
		if !filepath.IsAbs(*p) {
			return fmt.Errorf("--%s %q: want an absolute path", name, *p)
		}
		*p = filepath.Clean(*p)
	}
	if c.CgroupParent == "/" {
		return fmt.Errorf("--cgroup-parent: the root group belongs to the whole machine: name one of our own, as /skein")
	}
	if _, err := netip.ParseAddrPort(c.ListenAddr); err != nil {
		return fmt.Errorf("--listen-addr %q: want ADDRESS:PORT: %w", c.ListenAddr, err)
	}
	if c.Hostname == "" || len(c.Hostname) > 63 {
		return fmt.Errorf("--hostname %q: want 1 to 63 characters", c.Hostname)
	}
	for _, l := range c.Labels {
		if k, _, ok := strings.Cut(l, "="); !ok || k == "" {
			return fmt.Errorf("--label %q: want key=value", l)
		}
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
