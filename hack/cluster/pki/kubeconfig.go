package pki

import (
	"encoding/base64"
	"fmt"
	"strings"
)

// Kubeconfig returns a kubeconfig file with one context, contextName, which
// names its cluster and its user too. server is a URL such as
// https://127.0.0.1:6443. The file holds the private key: write it with mode
// 0600. Without certPEM and keyPEM the user has no credentials.
func Kubeconfig(server string, caPEM, certPEM, keyPEM []byte, contextName string) []byte {
	var b strings.Builder
	b64 := base64.StdEncoding.EncodeToString
	fmt.Fprintf(&b, "apiVersion: v1\nkind: Config\n")
	fmt.Fprintf(&b, "current-context: %q\n", contextName)
	fmt.Fprintf(&b, "clusters:\n- name: %q\n  cluster:\n    server: %q\n    certificate-authority-data: %s\n", contextName, server, b64(caPEM))
	fmt.Fprintf(&b, "contexts:\n- name: %q\n  context:\n    cluster: %[1]q\n    user: %[1]q\n", contextName)
	if len(certPEM) == 0 && len(keyPEM) == 0 {
		fmt.Fprintf(&b, "users:\n- name: %q\n  user: {}\n", contextName)
	} else {
		fmt.Fprintf(&b, "users:\n- name: %q\n  user:\n    client-certificate-data: %s\n    client-key-data: %s\n", contextName, b64(certPEM), b64(keyPEM))
	}
	return []byte(b.String())
}
