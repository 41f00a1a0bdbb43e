package image

import (
	"encoding/json"
	"fmt"
	"strings"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
)

// keychain has credentials by registry, or registry and a part of the path.
type keychain map[string]authn.AuthConfig

// NewKeychain reads the value of a Secret of type kubernetes.io/dockerconfigjson. The
// longest path that an image's name begins with counts.
func NewKeychain(config []byte) (authn.Keychain, error) {
	var c struct {
		Auths map[string]authn.AuthConfig `json:"auths"`
	}
	if err := json.Unmarshal(config, &c); err != nil {
		// The error could quote what it didn't understand.
		return nil, fmt.Errorf("credentials of registries aren't in the format of kubernetes.io/dockerconfigjson")
	}
	k := keychain{}
	for registry, auth := range c.Auths {
		registry = strings.TrimPrefix(strings.TrimPrefix(registry, "https://"), "http://")
		registry = strings.TrimSuffix(registry, "/")
		// Docker's own is written with the path of an interface that is long gone.
		for _, suffix := range []string{"/v1", "/v2"} {
			registry = strings.TrimSuffix(registry, suffix)
		}
		if registry == "docker.io" {
			registry = name.DefaultRegistry
		}
		k[registry] = auth
	}
	return k, nil
}

// Resolve implements authn.Keychain.
func (k keychain) Resolve(r authn.Resource) (authn.Authenticator, error) {
	for path := r.String(); ; {
		if auth, ok := k[path]; ok {
			return authn.FromConfig(auth), nil
		}
		i := strings.LastIndexByte(path, '/')
		if i < 0 {
			return authn.Anonymous, nil
		}
		path = path[:i]
	}
}
