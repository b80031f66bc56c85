// Package demo shows Skein at work on one machine: a cluster of namespaces, a web app from a registry, scaling, a rolling update under
// load, a node's death. It ends with a table that says what held, and leaves nothing behind.
package demo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os/signal"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"skein/cmd/dev"
)

const (
	serviceName   = "web"
	publishedPort = 8080
	stepWait      = 60 * time.Second
)

// Command is `skein demo`.
func Command() *cobra.Command {
	var keep bool
	var name string
	cmd := &cobra.Command{
		Use: "demo", Short: "Show a three-node cluster serving, scaling and rolling a web app", Args: cobra.NoArgs,
		Long: `Start a three-node cluster on this machine, deploy a small web app made for the occasion from a registry, scale it from 3 to 10, roll it
to version 2 under load, kill a node, and print what held. Needs root, and Go to compile the web app. Everything is removed at the end.`,
		SilenceUsage: true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGINT, syscall.SIGTERM)
			defer stop()
			if !cmd.Flags().Changed("name") {
				var err error
				if name, err = dev.FreeName(name); err != nil {
					return err
				}
			}
			return run(ctx, cmd.OutOrStdout(), name, keep)
		},
	}
	cmd.Flags().BoolVar(&keep, "keep", false, "leave the cluster up at the end")
	cmd.Flags().StringVar(&name, "name", "demo", "name of the cluster")
	return cmd
}

// show is one run of the demo.
type show struct {
	out     io.Writer
	name    string
	cluster *dev.Cluster
	images  *images
	steps   []step
	load    loadReport
}

type step struct {
	name string
	took time.Duration
	note string
	err  error
}

func run(ctx context.Context, out io.Writer, name string, keep bool) (err error) {
	s := &show{out: out, name: name}
	err = s.play(ctx)
	if s.images != nil {
		s.images.close()
	}
	if keep && err == nil {
		s.table()
		s.hints()
		return nil
	}
	s.do("remove everything", func() (string, error) {
		derr := dev.Down(name)
		if derr == nil {
			if left := dev.Leftovers(name); len(left) > 0 {
				derr = fmt.Errorf("left behind: %v", left)
			}
		}
		return "no process, namespace, link, mount or cgroup left", derr
	})
	s.table()
	for _, st := range s.steps {
		err = errors.Join(err, st.err)
	}
	if err != nil {
		return errors.New("the demo failed: see the table")
	}
	return nil
}

// play runs the steps in order and stops at the first that fails.
func (s *show) play(ctx context.Context) error {
	for _, st := range []struct {
		name string
		do   func(context.Context) (string, error)
	}{
		{"start a cluster of three managers", s.up},
		{"compile the web app, serve its images", s.prepare},
		{"deploy 3 replicas with a published port", s.deploy},
		{"every node answers for all replicas", s.everybodyAnswers},
		{"scale 3 → 10", s.scale},
		{"roll to version 2 under load", s.roll},
		{"kill a node: its tasks run elsewhere", s.killNode},
		{"every living node answers for all replicas", s.everybodyAnswers},
	} {
		if err := s.do(st.name, func() (string, error) {
			ctx, cancel := context.WithTimeout(ctx, stepWait)
			defer cancel()
			return st.do(ctx)
		}); err != nil {
			return err
		}
	}
	return nil
}

// do runs a step, shows it while it works, and remembers how it went. After a failed step later ones are skipped, but for clean-up.
func (s *show) do(name string, f func() (string, error)) error {
	fmt.Fprintf(s.out, "▸ %s …\n", name)
	begun := time.Now()
	note, err := f()
	took := time.Since(begun)
	s.steps = append(s.steps, step{name, took, note, err})
	if err != nil {
		fmt.Fprintf(s.out, "  ✗ %v\n", err)
		return err
	}
	fmt.Fprintf(s.out, "  ✓ %.1f s  %s\n", took.Seconds(), note)
	return nil
}

func (s *show) table() {
	fmt.Fprintf(s.out, "\n%-46s %8s  %-5s %s\n", "STEP", "TIME", "TRUE", "")
	for _, st := range s.steps {
		note := st.note
		if st.err != nil {
			note = st.err.Error()
		}
		fmt.Fprintf(s.out, "%-46s %6.1f s  %-5v %s\n", st.name, st.took.Seconds(), st.err == nil, note)
	}
	fmt.Fprintf(s.out, "\nRequests during the rolling update: %d sent, %d failed.\n", s.load.sent, s.load.failed)
}

func (s *show) hints() {
	n := s.cluster.Nodes[0]
	fmt.Fprintf(s.out, "\nThe cluster stays up. Try:\n")
	for _, l := range []string{
		"export DOCKER_HOST=unix://" + n.Socket,
		"docker node ls",
		"docker service ps " + serviceName,
		"docker service scale " + serviceName + "=5",
		"docker service logs " + serviceName,
		fmt.Sprintf("curl http://%s:%d/", n.Address, publishedPort),
		"docker service rollback " + serviceName,
	} {
		fmt.Fprintf(s.out, "  %s\n", l)
	}
	fmt.Fprintf(s.out, "The demo's registry is gone, both images are on every node. Remove the cluster with:\n  skein dev down --name %s\n", s.name)
}
