package main

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"skein/runtime/oci"
)

// createFlags are those of create and run.
type createFlags struct {
	oci.CreateOptions
	noPivot bool
}

func (c *createFlags) define(f *flag.FlagSet) {
	for _, n := range []string{"bundle", "b"} {
		f.StringVar(&c.Bundle, n, ".", "`directory` of the bundle")
	}
	f.StringVar(&c.PIDFile, "pid-file", "", "`file` to write the process's number to")
	f.StringVar(&c.ConsoleSocket, "console-socket", "", "unix `socket` that receives the terminal's master")
	f.BoolVar(&c.noPivot, "no-pivot", false, "refused: a root entered by chroot can be left again")
	f.BoolVar(&c.KeepKeyring, "no-new-keyring", false, "leave the process in this one's session keyring")
	f.IntVar(&c.Preserve, "preserve-fds", 0, "pass this `number` of descriptors too, from 3 on")
}

func (c *createFlags) check() error {
	if c.noPivot {
		return errors.New("--no-pivot is not offered: the root must be left behind for good")
	}
	return nil
}

func createCommand() command {
	return command{"create", "ID", "make a container that waits for start", func(s *session, f *flag.FlagSet) func([]string) error {
		var o createFlags
		o.define(f)
		return func(args []string) (err error) {
			if o.ID, err = one(args); err != nil {
				return err
			}
			if err = o.check(); err != nil {
				return err
			}
			c, err := s.rt.Create(o.CreateOptions)
			if err == nil {
				c.Close()
			}
			return err
		}
	}}
}

func startCommand() command {
	return command{"start", "ID", "execute the process of a created container", func(s *session, _ *flag.FlagSet) func([]string) error {
		return func(args []string) error {
			id, err := one(args)
			if err != nil {
				return err
			}
			return s.with(id, true, (*oci.Container).Start)
		}
	}}
}

func stateCommand() command {
	return command{"state", "ID", "print a container's state as JSON", func(s *session, _ *flag.FlagSet) func([]string) error {
		return func(args []string) error {
			id, err := one(args)
			if err != nil {
				return err
			}
			return s.with(id, false, func(c *oci.Container) error { return printJSON(c.Info()) })
		}
	}}
}

func printJSON(v any) error {
	e := json.NewEncoder(os.Stdout)
	e.SetIndent("", "  ")
	e.SetEscapeHTML(false)
	return e.Encode(v)
}

func parseSignal(name string) (unix.Signal, error) {
	if n, err := strconv.Atoi(name); err == nil {
		if n < 1 || n > 64 {
			return 0, fmt.Errorf("signal %d: want 1 to 64", n)
		}
		return unix.Signal(n), nil
	}
	n := strings.ToUpper(name)
	if !strings.HasPrefix(n, "SIG") {
		n = "SIG" + n
	}
	if s := unix.SignalNum(n); s != 0 {
		return s, nil
	}
	return 0, fmt.Errorf("signal %q is unknown", name)
}

func killCommand() command {
	return command{"kill", "ID [SIGNAL]", "send a signal, TERM unless told otherwise", func(s *session, f *flag.FlagSet) func([]string) error {
		var all bool
		for _, n := range []string{"all", "a"} {
			f.BoolVar(&all, n, false, "to all processes of the container")
		}
		return func(args []string) error {
			name := "TERM"
			if len(args) == 2 {
				args, name = args[:1], args[1]
			}
			id, err := one(args)
			if err != nil {
				return err
			}
			sig, err := parseSignal(name)
			if err != nil {
				return err
			}
			return s.with(id, false, func(c *oci.Container) error { return c.Kill(sig, all) })
		}
	}}
}

func deleteCommand() command {
	return command{"delete", "ID", "remove a stopped container", func(s *session, f *flag.FlagSet) func([]string) error {
		var force bool
		for _, n := range []string{"force", "f"} {
			f.BoolVar(&force, n, false, "kill it first if it runs; a container that does not exist is fine")
		}
		return func(args []string) error {
			id, err := one(args)
			if err != nil {
				return err
			}
			err = s.with(id, true, func(c *oci.Container) error { return c.Delete(force) })
			if force && errdefs.IsNotFound(err) {
				if err = s.rt.Discard(id); errdefs.IsNotFound(err) {
					return nil
				}
			}
			return err
		}
	}}
}

func pauseCommand() command {
	return command{"pause", "ID", "stop all processes of a container where they are", func(s *session, _ *flag.FlagSet) func([]string) error {
		return func(args []string) error {
			id, err := one(args)
			if err != nil {
				return err
			}
			return s.with(id, true, (*oci.Container).Pause)
		}
	}}
}

func resumeCommand() command {
	return command{"resume", "ID", "let a paused container go on", func(s *session, _ *flag.FlagSet) func([]string) error {
		return func(args []string) error {
			id, err := one(args)
			if err != nil {
				return err
			}
			return s.with(id, true, (*oci.Container).Resume)
		}
	}}
}

func listCommand() command {
	return command{"list", "", "list containers", func(s *session, f *flag.FlagSet) func([]string) error {
		var format string
		var quiet bool
		for _, n := range []string{"format", "f"} {
			f.StringVar(&format, n, "table", "`format`: table or json")
		}
		for _, n := range []string{"quiet", "q"} {
			f.BoolVar(&quiet, n, false, "ids only")
		}
		return func(args []string) error {
			list, err := s.rt.List()
			if err != nil {
				return err
			}
			switch {
			case len(args) > 0:
				return fmt.Errorf("list takes no arguments, got %q", strings.Join(args, " "))
			case quiet:
				for _, c := range list {
					fmt.Println(c.ID)
				}
			case format == "json":
				return printJSON(list)
			case format == "table":
				fmt.Printf("%-32s %-8s %-8s %-32s %s\n", "ID", "PID", "STATUS", "CREATED", "BUNDLE")
				for _, c := range list {
					fmt.Printf("%-32s %-8d %-8s %-32s %s\n", c.ID, c.Pid, c.Status, c.Created.Format("2006-01-02T15:04:05.000000000Z"), c.Bundle)
				}
			default:
				return fmt.Errorf("--format %q: want table or json", format)
			}
			return nil
		}
	}}
}

func psCommand() command {
	return command{"ps", "ID", "list the processes of a container", func(s *session, f *flag.FlagSet) func([]string) error {
		var format string
		for _, n := range []string{"format", "f"} {
			f.StringVar(&format, n, "table", "`format`: table or json")
		}
		return func(args []string) error {
			id, err := one(args)
			if err != nil {
				return err
			}
			return s.with(id, false, func(c *oci.Container) error {
				pids, err := c.Processes()
				switch {
				case err != nil:
					return err
				case format == "json":
					return printJSON(pids)
				case format != "table":
					return fmt.Errorf("--format %q: want table or json", format)
				}
				fmt.Printf("%-8s %-8s %s\n", "PID", "PPID", "CMD")
				for _, p := range pids {
					fmt.Printf("%-8d %-8s %s\n", p, parentOf(p), commandOf(p))
				}
				return nil
			})
		}
	}}
}

func parentOf(pid int) string {
	b, _ := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/status")
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, "PPid:"); ok {
			return strings.TrimSpace(v)
		}
	}
	return "-"
}

// commandOf is a process's command line, made fit for a terminal.
func commandOf(pid int) string {
	b, _ := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/cmdline")
	s := strings.TrimSpace(strings.ReplaceAll(string(b), "\x00", " "))
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return '?'
		}
		return r
	}, s)
}

func featuresCommand() command {
	return command{"features", "", "print as JSON what is offered", func(*session, *flag.FlagSet) func([]string) error {
		return func([]string) error { return printJSON(oci.Features()) }
	}}
}

// readResources reads limits from a file, - for standard input.
func readResources(file string) (*specs.LinuxResources, error) {
	f := os.Stdin
	if file != "-" {
		var err error
		if f, err = os.Open(file); err != nil {
			return nil, fmt.Errorf("read resources: %w", err)
		}
		defer f.Close()
	}
	var r specs.LinuxResources
	if err := json.NewDecoder(f).Decode(&r); err != nil {
		return nil, fmt.Errorf("read resources: %w", err)
	}
	return &r, nil
}
