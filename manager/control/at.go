package control

import (
	"fmt"
	"reflect"
	"strconv"
	"time"

	"github.com/containerd/errdefs"

	"skein/manager/api"
)

// shownBytes is how much of a refused value an error repeats.
const shownBytes = 60

// at is a place in what a client sent: the object it is of and the path of its JSON field. Everything that is refused names its place.
type at struct {
	object string
	path   string
}

// field is a field of the object at this place.
func (a at) field(name string) at {
	if a.path != "" {
		name = a.path + "." + name
	}
	return at{a.object, name}
}

// index is an element of the array at this place.
func (a at) index(i int) at { return at{a.object, a.path + "[" + strconv.Itoa(i) + "]"} }

// key is a value of the map at this place.
func (a at) key(k string) at { return at{a.object, a.path + "[" + shorten(k) + "]"} }

// bad refuses a value. The text says what is wrong with it, if that is not plain, and what is possible.
func (a at) bad(value any, format string, args ...any) error {
	return a.refuse(errdefs.ErrInvalidArgument, " = "+show(value), fmt.Sprintf(format, args...))
}

// missing refuses the absence of a value.
func (a at) missing(format string, args ...any) error {
	return a.refuse(errdefs.ErrInvalidArgument, " is missing", fmt.Sprintf(format, args...))
}

// unbuilt refuses by name what Skein cannot do yet.
func (a at) unbuilt(value any, format string, args ...any) error {
	return a.refuse(errdefs.ErrNotImplemented, " = "+show(value), fmt.Sprintf(format, args...)+": not supported by this version of Skein yet")
}

func (a at) refuse(kind error, value, why string) error {
	if a.path == "" {
		return api.Errorf(kind, "invalid %s: %s", a.object, why)
	}
	return api.Errorf(kind, "invalid %s: %s%s: %s", a.object, a.path, value, why)
}

// show is a value as an error repeats it.
func show(value any) string {
	switch v := value.(type) {
	case time.Duration:
		return v.String()
	case fmt.Stringer:
		return shorten(v.String())
	}
	v := reflect.ValueOf(value)
	for v.Kind() == reflect.Pointer && !v.IsNil() {
		v = v.Elem()
		if d, ok := v.Interface().(time.Duration); ok {
			return d.String()
		}
	}
	switch v.Kind() {
	case reflect.String:
		return shorten(v.String())
	case reflect.Slice, reflect.Map:
		return fmt.Sprintf("(%d elements)", v.Len())
	case reflect.Struct:
		return "{…}"
	case reflect.Invalid, reflect.Pointer:
		return "null"
	}
	return fmt.Sprint(v.Interface())
}

// shorten quotes a text, its end left out when it is long.
func shorten(s string) string {
	if len(s) <= shownBytes {
		return strconv.Quote(s)
	}
	return strconv.Quote(s[:shownBytes]) + "…"
}
