package layer

import (
	"bufio"
	"bytes"
	"fmt"
	"io"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	zstdWindow = 128 << 20 // what zstd --long=27 writes; a decoder must hold one window
	peekBytes  = 512
)

// Decompress recognises gzip, zstd and plain archives by their first bytes, whatever the media type said, and bounds the ratio.
func Decompress(r io.Reader) (io.ReadCloser, error) {
	raw := &counter{r: r}
	br := bufio.NewReaderSize(raw, 64<<10)
	head, err := br.Peek(peekBytes)
	if err != nil && err != io.EOF {
		return nil, err
	}
	switch {
	case bytes.HasPrefix(head, []byte{0x1f, 0x8b}):
		z, err := gzip.NewReader(br)
		if err != nil {
			return nil, fmt.Errorf("gzip: %v: %w", err, errdefs.ErrInvalidArgument)
		}
		return &ratio{in: raw, r: z, close: func() { z.Close() }}, nil
	case bytes.HasPrefix(head, []byte{0x28, 0xb5, 0x2f, 0xfd}), isSkippable(head):
		z, err := zstd.NewReader(br, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(zstdWindow))
		if err != nil {
			return nil, fmt.Errorf("zstd: %v: %w", err, errdefs.ErrInvalidArgument)
		}
		return &ratio{in: raw, r: z, close: z.Close}, nil
	case bytes.HasPrefix(head, []byte("BZh")), bytes.HasPrefix(head, []byte{0xfd, '7', 'z', 'X', 'Z'}):
		return nil, fmt.Errorf("layer is compressed with bzip2 or xz; gzip, zstd and none are understood: %w", errdefs.ErrNotImplemented)
	}
	return io.NopCloser(br), nil
}

// isSkippable recognises the zstd skippable frame that some builders put first.
func isSkippable(b []byte) bool {
	return len(b) >= 4 && b[0]&0xf0 == 0x50 && b[1] == 0x2a && b[2] == 0x4d && b[3] == 0x18
}

type counter struct {
	r io.Reader
	n int64
}

func (c *counter) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	return n, err
}

// ratio refuses decompression bombs.
type ratio struct {
	in    *counter
	r     io.Reader
	n     int64
	close func()
}

func (d *ratio) Read(p []byte) (int, error) {
	n, err := d.r.Read(p)
	d.n += int64(n)
	if d.n > ratioFloor && d.n/maxRatio > d.in.n {
		return n, fmt.Errorf("layer expands more than %d times: %w", maxRatio, errdefs.ErrInvalidArgument)
	}
	return n, err
}

func (d *ratio) Close() error {
	d.close()
	return nil
}

// MediaType is the OCI type of a layer that begins with head (four bytes or more).
func MediaType(head []byte) string {
	switch {
	case bytes.HasPrefix(head, []byte{0x1f, 0x8b}):
		return ocispec.MediaTypeImageLayerGzip
	case bytes.HasPrefix(head, []byte{0x28, 0xb5, 0x2f, 0xfd}), isSkippable(head):
		return ocispec.MediaTypeImageLayerZstd
	}
	return ocispec.MediaTypeImageLayer
}
