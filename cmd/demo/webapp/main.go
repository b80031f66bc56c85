// Command webapp is the small web application of the demo and the tests: one static program that says who it is.
//
//	/             "HOSTNAME VERSION CLIENT-ADDRESS\n"
//	/healthz      "ok\n"
//	/slow?d=2s    the same as /, after a while, in pieces
//	/fetch?url=U  GETs U from inside and returns its status and body
//	/resolve?name=N  addresses of N, one a line
//	/exit?code=N  ends the process with this code
//
// PORT (8080), VERSION, EXIT_AFTER (a duration) and EXIT_CODE come from the environment. SIGTERM lets requests end first.
package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strconv"
	"syscall"
	"time"
)

var version = "v1" // set by -ldflags "-X main.version=v2"; VERSION wins

const (
	grace     = 30 * time.Second
	maxFetch  = 1 << 20
	maxSlow   = time.Minute
	slowStep  = 100 * time.Millisecond
	fetchTime = 10 * time.Second
)

func main() {
	code, err := run()
	if err != nil {
		fmt.Fprintln(os.Stderr, "webapp:", err)
		os.Exit(1)
	}
	os.Exit(code)
}

func run() (int, error) {
	host, err := os.Hostname()
	if err != nil {
		return 1, err
	}
	a := &app{host: host, version: cmp.Or(os.Getenv("VERSION"), version), exit: make(chan int, 1)}
	exitCode := 0
	if c := os.Getenv("EXIT_CODE"); c != "" {
		if exitCode, err = strconv.Atoi(c); err != nil {
			return 1, fmt.Errorf("EXIT_CODE: %w", err)
		}
	}
	var after <-chan time.Time
	if d := os.Getenv("EXIT_AFTER"); d != "" {
		wait, err := time.ParseDuration(d)
		if err != nil {
			return 1, fmt.Errorf("EXIT_AFTER: %w", err)
		}
		after = time.After(wait)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	l, err := net.Listen("tcp", ":"+cmp.Or(os.Getenv("PORT"), "8080"))
	if err != nil {
		return 1, err
	}
	srv := &http.Server{Handler: a.routes(), ReadHeaderTimeout: 10 * time.Second}
	served := make(chan error, 1)
	go func() { served <- srv.Serve(l) }()
	fmt.Printf("start %s %s listening on %s\n", a.host, a.version, l.Addr())
	select {
	case err := <-served:
		return 1, err
	case exitCode = <-a.exit:
	case <-after:
	case <-ctx.Done():
	}
	end, cancel := context.WithTimeout(context.Background(), grace)
	defer cancel()
	if err := srv.Shutdown(end); err != nil && !errors.Is(err, http.ErrServerClosed) {
		return 1, err
	}
	fmt.Printf("stop %s %s\n", a.host, a.version)
	return exitCode, nil
}

type app struct {
	host, version string
	exit          chan int
}

func (a *app) routes() http.Handler {
	m := http.NewServeMux()
	m.HandleFunc("/{$}", a.who)
	m.HandleFunc("/healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	m.HandleFunc("/slow", a.slow)
	m.HandleFunc("/fetch", a.fetch)
	m.HandleFunc("/resolve", a.resolve)
	m.HandleFunc("/exit", a.quit)
	return m
}

func (a *app) who(w http.ResponseWriter, r *http.Request) {
	client, _, err := net.SplitHostPort(r.RemoteAddr)
	if err != nil {
		client = r.RemoteAddr
	}
	fmt.Fprintf(w, "%s %s %s\n", a.host, a.version, client)
}

func (a *app) slow(w http.ResponseWriter, r *http.Request) {
	d, err := time.ParseDuration(cmp.Or(r.URL.Query().Get("d"), "1s"))
	if err != nil || d > maxSlow {
		http.Error(w, "d: want a duration up to "+maxSlow.String(), http.StatusBadRequest)
		return
	}
	end := time.After(d)
	tick := time.NewTicker(slowStep)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			fmt.Fprint(w, ".")
			_ = http.NewResponseController(w).Flush() // a client that is gone ends the request
		case <-end:
			fmt.Fprintln(w)
			a.who(w, r)
			return
		case <-r.Context().Done():
			return
		}
	}
}

func (a *app) fetch(w http.ResponseWriter, r *http.Request) {
	ctx, cancel := context.WithTimeout(r.Context(), fetchTime)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, r.URL.Query().Get("url"), nil)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	// A new connection each time: tests want to see who answers.
	req.Close = true
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadGateway)
		return
	}
	defer resp.Body.Close()
	w.WriteHeader(resp.StatusCode)
	_, _ = io.Copy(w, io.LimitReader(resp.Body, maxFetch)) // the client may be gone
}

func (a *app) resolve(w http.ResponseWriter, r *http.Request) {
	ctx, cancel := context.WithTimeout(r.Context(), fetchTime)
	defer cancel()
	addrs, err := net.DefaultResolver.LookupHost(ctx, r.URL.Query().Get("name"))
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadGateway)
		return
	}
	for _, x := range addrs {
		fmt.Fprintln(w, x)
	}
}

func (a *app) quit(w http.ResponseWriter, r *http.Request) {
	code, err := strconv.Atoi(cmp.Or(r.URL.Query().Get("code"), "0"))
	if err != nil || code < 0 || code > 255 {
		http.Error(w, "code: want 0 to 255", http.StatusBadRequest)
		return
	}
	select {
	case a.exit <- code:
	default: // already ending
	}
	fmt.Fprintln(w, "bye")
}
