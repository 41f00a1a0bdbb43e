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

// BundleDocument is what peers trust, in the SPIFFE bundle format: a JWK set with
// the sequence number and the refresh hint. jwts may be nil. Equal authorities
// give equal bytes.
func (a *Authority) BundleDocument(jwts *JWTAuthority) ([]byte, error) {
	roots, err := parseDER(a.Roots())
	if err != nil {
		return nil, fmt.Errorf("encode bundle: %w", err)
	}
	// go-spiffe's bundle has its keys of JWT-SVIDs in a random order.
	document := struct {
		Keys        []jose.JSONWebKey `json:"keys"`
		Sequence    uint64            `json:"spiffe_sequence"`
		RefreshHint int               `json:"spiffe_refresh_hint"`
	}{Sequence: a.state.Sequence, RefreshHint: int(RefreshHint.Seconds())}
	for _, c := range roots {
		document.Keys = append(document.Keys, jose.JSONWebKey{Key: c.PublicKey, Certificates: []*x509.Certificate{c}, Use: "x509-svid"})
	}
	if jwts != nil {
		document.Keys = append(document.Keys, jwts.publicKeys()...)
		document.Sequence += jwts.sequence()
	}
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
