package oci

import (
	"encoding/json"
	"fmt"
	"reflect"
	"strconv"
	"strings"
	"unicode/utf16"
	"unicode/utf8"

	"github.com/containerd/errdefs"
)

// maxNesting bounds how deep a config may be nested.
const maxNesting = 64

// decode reads JSON into v as encoding/json does, but for three things: errors name the field, a key that is given twice is refused, and
// only types that occur are looked at. A command reads one config in its life, and encoding/json prepares for everything that a config
// of any platform could hold: 1.3 ms, a tenth of a container's run.
func decode(b []byte, v any) error {
	d := &decoder{b: b, types: map[reflect.Type]*object{}}
	err := d.value(reflect.ValueOf(v).Elem(), 0)
	if err == nil && d.next() != 0 {
		err = d.syntax("the end")
	}
	if err != nil {
		return fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	return nil
}

type decoder struct {
	b     []byte
	i     int
	types map[reflect.Type]*object
}

// object is what must be known of a struct.
type object struct {
	names []string
	index [][]int
}

// fieldError is an error at a place inside the document.
type fieldError struct {
	path string
	err  error
}

func (e *fieldError) Error() string { return e.path + ": " + e.err.Error() }
func (e *fieldError) Unwrap() error { return e.err }

// at adds one step to the place of an error.
func at(step string, err error) error {
	if err == nil {
		return nil
	}
	if f, ok := err.(*fieldError); ok {
		if !strings.HasPrefix(f.path, "[") {
			step += "."
		}
		return &fieldError{step + f.path, f.err}
	}
	return &fieldError{step, err}
}

func (d *decoder) syntax(want string) error {
	if d.i >= len(d.b) {
		return fmt.Errorf("JSON ends where %s is expected", want)
	}
	return fmt.Errorf("JSON has %q at byte %d where %s is expected", d.b[d.i], d.i, want)
}

// next skips white space and shows what follows, 0 at the end.
func (d *decoder) next() byte {
	for ; d.i < len(d.b); d.i++ {
		switch d.b[d.i] {
		case ' ', '\t', '\n', '\r':
		case 0:
			return 1 // nothing that JSON knows
		default:
			return d.b[d.i]
		}
	}
	return 0
}

// word takes a literal when it follows.
func (d *decoder) word(w string) bool {
	if strings.HasPrefix(string(d.b[d.i:min(len(d.b), d.i+len(w))]), w) {
		d.i += len(w)
		return true
	}
	return false
}

func (d *decoder) value(v reflect.Value, depth int) error {
	if depth > maxNesting {
		return fmt.Errorf("nested deeper than %d", maxNesting)
	}
	if _, own := v.Addr().Interface().(json.Unmarshaler); own || v.Kind() == reflect.Interface {
		return d.foreign(v, depth)
	}
	if d.next() == 'n' {
		if !d.word("null") {
			return d.syntax("a value")
		}
		switch v.Kind() {
		case reflect.Pointer, reflect.Slice, reflect.Map:
			v.SetZero()
		}
		return nil
	}
	switch v.Kind() {
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		return d.value(v.Elem(), depth)
	case reflect.Struct:
		return d.object(v, depth)
	case reflect.Slice:
		return d.slice(v, depth)
	case reflect.Map:
		return d.entries(v, depth)
	}
	return d.scalar(v)
}

// foreign leaves a value to encoding/json: one of a type that decodes itself, or of any type.
func (d *decoder) foreign(v reflect.Value, depth int) error {
	d.next()
	from := d.i
	if err := d.skip(depth); err != nil {
		return err
	}
	return json.Unmarshal(d.b[from:d.i], v.Addr().Interface())
}

func (d *decoder) scalar(v reflect.Value) error {
	switch c := d.next(); v.Kind() {
	case reflect.String:
		if c != '"' {
			return d.wrong("text")
		}
		s, err := d.text()
		v.SetString(s)
		return err
	case reflect.Bool:
		v.SetBool(c == 't')
		if !d.word("true") && !d.word("false") {
			return d.wrong("true or false")
		}
		return nil
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64:
		s, err := d.number("a whole number")
		if err != nil {
			return err
		}
		n, err := strconv.ParseInt(s, 10, v.Type().Bits())
		v.SetInt(n)
		return asNumber(s, err)
	case reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		s, err := d.number("a whole number that is not negative")
		if err != nil {
			return err
		}
		n, err := strconv.ParseUint(s, 10, v.Type().Bits())
		v.SetUint(n)
		return asNumber(s, err)
	case reflect.Float32, reflect.Float64:
		s, err := d.number("a number")
		if err != nil {
			return err
		}
		n, err := strconv.ParseFloat(s, v.Type().Bits())
		v.SetFloat(n)
		return asNumber(s, err)
	}
	return fmt.Errorf("a field of type %s cannot be read", v.Type())
}

func asNumber(s string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s does not fit: want a whole number that is neither too large nor, where it counts something, negative", s)
}

// wrong is a value of another kind than the field's.
func (d *decoder) wrong(want string) error {
	from := d.i
	if err := d.skip(0); err != nil {
		return err
	}
	what := map[byte]string{'"': "text", '{': "an object", '[': "a list", 't': "true", 'f': "false"}[d.b[from]]
	if what == "" {
		what = string(d.b[from:d.i])
	}
	return fmt.Errorf("%s where %s is expected", what, want)
}

func (d *decoder) number(want string) (string, error) {
	from := d.i
	if c := d.next(); c != '-' && (c < '0' || c > '9') {
		return "", d.wrong(want)
	}
	from = d.i
	d.word("-")
	if !d.word("0") && !d.digits() {
		return "", d.syntax("a digit")
	}
	if d.word(".") && !d.digits() {
		return "", d.syntax("a digit")
	}
	if d.word("e") || d.word("E") {
		_ = d.word("+") || d.word("-")
		if !d.digits() {
			return "", d.syntax("a digit")
		}
	}
	return string(d.b[from:d.i]), nil
}

func (d *decoder) digits() bool {
	from := d.i
	for d.i < len(d.b) && d.b[d.i] >= '0' && d.b[d.i] <= '9' {
		d.i++
	}
	return d.i > from
}

func (d *decoder) object(v reflect.Value, depth int) error {
	if d.next() != '{' {
		return d.wrong("an object")
	}
	o := d.types[v.Type()]
	if o == nil {
		o = &object{}
		o.learn(v.Type(), nil)
		d.types[v.Type()] = o
	}
	var seen uint64 // no struct of the specification has more fields
	return d.members(func(key string) error {
		i := o.find(key)
		if i < 0 {
			return d.skip(depth + 1)
		}
		if seen>>i&1 != 0 {
			return at(key, fmt.Errorf("given twice"))
		}
		seen |= 1 << i
		return at(o.names[i], d.value(v.FieldByIndex(o.index[i]), depth+1))
	})
}

// members reads the keys of an object and lets do read their values.
func (d *decoder) members(do func(key string) error) error {
	d.i++
	if d.next() == '}' {
		d.i++
		return nil
	}
	for {
		if d.next() != '"' {
			return d.syntax("a key")
		}
		key, err := d.text()
		if err != nil {
			return err
		}
		if d.next() != ':' {
			return d.syntax("a colon")
		}
		d.i++
		if err := do(key); err != nil {
			return err
		}
		switch d.next() {
		case ',':
			d.i++
		case '}':
			d.i++
			return nil
		default:
			return d.syntax("a comma or the end of the object")
		}
	}
}

func (d *decoder) elements(do func() error) error {
	d.i++
	if d.next() == ']' {
		d.i++
		return nil
	}
	for {
		if err := do(); err != nil {
			return err
		}
		switch d.next() {
		case ',':
			d.i++
		case ']':
			d.i++
			return nil
		default:
			return d.syntax("a comma or the end of the list")
		}
	}
}

func (d *decoder) slice(v reflect.Value, depth int) error {
	if d.next() != '[' {
		return d.wrong("a list")
	}
	out := reflect.MakeSlice(v.Type(), 0, 4)
	n := 0
	err := d.elements(func() error {
		out = reflect.Append(out, reflect.Zero(v.Type().Elem()))
		n++
		return at("["+strconv.Itoa(n-1)+"]", d.value(out.Index(n-1), depth+1))
	})
	v.Set(out)
	return err
}

func (d *decoder) entries(v reflect.Value, depth int) error {
	if d.next() != '{' {
		return d.wrong("an object")
	}
	if v.Type().Key().Kind() != reflect.String {
		return d.foreign(v, depth)
	}
	v.Set(reflect.MakeMap(v.Type()))
	return d.members(func(key string) error {
		k := reflect.ValueOf(key).Convert(v.Type().Key())
		if v.MapIndex(k).IsValid() {
			return at(strconv.Quote(key), fmt.Errorf("given twice"))
		}
		e := reflect.New(v.Type().Elem()).Elem()
		if err := d.value(e, depth+1); err != nil {
			return at(strconv.Quote(key), err)
		}
		v.SetMapIndex(k, e)
		return nil
	})
}

// learn lists a struct's fields, those of embedded structs as its own.
func (o *object) learn(t reflect.Type, prefix []int) {
	for i := range t.NumField() {
		f := t.Field(i)
		index := append(prefix[:len(prefix):len(prefix)], i)
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		switch {
		case f.Anonymous && name == "" && f.Type.Kind() == reflect.Struct:
			o.learn(f.Type, index)
		case !f.IsExported() || name == "-":
		default:
			if name == "" {
				name = f.Name
			}
			o.names, o.index = append(o.names, name), append(o.index, index)
		}
	}
}

// find is the field of a key, whose letters may be of the other case, or -1.
func (o *object) find(key string) int {
	for i, n := range o.names {
		if n == key {
			return i
		}
	}
	for i, n := range o.names {
		if strings.EqualFold(n, key) {
			return i
		}
	}
	return -1
}

// skip passes over one value of any kind.
func (d *decoder) skip(depth int) error {
	if depth > maxNesting {
		return fmt.Errorf("nested deeper than %d", maxNesting)
	}
	switch c := d.next(); {
	case c == '{':
		return d.members(func(string) error { return d.skip(depth + 1) })
	case c == '[':
		return d.elements(func() error { return d.skip(depth + 1) })
	case c == '"':
		_, err := d.text()
		return err
	case c == '-' || c >= '0' && c <= '9':
		_, err := d.number("a number")
		return err
	case d.word("true") || d.word("false") || d.word("null"):
		return nil
	}
	return d.syntax("a value")
}

// text reads a string, its opening quote included.
func (d *decoder) text() (string, error) {
	d.i++
	from := d.i
	for plain := true; d.i < len(d.b); d.i++ {
		switch c := d.b[d.i]; {
		case c == '"' && plain:
			s := string(d.b[from:d.i])
			d.i++
			return s, nil
		case c == '"':
			s, err := d.unquote(d.b[from:d.i])
			d.i++
			return s, err
		case c == '\\':
			plain = false
			d.i++
		case c < ' ':
			return "", d.syntax("a printable character")
		case c >= utf8.RuneSelf:
			plain = false
		}
	}
	d.i = len(d.b)
	return "", d.syntax("a closing quote")
}

// unquote resolves escapes; what is not UTF-8 becomes the replacement character.
func (d *decoder) unquote(s []byte) (string, error) {
	var out strings.Builder
	for i := 0; i < len(s); {
		if s[i] != '\\' {
			r, n := utf8.DecodeRune(s[i:])
			out.WriteRune(r)
			i += n
			continue
		}
		i++ // text made sure that something follows
		if j := strings.IndexByte(`"\/bfnrt`, s[i]); j >= 0 {
			out.WriteByte("\"\\/\b\f\n\r\t"[j])
			i++
			continue
		}
		r, ok := hex(s[i:])
		if !ok {
			return "", fmt.Errorf("JSON has an unknown escape \\%c before byte %d", s[i], d.i)
		}
		i += 5
		if utf16.IsSurrogate(r) {
			low, ok := rune(0), false
			if i < len(s) && s[i] == '\\' {
				low, ok = hex(s[i+1:])
			}
			if r = utf16.DecodeRune(r, low); ok && r != utf8.RuneError {
				i += 6
			}
		}
		out.WriteRune(r)
	}
	return out.String(), nil
}

// hex reads u and four digits.
func hex(s []byte) (rune, bool) {
	if len(s) < 5 || s[0] != 'u' {
		return 0, false
	}
	n, err := strconv.ParseUint(string(s[1:5]), 16, 16)
	return rune(n), err == nil && s[1] != '+'
}
