package engine

import (
	"fmt"
	"strconv"
	"strings"
	"time"
)

// psColumn is one column of a process list.
type psColumn struct {
	title string
	value func(psProcess) string
}

// psField finds a column by one of the names that ps knows it by.
func psField(name string) (psColumn, bool) {
	num := func(title string, f func(p psProcess) int64) (psColumn, bool) {
		return psColumn{title, func(p psProcess) string { return strconv.FormatInt(f(p), 10) }}, true
	}
	text := func(title string, f func(p psProcess) string) (psColumn, bool) { return psColumn{title, f}, true }
	stat := func(title string, i int) (psColumn, bool) {
		return num(title, func(p psProcess) int64 { return p.number(i) })
	}
	switch name {
	case "pid", "tgid":
		return num(strings.ToUpper(name), func(p psProcess) int64 { return int64(p.pid) })
	case "ppid":
		return stat("PPID", 4)
	case "pgid", "pgrp":
		return stat(strings.ToUpper(name), 5)
	case "sid", "sess", "session":
		return stat(strings.ToUpper(name[:min(4, len(name))]), 6)
	case "pri":
		return num("PRI", func(p psProcess) int64 { return 39 - p.number(18) })
	case "ni", "nice":
		return stat("NI", 19)
	case "nlwp", "thcount":
		return stat(map[string]string{"nlwp": "NLWP", "thcount": "THCNT"}[name], 20)
	case "psr":
		return stat("PSR", 39)
	case "vsz", "vsize":
		return num("VSZ", func(p psProcess) int64 { return p.number(23) >> 10 })
	case "rss", "rssize", "rsz":
		return num(map[string]string{"rss": "RSS", "rssize": "RSS", "rsz": "RSZ"}[name], func(p psProcess) int64 { return p.rss() >> 10 })
	case "uid", "euid":
		return num(strings.ToUpper(name), func(p psProcess) int64 { return int64(p.uid) })
	case "gid", "egid":
		return num(strings.ToUpper(name), func(p psProcess) int64 { return int64(p.gid) })
	case "user", "euser", "uname":
		return text(map[string]string{"user": "USER", "euser": "EUSER", "uname": "USER"}[name], func(p psProcess) string { return p.host.user(p.uid) })
	case "comm", "ucmd", "ucomm":
		return text(map[string]string{"comm": "COMMAND", "ucmd": "CMD", "ucomm": "COMMAND"}[name], func(p psProcess) string { return p.comm })
	case "args", "cmd", "command":
		return text(map[string]string{"args": "COMMAND", "cmd": "CMD", "command": "COMMAND"}[name], func(p psProcess) string { return p.cmd })
	case "tty", "tt", "tname":
		return text(map[string]string{"tty": "TT", "tt": "TT", "tname": "TTY"}[name], psProcess.tty)
	case "stat":
		return text("STAT", psProcess.longState)
	case "s", "state":
		return text("S", psProcess.state)
	case "c":
		return text("C", func(p psProcess) string { return strconv.Itoa(min(int(p.cpuShare()), 99)) })
	}
	return psTimeField(name)
}

func psTimeField(name string) (psColumn, bool) {
	var f func(psProcess) string
	title := strings.ToUpper(name)
	switch name {
	case "time", "cputime":
		title, f = "TIME", func(p psProcess) string { return clock(p.cpu()) }
	case "bsdtime":
		title, f = "TIME", func(p psProcess) string { return bsdTime(p.cpu()) }
	case "etime":
		title, f = "ELAPSED", func(p psProcess) string { return etime(p.elapsed()) }
	case "etimes":
		title, f = "ELAPSED", func(p psProcess) string { return strconv.Itoa(int(p.elapsed() / time.Second)) }
	case "start", "start_time", "bsdstart":
		title, f = "START", psProcess.since
	case "stime":
		f = psProcess.since
	case "lstart":
		title, f = "STARTED", func(p psProcess) string { return p.started().Format("Mon Jan _2 15:04:05 2006") }
	case "pcpu", "%cpu":
		title, f = "%CPU", func(p psProcess) string { return fmt.Sprintf("%.1f", p.cpuShare()) }
	case "pmem", "%mem":
		title, f = "%MEM", func(p psProcess) string {
			return fmt.Sprintf("%.1f", 100*float64(p.rss())/float64(max(p.host.memory, 1)))
		}
	}
	return psColumn{title, f}, f != nil
}

// psSet are the columns of one of ps's formats.
func psSet(format string) string {
	return map[string]string{
		"full":  "user=UID pid ppid c stime tname time cmd",
		"plain": "pid tname time ucmd",
		"user":  "user pid %cpu %mem vsz rss tname stat start bsdtime args",
		"x":     "pid tname stat bsdtime args",
		"jobs":  "pid pgid sid tname time ucmd",
		"jBSD":  "ppid pid pgid sid tname stat user=UID bsdtime args",
	}[format]
}

// psColumns reads options of ps: the common formats, and -o with a list of fields. None means -ef. Which processes they choose does not
// matter: it is always the container's.
func psColumns(args []string) ([]psColumn, error) {
	words := strings.Fields(strings.Join(args, " "))
	if len(words) == 0 {
		words = []string{"-ef"}
	}
	format, list := "", []string{}
	for i := 0; i < len(words); i++ {
		bsd := words[i][0] != '-'
		letters := strings.TrimPrefix(words[i], "-")
		for j := 0; j < len(letters); j++ {
			switch l := letters[j]; {
			case l == 'o':
				rest := letters[j+1:]
				if rest == "" && i+1 < len(words) {
					i++
					rest = words[i]
				}
				list = append(list, rest)
				j = len(letters)
			case strings.IndexByte("eAaxdw", l) >= 0:
				if bsd && (l == 'a' || l == 'x') && format == "" {
					format = "x"
				}
			case l == 'f' && !bsd:
				format = "full"
			case l == 'j' && !bsd:
				format = "jobs"
			case l == 'j':
				format = "jBSD"
			case l == 'u' && bsd:
				format = "user"
			default:
				return nil, notBuilt("docker top with the ps option %q is not supported by this version of skein: use -ef, aux, -j or -o with a list of fields", words[i])
			}
		}
	}
	switch {
	case len(list) > 0:
		return psList(strings.Join(list, ","))
	case format == "":
		format = "plain"
	}
	return psList(strings.ReplaceAll(psSet(format), " ", ","))
}

// psList reads fields, each with an own title after "=" if wished.
func psList(list string) ([]psColumn, error) {
	var out []psColumn
	pid := false
	for f := range strings.SplitSeq(list, ",") {
		name, title, own := strings.Cut(strings.TrimSpace(f), "=")
		if name == "" {
			continue
		}
		c, ok := psField(strings.ToLower(name))
		if !ok {
			return nil, notBuilt("docker top: the field %q of ps -o is unknown to this version of skein", name)
		}
		if own {
			c.title = title
		}
		pid = pid || c.title == "PID"
		out = append(out, c)
	}
	if !pid {
		return nil, invalid("Couldn't find PID field in ps output")
	}
	return out, nil
}
