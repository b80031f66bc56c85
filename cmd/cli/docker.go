package cli

import (
	"fmt"
	"io"
	"os"
	"regexp"
	"runtime"
	"strings"

	"github.com/docker/cli/cli/command"
	"github.com/docker/cli/cli/version"
	"github.com/spf13/cobra"
)

// unsupported are docker's verbs for what Skein does not do (engine plugins, checkpoints) or that live in plugins of docker's client.
var unsupported = []string{"plugin", "checkpoint", "bake"}

// adaptDocker makes docker's command tree ours: its name where docker/cli wrote "docker", without verbs that cannot work.
func adaptDocker(root *cobra.Command, docker *command.DockerCli) {
	for _, name := range unsupported {
		if c := child(root, name); c != nil {
			root.RemoveCommand(c)
		}
	}
	visit(root, func(c *cobra.Command) {
		c.Short = ourName(c.Short)
		c.Long = ourName(c.Long)
		c.Example = strings.ReplaceAll(c.Example, "docker ", "skein ")
		if al, ok := c.Annotations["aliases"]; ok {
			c.Annotations["aliases"] = strings.ReplaceAll(al, "docker ", "skein ")
		}
	})
	for _, name := range []string{"init", "join-token"} {
		if c := child(child(root, "swarm"), name); c != nil {
			printsJoin(c, docker)
		}
	}
	if c := child(root, "version"); c != nil {
		addClientOnly(c)
	}
	if c := child(child(root, "context"), "use"); c != nil {
		c.RunE = func(*cobra.Command, []string) error {
			return fmt.Errorf("skein does not follow docker's current context: name one with --context before the verb, or a daemon with -H or SKEIN_HOST")
		}
	}
}

// dockersName is docker's name as a word; Docker Hub is theirs, and a Dockerfile keeps its name.
var dockersName = regexp.MustCompile(`\bDocker\b( Hub\b)?`)

// ourName puts our name into docker's help.
func ourName(s string) string {
	return dockersName.ReplaceAllStringFunc(s, func(m string) string {
		if m == "Docker" {
			return "Skein"
		}
		return m
	})
}

func child(parent *cobra.Command, name string) *cobra.Command {
	if parent == nil {
		return nil
	}
	for _, c := range parent.Commands() {
		if c.Name() == name {
			return c
		}
	}
	return nil
}

func visit(c *cobra.Command, do func(*cobra.Command)) {
	do(c)
	for _, sub := range c.Commands() {
		visit(sub, do)
	}
}

// printsJoin has the command lines that a verb prints for copying name this program.
func printsJoin(c *cobra.Command, docker *command.DockerCli) {
	run := c.RunE
	c.RunE = func(cmd *cobra.Command, args []string) error {
		if err := command.WithOutputStream(ourOutput{os.Stdout})(docker); err != nil {
			return err
		}
		return run(cmd, args)
	}
}

// ourOutput rewrites docker's words in whole writes.
type ourOutput struct{ w io.Writer }

func (o ourOutput) Write(p []byte) (int, error) {
	if _, err := io.WriteString(o.w, ourWords(string(p))); err != nil {
		return 0, err
	}
	return len(p), nil
}

// addClientOnly adds a flag for what docker's version cannot do: answer without a daemon.
func addClientOnly(c *cobra.Command) {
	only := c.Flags().Bool("client", false, "Print the version of this program only, without asking a daemon")
	run := c.RunE
	c.RunE = func(cmd *cobra.Command, args []string) error {
		if *only {
			_, err := fmt.Fprintf(cmd.OutOrStdout(), "Skein version %s (%s, %s/%s)\n", version.Version, runtime.Version(), runtime.GOOS, runtime.GOARCH)
			return err
		}
		return run(cmd, args)
	}
}
