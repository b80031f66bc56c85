package control

import (
	"bytes"
	"encoding"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net/netip"
	"reflect"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/containerd/errdefs"
)

// maxElements bounds an array or map of a spec: an element of three bytes may be a large struct in memory.
const maxElements = 10_000

// strict checks JSON against the type it is to become, before anything of it does: no field that is unknown, given twice, or spelled in
// other letters, no value of another type or out of its type's range, no text that is no text, nothing behind the end. Go's own decoder
// takes the last of two, matches names without regard to case and replaces broken text. How deep it looks is bounded by the type.
type strict struct {
	data []byte
	dec  *json.Decoder
}

func checkStrict(object string, data []byte, t reflect.Type) error {
	root := at{object: object}
	if !utf8.Valid(data) {
		return root.bad(nil, "the JSON is not valid UTF-8 at byte %d", invalidUTF8(data))
	}
	s := &strict{data: data, dec: json.NewDecoder(bytes.NewReader(data))}
	s.dec.UseNumber()
	if err := s.value(root, t); err != nil {
		return err
	}
	if _, err := s.dec.Token(); !errors.Is(err, io.EOF) {
		return root.bad(nil, "there is more after the JSON object: want one object and nothing behind it")
	}
	return nil
}

func invalidUTF8(data []byte) int {
	for i := 0; i < len(data); {
		r, n := utf8.DecodeRune(data[i:])
		if r == utf8.RuneError && n == 1 {
			return i
		}
		i += n
	}
	return len(data)
}

// token is the next token. What it looks like in the input tells whether an escape named half a character.
func (s *strict) token(a at) (json.Token, error) {
	before := s.dec.InputOffset()
	tok, err := s.dec.Token()
	if err != nil {
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return nil, at{object: a.object}.bad(nil, "the JSON ends too early")
		}
		return nil, at{object: a.object}.bad(nil, "not valid JSON: %s (at byte %d)", strings.TrimPrefix(err.Error(), "json: "), s.dec.InputOffset())
	}
	if text, ok := tok.(string); ok {
		switch raw := s.data[before:s.dec.InputOffset()]; {
		case strings.ContainsRune(text, utf8.RuneError) && !bytes.ContainsRune(raw, utf8.RuneError):
			return nil, a.bad(text, "the text is not valid Unicode: half of a surrogate pair")
		case strings.Contains(text, "\x00"):
			return nil, a.bad(text, "the text has a NUL byte in it: take it out")
		}
	}
	return tok, nil
}

func (s *strict) value(a at, t reflect.Type) error {
	tok, err := s.token(a)
	if err != nil {
		return err
	}
	if tok == nil { // null: as if it were not there
		if a.path == "" {
			return a.bad(nil, "want a JSON object, not null")
		}
		return nil
	}
	for t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	if reflect.PointerTo(t).Implements(reflect.TypeFor[encoding.TextUnmarshaler]()) {
		return s.text(a, t, tok)
	}
	switch t.Kind() {
	case reflect.Struct:
		if tok != json.Delim('{') {
			return wrongType(a, tok, "an object")
		}
		return s.object(a, t)
	case reflect.Map:
		if tok != json.Delim('{') {
			return wrongType(a, tok, "an object")
		}
		return s.members(a, t.Elem())
	case reflect.Slice:
		if t.Elem().Kind() == reflect.Uint8 {
			return s.bytes(a, tok)
		}
		if tok != json.Delim('[') {
			return wrongType(a, tok, "an array")
		}
		return s.elements(a, t.Elem())
	}
	return scalar(a, tok, t)
}

// object checks the fields of a struct.
func (s *strict) object(a at, t reflect.Type) error {
	fields := jsonFields(t)
	seen := map[string]bool{}
	for s.dec.More() {
		tok, err := s.token(a)
		if err != nil {
			return err
		}
		name := tok.(string)
		ft, known := fields[name]
		switch {
		case !known:
			return unknownField(a, name, fields)
		case seen[name]:
			return a.field(name).refuse(errdefs.ErrInvalidArgument, "", "the field is given twice: give it once")
		}
		seen[name] = true
		if err := s.value(a.field(name), ft); err != nil {
			return err
		}
	}
	_, err := s.token(a)
	return err
}

func unknownField(a at, name string, fields map[string]reflect.Type) error {
	for known := range fields {
		if strings.EqualFold(known, name) {
			return a.field(name).refuse(errdefs.ErrInvalidArgument, "", fmt.Sprintf("unknown field %s: it is spelled %q", shorten(name), known))
		}
	}
	if len(name) > shownBytes {
		name = name[:shownBytes] + "…"
	}
	return a.field(name).refuse(errdefs.ErrInvalidArgument, "", fmt.Sprintf("unknown field %q: this version of Skein does not know it; take it out", name))
}

// members checks a map with names of the client's choice.
func (s *strict) members(a at, t reflect.Type) error {
	seen := map[string]bool{}
	for s.dec.More() {
		tok, err := s.token(a)
		if err != nil {
			return err
		}
		name := tok.(string)
		if seen[name] {
			return a.key(name).refuse(errdefs.ErrInvalidArgument, "", "the name is given twice: give it once")
		}
		if seen[name] = true; len(seen) > maxElements {
			return a.refuse(errdefs.ErrInvalidArgument, "", fmt.Sprintf("more than %d names", maxElements))
		}
		if err := s.value(a.key(name), t); err != nil {
			return err
		}
	}
	_, err := s.token(a)
	return err
}

func (s *strict) elements(a at, t reflect.Type) error {
	for i := 0; s.dec.More(); i++ {
		if i == maxElements {
			return a.refuse(errdefs.ErrInvalidArgument, "", fmt.Sprintf("more than %d elements", maxElements))
		}
		if err := s.value(a.index(i), t); err != nil {
			return err
		}
	}
	_, err := s.token(a)
	return err
}

// bytes are base64 in JSON. They may be secret: an error says how many there are, not which.
func (s *strict) bytes(a at, tok json.Token) error {
	text, ok := tok.(string)
	if !ok {
		return wrongType(a, tok, "base64 text")
	}
	if _, err := base64.StdEncoding.DecodeString(text); err != nil {
		return a.refuse(errdefs.ErrInvalidArgument, fmt.Sprintf(" (%d bytes)", len(text)), "not base64 in the standard alphabet with padding: "+err.Error())
	}
	return nil
}

// text are types with a syntax of their own: addresses, prefixes.
func (s *strict) text(a at, t reflect.Type, tok json.Token) error {
	text, ok := tok.(string)
	if !ok {
		return wrongType(a, tok, "text")
	}
	v := reflect.New(t).Interface().(encoding.TextUnmarshaler)
	if err := v.UnmarshalText([]byte(text)); err != nil {
		want := "an IP address"
		if t == reflect.TypeFor[netip.Prefix]() {
			want = "a subnet such as 10.1.0.0/16"
		}
		return a.bad(text, "want %s: %s", want, err)
	}
	return nil
}

// scalar checks a boolean, a number or a text.
func scalar(a at, tok json.Token, t reflect.Type) error {
	switch t.Kind() {
	case reflect.Bool:
		if _, ok := tok.(bool); !ok {
			return wrongType(a, tok, "true or false")
		}
	case reflect.String:
		if _, ok := tok.(string); !ok {
			return wrongType(a, tok, "text")
		}
	case reflect.Int, reflect.Int64, reflect.Int32, reflect.Int16, reflect.Int8:
		low, high := int64(math.MinInt64)>>(64-t.Bits()), int64(math.MaxInt64)>>(64-t.Bits())
		want := fmt.Sprintf("a whole number from %d to %d", low, high)
		n, ok := tok.(json.Number)
		if !ok {
			return wrongType(a, tok, want)
		}
		if _, err := strconv.ParseInt(n.String(), 10, t.Bits()); err != nil {
			return a.refuse(errdefs.ErrInvalidArgument, " = "+clip(n.String()), "want "+want)
		}
	case reflect.Uint, reflect.Uint64, reflect.Uint32, reflect.Uint16, reflect.Uint8:
		want := fmt.Sprintf("a whole number from 0 to %d", uint64(math.MaxUint64)>>(64-t.Bits()))
		n, ok := tok.(json.Number)
		if !ok {
			return wrongType(a, tok, want)
		}
		if _, err := strconv.ParseUint(n.String(), 10, t.Bits()); err != nil {
			return a.refuse(errdefs.ErrInvalidArgument, " = "+clip(n.String()), "want "+want)
		}
	case reflect.Float32, reflect.Float64:
		n, ok := tok.(json.Number)
		if !ok {
			return wrongType(a, tok, "a number")
		}
		if _, err := strconv.ParseFloat(n.String(), t.Bits()); err != nil {
			return a.refuse(errdefs.ErrInvalidArgument, " = "+clip(n.String()), "want a number of at most "+strconv.Itoa(t.Bits())+" bits")
		}
	default:
		panic("no rule for fields of type " + t.String())
	}
	return nil
}

func wrongType(a at, tok json.Token, want string) error {
	have := ""
	switch v := tok.(type) {
	case json.Delim:
		have = "an object"
		if v == '[' {
			have = "an array"
		}
	case json.Number:
		have = clip(v.String())
	case string:
		have = shorten(v)
	default:
		have = fmt.Sprint(v)
	}
	return a.refuse(errdefs.ErrInvalidArgument, " = "+have, "want "+want)
}

func clip(s string) string {
	if len(s) <= shownBytes {
		return s
	}
	return s[:shownBytes] + "…"
}

// jsonFields are a struct's fields by their names in JSON, those of embedded structs among them.
func jsonFields(t reflect.Type) map[string]reflect.Type {
	out := map[string]reflect.Type{}
	for _, f := range reflect.VisibleFields(t) {
		tag, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		if f.Anonymous && tag == "" || !f.IsExported() || tag == "-" || len(f.Index) > 1 && hidden(t, f) {
			continue
		}
		name := f.Name
		if tag != "" {
			name = tag
		}
		out[name] = f.Type
	}
	return out
}

// hidden reports whether a field belongs to an embedded struct that is a field of its own in JSON.
func hidden(t reflect.Type, f reflect.StructField) bool {
	outer := t.FieldByIndex(f.Index[:len(f.Index)-1])
	tag, _, _ := strings.Cut(outer.Tag.Get("json"), ",")
	return tag != ""
}
