package engine

import (
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
