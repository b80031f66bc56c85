package ca

import (
	"context"
	"crypto/x509"
	"time"

	"github.com/moby/moby/api/types/swarm"

	"skein/manager/api"
)

// Found makes the root of a new cluster, or takes the one that the user gives or whose key an external authority has, and issues the
// certificate (leaf, then root, in PEM) of the cluster's first node.
func Found(ctx context.Context, conf swarm.CAConfig, csr *x509.CertificateRequest, id api.NodeIdentity, now time.Time) (*Root, []byte, error) {
	if err := checkExternals(conf.ExternalCAs); err != nil {
		return nil, nil, err
	}
	root, err := firstRoot(conf, id.ClusterID, now)
	if err != nil {
		return nil, nil, err
	}
	a := &authority{root: root, trust: root.CertPEM(), external: externalsOf(conf.ExternalCAs, root.cert, true), life: conf.NodeCertExpiry}
	if a.life == 0 {
		a.life = NodeCertLife
	}
	if len(conf.ExternalCAs) > 0 && len(a.external) == 0 {
		return nil, nil, invalid("CAConfig.ExternalCAs: none of them is for the cluster's root certificate (%s)", root.cert.Subject)
	}
	certPEM, err := a.sign(ctx, NewExternal(nil), csr, id, now)
	return root, certPEM, err
}

func firstRoot(conf swarm.CAConfig, clusterID string, now time.Time) (*Root, error) {
	switch {
	case conf.SigningCACert != "":
		return givenRoot(conf, now)
	case conf.SigningCAKey != "":
		return nil, invalid("CAConfig.SigningCAKey: if a signing CA key is provided, the signing CA cert must also be provided")
	case len(conf.ExternalCAs) == 0:
		return NewRoot(clusterID, now)
	}
	for _, e := range conf.ExternalCAs {
		if e.CACert != "" {
			return givenRoot(swarm.CAConfig{SigningCACert: e.CACert}, now)
		}
	}
	return nil, invalid("CAConfig.ExternalCAs: a new cluster must know the root certificate of its external certificate authority: name it, as in --external-ca protocol=cfssl,url=https://...,cacert=root.pem")
}
