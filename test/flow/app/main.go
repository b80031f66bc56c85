// Command app is what the tasks of test/flow run, one static program of three modes.
//
//	app serve     answers on port 8080: /  "HOST VERSION CLIENT\n", the version from VERSION;  /stream?d=10s  the same after that time, a dot each 100 ms before it;
//	              /healthz  ok, until /sick was asked. ABRUPT=1: ends at once on SIGTERM, as simple servers do; else requests end first.
//	app probe     asks /healthz on port 8080.
//	app ask       is clients of TARGETS (HOST:PORT,…) and posts what they see to REPORT, a URL.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"skein/test/flow/load"
)

const (
	grace     = 30 * time.Second
	step      = 100 * time.Millisecond
	maxStream = time.Minute
)

func main() {
	mode := "serve"
	if len(os.Args) > 1 {
		mode = os.Args[1]
	}
	run := map[string]func() error{"serve": serve, "probe": probe, "ask": ask}[mode]
	if run == nil {
		run = func() error { return fmt.Errorf("mode %q: want serve, probe or ask", mode) }
	}
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "app:", err)
		os.Exit(1)
	}
}

func probe() error {
	resp, err := http.Get("http://127.0.0.1:8080/healthz")
	if err != nil {
		return err
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("status %s", resp.Status)
	}
	return nil
}

func serve() error {
	host, err := os.Hostname()
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	srv := &http.Server{Addr: ":8080", Handler: routes(host), ReadHeaderTimeout: 10 * time.Second}
	served := make(chan error, 1)
	go func() { served <- srv.ListenAndServe() }()
	select {
	case err := <-served:
		return err
	case <-ctx.Done():
	}
	if os.Getenv("ABRUPT") != "" {
		return nil
	}
	end, cancel := context.WithTimeout(context.Background(), grace)
	defer cancel()
	return srv.Shutdown(end)
}

func routes(host string) http.Handler {
	var sick atomic.Bool
	version := os.Getenv("VERSION")
	who := func(w http.ResponseWriter, r *http.Request) {
		from, _, _ := net.SplitHostPort(r.RemoteAddr)
		fmt.Fprintf(w, "%s %s %s\n", host, version, from)
	}
	m := http.NewServeMux()
	m.HandleFunc("/{$}", who)
	m.HandleFunc("/healthz", func(w http.ResponseWriter, _ *http.Request) {
		if sick.Load() {
			http.Error(w, "sick", http.StatusServiceUnavailable)
		}
	})
	m.HandleFunc("/sick", func(w http.ResponseWriter, r *http.Request) { sick.Store(true); who(w, r) })
	m.HandleFunc("/stream", func(w http.ResponseWriter, r *http.Request) {
		d, err := time.ParseDuration(r.URL.Query().Get("d"))
		if err != nil || d > maxStream {
			http.Error(w, "d: want a duration up to "+maxStream.String(), http.StatusBadRequest)
			return
		}
		end := time.After(d)
		for tick := time.NewTicker(step); ; {
			select {
			case <-tick.C:
				fmt.Fprint(w, ".")
				_ = http.NewResponseController(w).Flush() // a client that is gone ends the request
				continue
			case <-end:
				fmt.Fprintln(w)
				who(w, r)
			case <-r.Context().Done():
			}
			tick.Stop()
			return
		}
	})
	return m
}

// Report is what an asker tells from time to time.
type Report struct {
	From     string                 `json:"from"`
	Counts   map[string]load.Counts `json:"counts"` // since its start
	Failures []load.Failure         `json:"failures"`
}

// ask runs until it is told to end.
func ask() error {
	host, err := os.Hostname()
	if err != nil {
		return err
	}
	stream, err := time.ParseDuration(os.Getenv("STREAM"))
	if err != nil {
		return fmt.Errorf("STREAM: %w", err)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	failures := make(chan load.Failure, 10000) // more in a second are told as counts only
	l := load.Start(load.Config{
		From: host, Targets: strings.Split(os.Getenv("TARGETS"), ","), Pause: 20 * time.Millisecond, Stream: stream,
		Clients: map[string]int{load.KeepAlive: 1, load.Fresh: 1, load.Stream: 1},
		Failed: func(f load.Failure) {
			select {
			case failures <- f:
			default:
			}
		},
	})
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for ended := false; ; {
		select {
		case <-tick.C:
		case <-ctx.Done():
			ended = true
			l.Stop()
		}
		post(host, l.Counts(), failures)
		if ended {
			return nil
		}
	}
}

// post sends a report; what could not be sent is lost with a word in the log.
func post(host string, counts map[string]load.Counts, failures chan load.Failure) {
	r := Report{From: host, Counts: counts}
	for len(failures) > 0 {
		r.Failures = append(r.Failures, <-failures)
	}
	b, err := json.Marshal(r)
	if err == nil {
		var resp *http.Response
		c := http.Client{Timeout: 5 * time.Second}
		if resp, err = c.Post(os.Getenv("REPORT"), "application/json", bytes.NewReader(b)); err == nil {
			resp.Body.Close()
			return
		}
	}
	fmt.Fprintln(os.Stderr, "app: report:", err)
	for _, f := range r.Failures {
		fmt.Fprintln(os.Stderr, f)
	}
}
