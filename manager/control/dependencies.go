package control

import (
	"bytes"
	"context"
	"encoding/json"
	"path"
	"regexp"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/swarm"
	"google.golang.org/protobuf/proto"

	"skein/manager/api"
	"skein/manager/store"
)

const (
	maxDependencyName = 64
	maxDependencies   = 500            // of one service
	maxDependencySpec = 2 << 20        // bytes of JSON: the content in base64, and labels
	templatingGolang  = "golang"       // the only templating driver there is
	secretsDir        = "/run/secrets" // where relative targets of secrets are
)

var dependencyName = regexp.MustCompile(`^[a-zA-Z0-9]+([a-zA-Z0-9-_.]*[a-zA-Z0-9])?$`)

// dependencySpec is what swarm.SecretSpec and swarm.ConfigSpec have in common, and more than a config has.
type dependencySpec struct {
	swarm.Annotations
	Data       []byte        `json:",omitempty"`
	Driver     *swarm.Driver `json:",omitempty"`
	Templating *swarm.Driver `json:",omitempty"`
}

func checkKind(kind string) error {
	if kind != store.KindSecret && kind != store.KindConfig {
		return invalid("unknown kind of dependency %q: want secret or config", kind)
	}
	return nil
}

func decodeDependency(kind string, raw []byte) (*dependencySpec, error) {
	if err := checkKind(kind); err != nil {
		return nil, err
	}
	spec := &dependencySpec{}
	if err := decodeUpTo(kind+" spec", raw, maxDependencySpec, spec); err != nil {
		return nil, err
	}
	switch {
	case len(spec.Name) > maxDependencyName || !dependencyName.MatchString(spec.Name):
		return nil, invalid("invalid %s name %.80q: want 1 to %d letters, digits, - _ and . with a letter or digit at both ends", kind, spec.Name, maxDependencyName)
	case spec.Driver != nil && spec.Driver.Name != "":
		return nil, notBuilt("%s %s: driver %q", kind, spec.Name, spec.Driver.Name)
	case spec.Templating != nil && spec.Templating.Name != "" && spec.Templating.Name != templatingGolang:
		return nil, invalid("%s %s: templating driver %q is not known: want %s", kind, spec.Name, spec.Templating.Name, templatingGolang)
	}
	return spec, validateLabels(kind+" "+spec.Name, spec.Labels)
}

// CreateDependency stores a new secret or config.
func (s *Server) CreateDependency(ctx context.Context, r *api.DependencyRequest) (*api.Created, error) {
	spec, err := decodeDependency(r.Kind, r.SpecJson)
	if err != nil {
		return nil, err
	}
	limit := store.MaxConfigBytes
	if r.Kind == store.KindSecret {
		limit = store.MaxSecretBytes
	}
	if len(spec.Data) == 0 || len(spec.Data) >= limit {
		return nil, invalid("%s data must be larger than 0 and less than %d bytes: %s has %d", r.Kind, limit, spec.Name, len(spec.Data))
	}
	rec := &api.DependencyRecord{Id: api.NewID(), Kind: r.Kind, Name: spec.Name, Data: spec.Data}
	spec.Data = nil
	if rec.SpecJson, err = encode(spec); err != nil {
		return nil, err
	}
	err = s.write(ctx, func(tx store.WriteTx) error {
		if d, err := tx.FindDependency(r.Kind, rec.Name); err == nil && d.Name == rec.Name {
			return api.Errorf(errdefs.ErrAlreadyExists, "%s %s already exists", r.Kind, rec.Name)
		}
		tx.Add(expect(rec.Kind, rec.Id, 0))
		tx.Add(&api.Change{Kind: &api.Change_PutDependency{PutDependency: rec}})
		return nil
	})
	if err != nil {
		return nil, err
	}
	s.log.Info(r.Kind+" created", "id", rec.Id, "name", rec.Name)
	return &api.Created{Id: rec.Id}, nil
}

// UpdateDependency changes the labels of a secret or config.
func (s *Server) UpdateDependency(ctx context.Context, r *api.DependencyRequest) (*api.Empty, error) {
	spec, err := decodeDependency(r.Kind, r.SpecJson)
	if err != nil {
		return nil, err
	}
	return &api.Empty{}, s.write(ctx, func(tx store.WriteTx) error {
		old, err := tx.FindDependency(r.Kind, r.Ref)
		if err != nil {
			return err
		}
		if err := checkVersion(r.Kind+" "+old.Name, r.Version, old.Meta.GetVersion()); err != nil {
			return err
		}
		var have dependencySpec
		if err := json.Unmarshal(old.SpecJson, &have); err != nil {
			return api.Errorf(errdefs.ErrDataLoss, "%s %s: its spec is not JSON: %v", r.Kind, old.Name, err)
		}
		if spec.Name != old.Name || (spec.Data != nil && !bytes.Equal(spec.Data, old.Data)) || !sameDriver(spec.Templating, have.Templating) {
			return invalid("%s %s: only updates to Labels are allowed", r.Kind, old.Name)
		}
		have.Labels = spec.Labels
		rec := proto.Clone(old).(*api.DependencyRecord)
		if rec.SpecJson, err = encode(have); err != nil {
			return err
		}
		tx.Add(expect(r.Kind, old.Id, r.Version))
		tx.Add(&api.Change{Kind: &api.Change_PutDependency{PutDependency: rec}})
		return nil
	})
}

func sameDriver(a, b *swarm.Driver) bool {
	name := func(d *swarm.Driver) string {
		if d == nil {
			return ""
		}
		return d.Name
	}
	return name(a) == name(b)
}

// RemoveDependency removes a secret or config that no service needs.
func (s *Server) RemoveDependency(ctx context.Context, r *api.DependencyRequest) (*api.Empty, error) {
	if err := checkKind(r.Kind); err != nil {
		return nil, err
	}
	var name string
	err := s.write(ctx, func(tx store.WriteTx) error {
		d, err := tx.FindDependency(r.Kind, r.Ref)
		if err != nil {
			return err
		}
		name = d.Name
		if users := store.DependencyUsers(tx, d.Id); len(users) > 0 {
			return store.InUse(d, users)
		}
		tx.Add(&api.Change{Kind: &api.Change_DeleteDependency{DeleteDependency: &api.DependencyRef{Kind: r.Kind, Id: d.Id}}})
		return nil
	})
	if err != nil {
		return nil, err
	}
	s.log.Info(r.Kind+" removed", "name", name)
	return &api.Empty{}, nil
}

// GetDependency shows one secret, without its content, or one config.
func (s *Server) GetDependency(ctx context.Context, r *api.DependencyRequest) (*api.Object, error) {
	if err := checkKind(r.Kind); err != nil {
		return nil, err
	}
	var d *store.Dependency
	err := s.read(ctx, func(tx store.ReadTx) (err error) {
		d, err = tx.FindDependency(r.Kind, r.Ref)
		return err
	})
	if err != nil {
		return nil, err
	}
	b, err := dependencyJSON(d)
	return &api.Object{Json: b}, err
}

// ListDependencies shows the secrets or the configs that match all filters.
func (s *Server) ListDependencies(ctx context.Context, r *api.DependencyListRequest) (*api.Objects, error) {
	if err := checkKind(r.Kind); err != nil {
		return nil, err
	}
	f, err := newFilters(r.Filters, "id", "name", "names", "label")
	if err != nil {
		return nil, err
	}
	out := &api.Objects{}
	err = s.read(ctx, func(tx store.ReadTx) error {
		for _, d := range tx.Dependencies(r.Kind) {
			var spec dependencySpec
			if err := json.Unmarshal(d.SpecJson, &spec); err != nil {
				return api.Errorf(errdefs.ErrDataLoss, "%s %s: its spec is not JSON: %v", d.Kind, d.Name, err)
			}
			if !f.prefix("id", d.Id) || !f.prefix("name", d.Name) || !f.exact("names", d.Name) || !f.labels("label", spec.Labels) {
				continue
			}
			b, err := dependencyJSON(d)
			if err != nil {
				return err
			}
			out.Json = append(out.Json, b)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return out, nil
}

func dependencyJSON(d *store.Dependency) ([]byte, error) {
	if d.Kind == store.KindSecret {
		o := swarm.Secret{ID: d.Id, Meta: meta(d.Meta)}
		if err := json.Unmarshal(d.SpecJson, &o.Spec); err != nil {
			return nil, api.Errorf(errdefs.ErrDataLoss, "secret %s: its spec is not JSON: %v", d.Name, err)
		}
		return encode(o)
	}
	o := swarm.Config{ID: d.Id, Meta: meta(d.Meta)}
	if err := json.Unmarshal(d.SpecJson, &o.Spec); err != nil {
		return nil, api.Errorf(errdefs.ErrDataLoss, "config %s: its spec is not JSON: %v", d.Name, err)
	}
	o.Spec.Data = d.Data
	return encode(o)
}

// validateDependencies checks what a container spec says of secrets and configs; whether they exist is Apply's business.
func validateDependencies(c *swarm.ContainerSpec) error {
	if n := len(c.Secrets) + len(c.Configs); n > maxDependencies {
		return invalid("ContainerSpec: %d secrets and configs are more than the limit of %d", n, maxDependencies)
	}
	targets := map[string]string{}
	target := func(kind, name, file, dir, uid, gid string) error {
		if file == "" {
			return invalid("malformed %s reference, no target given: %s", kind, name)
		}
		at, below := file, "/"
		if !path.IsAbs(at) {
			at, below = path.Join(dir, at), strings.TrimSuffix(dir, "/")+"/"
		}
		if at = path.Clean(at); at == "/" || at == dir || !strings.HasPrefix(at, below) {
			return invalid("%s %s: target %q is not a file below %s", kind, name, file, dir)
		}
		if other, taken := targets[at]; taken {
			return invalid("%s references '%s' and '%s' have a conflicting target: '%s'", kind, other, name, file)
		}
		targets[at] = name
		for _, id := range []string{uid, gid} {
			if _, err := strconv.ParseUint(id, 10, 32); id != "" && err != nil {
				return invalid("%s %s: owner %q is not a numeric id", kind, name, id)
			}
		}
		return nil
	}
	for _, r := range c.Secrets {
		switch {
		case r == nil || r.SecretID == "" || r.SecretName == "":
			return invalid("malformed secret reference: want SecretID and SecretName")
		case r.File == nil:
			return invalid("malformed secret reference, no target provided: %s", r.SecretName)
		}
		if err := target(store.KindSecret, r.SecretName, r.File.Name, secretsDir, r.File.UID, r.File.GID); err != nil {
			return err
		}
	}
	for _, r := range c.Configs {
		switch {
		case r == nil || r.ConfigID == "" || r.ConfigName == "":
			return invalid("malformed config reference: want ConfigID and ConfigName")
		case r.Runtime != nil:
			return notBuilt("config %s as credential spec", r.ConfigName)
		case r.File == nil:
			return invalid("malformed config reference, no target provided: %s", r.ConfigName)
		}
		if err := target(store.KindConfig, r.ConfigName, r.File.Name, "/", r.File.UID, r.File.GID); err != nil {
			return err
		}
	}
	return nil
}
