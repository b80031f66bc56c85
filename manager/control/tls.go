package control

import (
	"crypto/sha256"
	"encoding/pem"

	"github.com/moby/moby/api/types/swarm"

	"skein/manager/api"
	"skein/manager/ca"
	"skein/manager/store"
)

// nodeTLS shows what a node said of its certificate. It names the roots that it believes by their digests; those that are none of the
// cluster's are not shown.
func nodeTLS(c *store.Cluster, t *api.NodeTLS) swarm.TLSInfo {
	info := swarm.TLSInfo{CertIssuerSubject: t.GetIssuerSubject(), CertIssuerPublicKey: t.GetIssuerKey()}
	if c == nil {
		return info
	}
	for rest := ca.TrustOf(c); len(rest) > 0; {
		var b *pem.Block
		if b, rest = pem.Decode(rest); b == nil {
			break
		}
		sum := sha256.Sum256(b.Bytes)
		for _, trusted := range t.GetTrust() {
			if string(trusted) == string(sum[:]) {
				info.TrustRoot += string(pem.EncodeToMemory(b))
			}
		}
	}
	return info
}
