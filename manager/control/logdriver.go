package control

import (
	"regexp"
	"slices"
	"strconv"
	"strings"
	"text/template"

	"github.com/docker/go-units"
	"github.com/moby/moby/api/types/swarm"
)

// logOptions are the options of the log drivers that nodes have.
func logOptions(driver string) (known []string, built bool) {
	file := []string{"max-size", "max-file", "compress", "mode", "max-buffer-size"}
	switch driver {
	case "", "json-file":
		return append(file, "labels", "labels-regex", "env", "env-regex", "tag"), true
	case "local":
		return file, true
	}
	return nil, driver == "none"
}

// validateLogDriver refuses what each node would refuse when it makes the container.
func validateLogDriver(a at, d *swarm.Driver) error {
	if d == nil {
		return nil
	}
	known, built := logOptions(d.Name)
	if !built {
		return a.field("Name").unbuilt(d.Name, "log drivers other than json-file, local and none")
	}
	for _, k := range sortedKeys(d.Options) {
		a, v := a.field("Options").key(k), d.Options[k]
		if !slices.Contains(known, k) {
			return a.bad(v, "unknown log opt '%s' for %s log driver: known are %s", clip(k), d.Name, strings.Join(known, ", "))
		}
		if want := wrongLogOption(k, v); want != "" {
			return a.bad(v, "want %s", want)
		}
	}
	o := d.Options
	if o["max-buffer-size"] != "" && o["mode"] != "non-blocking" {
		return a.field("Options").key("max-buffer-size").bad(o["max-buffer-size"], "it is only for mode=non-blocking")
	}
	if files, _ := strconv.Atoi(o["max-file"]); o["compress"] == "true" && d.Name != "local" && (files < 2 || o["max-size"] == "") {
		return a.field("Options").key("compress").bad(o["compress"], "compress cannot be true when max-file is less than 2 or max-size is not set")
	}
	return nil
}

// wrongLogOption is what the option's value should be, empty if it is.
func wrongLogOption(k, v string) string {
	switch k {
	case "max-size":
		if n, err := units.RAMInBytes(v); err != nil || n <= 0 {
			return "a positive size such as 10m"
		}
	case "max-file":
		if n, err := strconv.Atoi(v); err != nil || n < 1 || n > 1000 {
			return "1 to 1000"
		}
	case "compress":
		if _, err := strconv.ParseBool(v); err != nil {
			return "true or false"
		}
	case "mode":
		if v != "" && v != "blocking" && v != "non-blocking" {
			return "blocking or non-blocking"
		}
	case "max-buffer-size":
		if n, err := units.RAMInBytes(v); err != nil || n < 64<<10 || n > 1<<30 {
			return "a size from 64k to 1g"
		}
	case "labels-regex", "env-regex":
		if _, err := regexp.Compile(v); err != nil {
			return "a regular expression: " + err.Error()
		}
	case "tag":
		if _, err := template.New("").Parse(v); err != nil {
			return "a template: " + err.Error()
		}
	}
	return ""
}
