package identity

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
)

// RefreshHint is how often those who aren't told of changes should read the
// bundle. A new root is published for longer before anything is signed under it.
const RefreshHint = time.Minute

// BundleDocument is what peers trust, in the SPIFFE bundle format: a JWK set with
// the sequence number and the refresh hint.
func (a *Authority) BundleDocument() ([]byte, error) {
	b := spiffebundle.New(a.issuer.trustDomain)
	roots, err := parseDER(a.Roots())
	if err != nil {
		return nil, fmt.Errorf("encode bundle: %w", err)
	}
	b.SetX509Authorities(roots)
	b.SetRefreshHint(RefreshHint)
	b.SetSequenceNumber(a.state.Sequence)
	document, err := b.Marshal()
	if err != nil {
		return nil, fmt.Errorf("encode bundle: %w", err)
	}
	return document, nil
}

// BundleDigest names a set of roots (DER) of any order.
func BundleDigest(roots [][]byte) string {
	sorted := slices.SortedFunc(slices.Values(roots), bytes.Compare)
	h := sha256.New()
	for _, der := range sorted {
		sum := sha256.Sum256(der)
		h.Write(sum[:])
	}
	return hex.EncodeToString(h.Sum(nil)[:16])
}
