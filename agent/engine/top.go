package engine

import (
	"context"
	"fmt"
	"os"
	"os/user"
	"path"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/moby/moby/api/types/container"
)

// ContainerTop lists the container's processes as the host sees them, in the columns that options of ps choose.
func (e *Engine) ContainerTop(_ context.Context, ref string, args []string) (container.TopResponse, error) {
	c, err := e.find(ref)
	if err != nil {
		return container.TopResponse{}, err
	}
	r := c.snapshot()
	if !r.State.active() {
		return container.TopResponse{}, conflict("container %s is not running", r.ID)
	}
	columns, err := psColumns(args)
	if err != nil {
		return container.TopResponse{}, err
	}
	pids, err := processesOf(r.State.Pid)
	if err != nil {
		return container.TopResponse{}, conflict("container %s is not running: %v", r.ID, err)
	}
	out := container.TopResponse{Processes: [][]string{}}
	for _, c := range columns {
		out.Titles = append(out.Titles, c.title)
	}
	host := psHost{boot: bootTime(), now: time.Now(), memory: memTotal(), names: map[uint32]string{}}
	for _, pid := range pids {
		p, ok := readProcess(pid, &host)
		if !ok {
			continue // it ended meanwhile
		}
		row := make([]string, len(columns))
		for i, c := range columns {
			row[i] = c.value(p)
		}
		out.Processes = append(out.Processes, row)
	}
	return out, nil
}

// processesOf lists what is in the container's cgroup, whatever its pid namespace is.
func processesOf(pid int) ([]int, error) {
	g := groupsOf(pid)
	dir := g[""]
	for _, controller := range []string{"pids", "memory", "cpu", "freezer"} {
		if d := g[controller]; d != "" && (dir == "" || d == cgroupRoot) {
			dir = d
		}
	}
	b, err := os.ReadFile(path.Join(dir, "cgroup.procs"))
	if err != nil {
		return nil, err
	}
	var pids []int
	for f := range strings.FieldsSeq(string(b)) {
		if n, err := strconv.Atoi(f); err == nil {
			pids = append(pids, n)
		}
	}
	return pids, nil
}

// psHost is what the columns need of the machine.
type psHost struct {
	boot, now time.Time
	memory    int64
	names     map[uint32]string
}

func (h *psHost) user(id uint32) string {
	name, ok := h.names[id]
	if !ok {
		name = strconv.Itoa(int(id))
		if u, err := user.LookupId(name); err == nil {
			name = u.Username
		}
		h.names[id] = name
	}
	return name
}

// psProcess is one process: its line of /proc/PID/stat, from the state on, and its command.
type psProcess struct {
	host      *psHost
	pid       int
	uid, gid  uint32
	comm, cmd string
	stat      []string
}

func readProcess(pid int, h *psHost) (psProcess, bool) {
	dir := fmt.Sprintf("/proc/%d", pid)
	info, err := os.Stat(dir)
	if err != nil {
		return psProcess{}, false
	}
	b, err := os.ReadFile(dir + "/stat")
	if err != nil {
		return psProcess{}, false
	}
	open, end := strings.IndexByte(string(b), '('), strings.LastIndexByte(string(b), ')')
	if open < 0 || end < open {
		return psProcess{}, false
	}
	p := psProcess{host: h, pid: pid, comm: string(b[open+1 : end]), stat: strings.Fields(string(b[end+1:]))}
	if len(p.stat) < 37 {
		return psProcess{}, false
	}
	st := info.Sys().(*syscall.Stat_t)
	p.uid, p.gid = st.Uid, st.Gid
	p.cmd = strings.TrimSpace(strings.ReplaceAll(string(commandLine(dir)), "\x00", " ")) // a zombie has none
	if p.cmd == "" {
		p.cmd = "[" + p.comm + "]"
		if p.state() == "Z" {
			p.cmd += " <defunct>"
		}
	}
	return p, true
}

// number is field i of stat, counted as in proc(5).
func (p psProcess) number(i int) int64 {
	n, _ := strconv.ParseInt(p.stat[i-3], 10, 64)
	return n
}

func (p psProcess) state() string { return p.stat[0] }

func (p psProcess) cpu() time.Duration {
	return time.Duration(p.number(14)+p.number(15)) * (time.Second / clockTick)
}

func (p psProcess) started() time.Time {
	return p.host.boot.Add(time.Duration(p.number(22)) * (time.Second / clockTick))
}

func (p psProcess) elapsed() time.Duration { return max(p.host.now.Sub(p.started()), 0) }

func (p psProcess) cpuShare() float64 {
	if p.elapsed() == 0 {
		return 0
	}
	return 100 * p.cpu().Seconds() / p.elapsed().Seconds()
}

func (p psProcess) rss() int64 { return p.number(24) * int64(os.Getpagesize()) }

// tty names the controlling terminal, which is one of the container's.
func (p psProcess) tty() string {
	n := uint64(p.number(7))
	major, minor := n>>8&0xfff, n&0xff|n>>12&0xfff00
	switch {
	case n == 0:
		return "?"
	case major >= 136 && major <= 143:
		return fmt.Sprintf("pts/%d", (major-136)<<20+minor)
	case major == 4:
		return fmt.Sprintf("tty%d", minor)
	}
	return "?"
}

// longState is ps's STAT: the state, with its qualities.
func (p psProcess) longState() string {
	s := p.state()
	switch nice := p.number(19); {
	case nice < 0:
		s += "<"
	case nice > 0:
		s += "N"
	}
	if p.number(6) == int64(p.pid) {
		s += "s"
	}
	if p.number(20) > 1 {
		s += "l"
	}
	if p.number(5) == p.number(8) {
		s += "+"
	}
	return s
}

// clock is a duration as [days-]hours:minutes:seconds.
func clock(d time.Duration) string {
	s := int64(d / time.Second)
	text := fmt.Sprintf("%02d:%02d:%02d", s/3600%24, s/60%60, s%60)
	if days := s / 86400; days > 0 {
		text = fmt.Sprintf("%d-%s", days, text)
	}
	return text
}

func etime(d time.Duration) string {
	if d < time.Hour {
		s := int64(d / time.Second)
		return fmt.Sprintf("%02d:%02d", s/60, s%60)
	}
	return clock(d)
}

func bsdTime(d time.Duration) string {
	s := int64(d / time.Second)
	return fmt.Sprintf("%d:%02d", s/60, s%60)
}

// since is when a process started: the time within a day, else the date.
func (p psProcess) since() string {
	t := p.started()
	switch {
	case p.elapsed() < 24*time.Hour:
		return t.Format("15:04")
	case t.Year() == p.host.now.Year():
		return t.Format("Jan02")
	}
	return t.Format("2006")
}
