package authz

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"net"
	"slices"
	"testing"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"skein/manager/api"
)

// services are all that any node registers. A new service belongs here and into the table.
var services = []*grpc.ServiceDesc{
	&api.CA_ServiceDesc, &api.Control_ServiceDesc, &api.Membership_ServiceDesc, &api.Dispatcher_ServiceDesc, &api.Agent_ServiceDesc,
}

func allMethods() []string {
	var out []string
	for _, d := range services {
		for _, m := range d.Methods {
			out = append(out, "/"+d.ServiceName+"/"+m.MethodName)
		}
		for _, s := range d.Streams {
			out = append(out, "/"+d.ServiceName+"/"+s.StreamName)
		}
	}
	return out
}

func TestTableIsComplete(t *testing.T) {
	table, all := rules(), allMethods()
	for _, m := range all {
		if _, ok := table[m]; !ok {
			t.Errorf("%s has no rule", m)
		}
	}
	for m, r := range table {
		if !slices.Contains(all, m) {
			t.Errorf("rule for %s, which no service has", m)
		}
		if r.who < anyone || r.who > managers {
			t.Errorf("%s: rule allows nobody in particular (%d)", m, r.who)
		}
	}
}

var (
	managerID = "0000000000000000000manager"[1:]
	workerID  = "00000000000000000000worker"[1:]
	goneID    = "0000000000000000000removed"[1:]
	demotedID = "0000000000000000000demoted"[1:]
	promoID   = "000000000000000000promoted"[1:]
)

func authorizer() *Authorizer {
	return New(Config{Role: func(_ context.Context, who api.NodeIdentity) (string, error) {
		id := who.NodeID
		switch id {
		case managerID, promoID:
			return api.RoleManager, nil
		case workerID, demotedID:
			return api.RoleWorker, nil
		}
		return "", api.Errorf(errdefs.ErrPermissionDenied, "node %s was removed", id)
	}})
}

// as is the context of a request over a connection with this certificate; none if nodeID is empty.
func as(nodeID, role string, pairs ...string) context.Context {
	state := tls.ConnectionState{}
	if nodeID != "" {
		cert := &x509.Certificate{Subject: pkix.Name{CommonName: nodeID, OrganizationalUnit: []string{api.CertRole(role)}, Organization: []string{"c"}}}
		state.PeerCertificates = []*x509.Certificate{cert}
		state.VerifiedChains = [][]*x509.Certificate{{cert}}
	}
	ctx := peer.NewContext(context.Background(), &peer.Peer{Addr: &net.TCPAddr{IP: net.IPv4(192, 0, 2, 7), Port: 999}, AuthInfo: credentials.TLSInfo{State: state}})
	return metadata.NewIncomingContext(ctx, metadata.Pairs(pairs...))
}

func call(ctx context.Context, method string, req any) (Caller, error) {
	var seen Caller
	_, err := authorizer().Unary()(ctx, req, &grpc.UnaryServerInfo{FullMethod: method}, func(ctx context.Context, _ any) (any, error) {
		seen, _ = CallerFrom(ctx)
		return nil, nil
	})
	return seen, err
}

// allowed lists what each kind of caller may call; everything else must be denied to it.
func TestEvilCallers(t *testing.T) {
	joining := []string{api.CA_GetRootCA_FullMethodName, api.CA_IssueCertificate_FullMethodName}
	node := append([]string{api.CA_RenewCertificate_FullMethodName, api.Dispatcher_Session_FullMethodName,
		api.Control_NetStatus_FullMethodName, api.Control_NetCheck_FullMethodName}, joining...)
	for _, tc := range []struct {
		name    string
		ctx     context.Context
		allowed []string
		code    codes.Code
	}{
		{"stranger", as("", ""), joining, codes.Unauthenticated},
		{"worker", as(workerID, api.RoleWorker), node, codes.PermissionDenied},
		{"demoted manager with its old certificate", as(demotedID, api.RoleManager), node, codes.PermissionDenied},
		{"promoted worker with its old certificate", as(promoID, api.RoleWorker), node, codes.PermissionDenied},
		{"removed manager", as(goneID, api.RoleManager), joining, codes.PermissionDenied},
	} {
		for _, m := range allMethods() {
			_, err := call(tc.ctx, m, &api.MemberRequest{NodeId: tc.name})
			if slices.Contains(tc.allowed, m) {
				if err != nil {
					t.Errorf("%s: %s: %v, want allowed", tc.name, m, err)
				}
			} else if status.Code(err) != tc.code {
				t.Errorf("%s: %s: %v, want %v", tc.name, m, err, tc.code)
			}
		}
	}
	for _, m := range allMethods() {
		if c, err := call(as(managerID, api.RoleManager), m, &api.MemberRequest{NodeId: managerID}); err != nil || c.NodeID != managerID || c.Addr != "192.0.2.7" {
			t.Errorf("manager: %s: %+v, %v", m, c, err)
		}
	}
	if _, err := call(as(managerID, api.RoleManager), "/skein.api.v1.Control/New", nil); status.Code(err) != codes.PermissionDenied {
		t.Errorf("a method without a rule: %v, want denied", err)
	}
	if _, err := call(as(managerID, api.RoleManager), api.Membership_Leave_FullMethodName, &api.MemberRequest{NodeId: workerID}); status.Code(err) != codes.PermissionDenied {
		t.Errorf("a manager spoke for another: %v, want denied", err)
	}
}

// TestAttachForItselfOnly: a worker asks for what its own containers hold, and for nobody else's.
func TestAttachForItselfOnly(t *testing.T) {
	for _, tc := range []struct {
		name, id, speaksFor string
		want                codes.Code
	}{
		{"itself", workerID, workerID, codes.OK}, {"another", workerID, managerID, codes.PermissionDenied}, {"nobody", workerID, "", codes.PermissionDenied},
		{"a manager for a worker", managerID, workerID, codes.PermissionDenied}, {"a removed node", goneID, goneID, codes.PermissionDenied},
	} {
		_, err := call(as(tc.id, api.RoleWorker), api.Control_Attach_FullMethodName, &api.AttachRequest{NodeId: tc.speaksFor})
		_, list := call(as(tc.id, api.RoleWorker), api.Control_ListNodeNetworks_FullMethodName, &api.NodeNetworksRequest{NodeId: tc.speaksFor})
		if status.Code(err) != tc.want || status.Code(list) != tc.want {
			t.Errorf("%s: %v, %v, want %v", tc.name, err, list, tc.want)
		}
	}
}

func TestUnverifiedCertificateIsDenied(t *testing.T) {
	ctx := as(managerID, api.RoleManager)
	p, _ := peer.FromContext(ctx)
	info := p.AuthInfo.(credentials.TLSInfo)
	info.State.VerifiedChains = nil
	p.AuthInfo = info
	if _, err := call(ctx, api.Control_ListNodes_FullMethodName, nil); status.Code(err) != codes.Unauthenticated {
		t.Errorf("%v, want unauthenticated", err)
	}
	if _, err := call(context.Background(), api.CA_GetRootCA_FullMethodName, nil); status.Code(err) != codes.Unauthenticated {
		t.Errorf("without a peer: %v, want unauthenticated", err)
	}
}

func TestForwardedIdentity(t *testing.T) {
	carry := func(c Caller) []string {
		md, _ := metadata.FromOutgoingContext(Outgoing(context.Background(), c))
		var pairs []string
		for k, vs := range md {
			for _, v := range vs {
				pairs = append(pairs, k, v)
			}
		}
		return pairs
	}
	id := func(node, role string) Caller {
		return Caller{NodeIdentity: api.NodeIdentity{NodeID: node, Role: role}, Addr: "192.0.2.99"}
	}
	asManager := carry(id(managerID, api.RoleManager))
	list := api.Control_ListNodes_FullMethodName
	for _, tc := range []struct {
		name   string
		ctx    context.Context
		method string
		want   codes.Code
	}{
		{"manager speaks for manager", as(managerID, api.RoleManager, asManager...), list, codes.OK},
		{"manager speaks for worker", as(managerID, api.RoleManager, carry(id(workerID, api.RoleWorker))...), list, codes.PermissionDenied},
		{"manager speaks for removed node", as(managerID, api.RoleManager, carry(id(goneID, api.RoleManager))...), list, codes.PermissionDenied},
		{"manager speaks for a worker that claims more", as(managerID, api.RoleManager, carry(id(workerID, api.RoleManager))...), list, codes.PermissionDenied},
		{"manager speaks for stranger", as(managerID, api.RoleManager, carry(Caller{Addr: "192.0.2.99"})...), list, codes.Unauthenticated},
		{"manager lets stranger join", as(managerID, api.RoleManager, carry(Caller{Addr: "192.0.2.99"})...), api.CA_IssueCertificate_FullMethodName, codes.OK},
		{"worker forges", as(workerID, api.RoleWorker, asManager...), list, codes.PermissionDenied},
		{"worker forges on an open method", as(workerID, api.RoleWorker, asManager...), api.CA_GetRootCA_FullMethodName, codes.PermissionDenied},
		{"demoted manager forges", as(demotedID, api.RoleManager, asManager...), list, codes.PermissionDenied},
		{"stranger forges", as("", "", asManager...), list, codes.PermissionDenied},
		{"role missing", as(managerID, api.RoleManager, mdNode, managerID, mdAddr, "192.0.2.1"), list, codes.PermissionDenied},
		{"only address", as(managerID, api.RoleManager, mdAddr, "192.0.2.1"), list, codes.PermissionDenied},
		{"node twice", as(managerID, api.RoleManager, append(slices.Clone(asManager), mdNode, managerID)...), list, codes.PermissionDenied},
		{"bad node", as(managerID, api.RoleManager, mdNode, "x", mdRole, "manager", mdAddr, ""), list, codes.PermissionDenied},
		{"bad address", as(managerID, api.RoleManager, mdNode, managerID, mdRole, "manager", mdAddr, "<script>"), list, codes.PermissionDenied},
	} {
		c, err := call(tc.ctx, tc.method, nil)
		if status.Code(err) != tc.want {
			t.Errorf("%s: %v, want %v", tc.name, err, tc.want)
		}
		if err == nil && (!c.Forwarded || c.Addr != "192.0.2.99") {
			t.Errorf("%s: handler saw %+v, want the first caller, marked as forwarded", tc.name, c)
		}
	}
}
