package daemon

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestIDMaps(t *testing.T) {
	dir := t.TempDir()
	sub := func(text string) string {
		f := filepath.Join(dir, "sub")
		if err := os.WriteFile(f, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return f
	}
	f := sub("# ranges\ndockremap:100000:65536\nalice:300000:1000\nother:1:5\nalice:500000:2000\n")
	if m, err := idMaps("", f, f); err != nil || m != nil {
		t.Errorf("none: %v %v", m, err)
	}
	if m, err := idMaps("default", f, f); err != nil || len(m.UIDs) != 1 || m.UIDs[0].HostID != 100000 || m.GIDs[0].Size != 65536 {
		t.Errorf("default: %+v %v", m, err)
	}
	if m, err := idMaps("alice:dockremap", f, f); err != nil || len(m.UIDs) != 2 || m.UIDs[1].ContainerID != 1000 || m.UIDs[1].HostID != 500000 || m.GIDs[0].HostID != 100000 {
		t.Errorf("alice: %+v %v", m, err)
	}
	for text, want := range map[string]string{
		"bob:1:2": "want at least 1000", "": "want at least 1000", "bob:x:5000": "invalid syntax", "bob:0:5000": "holds the host's root",
		"bob:4294967000:5000": "ends above 32 bits", "bob:100000": "want NAME:FIRST:COUNT", "bob:100000:0": "is empty",
	} {
		f := sub(text + "\n")
		if _, err := idMaps("bob", f, f); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %s", text, err, want)
		}
	}
	if _, err := idMaps("bob", dir+"/none", dir+"/none"); err == nil || !strings.Contains(err.Error(), "bob:FIRST:COUNT") {
		t.Errorf("no file: %v", err)
	}
}
