package control

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
	"text/template"
	"text/template/parse"

	"github.com/moby/moby/api/types/swarm"
)

// validateTemplates fills in what swarm allows to be a template with the values of a task that is not there: what fails here would fail on
// every node.
func validateTemplates(a at, c *swarm.ContainerSpec) error {
	check := func(a at, text string) error {
		if !strings.Contains(text, "{{") {
			return nil
		}
		t, err := template.New("").Option("missingkey=error").Parse(text)
		if err == nil {
			err = plainTemplate(t.Root)
		}
		if err == nil {
			type m = map[string]any
			err = t.Execute(&bounded{left: maxExpanded}, m{
				"Service": m{"ID": "", "Name": ""},
				"Node":    m{"ID": "", "Hostname": "", "Platform": m{"Architecture": "", "OS": ""}},
				"Task":    m{"ID": "", "Slot": 1, "Name": ""},
			})
		}
		if err != nil {
			return a.bad(text, "invalid template: %s: known are .Service.ID, .Service.Name, .Node.ID, .Node.Hostname, .Node.Platform.Architecture, "+
				".Node.Platform.OS, .Task.ID, .Task.Name and .Task.Slot", strings.TrimPrefix(err.Error(), "template: "))
		}
		return nil
	}
	if err := check(a.field("Hostname"), c.Hostname); err != nil {
		return err
	}
	for i, kv := range c.Env {
		if err := check(a.field("Env").index(i), kv); err != nil {
			return err
		}
	}
	for i, m := range c.Mounts {
		if err := check(a.field("Mounts").index(i).field("Source"), m.Source); err != nil {
			return err
		}
	}
	return nil
}

// maxExpanded bounds what a template may become.
const maxExpanded = 1 << 20

// bounded counts what is written to it and refuses more than there is room for.
type bounded struct{ left int }

func (b *bounded) Write(p []byte) (int, error) {
	if b.left -= len(p); b.left < 0 {
		return 0, fmt.Errorf("it becomes longer than %d bytes", maxExpanded)
	}
	return len(p), nil
}

// plainTemplate refuses what could keep the managers busy, or make much out of little: loops, calls of other templates, variables, functions
// that repeat what they are given.
func plainTemplate(n parse.Node) error {
	switch n := n.(type) {
	case *parse.ListNode:
		for _, c := range n.Nodes {
			if err := plainTemplate(c); err != nil {
				return err
			}
		}
	case *parse.ActionNode:
		return plainPipe(n.Pipe)
	case *parse.IfNode:
		if err := plainPipe(n.Pipe); err != nil {
			return err
		}
		if n.ElseList != nil {
			if err := plainTemplate(n.ElseList); err != nil {
				return err
			}
		}
		return plainTemplate(n.List)
	case *parse.TextNode, *parse.CommentNode:
	default:
		return fmt.Errorf("%s is not possible here", clip(n.String()))
	}
	return nil
}

func plainPipe(p *parse.PipeNode) error {
	if len(p.Decl) > 0 {
		return fmt.Errorf("variables are not possible here")
	}
	for _, c := range p.Cmds {
		for i, arg := range c.Args {
			switch arg := arg.(type) {
			case *parse.PipeNode:
				if err := plainPipe(arg); err != nil {
					return err
				}
			case *parse.IdentifierNode:
				if !slices.Contains([]string{"and", "or", "not", "eq", "ne", "lt", "le", "gt", "ge", "len", "index", "print", "printf"}, arg.Ident) {
					return fmt.Errorf("the function %s is not possible here", arg.Ident)
				}
				if arg.Ident == "printf" && !plainFormat(c.Args[i+1:]) {
					return fmt.Errorf("printf wants a format in quotes, widths below 100, and no [n] or *")
				}
			}
		}
	}
	return nil
}

var wideFormat = regexp.MustCompile(`%[^a-zA-Z%]*([0-9]{3}|[*\[])`)

func plainFormat(args []parse.Node) bool {
	if len(args) == 0 {
		return false
	}
	format, ok := args[0].(*parse.StringNode)
	return ok && !wideFormat.MatchString(format.Text)
}
