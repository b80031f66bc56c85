package cli

import "testing"

func TestOurWords(t *testing.T) {
	const hint = `: is it running? Start it with "skein daemon", or name another with -H or SKEIN_HOST ("skein dev ls" lists the nodes of a development cluster)`
	for in, want := range map[string]string{
		"Cannot connect to the Docker daemon at unix:///a.sock. Is the docker daemon running?":                                                           "cannot connect to the Skein daemon at unix:///a.sock" + hint,
		"failed to connect to the docker API at unix:///a.sock; check if the path is correct and if the daemon is running: dial unix: permission denied": "cannot connect to the Skein daemon at unix:///a.sock (dial unix: permission denied)" + hint,
		`Error response from daemon: Use "docker swarm init" or "docker swarm join"`:                                                                     `Error response from daemon: Use "skein swarm init" or "skein swarm join"`,
		"docker.io/library/web: not found": "docker.io/library/web: not found",
	} {
		if got := ourWords(in); got != want {
			t.Errorf("%s:\n got %s\nwant %s", in, got, want)
		}
	}
}
