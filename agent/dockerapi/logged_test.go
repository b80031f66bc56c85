package dockerapi_test

import (
	"bytes"
	"errors"
	"log/slog"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"skein/agent/dockerapi"
	"skein/agent/dockerapi/dockerapitest"
	"skein/manager/api"
)

// Only the daemon's own failures are errors in its log.
func TestLevelsOfFailures(t *testing.T) {
	n, c := dockerapitest.NewNode(), dockerapitest.NewCluster()
	var log bytes.Buffer
	h := dockerapi.New(dockerapi.Config{Containers: n, Images: n, Networks: n, System: n, Swarm: c, Logger: slog.New(slog.NewTextHandler(&log, nil))})
	for _, w := range []struct {
		err   error
		level string
	}{
		{api.Errorf(errdefs.ErrUnavailable, "the cluster has no leader"), "level=WARN"},
		{errors.New("disk on fire"), "level=ERROR"},
		{api.Errorf(errdefs.ErrInvalidArgument, "no"), ""},
	} {
		log.Reset()
		c.NetworksErr = w.err
		do(h, "GET", "/networks", "")
		if got := log.String(); (w.level == "") != (got == "") || !strings.Contains(got, w.level) {
			t.Errorf("%v is logged as %q, want %q", w.err, got, w.level)
		}
	}
}
