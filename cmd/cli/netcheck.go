package cli

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
)

// netRow is one line of GET /skein/net/status.
type netRow struct {
	NodeID   string
	Hostname string
	Addr     string `json:",omitempty"`
	Table    string
	Network  string
	Desired  uint64
	Applied  uint64
	Behind   float64
	Live     bool
	Reason   string `json:",omitempty"`
	Silent   float64
	Err      string   `json:",omitempty"`
	Notes    []string `json:",omitempty"`
}

// netNode is one node of /skein/net/check.
type netNode struct {
	NodeID      string
	Hostname    string
	Differences []netDifference
	More        int    `json:",omitempty"`
	Err         string `json:",omitempty"`
	Took        float64
	Mended      int
}

type netDifference struct {
	Table  string
	Kind   string
	Object string
	State  string
	Mended bool
	Err    string `json:",omitempty"`
}

// checkFormat refuses formats that there are not.
func checkFormat(format string) error {
	if format != "table" && format != "json" {
		return fmt.Errorf("unknown format %q: there are table and json", format)
	}
	return nil
}

func (a *app) netStatusCommand() *cobra.Command {
	var format string
	cmd := &cobra.Command{
		Use: "status", Short: "Show the version of each endpoint table that each node has applied", Args: cobra.NoArgs,
		Long: "Show the version of each endpoint table that each node should have and has applied, for how long it has been behind, and why a node is stale.\n" +
			"It may be asked on every node of the cluster.",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := checkFormat(format); err != nil {
				return err
			}
			var rows []netRow
			if err := a.get(cmd, "/skein/net/status", &rows); err != nil {
				return err
			}
			if format == "json" {
				return json.NewEncoder(cmd.OutOrStdout()).Encode(rows)
			}
			return printNet(cmd.OutOrStdout(), rows)
		},
	}
	cmd.Flags().StringVar(&format, "format", "table", "Format of the output: table or json")
	return cmd
}

func printNet(w io.Writer, rows []netRow) error {
	tw := tabwriter.NewWriter(w, 0, 4, 3, ' ', 0)
	fmt.Fprintln(tw, "NODE\tHOSTNAME\tNETWORK\tDESIRED\tAPPLIED\tLAG\tSTATE")
	for _, r := range rows {
		lag := "-"
		if r.Applied < r.Desired {
			lag = shortDuration(r.Behind)
		}
		fmt.Fprintf(tw, "%s\t%s\t%s\t%d\t%d\t%s\t%s\n", r.NodeID, r.Hostname, r.Network, r.Desired, r.Applied, lag, r.state())
	}
	if err := tw.Flush(); err != nil {
		return err
	}
	for _, r := range rows {
		for _, n := range r.Notes {
			fmt.Fprintf(w, "%s: %s\n", nodeName(r.NodeID, r.Hostname), n)
		}
	}
	return nil
}

// state is a row in words.
func (r netRow) state() string {
	switch {
	case !r.Live && r.Reason == "":
		return "stale: the node does not report"
	case !r.Live && r.Silent < 0:
		return "stale: " + r.Reason
	case !r.Live:
		return fmt.Sprintf("stale: %s; last heard %s ago", r.Reason, shortDuration(r.Silent))
	case r.Err != "":
		return "failed: " + r.Err
	case r.Applied < r.Desired:
		return "behind"
	}
	return "ok"
}

func shortDuration(seconds float64) string {
	d := time.Duration(seconds * float64(time.Second))
	if d < time.Second {
		return d.Round(time.Millisecond).String()
	}
	return d.Round(100 * time.Millisecond).String()
}

func nodeName(id, hostname string) string {
	if hostname == "" {
		return id
	}
	return hostname
}

func (a *app) netCheckCommand() *cobra.Command {
	var format string
	var repair bool
	var nodes []string
	cmd := &cobra.Command{
		Use: "check", Short: "Compare the kernels of all nodes with the record of the cluster's networks", Args: cobra.NoArgs,
		Long: "Have each node compare its kernel (devices, addresses, routes, neighbours, forwarding entries, policy rules, nftables, kernel settings,\n" +
			"namespaces, DNS) with the record, and name each difference. With --repair they are mended at once; without it nodes mend them by themselves\n" +
			"within ten seconds. The exit code is 1 when something differed or a node did not answer. It may be asked on every node.",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := checkFormat(format); err != nil {
				return err
			}
			method, path := http.MethodGet, "/skein/net/check"
			if repair {
				method = http.MethodPost
			}
			if len(nodes) > 0 {
				path += "?" + url.Values{"node": nodes}.Encode()
			}
			var list []netNode
			if err := a.ask(cmd, method, path, nil, &list); err != nil {
				return err
			}
			if format == "json" {
				if err := json.NewEncoder(cmd.OutOrStdout()).Encode(list); err != nil {
					return err
				}
			} else if err := printCheck(cmd.OutOrStdout(), list); err != nil {
				return err
			}
			if wrong(list) {
				return errSaid{}
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&format, "format", "table", "Format of the output: table or json")
	cmd.Flags().BoolVar(&repair, "repair", false, "Mend what differs")
	cmd.Flags().StringSliceVar(&nodes, "node", nil, "Only this node (id or hostname; may be repeated)")
	return cmd
}

// errSaid ends a command with exit code 1 when all has been said already.
type errSaid struct{}

func (errSaid) Error() string { return "" }

// wrong tells that something differed or was not compared.
func wrong(list []netNode) bool {
	for _, n := range list {
		if n.Err != "" || len(n.Differences)+n.More > 0 {
			return true
		}
	}
	return false
}

func printCheck(w io.Writer, list []netNode) error {
	tw := tabwriter.NewWriter(w, 0, 4, 3, ' ', 0)
	headed := false
	for _, n := range list {
		for _, d := range n.Differences {
			if !headed {
				fmt.Fprintln(tw, "NODE\tWHERE\tKIND\tOBJECT\tSTATE\tMENDED")
				headed = true
			}
			mended := "no"
			if d.Mended {
				mended = "yes"
			} else if d.Err != "" {
				mended = "failed: " + strings.ReplaceAll(d.Err, "\n", "; ")
			}
			fmt.Fprintf(tw, "%s\t%s\t%s\t%s\t%s\t%s\n", nodeName(n.NodeID, n.Hostname), d.Table, d.Kind, d.Object, d.State, mended)
		}
	}
	if err := tw.Flush(); err != nil {
		return err
	}
	agree := 0
	for _, n := range list {
		name := nodeName(n.NodeID, n.Hostname)
		switch {
		case n.Err != "":
			fmt.Fprintf(w, "%s: %s\n", name, strings.ReplaceAll(n.Err, "\n", "; "))
		case n.More > 0:
			fmt.Fprintf(w, "%s: %d more differences\n", name, n.More)
		case len(n.Differences) == 0:
			agree++
		}
	}
	for _, n := range list {
		if n.Mended > 0 {
			fmt.Fprintf(w, "%s: found and mended %d differences by itself since its daemon started; its log names them\n", nodeName(n.NodeID, n.Hostname), n.Mended)
		}
	}
	_, err := fmt.Fprintf(w, "%d of %d nodes agree with the record.\n", agree, len(list))
	return err
}
