package oci

import "skein/runtime/rootfs"

// standardStreams are the descriptors that a process gets as its first three: the caller's, but null devices of their own in place of the
// host's, whose mode and owner root in the container could change. own are to be closed afterwards.
func standardStreams() (files, own []int, err error) {
	files = []int{0, 1, 2}
	var nulls *rootfs.Nulls
	for i := range files {
		if !rootfs.IsNull(i) {
			continue
		}
		if nulls == nil {
			if nulls, err = rootfs.NewNulls(); err != nil {
				return nil, own, err
			}
			defer nulls.Close()
		}
		if files[i], err = nulls.Open(); err != nil {
			return nil, own, err
		}
		own = append(own, files[i])
	}
	return files, own, nil
}
