package identity

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"time"

	"google.golang.org/grpc"

	"skein/manager/api"
)

const (
	renewRetryMin = 250 * time.Millisecond // a new role waits for it
	renewRetryMax = 5 * time.Minute        // 90 days of life leave at least 18 for trying
	renewTimeout  = 30 * time.Second
)

// Renewal tells Run how to reach a manager and whom to tell.
type Renewal struct {
	// Dial returns a connection to a manager; it is called for each attempt and closed after it.
	Dial func(ctx context.Context) (*grpc.ClientConn, error)
	// Renewed is called after each renewal; the role may be another. May be nil.
	Renewed func()
	Logger  *slog.Logger
}

// Run keeps the certificate fresh until ctx is done.
func (i *Identity) Run(ctx context.Context, r Renewal) error {
	log := r.Logger
	if log == nil {
		log = slog.Default()
	}
	log = log.With("component", "identity", "node", i.NodeID())
	retry := time.Duration(0)
	for {
		wait := retry
		if retry == 0 {
			nb, na := i.Validity()
			wait = renewalDue(nb, na, rand.Float64()).Sub(i.now())
		}
		timer := time.NewTimer(max(wait, 0))
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-i.renew:
			timer.Stop()
		case <-timer.C:
		}
		if err := i.attempt(ctx, r.Dial); err != nil {
			if ctx.Err() != nil {
				return nil
			}
			retry = min(max(2*retry, renewRetryMin), renewRetryMax)
			_, na := i.Validity()
			log.Warn("renew certificate", "err", err, "retry_in", retry, "expires", na)
			continue
		}
		retry = 0
		_, na := i.Validity()
		log.Info("renewed certificate", "role", i.Role(), "expires", na)
		if r.Renewed != nil {
			r.Renewed()
		}
	}
}

// RenewSoon asks Run to renew now, for instance because the store gave this node another role.
func (i *Identity) RenewSoon() {
	select {
	case i.renew <- struct{}{}:
	default: // one is wanted already
	}
}

// renewalDue is a point between 50 and 80 % of a certificate's life; f in [0, 1) spreads the nodes of a cluster.
func renewalDue(notBefore, notAfter time.Time, f float64) time.Time {
	return notBefore.Add(time.Duration(float64(notAfter.Sub(notBefore)) * (0.5 + 0.3*f)))
}

func (i *Identity) attempt(ctx context.Context, dial func(context.Context) (*grpc.ClientConn, error)) error {
	ctx, cancel := context.WithTimeout(ctx, renewTimeout)
	defer cancel()
	conn, err := dial(ctx)
	if err != nil {
		return err
	}
	defer conn.Close()
	return i.Renew(ctx, conn)
}

// Renew gets a new certificate for a new key over a connection to a manager, stores it, and uses it from then on.
func (i *Identity) Renew(ctx context.Context, conn grpc.ClientConnInterface) error {
	req, err := NewRequest()
	if err != nil {
		return err
	}
	reply, err := api.NewCAClient(conn).RenewCertificate(ctx, &api.IssueRequest{CsrPem: req.CSRPEM})
	if err != nil {
		return fmt.Errorf("renew certificate of node %s: %w", i.NodeID(), api.FromGRPC(err))
	}
	if err := i.renewed(req, reply); err != nil {
		return fmt.Errorf("renew certificate of node %s: %w", i.NodeID(), err)
	}
	return nil
}

// renewed takes a new certificate, and the roots that came with it. A crash on the way leaves a certificate that is under the roots beside it.
func (i *Identity) renewed(req *Request, reply *api.IssueReply) error {
	nodePEM, rootPEM, err := contents(req, reply)
	if err != nil {
		return err
	}
	m, err := parseMaterial(nodePEM)
	if err != nil {
		return err
	}
	roots, err := parseRoots(rootPEM)
	if err != nil {
		return err
	}
	if err := i.verify(i.newTrust(roots), m.cert.chain(), x509.ExtKeyUsageClientAuth, ""); err != nil {
		return err
	}
	if m.id.NodeID != i.NodeID() {
		return errors.New("the answer is for another node")
	}
	i.file.Lock()
	defer i.file.Unlock()
	old := i.trust.Load().roots
	same := sameRoots(old, roots)
	if !same {
		if err := i.believe(union(old, roots)); err != nil {
			return err
		}
	}
	if err := i.store(m, i.vault); err != nil || same {
		return err
	}
	return i.believe(roots)
}

func union(a, b []*x509.Certificate) []*x509.Certificate {
	out := slices.Clone(a)
	for _, c := range b {
		if !slices.ContainsFunc(out, c.Equal) {
			out = append(out, c)
		}
	}
	return out
}
