package ca

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/asn1"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/swarm"

	"skein/manager/api"
)

// Bounds of asking an external authority.
const (
	externalTimeout  = 5 * time.Second // each; docker's clients wait no longer than a minute in all
	maxExternals     = 8
	maxExternalBytes = 64 << 10
	maxExternalText  = 512  // of an answer that is quoted in an error
	crossProfile     = "CA" // of the cfssl server, for cross-signing
)

// External asks external certificate authorities by the cfssl protocol: JSON posted to their URL.
type External struct {
	own func() *tls.Certificate
}

// NewExternal returns a client. own is the certificate that it shows to authorities that want one, asked for each connection; may be nil.
func NewExternal(own func() *tls.Certificate) *External {
	if own == nil {
		own = func() *tls.Certificate { return &tls.Certificate{} }
	}
	return &External{own: own}
}

// clientFor is for one question. Trusted are the system's roots, those of the cluster, and the one that the user named for the authority.
func (e *External) clientFor(trust []byte, ca swarm.ExternalCA) *http.Client {
	roots, err := x509.SystemCertPool()
	if err != nil {
		roots = x509.NewCertPool()
	}
	roots.AppendCertsFromPEM(trust)
	roots.AppendCertsFromPEM([]byte(ca.CACert))
	return &http.Client{
		Timeout:       externalTimeout,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		Transport: &http.Transport{
			DisableKeepAlives: true, MaxResponseHeaderBytes: maxExternalBytes,
			TLSClientConfig: &tls.Config{
				MinVersion: tls.VersionTLS12, RootCAs: roots, // the other side is not ours
				GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return e.own(), nil },
			},
		},
	}
}

// externalSubject, externalName, externalExtension and externalRequest are cfssl's request to sign.
type externalRequest struct {
	Hosts      []string            `json:"hosts"`
	Request    string              `json:"certificate_request"`
	Subject    *externalSubject    `json:"subject,omitempty"`
	Profile    string              `json:"profile"`
	Extensions []externalExtension `json:"extensions,omitempty"`
}

type externalSubject struct {
	CN    string         `json:"CN"`
	Names []externalName `json:"names"`
}

type externalName struct {
	OU string `json:"OU,omitempty"`
	O  string `json:"O,omitempty"`
}

type externalExtension struct {
	ID       string `json:"id"` // dotted
	Critical bool   `json:"critical"`
	Value    string `json:"value"` // hexadecimal
}

type externalReply struct {
	Success bool `json:"success"`
	Result  struct {
		Certificate string `json:"certificate"`
	} `json:"result"`
	Errors []struct {
		Code    int    `json:"code"`
		Message string `json:"message"`
	} `json:"errors"`
}

// leafRequest asks for the certificate of a node.
func leafRequest(csr *x509.CertificateRequest, id api.NodeIdentity) externalRequest {
	return externalRequest{
		Hosts:   []string{id.NodeID, api.CertRole(id.Role)},
		Request: string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: csr.Raw})),
		Subject: &externalSubject{CN: id.NodeID, Names: []externalName{{OU: api.CertRole(id.Role), O: id.ClusterID}}},
	}
}

// crossRequest asks to vouch for another root.
func crossRequest(next *Root) (externalRequest, error) {
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{RawSubject: next.cert.RawSubject}, next.key)
	if err != nil {
		return externalRequest{}, fmt.Errorf("cross-sign root certificate: %w", err)
	}
	r := externalRequest{
		Request: string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})), Profile: crossProfile,
		Subject: &externalSubject{CN: next.cert.Subject.CommonName},
	}
	s := next.cert.Subject
	for i := range max(len(s.Organization), len(s.OrganizationalUnit)) {
		var n externalName
		if i < len(s.Organization) {
			n.O = s.Organization[i]
		}
		if i < len(s.OrganizationalUnit) {
			n.OU = s.OrganizationalUnit[i]
		}
		r.Subject.Names = append(r.Subject.Names, n)
	}
	basic := asn1.ObjectIdentifier{2, 5, 29, 19} // cfssl takes it from the request to sign only
	for _, e := range next.cert.Extensions {
		if e.Id.Equal(basic) {
			r.Extensions = append(r.Extensions, externalExtension{ID: e.Id.String(), Critical: e.Critical, Value: hex.EncodeToString(e.Value)})
		}
	}
	return r, nil
}

// sign asks the authorities in turn until one answers with a certificate.
func (e *External) sign(ctx context.Context, trust []byte, list []swarm.ExternalCA, r externalRequest) (*x509.Certificate, error) {
	body, err := json.Marshal(r)
	if err != nil {
		return nil, err
	}
	var errs []error
	for _, ca := range list[:min(len(list), maxExternals)] {
		cert, err := e.ask(ctx, trust, ca, body)
		if err == nil {
			return cert, nil
		}
		errs = append(errs, err)
		if ctx.Err() != nil {
			break
		}
	}
	return nil, api.Errorf(errdefs.ErrUnavailable, "no external certificate authority signed: %v: see to it that one answers, or name another with \"docker swarm update --external-ca\"", errors.Join(errs...))
}

func (e *External) ask(ctx context.Context, trust []byte, ca swarm.ExternalCA, body []byte) (*x509.Certificate, error) {
	ctx, cancel := context.WithTimeout(ctx, externalTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, ca.URL, bytes.NewReader(body))
	if err != nil {
		return nil, fmt.Errorf("external certificate authority %s: %w", shownURL(ca.URL), err)
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := e.clientFor(trust, ca).Do(req)
	if err != nil {
		var ue *url.Error // it would quote the whole URL
		if errors.As(err, &ue) {
			err = ue.Err
		}
		if errors.Is(err, context.DeadlineExceeded) {
			err = fmt.Errorf("no answer within %v", externalTimeout)
		}
		return nil, fmt.Errorf("external certificate authority %s: %w", shownURL(ca.URL), err)
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(io.LimitReader(resp.Body, maxExternalBytes+1))
	if err == nil && len(data) > maxExternalBytes {
		err = fmt.Errorf("its answer has more than %d bytes", maxExternalBytes)
	}
	var cert *x509.Certificate
	if err == nil {
		cert, err = readReply(resp.StatusCode, data)
	}
	if err != nil {
		return nil, fmt.Errorf("external certificate authority %s: %w", shownURL(ca.URL), err)
	}
	return cert, nil
}

func readReply(code int, data []byte) (*x509.Certificate, error) {
	var reply externalReply
	jsonErr := json.Unmarshal(data, &reply)
	switch {
	case jsonErr == nil && !reply.Success && len(reply.Errors) > 0:
		return nil, fmt.Errorf("refused (%d): %.*q", code, maxExternalText, reply.Errors[0].Message)
	case code != http.StatusOK:
		return nil, fmt.Errorf("answered %d %s: %.*q", code, http.StatusText(code), maxExternalText, data)
	case jsonErr != nil:
		return nil, fmt.Errorf("its answer is not JSON of the cfssl protocol: %w", jsonErr)
	case !reply.Success:
		return nil, errors.New("refused without a reason")
	}
	block, _ := pem.Decode([]byte(reply.Result.Certificate))
	if block == nil || block.Type != "CERTIFICATE" {
		return nil, errors.New("its answer holds no PEM certificate")
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("its certificate: %w", err)
	}
	return cert, nil
}

// checkExternals refuses names of authorities that could never be asked.
func checkExternals(list []*swarm.ExternalCA) error {
	bad := func(i int, format string, args ...any) error {
		return api.Errorf(errdefs.ErrInvalidArgument, "CAConfig.ExternalCAs[%d]%s", i, fmt.Sprintf(format, args...))
	}
	if len(list) > maxExternals {
		return api.Errorf(errdefs.ErrInvalidArgument, "CAConfig.ExternalCAs: %d external certificate authorities, at most %d are allowed", len(list), maxExternals)
	}
	for i, e := range list {
		if e == nil {
			return bad(i, " is null")
		}
		if p := strings.ToLower(string(e.Protocol)); p != "" && p != "cfssl" {
			return bad(i, ".Protocol %.64q: the only protocol is cfssl", e.Protocol)
		}
		u, err := url.Parse(e.URL)
		if err != nil || u.Scheme != "https" || u.Host == "" {
			return bad(i, ".URL %.200q: want https://host[:port]/path, as --external-ca protocol=cfssl,url=https://ca.example:8888/api/v1/cfssl/sign", shownURL(e.URL))
		}
		if len(e.Options) > 0 {
			return bad(i, ".Options: the cfssl protocol has none here: only protocol, url and cacert are understood")
		}
		if e.CACert != "" {
			if _, err := ParseRoot([]byte(e.CACert), nil); err != nil {
				return bad(i, ".CACert: %v", err)
			}
		}
	}
	return nil
}

// shownURL is a URL without what may be a password in it.
func shownURL(s string) string {
	u, err := url.Parse(s)
	if err != nil {
		return "(malformed)"
	}
	u.RawQuery = ""
	return u.Redacted()
}
