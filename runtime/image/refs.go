package image

import (
	"strings"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
)

// danglingPrefix begins the names of records that keep an image which has lost its last tag.
const danglingPrefix = "dangling@"

// parseRef reads a reference as people write it. The result has a digest, or a tag, or both.
func parseRef(ref string) (reference.Named, error) {
	n, err := reference.ParseNormalizedNamed(ref)
	if err != nil {
		return nil, kind(errdefs.ErrInvalidArgument, "image name %.300q: %v: write [HOST[:PORT]/]NAME[:TAG][@DIGEST] in lower case", ref, err)
	}
	return reference.TagNameOnly(n), nil
}

// recordName is the name of the stored record: a digest wins over a tag, as docker has it.
func recordName(n reference.Named) string {
	if d, ok := n.(reference.Digested); ok {
		return n.Name() + "@" + d.Digest().String()
	}
	return n.String()
}

// familiar shortens a stored name to what people write.
func familiar(name string) string {
	n, err := reference.ParseNormalizedNamed(name)
	if err != nil {
		return name
	}
	return reference.FamiliarString(n)
}

// splitRecord tells a record's familiar repository, tag and digest; the repository is empty for a dangling image.
func splitRecord(name string) (repo, tag string, dgst digest.Digest) {
	if strings.HasPrefix(name, danglingPrefix) {
		return "", "", ""
	}
	n, err := reference.ParseNormalizedNamed(name)
	if err != nil {
		return "", "", ""
	}
	if t, ok := n.(reference.Tagged); ok {
		tag = t.Tag()
	}
	if d, ok := n.(reference.Digested); ok {
		dgst = d.Digest()
	}
	return reference.FamiliarName(n), tag, dgst
}

// asID reads a full or shortened image ID.
func asID(ref string) (prefix string, ok bool) {
	prefix = strings.TrimPrefix(ref, "sha256:")
	if prefix == "" || len(prefix) > 64 || strings.Trim(prefix, "0123456789abcdef") != "" {
		return "", false
	}
	return prefix, true
}

func shortID(d digest.Digest) string {
	e := d.Encoded()
	return e[:min(12, len(e))]
}
