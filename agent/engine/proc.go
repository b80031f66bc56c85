package engine

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"
)

// clockTick is USER_HZ, 100 on every architecture Linux exports to user space.
const clockTick = 100

// maxCommandLine bounds what is shown of a process's arguments: thousands of processes may share megabytes of them.
const maxCommandLine = 4096

func commandLine(dir string) []byte {
	f, err := os.Open(dir + "/cmdline")
	if err != nil {
		return nil
	}
	defer f.Close()
	b, _ := io.ReadAll(io.LimitReader(f, maxCommandLine)) // a process that is gone has none
	return b
}

func bootTime() time.Time {
	b, _ := os.ReadFile("/proc/stat")
	for _, l := range strings.Split(string(b), "\n") {
		if v, ok := strings.CutPrefix(l, "btime "); ok {
			n, _ := strconv.ParseInt(v, 10, 64)
			return time.Unix(n, 0)
		}
	}
	return time.Time{}
}

// listening reports which of the ports have a listener in the network namespace of pid. UDP ports count when they are bound.
func listening(pid int, ports map[portKey]bool) (map[portKey]bool, error) {
	out := map[portKey]bool{}
	for _, file := range []struct {
		name, proto, state string
	}{{"tcp", "tcp", "0A"}, {"tcp6", "tcp", "0A"}, {"udp", "udp", "07"}, {"udp6", "udp", "07"}} {
		f, err := os.Open(fmt.Sprintf("/proc/%d/net/%s", pid, file.name))
		if err != nil {
			if strings.HasSuffix(file.name, "6") { // IPv6 may be off
				continue
			}
			return nil, err
		}
		sc := bufio.NewScanner(f)
		for sc.Scan() {
			fields := strings.Fields(sc.Text())
			if len(fields) < 4 || fields[3] != file.state {
				continue
			}
			_, hex, ok := strings.Cut(fields[1], ":")
			if !ok {
				continue
			}
			if n, err := strconv.ParseUint(hex, 16, 16); err == nil {
				if k := (portKey{file.proto, uint16(n)}); ports[k] {
					out[k] = true
				}
			}
		}
		f.Close()
	}
	return out, nil
}
