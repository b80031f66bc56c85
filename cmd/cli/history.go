package cli

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
)

// revision is one of GET /skein/services/ID/revisions.
type revision struct {
	Number    uint64
	CreatedAt time.Time
	Author    string
	Comment   string
	Note      string
	Current   bool
	Changes   []revisionChange
	Spec      json.RawMessage `json:",omitempty"`
}

type revisionChange struct{ Path, Old, New string }

// historyCommand is `skein service history`: who changed a service, when and what.
func (a *app) historyCommand() *cobra.Command {
	var format, diff string
	var limit int
	cmd := &cobra.Command{
		Use:   "history [OPTIONS] SERVICE",
		Short: "Show the revisions of a service: who changed what, and when",
		Example: "  skein service history web\n  skein service history web --diff 3 5\n  skein service history web --format json\n" +
			"  skein service rollback --to 3 web",
		Args: cobra.RangeArgs(1, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
			if format != "table" && format != "json" {
				return fmt.Errorf("unknown format %q: there are table and json", format)
			}
			if diff != "" {
				return a.showDiff(cmd, args, diff, format)
			}
			if len(args) != 1 {
				return fmt.Errorf("%q takes one service; a second number belongs to --diff", cmd.CommandPath())
			}
			revisions := []revision{}
			path := fmt.Sprintf("/skein/services/%s/revisions?limit=%d", url.PathEscape(args[0]), limit)
			if err := a.get(cmd, path, &revisions); err != nil {
				return err
			}
			if format == "json" {
				return json.NewEncoder(cmd.OutOrStdout()).Encode(revisions)
			}
			return printHistory(cmd.OutOrStdout(), revisions)
		},
	}
	cmd.Flags().StringVar(&format, "format", "table", "Format of the output: table or json")
	cmd.Flags().StringVar(&diff, "diff", "", "Show what changed from revision N to M (\"--diff N M\"), or from the one before N (\"--diff N\")")
	cmd.Flags().IntVarP(&limit, "last", "n", 0, "Show so many of the newest revisions (0: as many as one answer holds)")
	return cmd
}

// showDiff shows what changed between two revisions. The second number is the last argument, or stands behind "..".
func (a *app) showDiff(cmd *cobra.Command, args []string, diff, format string) error {
	from, to, both := strings.Cut(diff, "..")
	if len(args) == 2 {
		if both {
			return fmt.Errorf("--diff names more than two revisions")
		}
		to, both = args[1], true
	}
	numbers := []uint64{}
	for _, text := range []string{from, to} {
		if text == "" && !both {
			continue
		}
		n, err := strconv.ParseUint(text, 10, 64)
		if err != nil || n == 0 {
			return fmt.Errorf("invalid revision %q in --diff: want a number, as %q lists them", text, "service history")
		}
		numbers = append(numbers, n)
	}
	path := fmt.Sprintf("/skein/services/%s/revisions?number=", url.PathEscape(args[0]))
	if !both {
		var one []revision
		if err := a.get(cmd, path+fmt.Sprint(numbers[0]), &one); err != nil {
			return err
		}
		return printChanges(cmd.OutOrStdout(), format, one[0].Changes)
	}
	var pair []revision
	if err := a.get(cmd, fmt.Sprintf("%s%d,%d", path, numbers[0], numbers[1]), &pair); err != nil {
		return err
	}
	specs := map[uint64]json.RawMessage{}
	for _, r := range pair {
		specs[r.Number] = r.Spec
	}
	changes, err := compare(specs[numbers[0]], specs[numbers[1]])
	if err != nil {
		return err
	}
	return printChanges(cmd.OutOrStdout(), format, changes)
}

func printHistory(w io.Writer, revisions []revision) error {
	tw := tabwriter.NewWriter(w, 0, 4, 3, ' ', 0)
	fmt.Fprintln(tw, "REVISION\tCREATED\tAUTHOR\tCHANGES\tCOMMENT")
	for _, r := range revisions {
		number := fmt.Sprint(r.Number)
		if r.Current {
			number += " *"
		}
		comment := r.Comment
		if r.Note != "" {
			comment = strings.TrimSpace(comment + " (" + r.Note + ")")
		}
		fmt.Fprintf(tw, "%s\t%s\t%s\t%s\t%s\n", number, r.CreatedAt.Local().Format(time.DateTime), r.Author, summary(r.Changes), comment)
	}
	return tw.Flush()
}

// summary is what a line has room for.
func summary(changes []revisionChange) string {
	const shown, width = 2, 40
	var parts []string
	for i, c := range changes {
		if i == shown {
			parts = append(parts, fmt.Sprintf("and %d more", len(changes)-shown))
			break
		}
		name := c.Path[strings.LastIndexByte(c.Path, '.')+1:]
		parts = append(parts, fmt.Sprintf("%s %s → %s", name, shorten(c.Old, width), shorten(c.New, width)))
	}
	return strings.Join(parts, ", ")
}

func shorten(s string, n int) string {
	r := []rune(s)
	switch {
	case s == "":
		return "-"
	case len(r) > n:
		return string(r[:n-1]) + "…"
	}
	return s
}

func printChanges(w io.Writer, format string, changes []revisionChange) error {
	if format == "json" {
		return json.NewEncoder(w).Encode(changes)
	}
	for _, c := range changes {
		fmt.Fprintln(w, c.Path)
		if c.Old != "" {
			fmt.Fprintln(w, "  - "+c.Old)
		}
		if c.New != "" {
			fmt.Fprintln(w, "  + "+c.New)
		}
	}
	return nil
}

// addRollbackTo lets docker's `service rollback` return to any revision.
func (a *app) addRollbackTo(c *cobra.Command) {
	to := c.Flags().Uint64("to", 0, "Return to this revision, of those that \"service history\" lists, instead of the previous one")
	run := c.RunE
	c.RunE = func(cmd *cobra.Command, args []string) error {
		if *to == 0 {
			if cmd.Flags().Changed("to") {
				return fmt.Errorf("invalid revision 0 in --to: the first one is 1")
			}
			return run(cmd, args)
		}
		path := "/skein/services/" + url.PathEscape(args[0]) + "/rollback"
		if err := a.ask(cmd, http.MethodPost, path, struct{ To uint64 }{*to}, nil); err != nil {
			return err
		}
		_, err := fmt.Fprintln(cmd.OutOrStdout(), args[0])
		return err
	}
}
