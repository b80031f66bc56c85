package attack

import (
	"os"
	"path/filepath"
	"regexp"
	"testing"
)

// TestReadme: the table of README.md names tests that exist, and every test of this package is in it.
func TestReadme(t *testing.T) {
	b, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	var files []string
	for _, pattern := range []string{"*_test.go", "../../runtime/*/*_test.go", "../../runtime/*/*/*_test.go", "../../agent/*/*_test.go", "../../overlay/*_test.go", "../../manager/*/*_test.go"} {
		some, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, some...)
	}
	exists := map[string]bool{}
	for _, f := range files {
		src, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range regexp.MustCompile(`(?m)^func (Test\w+)\(t \*testing\.T\)`).FindAllSubmatch(src, -1) {
			exists[string(m[1])] = filepath.Dir(f) != "."
		}
	}
	for _, m := range regexp.MustCompile("`(Test\\w+)`").FindAllSubmatch(b, -1) {
		if _, ok := exists[string(m[1])]; !ok {
			t.Errorf("README.md names %s, which is not there", m[1])
		}
		exists[string(m[1])] = true
	}
	delete(exists, "TestReadme")
	for name, listed := range exists {
		if !listed {
			t.Errorf("README.md does not say what %s attacks", name)
		}
	}
}
