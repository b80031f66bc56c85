package cli

import "github.com/spf13/cobra"

// ownCommands are the verbs of Skein that talk to a daemon: a file per noun.
func (a *app) ownCommands() []*cobra.Command {
	return []*cobra.Command{a.netCommand(), a.rebalanceCommand()}
}
