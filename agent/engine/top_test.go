package engine

import (
	"os"
	"strings"
	"testing"
	"time"
)

func TestPsColumns(t *testing.T) {
	for args, want := range map[string]string{
		"":                               "UID PID PPID C STIME TTY TIME CMD",
		"-ef":                            "UID PID PPID C STIME TTY TIME CMD",
		"-e -f":                          "UID PID PPID C STIME TTY TIME CMD",
		"-e":                             "PID TTY TIME CMD",
		"aux":                            "USER PID %CPU %MEM VSZ RSS TTY STAT START TIME COMMAND",
		"ax":                             "PID TTY STAT TIME COMMAND",
		"-o pid,comm":                    "PID COMMAND",
		"-eo pid,ppid,etime,args":        "PID PPID ELAPSED COMMAND",
		"axo pid,stat,cmd":               "PID STAT CMD",
		"-o pid -o user=WHO":             "PID WHO",
		"-j":                             "PID PGID SID TTY TIME CMD",
		"-o comm":                        "!Couldn't find PID field in ps output",
		"-o pid=X":                       "!Couldn't find PID field",
		"-o pid,nonsense":                `!the field "nonsense"`,
		"-Z":                             `!the ps option "-Z"`,
		"--forest":                       `!the ps option "--forest"`,
		"-o":                             "!Couldn't find PID field",
		"-o pid,vsz,rss,nlwp,psr,tt,gid": "PID VSZ RSS NLWP PSR TT GID",
	} {
		columns, err := psColumns(strings.Fields(args))
		got := ""
		for _, c := range columns {
			got += " " + c.title
		}
		if want, bad := strings.CutPrefix(want, "!"); bad {
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%q: %v, want %q", args, err, want)
			}
		} else if err != nil || strings.TrimSpace(got) != want {
			t.Errorf("%q: %q %v, want %q", args, got, err, want)
		}
	}
}

// TestReadProcess fills every column with something of this test.
func TestReadProcess(t *testing.T) {
	p, ok := readProcess(os.Getpid(), &psHost{boot: bootTime(), now: time.Now(), memory: memTotal(), names: map[uint32]string{}})
	if !ok || p.number(4) != int64(os.Getppid()) || !strings.Contains(p.cmd, "test") || p.elapsed() > time.Hour || p.rss() < 1<<20 {
		t.Fatalf("%+v", p)
	}
	columns, err := psColumns(strings.Fields("-o pid,ppid,pgid,sid,pri,ni,nlwp,psr,vsz,rss,uid,gid,user,comm,args,tty,stat,s,c,time,bsdtime,etime,etimes,start,stime,lstart,pcpu,pmem"))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range columns {
		if c.value(p) == "" {
			t.Errorf("%s is empty", c.title)
		}
	}
}
