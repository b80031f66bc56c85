package daemon

import (
	"fmt"
	"os"

	"github.com/spf13/cobra"
)

// unit keeps containers alive when the daemon stops: only the main process is signalled, and an OOM kill of one container is not the
// service's failure (systemd.service(5), systemd.kill(5)).
const unit = `[Unit]
Description=Skein container cluster node
Documentation=man:skein(1)
After=network-online.target
Wants=network-online.target

[Service]
Type=exec
ExecStart=%s daemon
Restart=always
RestartSec=1
Delegate=yes
KillMode=process
OOMPolicy=continue
LimitNOFILE=1048576
TasksMax=infinity

[Install]
WantedBy=multi-user.target
`

func unitCommand() *cobra.Command {
	return &cobra.Command{
		Use: "unit", Short: "Print a systemd unit for this binary", Args: cobra.NoArgs,
		Example: "  skein daemon unit > /etc/systemd/system/skein.service && systemctl enable --now skein",
		RunE: func(cmd *cobra.Command, _ []string) error {
			exe, err := os.Executable()
			if err != nil {
				return err
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), unit, exe)
			return err
		},
	}
}
