package cli

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
)

// limitedToken is what the daemon says of a join token that is limited in time or uses.
type limitedToken struct {
	ID          string
	Token       string `json:",omitempty"`
	Role        string
	Description string `json:",omitempty"`
	CreatedAt   time.Time
	ExpiresAt   *time.Time `json:",omitempty"`
	Uses        uint64
	Used        uint64
	State       string
}

const joinTokensPath = "/skein/join-tokens"

// joinTokenCommands are what docker's `swarm join-token` cannot do: tokens that end.
func (a *app) joinTokenCommands() []*cobra.Command {
	return []*cobra.Command{a.joinTokenCreate(), a.joinTokenList(), a.joinTokenRemove()}
}

func (a *app) joinTokenCreate() *cobra.Command {
	var req struct {
		Role        string
		TTL         time.Duration
		Uses        uint64
		Description string
	}
	cmd := &cobra.Command{
		Use: "create --role worker|manager [--ttl DURATION] [--uses N]", Short: "Make a join token that is limited in time or uses, and print it", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var t limitedToken
			if err := a.ask(cmd, http.MethodPost, joinTokensPath, req, &t); err != nil {
				return err
			}
			_, err := fmt.Fprintln(cmd.OutOrStdout(), t.Token)
			return err
		},
	}
	f := cmd.Flags()
	f.StringVar(&req.Role, "role", "worker", "Role of the nodes that join with it: worker or manager")
	f.DurationVar(&req.TTL, "ttl", 0, "How long it is good, as 1h; 0: for ever")
	f.Uint64Var(&req.Uses, "uses", 0, "How many nodes may join with it; 0: any number")
	f.StringVar(&req.Description, "description", "", "A word on what it is for")
	return cmd
}

func (a *app) joinTokenList() *cobra.Command {
	var format string
	cmd := &cobra.Command{
		Use: "ls", Short: "List the join tokens that are limited in time or uses", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var list []limitedToken
			if err := a.get(cmd, joinTokensPath, &list); err != nil {
				return err
			}
			switch format {
			case "json":
				return json.NewEncoder(cmd.OutOrStdout()).Encode(list)
			case "table":
				return printTokens(cmd.OutOrStdout(), list)
			}
			return fmt.Errorf("unknown format %q: there are table and json", format)
		},
	}
	cmd.Flags().StringVar(&format, "format", "table", "Format of the output: table or json")
	return cmd
}

func printTokens(w io.Writer, list []limitedToken) error {
	tw := tabwriter.NewWriter(w, 0, 4, 3, ' ', 0)
	fmt.Fprintln(tw, "ID\tROLE\tUSED\tEXPIRES\tSTATE\tDESCRIPTION")
	for _, t := range list {
		used, expires := fmt.Sprintf("%d", t.Used), "never"
		if t.Uses > 0 {
			used = fmt.Sprintf("%d of %d", t.Used, t.Uses)
		}
		if t.ExpiresAt != nil {
			expires = t.ExpiresAt.Format(time.RFC3339)
		}
		fmt.Fprintf(tw, "%s\t%s\t%s\t%s\t%s\t%s\n", t.ID, t.Role, used, expires, t.State, t.Description)
	}
	return tw.Flush()
}

func (a *app) joinTokenRemove() *cobra.Command {
	return &cobra.Command{
		Use: "rm TOKEN-ID [TOKEN-ID...]", Short: "Revoke join tokens that are limited in time or uses", Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			for _, id := range args {
				if err := a.ask(cmd, http.MethodDelete, joinTokensPath+"/"+url.PathEscape(id), nil, nil); err != nil {
					return err
				}
				fmt.Fprintln(cmd.OutOrStdout(), id)
			}
			return nil
		},
	}
}
