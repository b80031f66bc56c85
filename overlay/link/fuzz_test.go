package link

import "testing"

// FuzzParse: a list of attributes, however damaged, is walked to an end within its bytes.
func FuzzParse(f *testing.F) {
	var a Attrs
	a.Str(1, "eth0")
	a.Nest(2, nil, func(a *Attrs) { a.U32(3, 7); a.BE16(4, 9) })
	f.Add(a.Encoded())
	f.Add([]byte{3, 0, 1, 0})
	f.Add([]byte{0xff, 0xff, 1, 0, 1})
	f.Fuzz(func(t *testing.T, b []byte) {
		n := 0
		for _, v := range Parse(b) {
			if n += 4 + len(v); n > len(b) {
				t.Fatalf("%d bytes of attributes in %d", n, len(b))
			}
			for range Parse(v) {
			}
		}
	})
}
