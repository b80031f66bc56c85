package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"

	"github.com/moby/moby/api/types/common"
	"github.com/spf13/cobra"
)

// maxAnswer bounds what a daemon may send to our own verbs.
const maxAnswer = 64 << 20

// netCommand is `skein net`: what the cluster's networks should be, and what the nodes made of it.
func (a *app) netCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "net", Short: "Compare the networks of the cluster with what its nodes applied"}
	cmd.AddCommand(a.netStatusCommand(), a.netCheckCommand())
	return cmd
}

// get asks the daemon for one of our own paths, which docker's client does not know.
func (a *app) get(cmd *cobra.Command, path string, into any) error {
	return a.ask(cmd, http.MethodGet, path, nil, into)
}

// ask sends body, if any, as JSON to one of our own paths, and reads the answer into into, if that is not nil.
func (a *app) ask(cmd *cobra.Command, method, path string, body, into any) error {
	if err := a.initDocker(cmd); err != nil {
		return err
	}
	client := a.docker.Client()
	hc := &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext:       func(ctx context.Context, _, _ string) (net.Conn, error) { return client.Dialer()(ctx) },
	}}
	var said io.Reader
	if body != nil {
		b, err := json.Marshal(body)
		if err != nil {
			return err
		}
		said = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(cmd.Context(), method, "http://skein"+path, said)
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := hc.Do(req)
	if err != nil {
		return errors.New(cannotConnect(client.DaemonHost(), err.Error()))
	}
	defer resp.Body.Close()
	answer := io.LimitReader(resp.Body, maxAnswer)
	if resp.StatusCode < 200 || resp.StatusCode > 299 {
		var e common.ErrorResponse
		if err := json.NewDecoder(answer).Decode(&e); err != nil || e.Message == "" {
			return fmt.Errorf("the daemon at %s answered %s", client.DaemonHost(), resp.Status)
		}
		return errors.New("Error response from daemon: " + e.Message)
	}
	if into == nil {
		return nil
	}
	return json.NewDecoder(answer).Decode(into)
}
