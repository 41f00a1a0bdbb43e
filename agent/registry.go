package agent

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"os"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/bulkhead-mesh/bulkhead/agent/image"
)

// rootsFiles are where distributions keep the authorities that a node trusts, its
// container runtime among others. The agent's own image has none.
var rootsFiles = []string{
	"/etc/ssl/certs/ca-certificates.crt", "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/ca-bundle.pem", "/etc/ssl/cert.pem",
}

// registryAccess is how registries are asked: with the node's own roots, and those
// and the credentials of one Secret. It is the only Secret that agents may read, and
// is read anew for each pull, never kept.
func (a *Agent) registryAccess(ctx context.Context) (image.Access, error) {
	var access image.Access
	access.Roots = x509.NewCertPool()
	for _, file := range rootsFiles {
		pem, err := os.ReadFile(a.nodeProc + "/root" + file)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return access, fmt.Errorf("read the node's trusted roots: %w", err)
		}
		access.Roots.AppendCertsFromPEM(pem)
		break
	}
	if a.kube == nil {
		return access, nil
	}
	var s corev1.Secret
	err := a.kube.Get(ctx, client.ObjectKey{Namespace: a.o.Namespace, Name: registrySecret}, &s)
	if apierrors.IsNotFound(err) {
		return access, nil
	}
	if err != nil {
		return access, fmt.Errorf("read Secret %s/%s: %w", a.o.Namespace, registrySecret, err)
	}
	access.Roots.AppendCertsFromPEM(s.Data["ca.crt"])
	if config := s.Data[corev1.DockerConfigJsonKey]; len(config) > 0 {
		if access.Keychain, err = image.NewKeychain(config); err != nil {
			return access, fmt.Errorf("use Secret %s/%s: %w", a.o.Namespace, registrySecret, err)
		}
	}
	return access, nil
}
