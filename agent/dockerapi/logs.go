package dockerapi

import (
	"io"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/moby/moby/api/pkg/stdcopy"
)

// rfc3339NanoFixed is the timestamp before a log line: always nine digits, so that lines sort.
const rfc3339NanoFixed = "2006-01-02T15:04:05.000000000Z07:00"

// logQuery is a log request: what the backend reads, and how lines are shown.
type logQuery struct {
	LogOptions
	Timestamps bool
	Details    bool
}

func readLogQuery(q url.Values) (logQuery, error) {
	o := logQuery{
		LogOptions: LogOptions{Stdout: boolQuery(q, "stdout"), Stderr: boolQuery(q, "stderr"), Follow: boolQuery(q, "follow"), Tail: -1},
		Timestamps: boolQuery(q, "timestamps"),
		Details:    boolQuery(q, "details"),
	}
	if !o.Stdout && !o.Stderr {
		return o, invalid("Bad parameters: you must choose at least one stream")
	}
	var err error
	if o.Since, err = timeQuery(q, "since"); err != nil {
		return o, err
	}
	if o.Until, err = timeQuery(q, "until"); err != nil {
		return o, err
	}
	if tail := q.Get("tail"); tail != "" && tail != "all" {
		n, err := strconv.ParseInt(tail, 10, 64)
		if err != nil {
			return o, invalid("invalid value for \"tail\": %q is neither a number nor \"all\"", tail)
		}
		o.Tail = max(n, -1)
	}
	return o, nil
}

// logWriter renders lines for one client: frames, or raw for a terminal.
type logWriter struct {
	logQuery
	out, err, sys io.Writer
	buf           []byte
}

func newLogWriter(w io.Writer, q logQuery, tty bool) *logWriter {
	lw := &logWriter{logQuery: q, out: w, err: w, sys: w}
	if !tty {
		mu := new(sync.Mutex)
		lw.out = frameWriter{mu, w, stdcopy.Stdout}
		lw.err = frameWriter{mu, w, stdcopy.Stderr}
		lw.sys = frameWriter{mu, w, stdcopy.Systemerr}
	}
	return lw
}

// line writes one line in one frame; clients rely on that.
func (l *logWriter) line(t time.Time, stderr bool, details string, text []byte) error {
	b := l.buf[:0]
	if l.Timestamps {
		b = t.UTC().AppendFormat(b, rfc3339NanoFixed)
		b = append(b, ' ')
	}
	if l.Details {
		b = append(b, details...)
		b = append(b, ' ')
	}
	b = append(b, text...)
	l.buf = b
	w := l.out
	if stderr {
		w = l.err
	}
	_, err := w.Write(b)
	return err
}

// detailsOf renders attributes as docker does: escaped, sorted, comma-separated.
func detailsOf(attrs map[string]string) string {
	pairs := make([]string, 0, len(attrs))
	for k, v := range attrs {
		pairs = append(pairs, url.QueryEscape(k)+"="+url.QueryEscape(v))
	}
	slices.Sort(pairs)
	return strings.Join(pairs, ",")
}

// beginLogs sends the headers of a log stream at once and returns its writers; the caller closes the flusher.
func beginLogs(w http.ResponseWriter, r *http.Request, q logQuery, tty bool) (*logWriter, *flusher, error) {
	w.Header().Set("Content-Type", streamType(r, tty))
	w.WriteHeader(http.StatusOK)
	if err := http.NewResponseController(w).Flush(); err != nil {
		return nil, nil, err
	}
	f := newFlusher(w)
	return newLogWriter(f, q, tty), f, nil
}

func (h *handlers) containerLogs(w http.ResponseWriter, r *http.Request) error {
	ref, err := pathRef(r, "id")
	if err != nil {
		return err
	}
	q, err := readLogQuery(r.URL.Query())
	if err != nil {
		return err
	}
	c, err := h.Containers.ContainerInspect(r.Context(), ref, false)
	if err != nil {
		return err
	}
	if c.HostConfig != nil && c.HostConfig.LogConfig.Type == "none" {
		return notBuilt("configured logging driver does not support reading")
	}
	lw, f, err := beginLogs(w, r, q, c.Config != nil && c.Config.Tty)
	if err != nil {
		return err
	}
	defer f.close()
	details := ""
	err = h.Containers.ContainerLogs(r.Context(), c.ID, q.LogOptions, func(l LogLine) error {
		if q.Details && details == "" {
			details = detailsOf(l.Details)
		}
		return lw.line(l.Time, l.Stderr, details, l.Line)
	})
	if err != nil && r.Context().Err() == nil {
		_, text := statusOf(err)
		_, _ = io.WriteString(lw.sys, "Error grabbing logs: "+text+"\n")
	}
	return nil
}
