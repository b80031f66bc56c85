package supervisor

import (
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"skein/runtime/logs"
)

// TestLogFormats: a container's output in every format, rotated, compressed and not blocking; a full disk holds nobody up.
func TestLogFormats(t *testing.T) {
	e := newEnv(t)
	for i, format := range []string{"", logs.JSON, logs.Local} {
		c := e.config("f"+string(rune('0'+i)), "flood", "5000")
		c.LogFormat, c.LogMaxSize, c.LogMaxFiles, c.LogCompress, c.LogNonBlocking = format, 40<<10, 50, i > 0, i > 0
		x, out := e.run(c)
		if x.Code != 0 || !strings.HasPrefix(out, "flood 0\nflood 1\n") || strings.Count(out, "\n") != 5000 || !strings.HasSuffix(out, "flood 4999\n") {
			t.Errorf("%q: exit %+v, %d lines", format, x, strings.Count(out, "\n"))
		}
	}
	c := e.config("full", "flood", "5000")
	c.LogPath = "/dev/full"
	e.start(c)
	if x := e.wait("full"); x.Code != 0 {
		t.Errorf("full disk: %+v", x)
	}
	if st, err := e.sup.State(e.ctx, "full"); err != nil || st.LogDropped != 5000 {
		t.Errorf("full disk: %d lines told as dropped, want 5000; %v", st.LogDropped, err)
	}
	c = e.config("none", "flood", "5000")
	c.LogPath = ""
	e.start(c)
	if x := e.wait("none"); x.Code != 0 {
		t.Errorf("no log: %+v", x)
	}
	c = e.config("bad", "exit", "0")
	c.LogFormat = "syslog"
	if err := e.sup.Create(e.ctx, c); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "syslog") {
		t.Errorf("unknown format: %v", err)
	}
}
