package dockerapi

import (
	"context"
	"net/http"

	"skein/manager/api"
)

// dependencyRoutes are docker's secrets and configs, which differ in their words only.
func (h *handlers) dependencyRoutes() []route {
	var out []route
	for _, kind := range []string{"secret", "config"} {
		d := dependencies{h, kind}
		out = append(out,
			route{"GET /" + kind + "s", d.list},
			route{"POST /" + kind + "s/create", d.create},
			route{"GET /" + kind + "s/{id}", d.inspect},
			route{"POST /" + kind + "s/{id}/update", d.update},
			route{"DELETE /" + kind + "s/{id}", d.remove},
		)
	}
	return out
}

type dependencies struct {
	h    *handlers
	kind string
}

func (d dependencies) list(w http.ResponseWriter, r *http.Request) error {
	f, err := filtersQuery(r.URL.Query(), "id", "name", "names", "label")
	if err != nil {
		return err
	}
	ctl, err := d.h.control(r.Context())
	if err != nil {
		return err
	}
	return writeList(r.Context(), w, listRequest(f, false), func(ctx context.Context, l *api.ListRequest) (*api.Objects, error) {
		return ctl.ListDependencies(ctx, &api.DependencyListRequest{Kind: d.kind, Filters: l.Filters, After: l.After, PageBytes: l.PageBytes})
	})
}

func (d dependencies) create(w http.ResponseWriter, r *http.Request) error {
	raw, err := readBody(w, r)
	if err != nil {
		return err
	}
	ctl, err := d.h.control(r.Context())
	if err != nil {
		return err
	}
	res, err := ctl.CreateDependency(r.Context(), &api.DependencyRequest{Kind: d.kind, SpecJson: raw})
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusCreated, map[string]string{"ID": res.GetId()})
}

func (d dependencies) inspect(w http.ResponseWriter, r *http.Request) error {
	ctl, err := d.h.control(r.Context())
	if err != nil {
		return err
	}
	obj, err := ctl.GetDependency(r.Context(), &api.DependencyRequest{Kind: d.kind, Ref: r.PathValue("id")})
	if err != nil {
		return err
	}
	return writeRaw(w, obj.GetJson())
}

func (d dependencies) update(w http.ResponseWriter, r *http.Request) error {
	raw, err := readBody(w, r)
	if err != nil {
		return err
	}
	version, err := versionQuery(r, d.kind)
	if err != nil {
		return err
	}
	ctl, err := d.h.control(r.Context())
	if err != nil {
		return err
	}
	_, err = ctl.UpdateDependency(r.Context(), &api.DependencyRequest{Kind: d.kind, Ref: r.PathValue("id"), Version: version, SpecJson: raw})
	return err
}

func (d dependencies) remove(w http.ResponseWriter, r *http.Request) error {
	ctl, err := d.h.control(r.Context())
	if err != nil {
		return err
	}
	if _, err := ctl.RemoveDependency(r.Context(), &api.DependencyRequest{Kind: d.kind, Ref: r.PathValue("id")}); err != nil {
		return err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}
