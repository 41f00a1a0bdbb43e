package identity

import (
	"encoding/json"
	"fmt"
	"slices"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Keys of the Secret that holds an Authority. Certificates and keys are PEM.
const (
	// DataRoots are the roots of the issuer that signs; an own one's comes first.
	DataRoots = "root.crt"
	// DataRootKey is the key of the first root. It is kept so that the operator can
	// make the next intermediate without a change of trust. Who reads the Secret can
	// sign for as long as the root lives, rather than as long as the intermediate
	// does; who doesn't want that takes this key out of the Secret, keeps it
	// elsewhere and renews the intermediate by hand.
	DataRootKey = "root.key"
	// DataIntermediate is the chain that signs, without a root, and DataIntermediateKey
	// the key of its first certificate.
	DataIntermediate    = "intermediate.crt"
	DataIntermediateKey = "intermediate.key"
	// DataOldRoots were those of the issuer before, as long as they are trusted.
	DataOldRoots = "old-root.crt"
	// DataNextPrefix is before the names of the next issuer's.
	DataNextPrefix = "next-"
	// DataState is JSON.
	DataState = "state.json"
)

// ownData are all keys that Data may have.
var ownData = []string{
	DataRoots, DataRootKey, DataIntermediate, DataIntermediateKey, DataOldRoots, DataState,
	DataNextPrefix + DataRoots, DataNextPrefix + DataRootKey, DataNextPrefix + DataIntermediate, DataNextPrefix + DataIntermediateKey,
}

// ParseAuthority is the inverse of Data. It checks that keys and certificates
// belong together and to one trust domain; not that they are valid now. Errors
// name the key of data that is wrong and never its value.
func ParseAuthority(data map[string][]byte) (*Authority, error) {
	a, err := parseAuthority(data)
	if err != nil {
		return nil, fmt.Errorf("parse authority: %w", err)
	}
	return a, nil
}

func parseAuthority(data map[string][]byte) (*Authority, error) {
	if size := dataSize(data); size > maxAuthorityDataSize {
		return nil, fmt.Errorf("%d bytes, more than %d", size, maxAuthorityDataSize)
	}
	a := &Authority{state: state{Sequence: 1}}
	if text := data[DataState]; len(text) > 0 {
		if err := json.Unmarshal(text, &a.state); err != nil {
			return nil, fmt.Errorf("%s: %w", DataState, err)
		}
	}
	switch a.state.Phase {
	case PhaseStable, PhasePublishing, PhaseRetiring:
	default:
		return nil, fmt.Errorf("%s: there is no phase %q", DataState, a.state.Phase)
	}
	var err error
	if a.issuer, err = parseStored(data, "", a.state.TrustDomain); err != nil {
		return nil, err
	}
	if len(data[DataNextPrefix+DataIntermediate]) > 0 {
		if a.next, err = parseStored(data, DataNextPrefix, a.TrustDomain()); err != nil {
			return nil, err
		}
	}
	if len(data[DataOldRoots]) > 0 {
		if a.old, err = parseCertificates(data[DataOldRoots], MaxRoots); err != nil {
			return nil, fmt.Errorf("%s: %w", DataOldRoots, err)
		}
	}
	a.state.TrustDomain = "" // the issuer's
	if n := len(a.Roots()); n > MaxRoots {
		return nil, fmt.Errorf("%d roots, more than %d", n, MaxRoots)
	}
	return a, nil
}

// parseStored reads an issuer. Without a trust domain, the certificate that signs
// names it.
func parseStored(data map[string][]byte, prefix, trustDomain string) (*Issuer, error) {
	rootsName, rootKeyName := prefix+DataRoots, prefix+DataRootKey
	chainName, keyName := prefix+DataIntermediate, prefix+DataIntermediateKey
	i := &Issuer{}
	var err error
	if i.roots, err = parseCertificates(data[rootsName], MaxRoots); err != nil {
		return nil, fmt.Errorf("%s: %w", rootsName, err)
	}
	if i.chain, err = parseCertificates(data[chainName], maxChain-1); err != nil {
		return nil, fmt.Errorf("%s: %w", chainName, err)
	}
	if i.key, err = parseSigner(data[keyName]); err != nil {
		return nil, fmt.Errorf("%s: %w", keyName, err)
	}
	if !samePublicKey(i.key, i.chain[0]) {
		return nil, fmt.Errorf("%s isn't the key of %s", keyName, chainName)
	}
	if len(data[rootKeyName]) > 0 {
		if i.rootKey, err = parseKey(data[rootKeyName]); err != nil {
			return nil, fmt.Errorf("%s: %w", rootKeyName, err)
		}
		if !i.rootKey.PublicKey.Equal(i.roots[0].PublicKey) {
			return nil, fmt.Errorf("%s isn't the key of the first certificate of %s", rootKeyName, rootsName)
		}
	}
	for _, c := range append(i.chain[:len(i.chain):len(i.chain)], i.roots...) {
		if !isAuthority(c) {
			return nil, fmt.Errorf("certificate %q isn't an authority's", c.Subject)
		}
	}
	for n, c := range i.chain[:len(i.chain)-1] {
		if err := c.CheckSignatureFrom(i.chain[n+1]); err != nil {
			return nil, fmt.Errorf("%s: certificate %d isn't signed by the next: %w", chainName, n+1, err)
		}
	}
	last, signed := i.chain[len(i.chain)-1], false
	for _, root := range i.roots {
		signed = signed || last.Equal(root) || last.CheckSignatureFrom(root) == nil
	}
	if !signed {
		return nil, fmt.Errorf("%s isn't signed by a certificate of %s", chainName, rootsName)
	}
	if trustDomain == "" {
		if trustDomain, err = trustDomainOf(i); err != nil {
			return nil, fmt.Errorf("%s: %w", chainName, err)
		}
	}
	if i.trustDomain, err = parseTrustDomain(trustDomain); err != nil {
		return nil, err
	}
	return i, nil
}

func trustDomainOf(i *Issuer) (string, error) {
	if len(i.chain[0].URIs) != 1 {
		return "", fmt.Errorf("must have one URI, spiffe://<trust domain>, or %s must say the trust domain", DataState)
	}
	id, err := spiffeid.FromURI(i.chain[0].URIs[0])
	if err != nil || id.Path() != "" {
		return "", fmt.Errorf("URI %q isn't spiffe://<trust domain>", i.chain[0].URIs[0])
	}
	return id.TrustDomain().Name(), nil
}

// Data is the content of the Secret that holds the authority, keys included.
func (a *Authority) Data() map[string][]byte {
	data := map[string][]byte{}
	a.issuer.store(data, "")
	if a.next != nil {
		a.next.store(data, DataNextPrefix)
	}
	if len(a.old) > 0 {
		data[DataOldRoots] = encodeAll(a.old)
	}
	s := a.state
	s.TrustDomain = a.TrustDomain()
	text, err := json.Marshal(s)
	if err != nil {
		panic("identity: encode state: " + err.Error()) // times of years beyond 9999
	}
	data[DataState] = text
	return data
}

func (i *Issuer) store(data map[string][]byte, prefix string) {
	data[prefix+DataRoots] = encodeAll(i.roots)
	data[prefix+DataIntermediate] = encodeAll(i.chain)
	data[prefix+DataIntermediateKey] = encodeKey(i.key)
	if i.rootKey != nil {
		data[prefix+DataRootKey] = encodeKey(i.rootKey)
	}
}

// SetData puts the authority into a Secret's data and leaves there what isn't the
// authority's.
func (a *Authority) SetData(data map[string][]byte) map[string][]byte {
	out := a.Data()
	for name, value := range data {
		if _, ours := out[name]; !ours && !slices.Contains(ownData, name) {
			out[name] = value
		}
	}
	return out
}

func dataSize(data map[string][]byte) (size int) {
	for _, v := range data {
		size += len(v)
	}
	return size
}
