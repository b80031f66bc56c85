package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"

	"skein/runtime/oci"
)

// version of this command; the specification's is beside it.
const version = "0.1.0"

// Exit codes: 1 is a failure of the operation, 255 one of exec before its process ran, as callers of OCI runtimes expect.
const (
	failed     = 1
	execFailed = 255
)

// session is one call of the command.
type session struct {
	rt     *oci.Runtime
	log    *slog.Logger
	logTo  io.Closer
	failed int
	code   int
}

// command is one word of the command line.
type command struct {
	name, args, help string
	// define adds flags and returns what to do with the arguments that are left.
	define func(s *session, f *flag.FlagSet) func(args []string) error
}

func commands() []command {
	return []command{createCommand(), startCommand(), stateCommand(), killCommand(), deleteCommand(), runCommand(), execCommand(), psCommand(),
		pauseCommand(), resumeCommand(), updateCommand(), listCommand(), featuresCommand()}
}

// errUsage is a wrong command line, explained already.
var errUsage = errors.New("wrong command line")

func run(args []string) int {
	s := &session{failed: failed}
	var root, logFile, logFormat, rootless string
	var systemd, debug, showVersion bool
	f := flag.NewFlagSet("skein-oci", flag.ContinueOnError)
	f.SetOutput(io.Discard)
	f.StringVar(&root, "root", "/run/skein-oci", "`directory` of the containers' state")
	f.StringVar(&logFile, "log", "", "append errors to this `file` too")
	f.StringVar(&logFormat, "log-format", "text", "`format` of the log: text or json")
	f.StringVar(&rootless, "rootless", "auto", "only auto and false: rootless mode is not offered")
	f.BoolVar(&systemd, "systemd-cgroup", false, "refused: groups are made directly, not by systemd")
	f.BoolVar(&debug, "debug", false, "log more")
	f.BoolVar(&showVersion, "version", false, "print the version")
	err := f.Parse(args)
	switch {
	case errors.Is(err, flag.ErrHelp), err == nil && f.NArg() == 0 && !showVersion, f.Arg(0) == "help":
		usage(os.Stdout, f)
		return 0
	case err != nil:
		fmt.Fprintf(os.Stderr, "skein-oci: %v; see skein-oci --help\n", err)
		return failed
	case showVersion:
		fmt.Printf("skein-oci version %s\nspec: %s\n", version, specs.Version)
		return 0
	}
	if err := s.open(root, logFile, logFormat, debug); err != nil {
		fmt.Fprintf(os.Stderr, "skein-oci: %v\n", err)
		return failed
	}
	defer s.close()
	switch {
	case systemd:
		err = errors.New("--systemd-cgroup is not offered: leave it out and give linux.cgroupsPath as a path like /machine/name")
	case rootless != "auto" && rootless != "false":
		err = fmt.Errorf("--rootless=%s is not offered: run as root", rootless)
	default:
		err = s.dispatch(f.Args())
	}
	if err != nil {
		s.report(err)
		return s.failed
	}
	return s.code
}

func (s *session) dispatch(args []string) error {
	all := commands()
	i := slices.IndexFunc(all, func(c command) bool { return c.name == args[0] })
	if why := notOffered(args[0]); why != "" {
		return fmt.Errorf("%s is not offered: %s", args[0], why)
	}
	if i < 0 {
		return fmt.Errorf("%q is not a command of skein-oci: see skein-oci --help", args[0])
	}
	c := all[i]
	f := flag.NewFlagSet(c.name, flag.ContinueOnError)
	f.SetOutput(io.Discard)
	do := c.define(s, f)
	err := f.Parse(args[1:])
	if errors.Is(err, flag.ErrHelp) {
		commandUsage(os.Stdout, c, f)
		return nil
	}
	if err != nil {
		return fmt.Errorf("%s: %w: see skein-oci %s --help", c.name, err, c.name)
	}
	return do(f.Args())
}

// notOffered says why a command that other runtimes have is left out here.
func notOffered(name string) string {
	switch name {
	case "checkpoint", "restore":
		return "processes are not written to disk and brought back"
	case "events":
		return "read the files of the container's groups, see linux.cgroupsPath"
	case "spec":
		return "engines write config.json"
	}
	return ""
}

// one is the container's id, which must be the only argument.
func one(args []string) (string, error) {
	switch len(args) {
	case 0:
		return "", errors.New("container id is missing")
	case 1:
		return args[0], nil
	}
	return "", fmt.Errorf("%q: want only a container id; flags come before it", strings.Join(args, " "))
}

func (s *session) open(root, file, format string, debug bool) error {
	abs, err := filepath.Abs(root)
	if err != nil {
		return err
	}
	if format != "text" && format != "json" {
		return fmt.Errorf("--log-format %q: want text or json", format)
	}
	var to io.Writer = io.Discard
	if file != "" {
		f, err := os.OpenFile(file, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o644)
		if err != nil {
			return fmt.Errorf("open log: %w", err)
		}
		to, s.logTo = f, f
	}
	opts := &slog.HandlerOptions{Level: slog.LevelInfo, ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		if a.Key == slog.LevelKey {
			a.Value = slog.StringValue(strings.ToLower(a.Value.String()))
		}
		return a
	}}
	if debug {
		opts.Level = slog.LevelDebug
	}
	if format == "json" {
		s.log = slog.New(slog.NewJSONHandler(to, opts))
	} else {
		s.log = slog.New(slog.NewTextHandler(to, opts))
	}
	s.rt = &oci.Runtime{Root: abs, Log: s.log}
	return nil
}

// report tells an error where callers look for it: the log and standard error.
func (s *session) report(err error) {
	s.log.Error(err.Error())
	fmt.Fprintf(os.Stderr, "skein-oci: %v\n", err)
}

func (s *session) close() {
	if s.logTo != nil {
		s.logTo.Close()
	}
}

// with opens a container for do.
func (s *session) with(id string, exclusive bool, do func(*oci.Container) error) error {
	c, err := s.rt.Open(id, exclusive)
	if err != nil {
		return err
	}
	defer c.Close()
	return do(c)
}

func usage(w io.Writer, f *flag.FlagSet) {
	fmt.Fprint(w, `skein-oci runs containers as the OCI runtime specification describes them.

Usage: skein-oci [flags] command [flags] [arguments]; flags come before arguments.

A bundle is a directory with config.json and the root filesystem. Exit codes: 0, 1 for a failed operation, the process's own for run
and exec in the foreground (128+n when signal n ended it), 255 when exec could not start its process.

Commands:
`)
	for _, c := range commands() {
		fmt.Fprintf(w, "  %-9s %s\n", c.name, c.help)
	}
	fmt.Fprint(w, "\nFlags:\n")
	f.SetOutput(w)
	f.PrintDefaults()
	fmt.Fprint(w, "\nskein-oci command --help shows a command's flags.\n")
}

func commandUsage(w io.Writer, c command, f *flag.FlagSet) {
	fmt.Fprintf(w, "Usage: skein-oci %s [flags] %s\n\n%s.\n\nFlags:\n", c.name, c.args, strings.ToUpper(c.help[:1])+c.help[1:])
	f.SetOutput(w)
	f.PrintDefaults()
}
