package identity

import (
	"crypto"
	"crypto/ecdsa"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"

	"github.com/bulkhead-mesh/bulkhead/model"
)

// DataJWTKeys is the key of the Secret that holds a JWTAuthority: JSON.
const DataJWTKeys = "keys.json"

// Lifetimes of JWT-SVIDs and of the keys that sign them.
const (
	// DefaultJWTTTL is how long a JWT-SVID lives unless the operator is told
	// otherwise: whoever sees one can use it, so it is short.
	DefaultJWTTTL = 5 * time.Minute
	MinJWTTTL     = time.Minute
	MaxJWTTTL     = time.Hour
	// JWTKeyLifetime is for how long a key signs.
	JWTKeyLifetime = 24 * time.Hour
	// JWTPublishAhead is for how long a key is in the bundle before it signs. It is
	// much longer than bundles take to get around.
	JWTPublishAhead = time.Hour
	// jwtKeyStays is for how long a key is in the bundle after its last token.
	jwtKeyStays = MaxJWTTTL + MaxBackdate
)

// Bounds of a request for a JWT-SVID.
const (
	MaxJWTAudiences    = 8
	MaxJWTAudienceSize = 256
	// MaxJWTSize is how many bytes a token has at most: it goes into a header.
	MaxJWTSize = 8 << 10
	maxJWTKeys = 16
)

// ErrAudience is for audiences that no token is signed for.
var ErrAudience = errors.New("not audiences of a JWT-SVID")

// CheckAudiences returns an error that wraps ErrAudience unless there are 1 to
// MaxJWTAudiences different ones, each printable and of 1 to MaxJWTAudienceSize
// bytes.
func CheckAudiences(audiences []string) error {
	if len(audiences) == 0 || len(audiences) > MaxJWTAudiences {
		return fmt.Errorf("%w: %d of them, must be 1 to %d", ErrAudience, len(audiences), MaxJWTAudiences)
	}
	for i, a := range audiences {
		if a == "" || len(a) > MaxJWTAudienceSize {
			return fmt.Errorf("%w: number %d has %d bytes, must have 1 to %d", ErrAudience, i, len(a), MaxJWTAudienceSize)
		}
		if !utf8.ValidString(a) || slices.ContainsFunc([]rune(a), func(r rune) bool { return !unicode.IsPrint(r) }) {
			return fmt.Errorf("%w: %q isn't printable", ErrAudience, a)
		}
		if slices.Contains(audiences[:i], a) {
			return fmt.Errorf("%w: %q is there twice", ErrAudience, a)
		}
	}
	return nil
}

// JWTAuthority signs JWT-SVIDs (ES256) and knows which keys verify them. It is
// immutable and safe for concurrent use.
//
//	made ──JWTPublishAhead──▶ signs ──JWTKeyLifetime──▶ another signs ──jwtKeyStays──▶ dropped
//	└────────────────────────────── in the bundle ────────────────────────────────┘
type JWTAuthority struct {
	keys []jwtKey // in the order in which they sign; at least one
}

type jwtKey struct {
	id   string // RFC 7638 thumbprint
	key  *ecdsa.PrivateKey
	from time.Time // signs since, or will
}

// NewJWTAuthority makes an authority with one key, which signs at once.
func NewJWTAuthority(now time.Time) (*JWTAuthority, error) {
	k, err := newJWTKey(now)
	if err != nil {
		return nil, fmt.Errorf("make JWT authority: %w", err)
	}
	return &JWTAuthority{keys: []jwtKey{k}}, nil
}

func newJWTKey(from time.Time) (jwtKey, error) {
	key, err := newKey()
	if err != nil {
		return jwtKey{}, err
	}
	id, err := thumbprint(key)
	return jwtKey{id: id, key: key, from: from.UTC().Truncate(time.Second)}, err
}

func thumbprint(key *ecdsa.PrivateKey) (string, error) {
	sum, err := (&jose.JSONWebKey{Key: &key.PublicKey}).Thumbprint(crypto.SHA256)
	return base64.RawURLEncoding.EncodeToString(sum), err
}

// Rotate returns the authority as it should be now: with the next key as soon as
// it has to be published, and without those whose last token has expired. It
// returns a itself if that is so already.
func (a *JWTAuthority) Rotate(now time.Time) (*JWTAuthority, error) {
	first := 0
	for i := 1; i < len(a.keys); i++ {
		if now.After(a.keys[i].from.Add(jwtKeyStays)) {
			first = i
		}
	}
	next := a.keys[first:]
	if now.Before(next[len(next)-1].from.Add(JWTKeyLifetime - JWTPublishAhead)) {
		if first == 0 {
			return a, nil
		}
		return &JWTAuthority{keys: slices.Clone(next)}, nil
	}
	k, err := newJWTKey(now.Add(JWTPublishAhead))
	if err != nil {
		return nil, fmt.Errorf("rotate JWT authority: %w", err)
	}
	return &JWTAuthority{keys: append(slices.Clone(next), k)}, nil
}

// signing is the key that signs now.
func (a *JWTAuthority) signing(now time.Time) jwtKey {
	// Before the first one's time a clock is behind that of who made it.
	current := a.keys[0]
	for _, k := range a.keys[1:] {
		if !now.Before(k.from) {
			current = k
		}
	}
	return current
}

// Sign returns a JWT-SVID of id for the audiences (see CheckAudiences) and when
// it expires. ttl is taken to the nearest of MinJWTTTL and MaxJWTTTL. Whether id
// may have one is the caller's to know.
func (a *JWTAuthority) Sign(id model.Identity, audiences []string, ttl time.Duration, now time.Time) (token string, expires time.Time, err error) {
	fail := func(err error) (string, time.Time, error) {
		return "", time.Time{}, fmt.Errorf("sign JWT-SVID of %s: %w", id, err)
	}
	if id.IsZero() {
		return fail(model.ErrIdentity)
	}
	if err := CheckAudiences(audiences); err != nil {
		return fail(err)
	}
	k := a.signing(now)
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: k.key, KeyID: k.id}},
		(&jose.SignerOptions{}).WithType("JWT"))
	if err != nil {
		return fail(err)
	}
	expires = now.Add(min(max(ttl, MinJWTTTL), MaxJWTTTL)).UTC().Truncate(time.Second)
	token, err = jwt.Signed(signer).Claims(jwt.Claims{
		Subject: id.String(), Audience: audiences, Expiry: jwt.NewNumericDate(expires), IssuedAt: jwt.NewNumericDate(now),
	}).Serialize()
	if err != nil {
		return fail(err)
	}
	if len(token) > MaxJWTSize {
		return fail(fmt.Errorf("%w: they make a token of %d bytes, more than %d", ErrAudience, len(token), MaxJWTSize))
	}
	return token, expires, nil
}

// publicKeys are those that verify what was signed and what is about to be.
func (a *JWTAuthority) publicKeys() (keys []jose.JSONWebKey) {
	for _, k := range a.keys {
		keys = append(keys, jose.JSONWebKey{Key: &k.key.PublicKey, KeyID: k.id, Use: useJWT})
	}
	return keys
}

// sequence grows with each change of the keys: one that comes is the last to sign,
// one that goes was the first.
func (a *JWTAuthority) sequence() uint64 {
	return uint64(a.keys[0].from.Unix() + a.keys[len(a.keys)-1].from.Unix())
}

// storedJWTKey is a key in the Secret.
type storedJWTKey struct {
	SignsFrom time.Time `json:"signsFrom"`
	Key       string    `json:"key"` // PEM
}

// Data is the content of the Secret that holds the authority, keys included.
func (a *JWTAuthority) Data() map[string][]byte {
	var stored []storedJWTKey
	for _, k := range a.keys {
		stored = append(stored, storedJWTKey{SignsFrom: k.from, Key: string(encodeKey(k.key))})
	}
	b, err := json.Marshal(stored)
	if err != nil {
		panic("identity: marshal JWT keys: " + err.Error()) // times and strings
	}
	return map[string][]byte{DataJWTKeys: b}
}

// ParseJWTAuthority is the inverse of Data. Errors never have a key in them.
func ParseJWTAuthority(data map[string][]byte) (*JWTAuthority, error) {
	if len(data[DataJWTKeys]) > maxAuthorityDataSize {
		return nil, fmt.Errorf("parse JWT authority: %s has %d bytes, more than %d", DataJWTKeys, len(data[DataJWTKeys]), maxAuthorityDataSize)
	}
	var stored []storedJWTKey
	if err := json.Unmarshal(data[DataJWTKeys], &stored); err != nil {
		return nil, fmt.Errorf("parse JWT authority: %s isn't a JSON list of keys", DataJWTKeys)
	}
	if len(stored) == 0 || len(stored) > maxJWTKeys {
		return nil, fmt.Errorf("parse JWT authority: %s has %d keys, must have 1 to %d", DataJWTKeys, len(stored), maxJWTKeys)
	}
	a := &JWTAuthority{}
	for i, s := range stored {
		key, err := parseKey([]byte(s.Key))
		if err != nil {
			return nil, fmt.Errorf("parse JWT authority: key %d of %s: %w", i, DataJWTKeys, err)
		}
		id, err := thumbprint(key)
		if err != nil {
			return nil, fmt.Errorf("parse JWT authority: key %d of %s: %w", i, DataJWTKeys, err)
		}
		if s.SignsFrom.IsZero() || i > 0 && !s.SignsFrom.After(stored[i-1].SignsFrom) {
			return nil, fmt.Errorf("parse JWT authority: key %d of %s must have a signsFrom later than the one before it", i, DataJWTKeys)
		}
		if slices.ContainsFunc(a.keys, func(k jwtKey) bool { return k.id == id }) {
			return nil, fmt.Errorf("parse JWT authority: key %d of %s is there twice", i, DataJWTKeys)
		}
		a.keys = append(a.keys, jwtKey{id: id, key: key, from: s.SignsFrom})
	}
	return a, nil
}
