package identity

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"slices"
	"time"

	"github.com/go-jose/go-jose/v4"
)

// RefreshHint is how often those who aren't told of changes should read the
// bundle. A new root is published for longer before anything is signed under it.
const RefreshHint = time.Minute

// Uses of a bundle's keys.
const (
	useX509 = "x509-svid"
	useJWT  = "jwt-svid"
)

// bundleDocument is the SPIFFE bundle format. go-spiffe's has its keys of JWT-SVIDs
// in a random order.
type bundleDocument struct {
	Keys        []jose.JSONWebKey `json:"keys"`
	Sequence    uint64            `json:"spiffe_sequence"`
	RefreshHint int               `json:"spiffe_refresh_hint"`
}

// BundleDocument is what peers trust, in the SPIFFE bundle format: a JWK set with
// the sequence number and the refresh hint. jwts may be nil. Equal authorities
// give equal bytes.
func (a *Authority) BundleDocument(jwts *JWTAuthority) ([]byte, error) {
	if jwts == nil {
		return a.encodeBundle(nil, a.state.Sequence)
	}
	return a.encodeBundle(jwts.publicKeys(), a.state.Sequence+jwts.sequence())
}

// BundleDocumentAfter is BundleDocument for those who don't know the keys of
// JWT-SVIDs: they are the published document's, whose successor it is. The
// published one comes back as it is if its roots are the authority's; without one
// that can be read there are no such keys.
func (a *Authority) BundleDocumentAfter(published []byte) ([]byte, error) {
	var last bundleDocument
	if err := json.Unmarshal(published, &last); err != nil {
		return a.BundleDocument(nil)
	}
	var roots [][]byte
	var keys []jose.JSONWebKey
	for _, k := range last.Keys {
		switch {
		case k.Use == useX509 && len(k.Certificates) == 1:
			roots = append(roots, k.Certificates[0].Raw)
		case k.Use == useJWT:
			keys = append(keys, k)
		}
	}
	if slices.EqualFunc(roots, a.Roots(), bytes.Equal) {
		return bytes.Clone(published), nil
	}
	// No more than one for each change of the roots, so that it isn't ahead of the
	// number that those count who know the keys.
	return a.encodeBundle(keys, max(last.Sequence+1, a.state.Sequence))
}

func (a *Authority) encodeBundle(jwtKeys []jose.JSONWebKey, sequence uint64) ([]byte, error) {
	roots, err := parseDER(a.Roots())
	if err != nil {
		return nil, fmt.Errorf("encode bundle: %w", err)
	}
	document := bundleDocument{Sequence: sequence, RefreshHint: int(RefreshHint.Seconds())}
	for _, c := range roots {
		document.Keys = append(document.Keys, jose.JSONWebKey{Key: c.PublicKey, Certificates: []*x509.Certificate{c}, Use: useX509})
	}
	document.Keys = append(document.Keys, jwtKeys...)
	b, err := json.Marshal(document)
	if err != nil {
		return nil, fmt.Errorf("encode bundle: %w", err)
	}
	return b, nil
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
