package oci

import (
	"encoding/json"
	"reflect"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"

	"skein/runtime/sandbox"
)

// FuzzDecode compares with encoding/json, which is right by definition but for what decode refuses on purpose.
func FuzzDecode(f *testing.F) {
	full, err := json.Marshal(sandbox.DefaultSpec())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(full)
	for _, s := range []string{`{}`, ` null `, `[]`, `{"ociVersion":1}`, `{"OCIVERSION":"1\u00e9\ud83d\ude00\ud83dx\n\/"}`, "{\"hostname\":\"\xff\"}", `{"hostname":"a` + "\x01" + `"}`,
		`{"process":{"user":{"uid":-1}}}`, `{"process":{"user":{"uid":1.0}}}`, `{"process":{"user":{"uid":4294967296}}}`, `{"process":{"oomScoreAdj":-7e1}}`,
		`{"process":{"oomScoreAdj":01}}`, `{"process":{"args":["a",null,"b"]},}`, `{"linux":{"resources":{"unified":{"a.b":"c"},"blockIO":{"weightDevice":[{"major":1,"minor":2,"weight":3}]}}}}`,
		`{"linux":{"devices":[{"fileMode":438,"path":"/dev/x"}],"rootfsPropagation":null}}`, `{"windows":{"credentialSpec":{"a":[1,2.5,"x"]}}}`, `{"a":[1,{"b":true}],"mounts":null}`, `{"root":{"readonly":tru}}`, `{"x":"\q"}`, `{"mounts":[{"options":[]}]} x`, `{"annotations":{"a":"b","c":null}}`} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var got, want specs.Spec
		gerr, werr := decode(b, &got), json.Unmarshal(b, &want)
		if gerr != nil && (strings.Contains(gerr.Error(), "given twice") || strings.Contains(gerr.Error(), "nested deeper")) {
			return
		}
		if (gerr == nil) != (werr == nil) {
			t.Fatalf("%q: %v, encoding/json says %v", b, gerr, werr)
		}
		if gerr == nil && !reflect.DeepEqual(got, want) {
			t.Fatalf("%q:\n%+v\n%+v", b, got, want)
		}
	})
}

func TestDecodeErrors(t *testing.T) {
	for doc, want := range map[string]string{
		`{"linux":{"resources":{"memory":{"limit":"1g"}}}}`:   `linux.resources.memory.limit: text where a whole number is expected`,
		`{"linux":{"resources":{"cpu":{"shares":-1}}}}`:       `linux.resources.cpu.shares: -1 does not fit`,
		`{"process":{"args":["a",7]}}`:                        `process.args[1]: 7 where text is expected`,
		`{"process":{"rlimits":[{},{"soft":[]}]}}`:            `process.rlimits[1].soft: a list where a whole number`,
		`{"annotations":{"a":{}}}`:                            `annotations."a": an object where text is expected`,
		`{"hostname":"a","hostname":"b"}`:                     `hostname: given twice`,
		`{"annotations":{"a":"b","a":"b"}}`:                   `given twice`,
		`{"hostname":"a"`:                                     `JSON ends where a comma or the end of the object is expected`,
		strings.Repeat(`{"x":`, 100) + strings.Repeat("}", 9): `nested deeper than`,
	} {
		var s specs.Spec
		if err := decode([]byte(doc), &s); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %s", doc, err, want)
		}
	}
}
