package e2e

import (
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"skein/runtime/image"
	"skein/test/lab"
)

// loadInside makes the image "inside" of testdata/inside, which has a volume, and loads it.
func loadInside(t *testing.T, l *lab.Lab) {
	t.Helper()
	dir := t.TempDir()
	cmd := exec.Command("go", "build", "-o", filepath.Join(dir, "inside"), "./testdata/inside")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build the test program: %v\n%s", err, out)
	}
	bin, err := os.ReadFile(filepath.Join(dir, "inside"))
	if err != nil {
		t.Fatal(err)
	}
	art, err := image.FromBinary("/bin/inside", bin, ocispec.Platform{OS: "linux", Architecture: runtime.GOARCH},
		ocispec.ImageConfig{Cmd: []string{"inside", "sleep=1h"}, Env: []string{"PATH=/bin", "FROM=image"}},
		image.File{Path: "/etc/passwd", Data: []byte("root:x:0:0::/root:/x\napp:x:1000:1000::/home/app:/x\n")},
		image.File{Path: "/etc/notexec", Data: []byte("text")}, image.File{Path: "/etc/text", Mode: 0o755, Data: []byte("text")}, image.File{Path: "/old/file", Data: []byte("old")})
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(filepath.Join(dir, "image.tar"))
	if err == nil {
		err = art.WriteArchive(f, "inside:1")
	}
	if err != nil || f.Close() != nil {
		t.Fatal(err)
	}
	l.Must(0, "load", "-q", "-i", f.Name())
}

// step is one docker command, what it ends with and what it says.
type step struct {
	args string
	code int
	want string // all that is separated by "&" in output or errors; after "!" what must not be there
}

// run carries the step out and tells what is wrong, with what the command said.
func (s step) run(l *lab.Lab) (wrong []string) {
	out, errOut, code := l.Docker(0, strings.Fields(s.args)...)
	if code != s.code {
		wrong = append(wrong, fmt.Sprintf("exit code %d, want %d", code, s.code))
	}
	for w := range strings.SplitSeq(s.want, "&") {
		if bad, not := strings.CutPrefix(w, "!"); not == strings.Contains(out+errOut, bad) {
			wrong = append(wrong, fmt.Sprintf("want %q", w))
		}
	}
	if len(wrong) > 0 {
		wrong = append(wrong, out+errOut)
	}
	return wrong
}

func try(t *testing.T, l *lab.Lab, steps ...step) {
	t.Helper()
	for _, s := range steps {
		t.Run(s.args, func(t *testing.T) {
			if strings.HasPrefix(s.args, "events ") { // the client counts the past in whole seconds: what happened just now is not in it yet
				l.Eventually(10*time.Second, s.args, func() (bool, string) {
					wrong := s.run(l)
					return len(wrong) == 0, strings.Join(wrong, "\n")
				})
				return
			}
			if wrong := s.run(l); len(wrong) > 0 {
				t.Error(strings.Join(wrong, "\n"))
			}
		})
	}
}

// TestProcesses drives what a container's processes can do: exit codes, init, exec, signals, restarts, logs, changes.
func TestProcesses(t *testing.T) {
	l := lab.New(t, "e9", 1, 0)
	loadInside(t, l)
	t.Run("exit codes", func(t *testing.T) {
		try(t, l, exitCodes()...)
	})
	l.Must(0, "run", "-d", "--name", "box", "-e", "MINE=1", "-v", "data:/data", "inside:1")
	t.Run("exec", func(t *testing.T) { try(t, l, execs()...) })
	t.Run("isolation", func(t *testing.T) { try(t, l, isolation()...) })
	t.Run("changes", func(t *testing.T) { try(t, l, changes()...) })
	t.Run("signals", func(t *testing.T) { try(t, l, signals()...) })
	t.Run("logs", func(t *testing.T) { try(t, l, logDrivers()...) })
	t.Run("streams", func(t *testing.T) { streams(t, l) })
	t.Run("terminal", func(t *testing.T) { terminal(t, l) })
}

func exitCodes() []step {
	const failed = "failed to create task for container: OCI runtime create failed: unable to start container process"
	return []step{
		{"run --rm inside:1 inside exit=3", 3, ""},
		{"run --rm inside:1 nosuch", 127, failed + `&exec: "nosuch": executable file not found in $PATH`},
		{"run --rm inside:1 /no/such", 127, failed + "&no such file or directory"},
		{"run --rm inside:1 /etc", 126, failed + `&exec: "/etc": permission denied`},
		{"run --rm inside:1 /etc/notexec", 126, failed + "&permission denied"},
		{"run --rm inside:1 /etc/text", 125, failed + "&exec format error"},
		{"run --rm --nonsense inside:1", 125, "unknown flag: --nonsense"},
		{"run --rm --pull never nosuch:1", 125, "No such image: nosuch:1"},
		{"run --rm -u nobody inside:1", 125, "unable to find user nobody: no matching entries in passwd file"},
		{"run --rm --restart always inside:1", 125, "conflicting options: cannot specify both --restart and --rm"},
		{"run --rm --init inside:1 inside die=9", 137, ""},
		{"run --rm --init inside:1 inside die=15", 143, ""},
		{"run --name oom -m 32m inside:1 inside eat=200", 137, ""},
		{"inspect -f {{.State.OOMKilled}}{{.State.ExitCode}} oom", 0, "true137"},
		{"rm oom", 0, "oom"},
		{"run --rm --init inside:1 inside who first exit=7", 7, "pid=2&first=docker-init"},
		{"run --rm --init inside:1 nosuch", 127, "executable file not found in $PATH"},
		{"run --rm -w /made/here inside:1 inside who", 0, "cwd=/made/here"},
	}
}

func execs() []step {
	const failed = "OCI runtime exec failed: exec failed: unable to start container process: "
	return []step{
		{"exec box inside exit=9", 9, ""},
		{"exec box inside die=9", 137, ""},
		{"exec box nosuch", 127, failed + `exec: "nosuch": executable file not found in $PATH`},
		{"exec box /etc", 126, failed + `exec: "/etc": permission denied`},
		{"exec -w /no/dir box inside who", 127, failed + "&no such file or directory"},
		{"exec -u nobody box inside who", 126, "unable to find user nobody"},
		{"exec -u app -w /old box inside who", 0, "uid=1000 gid=1000 cwd=/old"},
		{"exec -u 5:6 box inside who", 0, "uid=5 gid=6"},
		{"exec -e MINE=2 -e MORE=3 box inside env=MINE env=MORE env=FROM env=HOME", 0, "MINE=2&MORE=3&FROM=image&HOME=/root"},
		{"exec --detach-keys ctrl-1 box inside", 1, "Invalid detach keys (ctrl-1) provided"},
		{"exec -d box inside write=/done", 0, ""},
		{"pause box", 0, "box"},
		{"exec box inside", 1, "is paused, unpause the container before exec"},
		{"stop -t 1 box", 0, "box"},
		{"exec box inside", 1, "is not running"},
		{"start box", 0, "box"},
		{"top box", 0, "UID&PID&STIME&inside sleep=1h"},
		{"top box aux", 0, "USER&%CPU&RSS&root&inside sleep=1h"},
		{"top box -o pid,comm,etime", 0, "PID&COMMAND&ELAPSED&!STIME"},
		{"top box -o comm", 1, "Couldn't find PID field in ps output"},
		{"top box --forest", 1, `the ps option "--forest" is not supported`},
		{"events --since 1m --until 0s --filter container=box --format {{.Action}}{{.Actor.Attributes.exitCode}}", 0,
			"exec_create: inside exit=9&exec_start: inside exit=9&exec_die9"},
	}
}

// isolation: what the container may do and see, and wishes that are refused before anything is made.
func isolation() []step {
	return []step{
		{"run --rm inside:1 inside ls=/dev", 0, "null&!kmsg"},
		{"run --rm --privileged inside:1 inside ls=/dev", 0, "null&kmsg"},
		{"run --rm --device /dev/null:/dev/other:r inside:1 inside ls=/dev", 0, "other"},
		{"run --rm --read-only inside:1 inside write=/x", 0, "read-only file system"},
		{"run --rm --read-only --tmpfs /t:size=1m,mode=1777 inside:1 inside write=/t/x", 0, "!read-only"},
		{"run --rm --user 5:6 --group-add 7 inside:1 inside who", 0, "uid=5 gid=6"},
		{"run --rm --cap-add BOGUS inside:1", 125, `unknown capability: "CAP_BOGUS"`},
		{"run --rm --security-opt apparmor=mine inside:1", 125, "loads no AppArmor profiles"},
		{"run --rm --mount type=bind,source=/nonexistent,target=/x inside:1", 125, "bind source path does not exist: /nonexistent"},
		{"run --rm --memory 4m inside:1", 125, "Minimum memory limit allowed is 6MB"},
		{"run --rm --cpuset-cpus 0-99 inside:1", 125, "Requested CPUs are not available - requested 0-99"},
		{"run --rm --gpus all inside:1", 125, "could not select device driver"},
		{"run --rm --storage-opt size=1g inside:1", 125, "has no quota"},
		{"run --rm --pid container:nosuch --pull never inside:1", 125, "No such container: nosuch"},
	}
}

func changes() []step {
	return []step{
		{"exec box inside write=/new write=/old/more remove=/old/file write=/data/x", 0, "remove <nil>"},
		{"diff box", 0, "C /old\nD /old/file\nA /old/more&!/etc/hosts&!/data/x&A /new"},
		{"inspect -s -f {{.SizeRw}} box", 0, "15"},
		{"run --rm --volumes-from box:ro inside:1 inside ls=/data write=/data/y", 0, "x <nil>&read-only file system"},
		{"run --rm --pull never --volumes-from nosuch inside:1", 125, "No such container: nosuch"},
		{"export -o /tmp/never-made nosuch", 1, "No such container: nosuch"},
		{"rename box box", 1, "Renaming a container with the same name as its current name"},
		{"container prune -f --filter label!=keep --filter until=1h", 0, "Total reclaimed space: 0B"},
		{"ps -a --filter exited=x", 1, "invalid filter 'exited=x'"},
	}
}

func signals() []step {
	return []step{
		{"run -d --name trap --stop-signal USR1 inside:1 inside trap", 0, ""},
		{"kill -s NOPE trap", 1, "invalid signal: NOPE"},
		{"stop trap", 0, "trap"},
		{"inspect -f {{.State.ExitCode}} trap", 0, "50"},
		{"kill trap", 1, "cannot kill container: trap"},
		{"start trap", 0, "trap"},
		{"stop -s HUP trap", 0, "trap"},
		{"inspect -f {{.State.ExitCode}} trap", 0, "41"},
		{"rm trap", 0, "trap"},
		{"run -d --name again --restart always inside:1 inside sleep=50ms exit=3", 0, ""},
		{"update --restart no again", 0, "again"},
		{"wait again", 0, "3"},
		{"rm -f again", 0, "again"},
		{"run -d --name few --restart on-failure:2 inside:1 inside exit=3", 0, ""},
		{"wait few", 0, "3"},
		{"inspect -f {{.RestartCount}}{{.State.Status}} few", 0, "2exited"},
		{"rm few", 0, "few"},
	}
}

func logDrivers() []step {
	return []step{
		{"run --name local --log-driver local --log-opt max-size=10k inside:1 inside say=hello", 0, "hello"},
		{"logs local", 0, "hello"},
		{"run --name none --log-driver none inside:1 inside say=hello", 0, "hello"},
		{"logs none", 1, "configured logging driver does not support reading"},
		{"run --name tag --log-opt tag={{.Name}} --log-opt env=FROM inside:1 inside say=hello", 0, ""},
		{"logs --details tag", 0, "FROM=image,tag=tag hello"},
		{"run --log-driver syslog inside:1", 125, "logger: no log driver named 'syslog' is registered"},
		{"run --log-opt x=y inside:1", 125, "unknown log opt 'x' for json-file log driver"},
		{"rm local none tag", 0, "tag"},
	}
}

// streams passes input through run and exec, more than any buffer holds, and to a process that does not read it all.
func streams(t *testing.T, l *lab.Lab) {
	const size = 20 << 20
	for _, args := range []string{"exec -i box inside cat", "run --rm -i inside:1 inside cat", "run --rm -i --init inside:1 inside cat", "run --rm -i inside:1 inside read say=enough"} {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		cmd := exec.CommandContext(ctx, "docker", append([]string{"-H", "unix://" + l.Nodes[0].Socket}, strings.Fields(args)...)...)
		in, want := sha256.New(), sha256.New()
		cmd.Stdin = io.TeeReader(io.LimitReader(counter{}, size), want)
		var errOut strings.Builder
		cmd.Stdout, cmd.Stderr = in, &errOut
		err := cmd.Run()
		cancel()
		if strings.Contains(args, "read") {
			want = sha256.New()
			fmt.Fprintln(want, "enough")
			if cmd.ProcessState.ExitCode() != 0 {
				t.Errorf("%s: %v", args, err)
			}
		} else if err != nil {
			t.Errorf("%s: %v", args, err)
		}
		if string(in.Sum(nil)) != string(want.Sum(nil)) || errOut.Len() > 0 {
			t.Errorf("%s: what came back differs, or: %s", args, errOut.String())
		}
	}
}

// counter is input that never repeats within a megabyte.
type counter struct{}

func (counter) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = byte(i * (i>>8 + 1))
	}
	return len(p), nil
}

// terminal types into docker run -it: an interrupt reaches the command below the init; detached, it can be attached to again.
func terminal(t *testing.T, l *lab.Lab) {
	for _, tc := range []struct {
		args, wait, keys string
		code             int
	}{
		{"run -it --rm --init inside:1 inside say=ready cat", "ready", "\x03", 130},
		{"run -it --name tty inside:1 inside say=ready read say=over exit=5", "ready", "\x10\x11", 0},
		{"attach tty", "", "\n", 5},
		{"start -ai tty", "ready", "\n", 5},
		{"exec -it box inside say=ready read exit=6", "ready", "\n", 6},
	} {
		master, slave := openTerminal(t)
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		cmd := exec.CommandContext(ctx, "docker", append([]string{"-H", "unix://" + l.Nodes[0].Socket}, strings.Fields(tc.args)...)...)
		cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, slave
		cmd.SysProcAttr = &unix.SysProcAttr{Setsid: true, Setctty: true}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		slave.Close()
		var mu sync.Mutex
		var said strings.Builder
		done := make(chan struct{})
		go func() { // ends with the terminal
			defer close(done)
			typed := tc.wait == ""
			if typed {
				_, _ = master.WriteString(tc.keys)
			}
			for buf := make([]byte, 4096); ; {
				n, err := master.Read(buf)
				mu.Lock()
				said.Write(buf[:n])
				text := said.String()
				mu.Unlock()
				if !typed && strings.Contains(text, tc.wait) {
					typed = true
					_, _ = master.WriteString(tc.keys)
				}
				if err != nil {
					return
				}
			}
		}()
		_ = cmd.Wait()
		cancel()
		<-done
		master.Close()
		if code := cmd.ProcessState.ExitCode(); code != tc.code {
			t.Errorf("%s: exit code %d, want %d\n%s", tc.args, code, tc.code, said.String())
		}
	}
	l.Must(0, "rm", "tty")
}

func openTerminal(t *testing.T) (master, slave *os.File) {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
	if err == nil {
		err = unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0)
	}
	if err == nil {
		slave, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	}
	if err != nil {
		t.Fatal(err)
	}
	return master, slave
}
