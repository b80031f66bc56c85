package dispatcher

import (
	"bytes"
	"time"

	"google.golang.org/protobuf/proto"

	"skein/manager/api"
	"skein/manager/ca"
	"skein/manager/store"
)

const (
	// renewalsBound is how many nodes get new certificates at the same time while the root certificate is replaced: the leader signs some
	// thousand a second, and has other things to do.
	renewalsBound = 64
	// renewalWait is how long a node may take for it before another one has its turn; it goes on trying meanwhile.
	renewalWait = 10 * time.Second
)

// credentials is whom nodes are to trust, what they encrypt gossip with, and who is getting a new certificate. It belongs to Run.
type credentials struct {
	sent    *api.Credentials     // what all sessions have been told
	wanted  ca.Wanted            // of certificates
	renewal bool                 // the root is being replaced
	asked   map[string]time.Time // nodes that were told to renew: when
	again   *time.Timer          // the next look at those
}

func newCredentials() *credentials {
	return &credentials{asked: map[string]time.Time{}}
}

func (c *credentials) stop() {
	if c.again != nil {
		c.again.Stop()
	}
}

// spreadCredentials tells all sessions when something has changed, and paces the renewal of certificates.
func (d *Dispatcher) spreadCredentials(tx store.ReadTx) {
	c := tx.Cluster()
	if c == nil {
		return
	}
	now := &api.Credentials{TrustPem: ca.TrustOf(c), GossipKeys: ca.GossipKeys(c)}
	if !proto.Equal(now, d.creds.sent) {
		first := d.creds.sent == nil
		renewed := first || !bytes.Equal(now.TrustPem, d.creds.sent.TrustPem)
		d.creds.sent = now
		if renewed {
			d.creds.wanted, d.creds.renewal = ca.NewWanted(c), c.Rotation != nil
			clear(d.creds.asked)
		}
		if !first {
			for _, n := range d.nodes {
				if n.session != nil {
					n.session.push(credentialsMessage(now), 0)
				}
			}
		}
	}
	d.renewSome()
}

func credentialsMessage(c *api.Credentials) *api.ManagerMessage {
	return &api.ManagerMessage{Kind: &api.ManagerMessage_Credentials{Credentials: c}}
}

// greetCredentials is what a new session is told before anything else: without the roots, other nodes might not be known to it.
func (d *Dispatcher) greetCredentials(tx store.ReadTx, n *node) {
	if d.creds.sent == nil {
		d.spreadCredentials(tx)
	}
	if d.creds.sent != nil {
		n.session.push(credentialsMessage(d.creds.sent), 0)
	}
	delete(d.creds.asked, n.id) // the session that was told is gone
	d.renewSome()
}

// renewSome tells nodes to get new certificates, a bounded number at a time.
func (d *Dispatcher) renewSome() {
	cr := d.creds
	if !cr.renewal {
		return
	}
	now := time.Now()
	for id, at := range cr.asked {
		n := d.nodes[id]
		if n == nil || n.session == nil || cr.wanted.Has(n.rec.Tls) || now.Sub(at) >= renewalWait {
			delete(cr.asked, id)
		}
	}
	if len(cr.asked) < renewalsBound {
		for id, n := range d.nodes {
			if _, asked := cr.asked[id]; asked || n.session == nil || cr.wanted.Has(n.rec.Tls) {
				continue
			}
			cr.asked[id] = now
			m := proto.Clone(cr.sent).(*api.Credentials)
			m.Renew = true
			n.session.push(credentialsMessage(m), 0)
			if len(cr.asked) == renewalsBound {
				break
			}
		}
	}
	if len(cr.asked) > 0 {
		cr.stop()
		cr.again = time.AfterFunc(renewalWait, func() { _ = d.do(d.ctx, d.renewSome) })
	}
}

// noteTLS records what a node says of its certificate.
func (d *Dispatcher) noteTLS(n *node, t *api.NodeTLS) {
	if validTLS(t) {
		d.writer.said(n.id, &api.Hello{Tls: t})
	}
}

// Bounds of what a node may say of its certificate; it is kept in the log.
const (
	maxTrusted   = 8
	maxNameBytes = 1 << 10
)

func validTLS(t *api.NodeTLS) bool {
	if t == nil || len(t.Trust) > maxTrusted || len(t.IssuerSubject) > maxNameBytes || len(t.IssuerKey) > maxNameBytes {
		return false
	}
	for _, sum := range t.Trust {
		if len(sum) > 64 {
			return false
		}
	}
	return true
}
