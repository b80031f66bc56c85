package dev

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"text/tabwriter"

	"github.com/spf13/cobra"
)

// Command is `skein dev`.
func Command() *cobra.Command {
	var name string
	root := &cobra.Command{
		Use:   "dev",
		Short: "Run a cluster on this machine, to try and to test",
		Long: `A development cluster is made of real daemons, each in a network namespace, a mount namespace and a cgroup subtree of its own,
joined by a bridge. It needs root and touches nothing of the machine outside its own names.`,
	}
	root.PersistentFlags().StringVar(&name, "name", "c1", "name of the cluster")
	root.AddCommand(upCommand(&name), downCommand(&name), listCommand(), shellCommand(&name), addCommand(&name),
		nodeCommand(&name, "kill", "Kill everything of a node: daemon, supervisor, containers (SIGKILL)", func(_ *cobra.Command, c *Cluster, n *Node) error { return c.Kill(n) }),
		nodeCommand(&name, "start", "Start a node's daemon again", func(cmd *cobra.Command, c *Cluster, n *Node) error { return c.Start(cmd.Context(), n) }),
		nodeCommand(&name, "cut", "Cut a node's network link", func(_ *cobra.Command, c *Cluster, n *Node) error { return c.Cut(n) }),
		nodeCommand(&name, "heal", "Heal a cut link", func(_ *cobra.Command, c *Cluster, n *Node) error { return c.Heal(n) }),
	)
	return root
}

func upCommand(name *string) *cobra.Command {
	var o Options
	cmd := &cobra.Command{
		Use: "up", Short: "Start a cluster", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			o.Name, o.Progress = *name, cmd.ErrOrStderr()
			c, err := Up(cmd.Context(), o)
			if err != nil {
				return err
			}
			PrintHints(cmd.OutOrStdout(), c)
			return nil
		},
	}
	cmd.Flags().IntVar(&o.Managers, "managers", 3, "number of managers")
	cmd.Flags().IntVar(&o.Workers, "workers", 0, "number of workers")
	cmd.Flags().BoolVar(&o.IPv6, "ipv6", false, "give the nodes IPv6 addresses alone (else they have both)")
	cmd.Flags().IntVar(&o.DiskMiB, "disk", 0, "give each node a disk of this many MiB for its state: ext4 on a loop device")
	cmd.Flags().StringArrayVar(&o.Flags, "daemon-flag", nil, "a further flag of every daemon, as one word: --daemon-flag=--log-level=debug")
	return cmd
}

// PrintHints says what to do with a cluster that is up.
func PrintHints(w io.Writer, c *Cluster) {
	n := c.Nodes[0]
	fmt.Fprintf(w, "Cluster %s is up: %d nodes. Next:\n", c.Name, len(c.Nodes))
	fmt.Fprintf(w, "  export DOCKER_HOST=unix://%s\n", n.Socket)
	fmt.Fprintf(w, "  docker node ls\n")
	fmt.Fprintf(w, "  skein dev ls\n")
	fmt.Fprintf(w, "  skein dev down --name %s\n", c.Name)
	fmt.Fprintf(w, "This machine is %s on the cluster's network: a registry that listens there is reached by the nodes without TLS, and a published\nport answers at %s and on every other node.\n", c.HostAddr(), n.Address)
}

func downCommand(name *string) *cobra.Command {
	return &cobra.Command{
		Use: "down", Short: "Remove a cluster and everything of it", Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error { return Down(*name) },
	}
}

func listCommand() *cobra.Command {
	var format string
	cmd := &cobra.Command{
		Use: "ls", Short: "List clusters and nodes", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			rows, err := listNodes()
			if err != nil {
				return err
			}
			switch format {
			case "json":
				enc := json.NewEncoder(cmd.OutOrStdout())
				enc.SetIndent("", "  ")
				return enc.Encode(rows)
			case "table", "":
				w := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 8, 2, ' ', 0)
				fmt.Fprintln(w, "CLUSTER\tNAME\tROLE\tADDRESS\tNAMESPACE\tPID\tSOCKET")
				for _, r := range rows {
					pid := "-"
					if r.PID != 0 {
						pid = strconv.Itoa(r.PID)
					}
					fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\n", r.Cluster, r.Name, r.Role, r.Address, r.Namespace, pid, r.Socket)
				}
				return w.Flush()
			}
			return fmt.Errorf("--format %q: want table or json", format)
		},
	}
	cmd.Flags().StringVar(&format, "format", "table", "table or json")
	return cmd
}

type row struct {
	Cluster string `json:"cluster"`
	Node
}

func listNodes() ([]row, error) {
	names, err := List()
	if err != nil {
		return nil, err
	}
	rows := []row{}
	for _, name := range names {
		c, err := Load(name)
		if err != nil {
			fmt.Fprintf(os.Stderr, "%v\n", err)
			continue
		}
		for _, n := range c.Nodes {
			rows = append(rows, row{name, *n})
		}
	}
	return rows, nil
}

func nodeCommand(name *string, verb, short string, do func(*cobra.Command, *Cluster, *Node) error) *cobra.Command {
	return &cobra.Command{
		Use: verb + " NODE", Short: short, Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := Load(*name)
			if err != nil {
				return err
			}
			n, err := c.Node(args[0])
			if err != nil {
				return err
			}
			return do(cmd, c, n)
		},
	}
}

func addCommand(name *string) *cobra.Command {
	var manager bool
	cmd := &cobra.Command{
		Use: "add", Short: "Add a node to the cluster", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := Load(*name)
			if err != nil {
				return err
			}
			role := "worker"
			if manager {
				role = "manager"
			}
			n, err := c.Add(cmd.Context(), role)
			if err != nil {
				return err
			}
			fmt.Fprintln(cmd.OutOrStdout(), n.Name)
			return nil
		},
	}
	cmd.Flags().BoolVar(&manager, "manager", false, "join as a manager instead of a worker")
	return cmd
}

func shellCommand(name *string) *cobra.Command {
	return &cobra.Command{
		Use: "shell NODE [-- CMD [ARG...]]", Short: "Run a shell or a command inside a node", Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := Load(*name)
			if err != nil {
				return err
			}
			n, err := c.Node(args[0])
			if err != nil {
				return err
			}
			argv := args[1:]
			if len(argv) == 0 {
				argv = []string{"/bin/sh"}
				if s := os.Getenv("SHELL"); s != "" {
					argv = []string{s}
				}
			}
			path, err := exec.LookPath(argv[0])
			if err != nil {
				return err
			}
			pid, err := c.inside(n)
			if err != nil {
				return err
			}
			sock := "unix:///run/skein/skein.sock"
			env := append(os.Environ(), "SKEIN_HOST="+sock, "DOCKER_HOST="+sock, "PS1="+n.Name+"# ")
			return Enter{Netns: netnsPath(n), MountOf: pid, Argv: append([]string{path}, argv[1:]...), Env: env}.Exec()
		},
	}
}

// EnterCommand is the hidden verb that starts a process inside a node.
func EnterCommand() *cobra.Command {
	var x Enter
	cmd := &cobra.Command{
		Use: "dev-enter -- CMD [ARG...]", Hidden: true, Args: cobra.MinimumNArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			if x.MountOf == 0 && x.RunDir == "" && x.MountNS == "" {
				return errors.New("one of --run-dir, --mount-of and --mount-ns is needed")
			}
			x.Argv, x.Env = args, os.Environ()
			return x.Exec()
		},
	}
	f := cmd.Flags()
	f.StringVar(&x.Netns, "netns", "", "network namespace to enter")
	f.StringVar(&x.RunDir, "run-dir", "", "directory that becomes /run in a new mount namespace")
	f.IntVar(&x.MountOf, "mount-of", 0, "process whose mount namespace is joined instead")
	f.StringVar(&x.MountNS, "mount-ns", "", "file of the mount namespace that is joined instead")
	f.StringVar(&x.Cgroup, "cgroup", "", "cgroup to join")
	return cmd
}
