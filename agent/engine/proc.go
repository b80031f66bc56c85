package engine

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// clockTick is USER_HZ, 100 on every architecture Linux exports to user space.
const clockTick = 100

// processRow describes one process as `ps -ef` does; false when it is gone.
func processRow(pid int) ([]string, bool) {
	dir := fmt.Sprintf("/proc/%d", pid)
	st, err := os.Stat(dir)
	if err != nil {
		return nil, false
	}
	b, err := os.ReadFile(dir + "/stat")
	if err != nil {
		return nil, false
	}
	end := bytes.LastIndexByte(b, ')')
	f := strings.Fields(string(b[end+1:]))
	if end < 0 || len(f) < 20 {
		return nil, false
	}
	name := string(b[bytes.IndexByte(b, '(')+1 : end])
	cmd := commandLine(dir)
	line := strings.TrimSpace(string(bytes.ReplaceAll(cmd, []byte{0}, []byte{' '})))
	if line == "" {
		line = "[" + name + "]"
	}
	ticks := func(i int) int64 { n, _ := strconv.ParseInt(f[i], 10, 64); return n }
	cpu := time.Duration(ticks(11)+ticks(12)) * time.Second / clockTick
	started := bootTime().Add(time.Duration(ticks(19)) * time.Second / clockTick)
	uid := st.Sys().(*syscall.Stat_t).Uid
	return []string{
		strconv.Itoa(int(uid)), strconv.Itoa(pid), f[1], "0", started.Format("15:04"), "?",
		fmt.Sprintf("%02d:%02d:%02d", int(cpu.Hours()), int(cpu.Minutes())%60, int(cpu.Seconds())%60), line,
	}, true
}

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
