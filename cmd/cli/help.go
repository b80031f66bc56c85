package cli

import (
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/spf13/cobra"
)

const intro = `Usage:  skein [OPTIONS] COMMAND

Skein makes a few Linux machines one place to run containers. Its verbs are docker's; services run on all machines together.

First steps:
  skein demo                                          See it all on this machine; nothing is left behind
  skein dev up                                        A cluster of three nodes on this machine, to play with
  skein daemon                                        Run this machine's node, then "skein swarm init" or "skein swarm join"
  skein service create --name web -p 80:8080 IMAGE    Run a service, then "skein service scale web=10"
`

// groups is the order of the root's help; verbs that no group names come last.
var groups = []struct {
	title string
	names []string
}{
	{"Cluster", []string{"swarm", "node", "service", "stack", "secret", "config", "network"}},
	{"Containers of one node", []string{"run", "ps", "exec", "logs", "stop", "start", "rm", "inspect", "container"}},
	{"Images", []string{"images", "pull", "push", "build", "login", "logout", "image"}},
	{"Information", []string{"version", "info", "events", "system"}},
}

// setHelp gives the root a short help of its own; the verbs keep docker's.
func setHelp(root *cobra.Command, own map[*cobra.Command]bool) {
	byDefault := root.HelpFunc()
	root.SetHelpFunc(func(cmd *cobra.Command, args []string) {
		if cmd != root {
			byDefault(cmd, args)
			return
		}
		writeHelp(cmd.OutOrStdout(), root, own)
	})
}

func writeHelp(w io.Writer, root *cobra.Command, own map[*cobra.Command]bool) {
	fmt.Fprint(w, intro)
	shown := map[string]bool{"help": true, "completion": true}
	section := func(title string, cmds []*cobra.Command) {
		if len(cmds) == 0 {
			return
		}
		fmt.Fprintf(w, "\n%s:\n", title)
		for _, c := range cmds {
			shown[c.Name()] = true
			fmt.Fprintf(w, "  %-11s %s\n", c.Name(), c.Short)
		}
	}
	var ours []*cobra.Command
	for _, c := range root.Commands() {
		if own[c] && c.IsAvailableCommand() {
			ours = append(ours, c)
		}
	}
	section("Skein", ours)
	for _, g := range groups {
		var cmds []*cobra.Command
		for _, name := range g.names {
			if c := child(root, name); c != nil && c.IsAvailableCommand() {
				cmds = append(cmds, c)
			}
		}
		section(g.title, cmds)
	}
	var rest []string
	for _, c := range root.Commands() {
		if c.IsAvailableCommand() && !shown[c.Name()] {
			rest = append(rest, c.Name())
		}
	}
	slices.Sort(rest)
	fmt.Fprintf(w, "\nMore:\n  %s\n", wrap(rest, 100))
	fmt.Fprintf(w, "\nOptions:\n%s", root.LocalFlags().FlagUsagesWrapped(110))
	fmt.Fprint(w, "\nRun 'skein COMMAND --help' for more on a command.\n")
}

func wrap(words []string, width int) string {
	var b strings.Builder
	col := 0
	for i, word := range words {
		if i > 0 {
			if col+len(word)+2 > width {
				b.WriteString(",\n  ")
				col = 0
			} else {
				b.WriteString(", ")
				col += 2
			}
		}
		b.WriteString(word)
		col += len(word)
	}
	return b.String()
}
