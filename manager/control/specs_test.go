package control_test

import (
	"encoding"
	"encoding/json"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/api/types/swarm"

	"skein/manager/api"
	"skein/manager/store"
)

// Every field of what clients send has rows here: values that are refused, or values that are taken as they are. The fields come from the
// types, so that a field of a newer API without a row fails TestEveryFieldHasARow. In paths, [] is an element and {} a value of a map.

// row is one value of one field. Refused values name what the error says; kept ones come back unchanged.
type row struct {
	value string   // JSON
	want  string   // in the error; empty: the value is taken
	with  []string // what must be around it: path=JSON
	at    string   // the path that the error names, if it is another
}

func bad(value, want string, with ...string) row { return row{value: value, want: want, with: with} }
func kept(value string, with ...string) row      { return row{value: value, with: with} }
func (r row) named(path string) row              { r.at = path; return r }

// kind is a kind of object that clients send.
type kind struct {
	object   string
	typ      reflect.Type
	base     string            // a good one
	scaffold map[string]string // what an element needs besides the field that is tried
	rows     map[string][]row
	// send creates or updates; show is what came of it.
	send func(f *fixture, spec []byte) error
	show func(f *fixture) []byte
	undo func(f *fixture)
}

func kinds() []kind {
	return []kind{
		{object: "service spec", typ: reflect.TypeFor[swarm.ServiceSpec](), base: `{"Name":"web","TaskTemplate":{"ContainerSpec":{"Image":"i"}}}`, scaffold: serviceScaffold(), rows: serviceRows(),
			send: func(f *fixture, spec []byte) error {
				_, err := f.srv.CreateService(f.t.Context(), &api.CreateRequest{SpecJson: spec})
				return err
			},
			show: func(f *fixture) []byte {
				return f.shown(f.srv.GetService(f.t.Context(), &api.GetRequest{Ref: f.only("service")}))
			},
			undo: func(f *fixture) {
				_, err := f.srv.RemoveService(f.t.Context(), &api.RemoveRequest{Ref: f.only("service")})
				f.ok(err)
			}},
		{object: "network spec", typ: reflect.TypeFor[network.CreateRequest](), base: `{"Name":"net"}`, rows: networkRows(),
			send: func(f *fixture, spec []byte) error {
				_, err := f.srv.CreateNetwork(f.t.Context(), &api.CreateRequest{SpecJson: spec})
				return err
			},
			undo: func(f *fixture) {
				_, err := f.srv.RemoveNetwork(f.t.Context(), &api.RemoveRequest{Ref: f.only("network")})
				f.ok(err)
			}},
		dependencyKind("secret", reflect.TypeFor[swarm.SecretSpec](), secretRows()),
		dependencyKind("config", reflect.TypeFor[swarm.ConfigSpec](), configRows()),
		{object: "node spec", typ: reflect.TypeFor[swarm.NodeSpec](), base: `{"Availability":"active","Role":"worker"}`, rows: nodeRows(),
			send: func(f *fixture, spec []byte) error {
				var n *store.Node
				f.st.View(func(tx store.ReadTx) { n = tx.Node(f.node[1]) })
				_, err := f.srv.UpdateNode(f.t.Context(), &api.UpdateRequest{Ref: n.Id, Version: n.Meta.Version, SpecJson: spec})
				return err
			},
			show: func(f *fixture) []byte { return f.shown(f.srv.GetNode(f.t.Context(), &api.GetRequest{Ref: f.node[1]})) }},
		{object: "cluster spec", typ: reflect.TypeFor[swarm.Spec](), base: `{"Name":"default","Labels":{}}`, rows: clusterRows(),
			send: func(f *fixture, spec []byte) error {
				var version uint64
				f.st.View(func(tx store.ReadTx) { version = tx.Cluster().Meta.Version })
				_, err := f.srv.UpdateCluster(f.t.Context(), &api.UpdateRequest{Version: version, SpecJson: spec})
				return err
			},
			show: func(f *fixture) []byte { return f.shown(f.srv.GetCluster(f.t.Context(), &api.GetRequest{})) }},
	}
}

func dependencyKind(name string, typ reflect.Type, rows map[string][]row) kind {
	return kind{object: name + " spec", typ: typ, base: `{"Name":"dep","Data":"eA=="}`, rows: rows,
		send: func(f *fixture, spec []byte) error {
			_, err := f.srv.CreateDependency(f.t.Context(), &api.DependencyRequest{Kind: name, SpecJson: spec})
			return err
		},
		show: func(f *fixture) []byte {
			return f.shown(f.srv.GetDependency(f.t.Context(), &api.DependencyRequest{Kind: name, Ref: f.only(name)}))
		},
		undo: func(f *fixture) {
			_, err := f.srv.RemoveDependency(f.t.Context(), &api.DependencyRequest{Kind: name, Ref: f.only(name)})
			f.ok(err)
		}}
}

func (f *fixture) shown(o *api.Object, err error) []byte {
	f.t.Helper()
	f.ok(err)
	return o.Json
}

// only is the id of the only object of a kind, besides those of the fixture.
func (f *fixture) only(kind string) (id string) {
	f.t.Helper()
	f.st.View(func(tx store.ReadTx) {
		switch kind {
		case "service":
			for _, s := range tx.Services() {
				id = s.Id
			}
		case "network":
			for _, n := range tx.Networks() {
				if !n.Ingress {
					id = n.Id
				}
			}
		default:
			for _, d := range tx.Dependencies(kind) {
				id = d.Id
			}
		}
	})
	return id
}

// leaf is a field that has no fields itself.
type leaf struct {
	path string
	typ  reflect.Type
}

func leaves(path string, t reflect.Type) []leaf {
	for t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	switch {
	case reflect.PointerTo(t).Implements(reflect.TypeFor[encoding.TextUnmarshaler]()):
	case t.Kind() == reflect.Slice && t.Elem().Kind() != reflect.Uint8:
		return leaves(path+"[]", t.Elem())
	case t.Kind() == reflect.Map:
		return leaves(path+"{}", t.Elem())
	case t.Kind() == reflect.Struct && t.NumField() > 0:
		var out []leaf
		for _, f := range reflect.VisibleFields(t) {
			if f.Anonymous || !f.IsExported() {
				continue
			}
			name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
			if name == "" {
				name = f.Name
			}
			out = append(out, leaves(strings.TrimPrefix(path+"."+name, "."), f.Type)...)
		}
		return out
	}
	return []leaf{{path, t}}
}

// object is a JSON object that is put together; set puts a value at a path, making what is on the way.
type object = map[string]any

func (k kind) build(t *testing.T, path, value string, with ...string) []byte {
	t.Helper()
	root := parse[object](t, k.base)
	for _, w := range with {
		p, v, ok := strings.Cut(w, "=")
		if !ok {
			t.Fatalf("%q: want path=JSON", w)
		}
		k.set(t, root, p, v)
	}
	k.set(t, root, path, value)
	b, err := json.Marshal(root)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func parse[T any](t *testing.T, text string) T {
	t.Helper()
	var v T
	if err := json.Unmarshal([]byte(text), &v); err != nil {
		t.Fatalf("%s: %v", text, err)
	}
	return v
}

func (k kind) set(t *testing.T, root object, path, value string) {
	t.Helper()
	if path == "" {
		return
	}
	var raw any = json.RawMessage(value)
	o, done := root, ""
	steps := strings.Split(path, ".")
	for i, step := range steps {
		done = strings.TrimPrefix(done+"."+step, ".")
		last := i == len(steps)-1
		name, element, isList := strings.Cut(step, "[]")
		key, _, isMap := strings.Cut(step, "{}")
		switch {
		case isList && last:
			for range strings.Count(element, "[]") {
				raw = []any{raw}
			}
			list, _ := o[name].([]any)
			o[name] = append(list, raw)
		case isList:
			list, _ := o[name].([]any)
			if len(list) == 0 {
				list = []any{k.element(t, done)}
				o[name] = list
			}
			o = list[0].(object)
		case isMap && last:
			m, _ := o[key].(object)
			if m == nil {
				m = object{}
				o[key] = m
			}
			if k, v, ok := strings.Cut(value, ":="); ok { // a name of its own
				m[k] = json.RawMessage(v)
			} else {
				m["k"] = raw
			}
		case last:
			o[step] = raw
		default:
			next, ok := o[step].(object)
			if !ok {
				next = k.element(t, done)
				o[step] = next
			}
			o = next
		}
	}
}

func (k kind) element(t *testing.T, path string) object {
	if s := k.scaffold[path]; s != "" {
		return parse[object](t, s)
	}
	return object{}
}

// concrete is the path as an error names it.
func concrete(path string) string {
	return strings.ReplaceAll(strings.ReplaceAll(path, "[]", "[0]"), "{}", "[")
}

func TestEveryFieldHasARow(t *testing.T) {
	for _, k := range kinds() {
		known := map[string]bool{}
		for _, l := range leaves("", k.typ) {
			known[l.path] = true
			if len(k.rows[l.path]) == 0 {
				t.Errorf("%s: the field %s (%s) has no row: refuse it by name, check it, or say that it is taken as it is", k.object, l.path, l.typ)
			}
		}
		for path := range k.rows {
			if !known[path] && !slices.ContainsFunc(slices.Collect(maps.Keys(known)), func(l string) bool { return strings.HasPrefix(l, path) }) {
				t.Errorf("%s: there is no field %s", k.object, path)
			}
		}
	}
}

// check sends one that must be refused and changes nothing.
func (k kind) refused(t *testing.T, f *fixture, spec []byte, path, want string) {
	t.Helper()
	before := f.st.Hash()
	err := k.send(f, spec)
	named := "invalid " + k.object + ": " + path
	switch {
	case err == nil:
		t.Errorf("%s: %.300s was taken, want it refused", path, spec)
		if k.undo != nil {
			k.undo(f)
		}
		return
	case !errdefs.IsInvalidArgument(err) && !errdefs.IsNotImplemented(err) && !errdefs.IsFailedPrecondition(err):
		t.Errorf("%.300s: an error of kind %T: %v", spec, err, err)
	case !strings.HasPrefix(err.Error(), named) || !strings.Contains(err.Error(), want):
		t.Errorf("%.300s:\n\tis refused with %s\n\twant            %s… and %q in it", spec, err, named, want)
	case len(err.Error()) > 1000:
		t.Errorf("%.300s: an error of %d bytes", spec, len(err.Error()))
	}
	if f.st.Hash() != before {
		t.Errorf("%.300s: was refused and changed the store", spec)
	}
}

func TestBadValues(t *testing.T) {
	for _, k := range kinds() {
		t.Run(k.object, func(t *testing.T) {
			f, n := setup(t), 0
			f.level(api.FeatureLevel)
			for _, path := range slices.Sorted(maps.Keys(k.rows)) {
				for _, r := range k.rows[path] {
					n++
					spec := k.build(t, path, r.value, r.with...)
					if r.want != "" {
						at := concrete(path)
						if r.at != "" {
							at = r.at
						}
						k.refused(t, f, spec, at, r.want)
						continue
					}
					k.taken(t, f, spec)
				}
			}
			t.Logf("%d rows", n)
		})
	}
}

// taken sends one that must be taken; what comes back has all that was sent.
func (k kind) taken(t *testing.T, f *fixture, spec []byte) {
	t.Helper()
	if err := k.send(f, spec); err != nil {
		t.Errorf("%.300s: %v; want it taken", spec, err)
		return
	}
	if k.show != nil {
		have := parse[struct{ Spec any }](t, string(k.show(f)))
		sent := parse[object](t, string(spec))
		if k.object == "secret spec" {
			delete(sent, "Data")
		}
		if diff := missing("", sent, have.Spec); diff != "" {
			t.Errorf("%.300s came back without %s", spec, diff)
		}
	}
	if k.undo != nil {
		k.undo(f)
	}
}

// missing is the path of what is in want and not in have. What is empty may be left out.
func missing(path string, want, have any) string {
	switch w := want.(type) {
	case object:
		h, _ := have.(object)
		for k, v := range w {
			if d := missing(path+"."+k, v, h[k]); d != "" {
				return d
			}
		}
		return ""
	case []any:
		h, _ := have.([]any)
		if len(h) != len(w) {
			return fmt.Sprintf("%s: %d elements, want %d", path, len(h), len(w))
		}
		for i := range w {
			if d := missing(path+"["+strconv.Itoa(i)+"]", w[i], h[i]); d != "" {
				return d
			}
		}
		return ""
	}
	if want == nil || want == "" || want == 0.0 || want == false || reflect.DeepEqual(want, have) {
		return ""
	}
	return fmt.Sprintf("%s = %v, it is %v", path, want, have)
}

// Whatever the field: another type, a name that is not known or written in other letters, or given twice, a NUL byte, half a character.
func TestBadShapes(t *testing.T) {
	for _, k := range kinds() {
		t.Run(k.object, func(t *testing.T) {
			f, n := setup(t), 0
			try := func(path, at, value, want string) {
				n++
				k.refused(t, f, k.build(t, path, value), at, want)
			}
			for _, l := range leaves("", k.typ) {
				at := concrete(l.path)
				for _, wrong := range wrongTypes(l.typ) {
					try(l.path, at, wrong[0], wrong[1])
				}
				if l.typ.Kind() == reflect.String {
					try(l.path, at, `"a\u0000b"`, "NUL byte")
					try(l.path, at, `"a\ud800b"`, "half of a surrogate pair")
				}
				step := l.path[strings.LastIndex(l.path, ".")+1:]
				if strings.ContainsAny(step, "[{") {
					continue
				}
				parent := strings.TrimSuffix(l.path, step)
				other := strings.ToLower(step[:1]) + step[1:]
				if other == step { // names in small letters
					other = strings.ToUpper(step)
				}
				try(parent+other, concrete(parent+other), "null", "it is spelled")
				try(parent+"Bogus", concrete(parent+"Bogus"), "1", `unknown field "Bogus"`)
				twice := k.build(t, parent+step+"TWICE", "null", l.path+"=null")
				k.refused(t, f, []byte(strings.Replace(string(twice), step+"TWICE", step, 1)), at, "given twice")
			}
			t.Logf("%d shapes", n)
		})
	}
}

// wrongTypes are values that a field of the type cannot have, and what is said of them.
func wrongTypes(t reflect.Type) [][2]string {
	switch t.Kind() {
	case reflect.String:
		return [][2]string{{"5", "= 5: want text"}, {"{}", "an object: want text"}, {"[]", "an array: want text"}, {"true", "true: want text"}}
	case reflect.Bool:
		return [][2]string{{`"true"`, `"true": want true or false`}, {"1", "want true or false"}}
	case reflect.Float32, reflect.Float64:
		return [][2]string{{`"1"`, "want a number"}, {"1e999", "want a number of at most"}}
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64:
		return [][2]string{{`"1"`, "want a whole number"}, {"1.5", "= 1.5: want a whole number"}, {"99999999999999999999", "want a whole number from -"}, {"[]", "an array: want"}}
	case reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		return [][2]string{{`"1"`, "want a whole number"}, {"-1", "= -1: want a whole number from 0 to"}, {"99999999999999999999", "want a whole number from 0"}, {"1.5", "want a whole"}}
	case reflect.Slice:
		return [][2]string{{`"?"`, "not base64"}, {"5", "want base64 text"}}
	case reflect.Struct:
		if t.NumField() == 0 {
			return [][2]string{{"5", "want an object"}, {`{"Bogus":1}`, "unknown field"}}
		}
		return [][2]string{{`"x"`, "want a"}, {"5", "want text"}}
	}
	return nil
}

func TestBadDocuments(t *testing.T) {
	for _, k := range kinds() {
		f := setup(t)
		limit := 1 << 20
		if k.object == "secret spec" || k.object == "config spec" {
			limit = 2 << 20
		}
		for _, tc := range []struct{ spec, want string }{
			{``, "ends too early"}, {`{`, "ends too early"}, {`{"Name":`, "ends too early"}, {`[]`, "want an object"}, {`"x"`, "want an object"}, {`null`, "not null"}, {`nul`, ""}, {`{"Name" "x"}`, "not valid JSON"},
			{k.base + "{}", "more after the JSON"}, {k.base + "]", ""}, {k.base + "x", ""}, {`{"Name":"` + "\xff" + `"}`, "not valid UTF-8 at byte 9"},
			{strings.Repeat(`{"Labels":`, 5000), "Labels"}, {strings.Repeat(`[`, 100_000), "want an object"}, {`{"Labels":{"a":` + strings.Repeat(`[`, 100_000), "want text"},
			{`{"Name":"` + strings.Repeat("x", limit) + `"}`, "more than the limit"}, {`{"Labels":{` + strings.Repeat(`"a":"",`, 2) + `"b":""}}`, `Labels["a"]`},
		} {
			k.refused(t, f, []byte(tc.spec), "", tc.want)
		}
		many := map[string]string{}
		for i := range 10_001 {
			many[strconv.Itoa(i)] = ""
		}
		b, _ := json.Marshal(many)
		k.refused(t, f, []byte(`{"Labels":`+string(b)+`}`), "Labels", "more than 10000 names")
	}
	k, f := kinds()[0], setup(t)
	k.refused(t, f, k.build(t, "TaskTemplate.ContainerSpec.Mounts", "["+strings.Repeat("{},", 20_000)+"{}]"), "TaskTemplate.ContainerSpec.Mounts", "more than 10000 elements")
}

// An update that is refused leaves the service as it was.
func TestUpdatesOfBadSpecs(t *testing.T) {
	k, f := kinds()[0], setup(t)
	f.create(k.base)
	n := 0
	for path, rows := range k.rows {
		for _, r := range rows {
			if r.want == "" || path == "Name" {
				continue
			}
			n++
			before := f.st.Hash()
			_, err := f.srv.UpdateService(t.Context(), &api.UpdateRequest{Ref: "web", Version: f.service("web").Version.Index, SpecJson: k.build(t, path, r.value, r.with...)})
			if err == nil || !strings.Contains(err.Error(), r.want) || f.st.Hash() != before {
				t.Errorf("%s = %s: %v; want it refused with %q and nothing changed", path, r.value, err, r.want)
			}
		}
	}
	t.Logf("%d updates", n)
}
