package control

import (
	"encoding/json"
	"strconv"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/network"

	"skein/manager/api"
	"skein/manager/store"
)

// optEncrypted is docker's option of an overlay network whose packets are encrypted between nodes. It stands alone or with a truth value.
const optEncrypted = "encrypted"

// encryptedOption reads the option's value.
func encryptedOption(a at, value string) (bool, error) {
	if value == "" {
		return true, nil
	}
	on, err := strconv.ParseBool(value)
	if err != nil {
		return false, a.bad(value, "want no value, true or false")
	}
	return on, nil
}

// mayEncrypt refuses an encrypted network while managers or agents of an older version could take it for a plain one.
func mayEncrypt(tx store.ReadTx, rec *api.NetworkRecord) error {
	if rec.Encrypted && rec.Ingress {
		return api.Errorf(errdefs.ErrNotImplemented, "network %s: the routing mesh cannot be encrypted in this version of skein: publish what needs encryption between nodes with mode=host, or encrypt it in the service", rec.Name)
	}
	if level := tx.Cluster().GetFeatureLevel(); rec.Encrypted && level < api.LevelNetworks {
		return api.Errorf(errdefs.ErrFailedPrecondition, "encrypted networks need feature level %d, the cluster has %d: upgrade all managers first", api.LevelNetworks, level)
	}
	return nil
}

// addEncrypted shows the option as it was asked for.
func addEncrypted(n *store.Network, out map[string]string) {
	if !n.Encrypted {
		return
	}
	var asked network.CreateRequest
	_ = json.Unmarshal(n.SpecJson, &asked) // it is our own
	out[optEncrypted] = asked.Options[optEncrypted]
}
