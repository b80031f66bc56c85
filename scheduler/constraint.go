package scheduler

import (
	"fmt"
	"net/netip"
	"strings"
)

// maxConstraint bounds the text of one constraint; specs come from users.
const maxConstraint = 1024

// Constraint is one hard rule over an attribute of a node: attribute == value or attribute != value.
type Constraint struct {
	Attribute string
	Value     string
	Negated   bool
}

const (
	nodeLabels   = "node.labels."
	engineLabels = "engine.labels."
)

// plainAttributes are the attributes besides labels.
var plainAttributes = []string{"node.id", "node.hostname", "node.ip", "node.role", "node.platform.os", "node.platform.arch"}

// String is the constraint as users write it.
func (c Constraint) String() string {
	if c.Negated {
		return c.Attribute + " != " + c.Value
	}
	return c.Attribute + " == " + c.Value
}

// ParseConstraint reads "attribute == value" or "attribute != value".
func ParseConstraint(text string) (Constraint, error) {
	fail := func(cause string) (Constraint, error) {
		if len(text) > 80 {
			text = text[:80] + "..."
		}
		return Constraint{}, fmt.Errorf("constraint %q: %s", text, cause)
	}
	if len(text) > maxConstraint {
		return fail(fmt.Sprintf("longer than %d bytes", maxConstraint))
	}
	eq, ne := strings.Index(text, "=="), strings.Index(text, "!=")
	at := eq
	if eq < 0 || (ne >= 0 && ne < eq) {
		at = ne
	}
	if at < 0 {
		return fail("want attribute == value or attribute != value")
	}
	c := Constraint{Attribute: strings.TrimSpace(text[:at]), Value: strings.TrimSpace(text[at+2:]), Negated: at == ne}
	if c.Value == "" {
		return fail("the value is missing")
	}
	if strings.ContainsFunc(c.Value, func(r rune) bool { return r < ' ' || r == 0x7f }) {
		return fail("the value has control characters")
	}
	attribute, err := parseAttribute(c.Attribute)
	if err != nil {
		return fail(err.Error())
	}
	c.Attribute = attribute
	if attribute == "node.ip" {
		if _, err := parsePrefix(c.Value); err != nil {
			return fail("the value is neither an address nor a network like 10.0.0.0/8")
		}
	}
	return c, nil
}

// ParseConstraints reads a list, for validation and for Requirements.
func ParseConstraints(texts []string) ([]Constraint, error) {
	out := make([]Constraint, 0, len(texts))
	for _, text := range texts {
		c, err := ParseConstraint(text)
		if err != nil {
			return nil, err
		}
		out = append(out, c)
	}
	return out, nil
}

// ParseSpread checks the label that a preference spreads over.
func ParseSpread(label string) (string, error) {
	attribute, err := parseAttribute(strings.TrimSpace(label))
	if err == nil && !isLabel(attribute) {
		err = fmt.Errorf("want node.labels.NAME or engine.labels.NAME")
	}
	if err != nil {
		return "", fmt.Errorf("placement preference %q: %w", label, err)
	}
	return attribute, nil
}

func isLabel(attribute string) bool {
	return strings.HasPrefix(attribute, nodeLabels) || strings.HasPrefix(attribute, engineLabels)
}

func parseAttribute(s string) (string, error) {
	for _, prefix := range []string{nodeLabels, engineLabels} {
		if len(s) > len(prefix) && strings.EqualFold(s[:len(prefix)], prefix) {
			name := s[len(prefix):]
			if strings.ContainsAny(name, " \t\n=!") {
				return "", fmt.Errorf("the label name %q has spaces or operators in it", name)
			}
			return prefix + name, nil
		}
	}
	for _, a := range plainAttributes {
		if strings.EqualFold(s, a) {
			return a, nil
		}
	}
	return "", fmt.Errorf("unknown attribute %q, want one of %s, node.labels.NAME, engine.labels.NAME", s, strings.Join(plainAttributes, ", "))
}

func parsePrefix(s string) (netip.Prefix, error) {
	if strings.Contains(s, "/") {
		return netip.ParsePrefix(s)
	}
	a, err := netip.ParseAddr(s)
	if err != nil {
		return netip.Prefix{}, err
	}
	return a.Prefix(a.BitLen())
}

// Matches reports whether the node satisfies the constraint. Values are compared without regard to case; a missing label is an
// empty value.
func (c Constraint) Matches(n *Node) bool {
	return c.equals(n) != c.Negated
}

func (c Constraint) equals(n *Node) bool {
	switch c.Attribute {
	case "node.ip":
		prefix, err := parsePrefix(c.Value)
		addr, addrErr := netip.ParseAddr(n.Addr)
		return err == nil && addrErr == nil && prefix.Contains(addr.Unmap())
	case "node.platform.arch":
		return Platform{Arch: c.Value}.normalize().Arch == n.Platform.normalize().Arch
	}
	return strings.EqualFold(attribute(n, c.Attribute), c.Value)
}

// attribute is the node's value of an attribute other than its address.
func attribute(n *Node, name string) string {
	switch name {
	case "node.id":
		return n.ID
	case "node.hostname":
		return n.Hostname
	case "node.role":
		return n.Role
	case "node.platform.os":
		return n.Platform.OS
	}
	if label, ok := strings.CutPrefix(name, nodeLabels); ok {
		return n.Labels[label]
	}
	label, _ := strings.CutPrefix(name, engineLabels)
	return n.EngineLabels[label]
}

// MatchesAll reports whether the node satisfies constraints, platforms and plugins of r, which do not depend on what runs there.
func (r *Requirements) MatchesAll(n *Node) bool {
	for _, c := range r.Constraints {
		if !c.Matches(n) {
			return false
		}
	}
	return r.runsOn(n) && r.hasPlugins(n)
}

func (r *Requirements) runsOn(n *Node) bool {
	if len(r.Platforms) == 0 {
		return true
	}
	for _, p := range r.Platforms {
		if n.Platform.runs(p) {
			return true
		}
	}
	return false
}
