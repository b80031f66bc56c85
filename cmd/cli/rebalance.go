package cli

import (
	"fmt"
	"net/http"
	"net/url"
	"text/tabwriter"

	"github.com/spf13/cobra"
)

// moveRow is one line of /skein/rebalance.
type moveRow struct {
	ServiceName, FromHostname, ToHostname string
	Slot                                  uint64
}

// rebalanceCommand is `skein rebalance`: level the nodes, the plan first.
func (a *app) rebalanceCommand() *cobra.Command {
	var apply bool
	cmd := &cobra.Command{
		Use: "rebalance [SERVICE]", Short: "Show which tasks should move to level the nodes, or move them", Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			path, method := "/skein/rebalance", http.MethodGet
			if len(args) > 0 {
				path += "?service=" + url.QueryEscape(args[0])
			}
			if apply {
				method = http.MethodPost
			}
			var rows []moveRow
			if err := a.ask(cmd, method, path, nil, &rows); err != nil {
				return err
			}
			if len(rows) == 0 {
				fmt.Fprintln(cmd.OutOrStdout(), "Nothing to move: the nodes are level, or what runs is about to change anyway.")
				return nil
			}
			tw := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 4, 3, ' ', 0)
			fmt.Fprintln(tw, "TASK\tFROM\tTO")
			for _, r := range rows {
				fmt.Fprintf(tw, "%s.%d\t%s\t%s\n", r.ServiceName, r.Slot, r.FromHostname, r.ToHostname)
			}
			return tw.Flush()
		},
	}
	cmd.Flags().BoolVar(&apply, "apply", false, "move them: each task runs until its successor does, as many at once as the service's updates allow")
	return cmd
}
