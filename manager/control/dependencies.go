package control

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io/fs"
	"math"
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
	if kind == store.KindConfig {
		var c swarm.ConfigSpec
		if err := decodeUpTo("config spec", raw, maxDependencySpec, &c); err != nil {
			return nil, err
		}
		spec.Annotations, spec.Data, spec.Templating = c.Annotations, c.Data, c.Templating
	} else {
		var c swarm.SecretSpec
		if err := decodeUpTo("secret spec", raw, maxDependencySpec, &c); err != nil {
			return nil, err
		}
		*spec = dependencySpec(c)
	}
	a := at{object: kind + " spec"}
	switch {
	case len(spec.Name) > maxDependencyName || !dependencyName.MatchString(spec.Name):
		return nil, a.field("Name").bad(spec.Name, "invalid %s name: want 1 to %d letters, digits, - _ and . with a letter or digit at both ends", kind, maxDependencyName)
	case spec.Driver != nil && spec.Driver.Name != "":
		return nil, a.field("Driver.Name").unbuilt(spec.Driver.Name, "secrets of a driver")
	case spec.Driver != nil && len(spec.Driver.Options) > 0:
		return nil, a.field("Driver.Options").bad(spec.Driver.Options, "there are options, but no driver")
	case spec.Templating != nil && spec.Templating.Name != "" && spec.Templating.Name != templatingGolang:
		return nil, a.field("Templating.Name").bad(spec.Templating.Name, "templating driver is not known: want %s", templatingGolang)
	case spec.Templating != nil && len(spec.Templating.Options) > 0:
		return nil, a.field("Templating.Options").bad(spec.Templating.Options, "templating has no options")
	}
	return spec, validateOptions(a.field("Labels"), kind, spec.Labels)
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
		return nil, at{object: r.Kind + " spec"}.field("Data").refuse(errdefs.ErrInvalidArgument, fmt.Sprintf(" (%d bytes)", len(spec.Data)),
			fmt.Sprintf("%s data must be larger than 0 and less than %d bytes", r.Kind, limit))
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
	p := newPage(r.After, r.PageBytes)
	err = s.read(ctx, func(tx store.ReadTx) error {
		for _, d := range behind(tx.Dependencies(r.Kind), r.After, func(d *store.Dependency) string { return d.Id }) {
			var spec dependencySpec
			if err := json.Unmarshal(d.SpecJson, &spec); err != nil {
				return api.Errorf(errdefs.ErrDataLoss, "%s %s: its spec is not JSON: %v", d.Kind, d.Name, err)
			}
			if !f.prefix("id", d.Id) || !f.prefix("name", d.Name) || !f.exact("names", d.Name) || !f.labels("label", spec.Labels) {
				continue
			}
			if p.full() {
				return nil
			}
			b, err := dependencyJSON(d)
			if err != nil {
				return err
			}
			p.addJSON(d.Id, b)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return p.out, nil
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
func validateDependencies(a at, c *swarm.ContainerSpec) error {
	if n := len(c.Secrets) + len(c.Configs); n > maxDependencies {
		return a.field("Secrets").bad(c.Secrets, "%d secrets and configs are more than the limit of %d", n, maxDependencies)
	}
	targets := map[string]string{}
	for i, r := range c.Secrets {
		a := a.field("Secrets").index(i)
		switch {
		case r == nil || r.SecretID == "":
			return a.field("SecretID").missing("malformed secret reference: want SecretID and SecretName")
		case r.SecretName == "":
			return a.field("SecretName").missing("malformed secret reference: want SecretID and SecretName")
		case r.File == nil:
			return a.field("File").missing("malformed secret reference, no target provided: %s", clip(r.SecretName))
		}
		f := fileTarget{kind: store.KindSecret, name: r.SecretName, dir: secretsDir, file: r.File.Name, uid: r.File.UID, gid: r.File.GID, mode: r.File.Mode}
		if err := f.validate(a, targets); err != nil {
			return err
		}
	}
	for i, r := range c.Configs {
		a := a.field("Configs").index(i)
		switch {
		case r == nil || r.ConfigID == "":
			return a.field("ConfigID").missing("malformed config reference: want ConfigID and ConfigName")
		case r.ConfigName == "":
			return a.field("ConfigName").missing("malformed config reference: want ConfigID and ConfigName")
		case r.Runtime != nil:
			return a.field("Runtime").unbuilt(*r.Runtime, "a config as credential spec")
		case r.File == nil:
			return a.field("File").missing("malformed config reference, no target provided: %s", clip(r.ConfigName))
		}
		f := fileTarget{kind: store.KindConfig, name: r.ConfigName, dir: "/", file: r.File.Name, uid: r.File.UID, gid: r.File.GID, mode: r.File.Mode}
		if err := f.validate(a, targets); err != nil {
			return err
		}
	}
	return nil
}

// fileTarget is where and how a task finds a secret or config.
type fileTarget struct {
	kind, name, dir, file, uid, gid string
	mode                            fs.FileMode
}

// validate checks one of them; targets are those of the ones before.
func (f fileTarget) validate(a at, targets map[string]string) error {
	a = a.field("File")
	if f.file == "" {
		return a.field("Name").missing("malformed %s reference, no target given: %s", f.kind, clip(f.name))
	}
	p, below := f.file, "/"
	if !path.IsAbs(p) {
		p, below = path.Join(f.dir, p), strings.TrimSuffix(f.dir, "/")+"/"
	}
	if p = path.Clean(p); p == "/" || p == f.dir || !strings.HasPrefix(p, below) || strings.Contains(p, "\n") {
		return a.field("Name").bad(f.file, "the target of %s %s is not a file below %s", f.kind, clip(f.name), f.dir)
	}
	if other, taken := targets[p]; taken {
		return a.field("Name").bad(f.file, "%s references '%s' and '%s' have a conflicting target: '%s'", f.kind, clip(other), clip(f.name), clip(f.file))
	}
	targets[p] = f.name
	for _, x := range []struct{ field, id string }{{"UID", f.uid}, {"GID", f.gid}} {
		if n, err := strconv.ParseUint(x.id, 10, 32); x.id != "" && (err != nil || n == math.MaxUint32) {
			return a.field(x.field).bad(x.id, "not a numeric id: want 0 to %d", uint32(math.MaxUint32-1))
		}
	}
	if f.mode&^fs.ModePerm != 0 {
		return a.field("Mode").bad(uint32(f.mode), "want the permissions of a file, 0 to 511 (0777)")
	}
	return nil
}
