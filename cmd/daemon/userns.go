package daemon

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/user"
	"strconv"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"

	"skein/agent/engine"
)

// defaultRemap is the user whose ranges "default" takes, docker's name.
const defaultRemap = "dockremap"

// minRemap is the least that an image's users and the terminals' group need.
const minRemap = 1000

// idMaps reads --userns-remap: a user, and a group where it has another name, whose ranges are in /etc/subuid and /etc/subgid.
func idMaps(wish, subuid, subgid string) (*engine.IDMaps, error) {
	if wish == "" {
		return nil, nil
	}
	if wish == "default" {
		wish = defaultRemap
	}
	name, group, both := strings.Cut(wish, ":")
	if !both {
		group = name
	}
	m := &engine.IDMaps{}
	for _, x := range []struct {
		file, owner string
		alias       func(string) string
		to          *[]specs.LinuxIDMapping
	}{{subuid, name, otherUser, &m.UIDs}, {subgid, group, otherGroup, &m.GIDs}} {
		list, err := readRanges(x.file, x.owner, x.alias(x.owner))
		if err != nil {
			return nil, fmt.Errorf("--userns-remap %s: %w", wish, err)
		}
		*x.to = list
	}
	return m, nil
}

// otherUser is a user's number for his name, and the other way round, empty when this host knows none.
func otherUser(s string) string {
	if u, err := user.LookupId(s); err == nil {
		return u.Username
	}
	if u, err := user.Lookup(s); err == nil {
		return u.Uid
	}
	return ""
}

func otherGroup(s string) string {
	if g, err := user.LookupGroupId(s); err == nil {
		return g.Name
	}
	if g, err := user.LookupGroup(s); err == nil {
		return g.Gid
	}
	return otherUser(s)
}

// readRanges puts the ranges of an owner one after the other.
func readRanges(file, owner, alias string) ([]specs.LinuxIDMapping, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, fmt.Errorf("%w: it must have a line %s:FIRST:COUNT", err, owner)
	}
	defer f.Close()
	var out []specs.LinuxIDMapping
	var next uint64
	sc := bufio.NewScanner(f)
	for sc.Scan() {
		line := strings.TrimSpace(sc.Text())
		if line == "" || line[0] == '#' {
			continue
		}
		p := strings.Split(line, ":")
		if len(p) != 3 {
			return nil, fmt.Errorf("%s: line %q: want NAME:FIRST:COUNT", file, line)
		}
		if p[0] != owner && (alias == "" || p[0] != alias) {
			continue
		}
		first, err := strconv.ParseUint(p[1], 10, 32)
		count, err2 := strconv.ParseUint(p[2], 10, 32)
		if err := errors.Join(err, err2); err != nil {
			return nil, fmt.Errorf("%s: line %q: %w", file, line, err)
		}
		if first == 0 || count == 0 || first+count > 1<<32-1 || next+count > 1<<32-1 {
			return nil, fmt.Errorf("%s: line %q: the range is empty, holds the host's root or ends above 32 bits", file, line)
		}
		out = append(out, specs.LinuxIDMapping{ContainerID: uint32(next), HostID: uint32(first), Size: uint32(count)})
		next += count
	}
	if err := sc.Err(); err != nil {
		return nil, fmt.Errorf("read %s: %w", file, err)
	}
	if next < minRemap {
		return nil, fmt.Errorf("%s gives %s %d numbers, want at least %d: add a line %s:FIRST:65536", file, owner, next, minRemap, owner)
	}
	return out, nil
}
