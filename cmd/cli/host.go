package cli

import (
	"errors"
	"strings"
)

// DefaultHost is where a machine's daemon listens unless told otherwise.
const DefaultHost = "unix:///run/skein/skein.sock"

// chooseHost says which daemon docker's verbs talk to: the flag -H, SKEIN_HOST, DOCKER_HOST, or this machine's. An empty result leaves it to
// the docker context that was named on the command line. Docker's current context counts for nothing: it names docker daemons, and a command
// that means Skein must never reach one by surprise.
func chooseHost(flag []string, dockerContext string, getenv func(string) string) (string, error) {
	if dockerContext != "" && dockerContext != "default" {
		if len(flag) > 0 {
			return "", errors.New("conflicting options: --host and --context both name a daemon: give one of them")
		}
		return "", nil
	}
	host := DefaultHost
	switch {
	case len(flag) > 0:
		host = flag[0]
	case getenv("SKEIN_HOST") != "":
		host = getenv("SKEIN_HOST")
	case getenv("DOCKER_HOST") != "":
		host = getenv("DOCKER_HOST")
	}
	if strings.HasPrefix(host, "/") {
		host = "unix://" + host
	}
	return host, nil
}
