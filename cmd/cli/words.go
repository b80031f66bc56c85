package cli

import (
	"regexp"
	"strings"
)

// noConnection finds what docker's client says of a daemon that does not answer, in its older and newer form: the address, and the cause
// where it tells one.
var noConnection = regexp.MustCompile(`(?s)(?:Cannot connect to the Docker daemon at|failed to connect to the docker API at) (\S+?)[;.] (?:Is the docker daemon running\?|check if the path is correct and if the daemon is running)(?:: (.*))?`)

// ourWords turns docker's texts into what a user of this program can do about it. The daemon itself speaks docker's words, which other
// clients match.
func ourWords(text string) string {
	if m := noConnection.FindStringSubmatchIndex(text); m != nil {
		cause := ""
		if m[4] >= 0 {
			cause = text[m[4]:m[5]]
		}
		return text[:m[0]] + cannotConnect(text[m[2]:m[3]], cause)
	}
	return strings.NewReplacer("docker swarm ", "skein swarm ", "docker service ", "skein service ").Replace(text)
}

func cannotConnect(host, cause string) string {
	if cause != "" {
		host += " (" + cause + ")"
	}
	return "cannot connect to the Skein daemon at " + host + ": is it running? Start it with \"skein daemon\", or name another with -H or SKEIN_HOST " +
		"(\"skein dev ls\" lists the nodes of a development cluster)"
}
