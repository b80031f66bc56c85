package daemon

import (
	"bytes"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/sirupsen/logrus"
	"github.com/spf13/pflag"
)

// configured loads a configuration as the command does.
func configured(t *testing.T, file string, args ...string) (Config, error) {
	t.Helper()
	var c Config
	f := pflag.NewFlagSet("daemon", pflag.ContinueOnError)
	c.flags(f)
	path := filepath.Join(t.TempDir(), "daemon.json")
	f.String("config", path, "")
	if file != "" {
		if err := os.WriteFile(path, []byte(file), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Parse(args); err != nil {
		return c, err
	}
	if err := load(f, path, f.Changed("config")); err != nil {
		return c, err
	}
	return c, c.validate()
}

func needRoot(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("the daemon's configuration is refused without root")
	}
}

func TestPrecedence(t *testing.T) {
	needRoot(t)
	file := `{"log-level": "error", "hostname": "from-file", "label": ["a=1", "b=2"], "disk-reserve": "1g"}`
	t.Setenv("SKEIN_HOSTNAME", "from-env")
	t.Setenv("SKEIN_LABEL", "c=3,d=4")
	t.Setenv("SKEIN_STATE_DIR", "/from-env")
	c, err := configured(t, file, "--state-dir", "/from-flag/../flag")
	if err != nil {
		t.Fatal(err)
	}
	if c.LogLevel != "error" || c.Hostname != "from-env" || c.StateDir != "/flag" || !slices.Equal(c.Labels, []string{"c=3", "d=4"}) || c.reserve != 1<<30 {
		t.Errorf("%+v", c)
	}
	if c.Socket != "/run/skein/skein.sock" {
		t.Errorf("socket %s", c.Socket)
	}
}

func TestConfigRefused(t *testing.T) {
	needRoot(t)
	for _, tc := range []struct{ file, args, want string }{
		{`{"log-levle": "info"}`, "", `unknown key "log-levle"`},
		{`{"config": "/x"}`, "", `unknown key "config"`},
		{`{"help": true}`, "", `unknown key "help"`},
		{`{"log-level": "info",}`, "", "must be one JSON object"},
		{`["log-level"]`, "", "must be one JSON object"},
		{`{"log-level": ["info"]}`, "", `key "log-level": wants one value, not a list`},
		{`{"log-level": null}`, "", `key "log-level": wants a string`},
		{`{"label": {"a": "b"}}`, "", `key "label": wants a list of strings`},
		{`{"label": [1]}`, "", `wants a list of strings, not 1`},
		{`{"log-level": "loud"}`, "", "--log-level"},
		{"", "--state-dir=state", "--state-dir \"state\": want an absolute path"},
		{"", "--cgroup-parent=/", "--cgroup-parent"},
		{"", "--listen-addr=0.0.0.0", "--listen-addr"},
		{"", "--listen-addr=0.0.0.0:0", "--listen-addr"},
		{"", "--hostname=", "--hostname"},
		{"", "--hostname=a b", "--hostname"},
		{"", "--label=x", "want key=value"},
		{"", "--disk-reserve=lots", "--disk-reserve"},
		{"", "--socket=/" + strings.Repeat("s", 110), "--socket"},
		{"", "--config=/nonexistent/daemon.json", "config file"},
	} {
		var args []string
		if tc.args != "" {
			args = []string{tc.args}
		}
		if tc.args == "--config=/nonexistent/daemon.json" {
			if err := load(pflag.NewFlagSet("x", pflag.ContinueOnError), "/nonexistent/daemon.json", true); err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("a missing file that was asked for: %v", err)
			}
			continue
		}
		if _, err := configured(t, tc.file, args...); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s %s: %v, want %q", tc.file, tc.args, err, tc.want)
		}
	}
	t.Setenv("SKEIN_LOG_LEVEL", "loud")
	if _, err := configured(t, ""); err == nil || !strings.Contains(err.Error(), "--log-level") {
		t.Errorf("bad environment: %v", err)
	}
}

func TestUnit(t *testing.T) {
	cmd := Command("test")
	var out bytes.Buffer
	cmd.SetOut(&out)
	cmd.SetArgs([]string{"unit"})
	if err := cmd.Execute(); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"Delegate=yes", "KillMode=process", "OOMPolicy=continue", " daemon\n", "WantedBy=multi-user.target"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("the unit lacks %q:\n%s", want, out.String())
		}
	}
}

// What libraries say through logrus is in our format, and their warnings are not the user's.
func TestLibrariesLog(t *testing.T) {
	var out bytes.Buffer
	quietLibraries(slog.New(slog.NewTextHandler(&out, &slog.HandlerOptions{Level: slog.LevelInfo})))
	logrus.Warn("failed check for fsverity support")
	logrus.WithField("path", "/x").Error("broken")
	if got := out.String(); strings.Contains(got, "fsverity") || !strings.Contains(got, "level=WARN msg=broken component=library path=/x") {
		t.Errorf("%q", got)
	}
}

func TestLockRefusesSecondDaemon(t *testing.T) {
	path := filepath.Join(t.TempDir(), "daemon.lock")
	unlock, err := lock(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := lock(path); err == nil || !strings.Contains(err.Error(), "another daemon uses") {
		t.Errorf("second lock: %v", err)
	}
	unlock()
	unlock, err = lock(path)
	if err != nil {
		t.Fatal(err)
	}
	unlock()
}
