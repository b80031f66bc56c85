package api

import (
	"errors"
	"strings"
	"testing"
)

func TestExpandTemplate(t *testing.T) {
	values := map[string]any{"Task": map[string]any{"Slot": uint64(2), "Name": "web.2"}}
	funcs := map[string]func(string) (string, error){
		"env":    func(name string) (string, error) { return "<" + name + ">", nil },
		"config": func(string) (string, error) { return strings.Repeat("x", 400_000), nil },
		"secret": func(string) (string, error) { return "", errors.New("secret target pw not found") },
	}
	nested := "\"\\\\\"" // a backslash
	for range 60 {
		nested = `(printf "%q" ` + nested + ")"
	}
	for _, c := range []struct{ text, want, fails string }{
		{"plain }} text", "plain }} text", ""},
		{`{{.Task.Name}}-{{printf "%03d" .Task.Slot}}{{if eq .Task.Slot 2}} two{{else}} other{{end}} {{env "A"}}`, "web.2-002 two <A>", ""},
		{`{{.Task.Nothing}}`, "", "no entry for key"},
		{`{{secret "pw"}}`, "", "secret target pw not found"},
		{`{{range .Task}}x{{end}}`, "", "is not possible here"},
		{`{{with .Task}}x{{end}}`, "", "is not possible here"},
		{`{{define "a"}}{{template "a"}}{{end}}{{template "a"}}`, "", "is not possible here"},
		{`{{$x := .Task.Name}}{{$x}}`, "", "variables are not possible here"},
		{`{{urlquery .Task.Name}}`, "", "the function urlquery is not possible here"},
		{`{{if true}}x{{else}}{{range .Task}}x{{end}}{{end}}`, "", "is not possible here"},
		{`{{printf "%1000000d" 1}}`, "", "printf wants"},
		{`{{config "a"}}{{config "a"}}{{config "a"}}`, "", "give more than"},
		{`{{if eq (print (config "a") (config "a")) ""}}x{{end}}`, "", "give more than"},
		{"{{" + nested + "}}", "", "give more than"},
		{strings.Repeat("a", MaxExpanded) + "{{.Task.Slot}}", "", "becomes longer than"},
	} {
		got, err := ExpandTemplate(c.text, values, funcs)
		if c.fails == "" && (err != nil || got != c.want) {
			t.Errorf("%.80q became %.80q, %v: want %q", c.text, got, err, c.want)
		}
		if c.fails != "" && (err == nil || !strings.Contains(err.Error(), c.fails)) {
			t.Errorf("%.80q became %.80q, %v: want an error with %q", c.text, got, err, c.fails)
		}
	}
}
