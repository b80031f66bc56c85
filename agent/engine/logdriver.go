package engine

import (
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"text/template"

	cerrdefs "github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"

	"skein/runtime"
	"skein/runtime/logs"
)

// The log drivers that are built; "none" keeps nothing.
const (
	logJSON  = "json-file"
	logLocal = "local"
	logNone  = "none"
)

// logPlan is what a container's log options mean.
type logPlan struct {
	driver      string
	maxSize     int64
	maxFiles    int
	compress    bool
	nonBlocking bool
	buffer      int64
}

// logOptions are the options that docker's drivers of these names know; those of json-file on the second line add details to lines.
var logOptions = map[string][]string{
	logJSON: {"max-size", "max-file", "compress", "mode", "max-buffer-size",
		"labels", "labels-regex", "env", "env-regex", "tag"},
	logLocal: {"max-size", "max-file", "compress", "mode", "max-buffer-size"},
	logNone:  nil,
}

// planLog reads a container's log options; what it refuses is refused when the container is created.
func planLog(lc container.LogConfig) (logPlan, error) {
	p := logPlan{driver: lc.Type, maxFiles: 1}
	switch lc.Type {
	case "":
		p.driver = logJSON
	case logLocal: // docker's defaults
		p.maxSize, p.maxFiles, p.compress = 20<<20, 5, true
	}
	known, ok := logOptions[p.driver]
	if !ok {
		return p, invalid("logger: no log driver named '%s' is registered: json-file, local and none are", lc.Type)
	}
	for k, v := range lc.Config {
		if !slices.Contains(known, k) {
			return p, invalid("unknown log opt '%s' for %s log driver", k, p.driver)
		}
		if err := p.set(k, v); err != nil {
			return p, err
		}
	}
	switch {
	case lc.Config["max-buffer-size"] != "" && !p.nonBlocking:
		return p, invalid("logger: max-buffer-size option is only supported with 'mode=non-blocking'")
	case p.driver == logJSON && p.compress && (p.maxFiles < 2 || p.maxSize == 0):
		return p, invalid("compress cannot be true when max-file is less than 2 or max-size is not set")
	}
	return p, nil
}

func (p *logPlan) set(k, v string) (err error) {
	switch k {
	case "max-size":
		if p.maxSize, err = parseSize(v); err != nil || p.maxSize <= 0 {
			return invalid("invalid log option max-size=%q: want a positive size such as 10m", v)
		}
	case "max-file":
		if p.maxFiles, err = strconv.Atoi(v); err != nil || p.maxFiles < 1 || p.maxFiles > 1000 {
			return invalid("invalid log option max-file=%q: want 1 to 1000", v)
		}
	case "compress":
		if p.compress, err = strconv.ParseBool(v); err != nil {
			return invalid("invalid log option compress=%q: want true or false", v)
		}
	case "mode":
		if v != "" && v != "blocking" && v != "non-blocking" {
			return invalid("logger: logging mode not supported: %s", v)
		}
		p.nonBlocking = v == "non-blocking"
	case "max-buffer-size":
		if p.buffer, err = parseSize(v); err != nil || p.buffer < 64<<10 || p.buffer > 1<<30 {
			return invalid("invalid log option max-buffer-size=%q: want a size from 64k to 1g", v)
		}
	case "labels-regex", "env-regex":
		if _, err := regexp.Compile(v); err != nil {
			return invalid("invalid log option %s=%q: %v", k, v, err)
		}
	case "tag":
		if _, err := expandTag(v, record{Config: &container.Config{}}); err != nil {
			return invalid("invalid log option tag=%q: %v", v, err)
		}
	}
	return nil
}

// apply makes the supervisor write the log.
func (p logPlan) apply(cfg *runtime.Config, path string) {
	if p.driver == logNone {
		return
	}
	cfg.LogPath, cfg.LogMaxSize, cfg.LogMaxFiles, cfg.LogCompress = path, p.maxSize, p.maxFiles, p.compress
	cfg.LogNonBlocking, cfg.LogBufferSize = p.nonBlocking, p.buffer
	if p.driver == logLocal {
		cfg.LogFormat = logs.Local
	}
}

// logPath is empty when no log is kept.
func (e *Engine) logPath(r record) string {
	switch r.HostConfig.LogConfig.Type {
	case logNone:
		return ""
	case logLocal:
		return filepath.Join(e.containerDir(r.ID), "local-log")
	}
	return filepath.Join(e.containerDir(r.ID), r.ID+"-json.log")
}

var errNoLog = errf(cerrdefs.ErrNotImplemented, "configured logging driver does not support reading")

// logDetails are what "docker logs --details" shows before each line: labels, variables and tag that the log options chose.
func logDetails(r record) map[string]string {
	o := r.HostConfig.LogConfig.Config
	out := map[string]string{}
	pick := func(option string, all map[string]string) {
		for name := range strings.SplitSeq(o[option], ",") {
			if v, ok := all[name]; ok {
				out[name] = v
			}
		}
		if re, err := regexp.Compile(o[option+"-regex"]); err == nil && o[option+"-regex"] != "" {
			for k, v := range all {
				if re.MatchString(k) {
					out[k] = v
				}
			}
		}
	}
	pick("labels", r.Config.Labels)
	env := map[string]string{}
	for _, kv := range r.Config.Env {
		if k, v, ok := strings.Cut(kv, "="); ok {
			env[k] = v
		}
	}
	pick("env", env)
	if o["tag"] != "" {
		if tag, err := expandTag(o["tag"], r); err == nil {
			out["tag"] = tag
		}
	}
	return out
}

// expandTag fills in the template of the option tag.
func expandTag(tag string, r record) (string, error) {
	t, err := template.New("").Option("missingkey=error").Parse(tag)
	if err != nil {
		return "", err
	}
	var b strings.Builder
	image := strings.TrimPrefix(r.Image, "sha256:")
	err = t.Execute(&b, map[string]any{
		"ID": r.ID[:min(12, len(r.ID))], "FullID": r.ID, "Name": r.Name, "ImageID": image[:min(12, len(image))], "ImageFullID": r.Image,
		"ImageName": r.Config.Image, "DaemonName": "skein",
	})
	return b.String(), err
}
