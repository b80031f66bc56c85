package main

import (
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
)

func get(t *testing.T, h http.Handler, target string) (int, string) {
	t.Helper()
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequest(http.MethodGet, target, nil))
	return w.Code, w.Body.String()
}

func TestRoutes(t *testing.T) {
	a := &app{host: "h1", version: "v2", exit: make(chan int, 1)}
	h := a.routes()
	srv := httptest.NewServer(h)
	defer srv.Close()
	for _, c := range []struct {
		target string
		code   int
		want   string
	}{
		{"/", 200, "h1 v2 192.0.2.1\n"},
		{"/healthz", 200, "ok\n"},
		{"/slow?d=150ms", 200, ".\nh1 v2 192.0.2.1\n"},
		{"/slow?d=1h", 400, ""},
		{"/fetch?url=" + url.QueryEscape(srv.URL), 200, "h1 v2 127.0.0.1\n"},
		{"/fetch?url=" + url.QueryEscape("http://127.0.0.1:1/"), 502, "refused"},
		{"/resolve?name=127.0.0.1", 200, "127.0.0.1\n"},
		{"/exit?code=300", 400, ""},
		{"/exit?code=3", 200, "bye\n"},
		{"/none", 404, ""},
	} {
		if code, body := get(t, h, c.target); code != c.code || !strings.Contains(body, c.want) {
			t.Errorf("%s: got %d %q, want %d %q", c.target, code, body, c.code, c.want)
		}
	}
	if got := <-a.exit; got != 3 {
		t.Errorf("exit code: got %d", got)
	}
}

func TestExit(t *testing.T) {
	t.Setenv("PORT", "0")
	t.Setenv("EXIT_AFTER", "10ms")
	t.Setenv("EXIT_CODE", "7")
	if code, err := run(); code != 7 || err != nil {
		t.Errorf("got %d, %v", code, err)
	}
}
