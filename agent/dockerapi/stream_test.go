package dockerapi_test

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/pkg/stdcopy"
	"github.com/moby/moby/api/types/events"

	"skein/agent/dockerapi"
	"skein/agent/dockerapi/dockerapitest"
	"skein/manager/api"
)

// serve runs the API on a unix socket, as the daemon does.
func serve(t *testing.T, h http.Handler) string {
	t.Helper()
	sock := filepath.Join(t.TempDir(), "s")
	l, err := dockerapi.ListenUnix(sock, "")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- dockerapi.Serve(ctx, l, h, nil) }()
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Error(err)
			}
		case <-time.After(10 * time.Second):
			t.Error("Serve did not end")
		}
	})
	return sock
}

// hijackConn sends a request and returns the connection after the answer's head.
func hijackConn(t *testing.T, sock, path, extra, body string) (*net.UnixConn, *bufio.Reader, *http.Response) {
	t.Helper()
	conn, err := net.Dial("unix", sock)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	fmt.Fprintf(conn, "POST %s HTTP/1.1\r\nHost: d\r\n%sContent-Length: %d\r\n\r\n%s", path, extra, len(body), body)
	br := bufio.NewReader(conn)
	resp, err := http.ReadResponse(br, nil)
	if err != nil {
		t.Fatal(err)
	}
	return conn.(*net.UnixConn), br, resp
}

const upgrade = "Connection: Upgrade\r\nUpgrade: tcp\r\n"

func TestAttachHalfClose(t *testing.T) {
	for _, tc := range []struct {
		version, container, extra string
		code                      int
		ctype                     string
		raw                       bool
	}{
		{"/v1.55", "web", upgrade, 101, "application/vnd.docker.multiplexed-stream", false},
		{"/v1.41", "web", upgrade, 101, "application/vnd.docker.raw-stream", false},
		{"", "web", "", 200, "application/vnd.docker.multiplexed-stream", false},
		{"", "tty", upgrade, 101, "application/vnd.docker.raw-stream", true},
	} {
		n, _, h := newHandler()
		n.Add(&dockerapitest.Container{ID: strings.Repeat("cd", 32), Name: "tty", TTY: true, Running: true})
		sock := serve(t, h)
		conn, br, resp := hijackConn(t, sock, tc.version+"/containers/"+tc.container+"/attach?stream=1&stdin=1&stdout=1&stderr=1", tc.extra, "")
		if resp.StatusCode != tc.code || resp.Header.Get("Content-Type") != tc.ctype {
			t.Fatalf("%+v: %s %v", tc, resp.Status, resp.Header)
		}
		if _, err := io.WriteString(conn, "echo me\n"); err != nil {
			t.Fatal(err)
		}
		if err := conn.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		var out, errOut bytes.Buffer
		var err error
		if tc.raw {
			_, err = io.Copy(&out, br)
			if err != nil || out.String() != "echo me\nbye\n" {
				t.Errorf("raw: %q %v", out.String(), err)
			}
			continue
		}
		_, err = stdcopy.StdCopy(&out, &errOut, br)
		if err != nil || out.String() != "echo me\n" || errOut.String() != "bye\n" {
			t.Errorf("%+v: %q %q %v", tc, out.String(), errOut.String(), err)
		}
	}
}

func TestExec(t *testing.T) {
	n, _, h := newHandler()
	sock := serve(t, h)
	for cmd, want := range map[string]string{"date": "date\n", "missing": "exec: \"missing\": executable file not found in $PATH\r\n"} {
		w := do(h, "POST", "/containers/web/exec", `{"Cmd":["`+cmd+`"],"AttachStdout":true,"AttachStderr":true}`)
		if w.Code != 201 {
			t.Fatalf("%d %s", w.Code, w.Body)
		}
		id := strings.Split(w.Body.String(), `"`)[3]
		_, br, resp := hijackConn(t, sock, "/exec/"+id+"/start", upgrade+"Content-Type: application/json\r\n", `{"Detach":false,"Tty":false}`)
		if resp.StatusCode != 101 {
			t.Fatalf("%s", resp.Status)
		}
		var out bytes.Buffer
		if _, err := stdcopy.StdCopy(&out, &out, br); err != nil || out.String() != want {
			t.Errorf("%s: %q %v", cmd, out.String(), err)
		}
	}
	_ = n
	w := do(h, "POST", "/containers/web/exec", `{"Cmd":["date"]}`)
	id := strings.Split(w.Body.String(), `"`)[3]
	if w := do(h, "POST", "/exec/"+id+"/start", `{"Detach":true}`); w.Code != 200 {
		t.Errorf("detached: %d %s", w.Code, w.Body)
	}
}

func TestContainerLogs(t *testing.T) {
	_, _, h := newHandler()
	w := do(h, "GET", "/v1.55/containers/web/logs?stdout=1&stderr=1&timestamps=1&details=1", "")
	if ct := w.Header().Get("Content-Type"); ct != "application/vnd.docker.multiplexed-stream" {
		t.Errorf("type %s", ct)
	}
	want := "\x01\x00\x00\x00\x00\x00\x00\x26" + "2026-11-21T10:00:00.000000005Z  hello\n" +
		"\x02\x00\x00\x00\x00\x00\x00\x25" + "2026-11-21T10:00:01.000000005Z  oops\n"
	if got := w.Body.String(); got != want {
		t.Errorf("got  %q\nwant %q", got, want)
	}
	w = do(h, "GET", "/containers/web/logs?stdout=1&stderr=1&tail=1", "")
	if got := w.Body.String(); got != "\x02\x00\x00\x00\x00\x00\x00\x05oops\n" {
		t.Errorf("tail: %q", got)
	}
}

func TestServiceLogs(t *testing.T) {
	_, c, h := newHandler()
	w := do(h, "POST", "/services/create", `{"Name":"a","TaskTemplate":{"ContainerSpec":{"Image":"x"}},"Mode":{"Replicated":{"Replicas":2}}}`)
	if w.Code != 201 {
		t.Fatalf("%d %s", w.Code, w.Body)
	}
	for range 4 { // tasks advance when listed
		do(h, "GET", "/tasks", "")
	}
	w = do(h, "GET", "/services/a/logs?stdout=1&stderr=1&details=1", "")
	var out, errOut bytes.Buffer
	if _, err := stdcopy.StdCopy(&out, &errOut, w.Body); err != nil {
		t.Fatal(err)
	}
	for _, task := range c.Tasks {
		d := "com.docker.swarm.node.id=" + dockerapitest.NodeID + ",com.docker.swarm.service.id=" + task.ServiceID + ",com.docker.swarm.task.id=" + task.ID
		if !strings.Contains(out.String(), d+" out of "+task.ID+"\n") || !strings.Contains(errOut.String(), d+" err of "+task.ID+"\n") {
			t.Errorf("task %s is missing in\n%s%s", task.ID, out.String(), errOut.String())
		}
	}
	// Lines of all tasks come by time: first every task's first line.
	order := do(h, "GET", "/services/a/logs?stdout=1&stderr=1", "").Body.String()
	if strings.LastIndex(order, "out of") > strings.Index(order, "err of") {
		t.Errorf("lines are not in order: %q", order)
	}
	c.AgentErr = api.Errorf(errdefs.ErrUnavailable, "connection refused")
	w = do(h, "GET", "/tasks/"+c.Tasks[0].ID+"/logs?stdout=1", "")
	_, err := stdcopy.StdCopy(io.Discard, io.Discard, w.Body)
	if err == nil || !strings.Contains(err.Error(), "incomplete log stream") || !strings.Contains(err.Error(), dockerapitest.NodeID+": connection refused") {
		t.Errorf("unreachable node: %v", err)
	}
	// The logs of a removed node are gone for good. That is worth a word only to one who asks for nothing else.
	c.AgentErr = api.Errorf(errdefs.ErrNotFound, "node gone not found")
	w = do(h, "GET", "/tasks/"+c.Tasks[0].ID+"/logs?stdout=1", "")
	if _, err = stdcopy.StdCopy(io.Discard, io.Discard, w.Body); err == nil || !strings.Contains(err.Error(), "was removed from the cluster") {
		t.Errorf("logs of a removed node alone: %v", err)
	}
	c.Gone = map[string]bool{dockerapitest.NodeID: true}
	c.AgentErr, c.Tasks[0].NodeID = nil, "stays"
	w = do(h, "GET", "/services/a/logs?stdout=1", "")
	if _, err = stdcopy.StdCopy(io.Discard, io.Discard, w.Body); err != nil {
		t.Errorf("logs of a removed node among others: %v", err)
	}
}

func TestEventsAreFlushedAndEndWithTheDaemon(t *testing.T) {
	n, _, h := newHandler()
	sock := serve(t, h)
	cl := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", sock)
	}}}
	resp, err := cl.Get("http://d/events")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	n.EventsCh <- events.Message{Type: events.ContainerEventType, Action: events.ActionStart, Actor: events.Actor{ID: "x"}}
	line, err := bufio.NewReader(resp.Body).ReadString('\n')
	if err != nil || !strings.Contains(line, `"Action":"start"`) {
		t.Errorf("%q %v", line, err)
	}
	// The cleanup of serve fails if this open stream keeps Serve from ending.
}

func TestListenUnix(t *testing.T) {
	path := filepath.Join(t.TempDir(), "run", "s")
	l, err := dockerapi.ListenUnix(path, "")
	if err != nil {
		t.Fatal(err)
	}
	st, err := os.Stat(path)
	if err != nil || st.Mode().Perm() != 0o660 {
		t.Fatalf("mode %v %v", st.Mode(), err)
	}
	if _, err := dockerapi.ListenUnix(path, ""); err == nil || !strings.Contains(err.Error(), "another daemon answers there") {
		t.Errorf("second daemon: %v", err)
	}
	l2, err := dockerapi.ListenUnix(path+"2", "no-such-group-here")
	if err != nil {
		t.Fatalf("unknown group: %v", err)
	}
	l2.Close()
	l.Close()
	if _, err := os.Stat(path); !os.IsNotExist(err) {
		t.Errorf("socket is left: %v", err)
	}
	if err := os.WriteFile(path, nil, 0o600); err != nil { // what a crash leaves
		t.Fatal(err)
	}
	l, err = dockerapi.ListenUnix(path, "")
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
}
