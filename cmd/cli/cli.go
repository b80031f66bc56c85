// Package cli is skein's command line: docker's verbs, embedded from docker/cli and pointed at Skein's daemon, and the root under which
// cmd/skein hangs the verbs of its own (daemon, dev, demo).
//
// Docker's verbs behave as docker's do: flags, output, exit codes. They never fall back to docker's own socket. Verbs of Skein's own do not
// touch docker's configuration and need no daemon. It decides nothing about clusters; it talks to the API. Used by cmd/skein alone.
package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	dockercli "github.com/docker/cli/cli"
	"github.com/docker/cli/cli/command"
	"github.com/docker/cli/cli/command/commands"
	cliflags "github.com/docker/cli/cli/flags"
	"github.com/docker/cli/cli/version"
	"github.com/spf13/cobra"
)

// app is one run of the program.
type app struct {
	docker *command.DockerCli
	opts   *cliflags.ClientOptions
	own    map[*cobra.Command]bool // verbs that are not docker's
}

// Main runs the command line of this process and returns its exit code. Extra are the verbs of the composition root; they get a context
// that ends with SIGINT or SIGTERM.
func Main(version string, extra ...*cobra.Command) int {
	ctx, stop := withSignals(context.Background())
	defer stop()
	return Run(ctx, New(version, extra...), os.Args[1:], os.Stderr)
}

// New returns the root command.
func New(ver string, extra ...*cobra.Command) *cobra.Command {
	// docker/cli keeps what `version` and its user agent say in variables that are meant to be set at build time.
	version.Version, version.PlatformName, version.GitCommit, version.BuildTime = ver, "Skein", "", ""
	a := &app{own: map[*cobra.Command]bool{}}
	root := &cobra.Command{
		Use:                   "skein [OPTIONS] COMMAND",
		Short:                 "Containers on many machines as on one",
		Version:               ver,
		SilenceUsage:          true,
		SilenceErrors:         true,
		TraverseChildren:      true, // flags before the verb are the root's, behind it the verb's
		DisableFlagsInUseLine: true,
		CompletionOptions:     cobra.CompletionOptions{HiddenDefaultCmd: true},
		PersistentPreRunE:     a.prepare,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return cmd.Help()
			}
			return fmt.Errorf("skein: unknown command: skein %s\n\nRun 'skein --help' for the commands there are", args[0])
		},
	}
	a.opts, _ = dockercli.SetupRootCommand(root)
	root.Annotations = nil // docker's pointer to its guides
	root.SetVersionTemplate("Skein version {{.Version}}\n")
	root.Flags().Lookup("context").Usage = "Name of a docker context that says which daemon to connect to"
	root.Flags().Lookup("host").Usage = "Daemon to connect to (default SKEIN_HOST, DOCKER_HOST, or " + DefaultHost + ")"
	root.Flags().BoolP("version", "v", false, "Print the version and quit")

	// Only its streams are set up here; what reads files or connects waits for prepare.
	docker, err := command.NewDockerCli()
	if err != nil {
		panic(err) // options that cannot fail
	}
	a.docker = docker
	commands.AddCommands(root, docker)
	adaptDocker(root, docker)
	if c := child(child(root, "swarm"), "join-token"); c != nil {
		c.AddCommand(a.joinTokenCommands()...)
	}
	if c := child(root, "service"); c != nil {
		c.AddCommand(a.historyCommand())
		a.addRollbackTo(child(c, "rollback"))
	}
	for _, cmd := range append(a.ownCommands(), extra...) {
		a.own[cmd] = true
		root.AddCommand(cmd)
	}
	setHelp(root, a.own)
	return root
}

// Run executes the root with arguments and returns the exit code, docker's where docker has one.
func Run(ctx context.Context, root *cobra.Command, args []string, stderr io.Writer) int {
	root.SetArgs(args)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return 0
	}
	var sig signalError
	if errors.As(context.Cause(ctx), &sig) && errors.Is(err, context.Canceled) {
		return 128 + int(sig)
	}
	if text := err.Error(); text != "" {
		fmt.Fprintln(stderr, ourWords(text))
	}
	var st dockercli.StatusError
	if errors.As(err, &st) && st.StatusCode != 0 {
		return st.StatusCode
	}
	return 1
}

// prepare points docker's verbs at the daemon. Our own verbs need none of it, so that they start fast and without a home directory.
func (a *app) prepare(cmd *cobra.Command, _ []string) error {
	if a.isOwn(cmd) {
		return nil
	}
	return a.initDocker(cmd)
}

func (a *app) isOwn(cmd *cobra.Command) bool {
	for c := cmd; c != nil; c = c.Parent() {
		if a.own[c] {
			return true
		}
	}
	return false
}

// initDocker completes docker's client; it connects at its first use.
func (a *app) initDocker(cmd *cobra.Command) error {
	host, err := chooseHost(a.opts.Hosts, a.opts.Context, os.Getenv)
	if err != nil {
		return err
	}
	if host != "" {
		a.opts.Hosts, a.opts.Context = []string{host}, ""
	}
	a.opts.SetDefaultOptions(cmd.Root().Flags())
	return a.docker.Initialize(a.opts, command.WithBaseContext(cmd.Context()), command.WithUserAgent("Skein/"+version.Version+" (linux)"))
}

// signalError is why the context of a signalled process ended.
type signalError syscall.Signal

func (e signalError) Error() string { return "terminated by signal: " + syscall.Signal(e).String() }

// withSignals returns a context that ends with the first SIGINT or SIGTERM; the third ends the process.
func withSignals(parent context.Context) (context.Context, func()) {
	ctx, cancel := context.WithCancelCause(parent)
	ch := make(chan os.Signal, 3)
	signal.Notify(ch, syscall.SIGINT, syscall.SIGTERM)
	done := make(chan struct{})
	go func() {
		for n := 1; ; n++ {
			select {
			case <-done:
				return
			case s := <-ch:
				cancel(signalError(s.(syscall.Signal)))
				if n == 3 {
					os.Exit(1)
				}
			}
		}
	}()
	return ctx, func() {
		signal.Stop(ch)
		close(done)
		cancel(nil)
	}
}
