package control

import (
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// README.md documents the options that there are, each for the kinds of objects that it belongs to, and no others.
func TestOptionsAreDocumented(t *testing.T) {
	text, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	var written, known []string
	row := regexp.MustCompile("(?m)^\\| `(skein\\.[a-z.-]+)(?:=[^`]*)?` \\| ([^|]*) \\|")
	for _, m := range row.FindAllStringSubmatch(string(text), -1) {
		on, _, _ := strings.Cut(m[2], " (")
		for kind := range strings.SplitSeq(on, ", ") {
			written = append(written, m[1]+" of a "+kind)
		}
	}
	for _, o := range options() {
		known = append(known, o.name+" of a "+o.on)
	}
	slices.Sort(written)
	slices.Sort(known)
	if !slices.Equal(written, known) {
		t.Errorf("README.md has\n%s\nthere are\n%s", strings.Join(written, "\n"), strings.Join(known, "\n"))
	}
}
