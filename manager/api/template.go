package api

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
	"text/template"
	"text/template/parse"
)

// MaxExpanded bounds what a template may become, and what its functions may give all in all.
const MaxExpanded = 1 << 20

// ExpandTemplate fills in a template that a user wrote. Managers check templates with it and nodes expand them, so both know the same
// language: conditions, comparisons, print and printf with fixed widths, and the functions given. Loops, variables and templates within
// templates, which make much out of little, are refused.
func ExpandTemplate(text string, values map[string]any, funcs map[string]func(name string) (string, error)) (string, error) {
	if !strings.Contains(text, "{{") {
		return text, nil
	}
	b := &templateBudget{left: MaxExpanded}
	known := template.FuncMap{ // instead of the ones built in: nested, they would double what they are given each time
		"print":  func(args ...any) (string, error) { return b.charge(fmt.Sprint(args...), nil) },
		"printf": func(format string, args ...any) (string, error) { return b.charge(fmt.Sprintf(format, args...), nil) },
	}
	allowed := []string{"and", "or", "not", "eq", "ne", "lt", "le", "gt", "ge", "len", "index", "print", "printf"}
	for name, f := range funcs {
		known[name] = func(arg string) (string, error) { return b.charge(f(arg)) }
		allowed = append(allowed, name)
	}
	t, err := template.New("").Option("missingkey=error").Funcs(known).Parse(text)
	if err != nil {
		return "", err
	}
	if err := plainTemplate(allowed, t.Root); err != nil {
		return "", err
	}
	out := boundedText{left: MaxExpanded}
	if err := t.Execute(&out, values); err != nil {
		return "", err
	}
	return out.String(), nil
}

// templateBudget is what a template's functions may still give.
type templateBudget struct{ left int }

func (b *templateBudget) charge(s string, err error) (string, error) {
	if err != nil {
		return "", err
	}
	if b.left -= len(s); b.left < 0 {
		return "", fmt.Errorf("its functions give more than %d bytes", MaxExpanded)
	}
	return s, nil
}

// boundedText takes what is written to it, up to a bound.
type boundedText struct {
	strings.Builder
	left int
}

func (b *boundedText) Write(p []byte) (int, error) {
	if b.left -= len(p); b.left < 0 {
		return 0, fmt.Errorf("it becomes longer than %d bytes", MaxExpanded)
	}
	return b.Builder.Write(p)
}

// plainTemplate refuses what could keep a manager or a node busy, or make much out of little: loops, calls of other templates, variables, functions
// that repeat what they are given.
func plainTemplate(allowed []string, n parse.Node) error {
	switch n := n.(type) {
	case *parse.ListNode:
		for _, c := range n.Nodes {
			if err := plainTemplate(allowed, c); err != nil {
				return err
			}
		}
	case *parse.ActionNode:
		return plainPipe(allowed, n.Pipe)
	case *parse.IfNode:
		if err := plainPipe(allowed, n.Pipe); err != nil {
			return err
		}
		if n.ElseList != nil {
			if err := plainTemplate(allowed, n.ElseList); err != nil {
				return err
			}
		}
		return plainTemplate(allowed, n.List)
	case *parse.TextNode, *parse.CommentNode:
	default:
		return fmt.Errorf("%s is not possible here", clipTemplate(n.String()))
	}
	return nil
}

func plainPipe(allowed []string, p *parse.PipeNode) error {
	if len(p.Decl) > 0 {
		return fmt.Errorf("variables are not possible here")
	}
	for _, c := range p.Cmds {
		for i, arg := range c.Args {
			switch arg := arg.(type) {
			case *parse.PipeNode:
				if err := plainPipe(allowed, arg); err != nil {
					return err
				}
			case *parse.IdentifierNode:
				if !slices.Contains(allowed, arg.Ident) {
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

// clipTemplate keeps an error short.
func clipTemplate(s string) string {
	if len(s) > 80 {
		return s[:80] + "..."
	}
	return s
}
