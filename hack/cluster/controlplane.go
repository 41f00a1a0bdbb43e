package main

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"

	"github.com/bulkhead-mesh/bulkhead/hack/cluster/build"
	"github.com/bulkhead-mesh/bulkhead/hack/cluster/machine"
	"github.com/bulkhead-mesh/bulkhead/hack/cluster/pki"
)

// kubeconfigs writes a kubeconfig of its own for each component that talks to the
// API server.
func (c cluster) writeKubeconfig(ca *pki.CA, file, user string, groups ...string) error {
	cert, key, err := ca.Issue("client-"+filepath.Base(filepath.Dir(file))+"-"+filepath.Base(file),
		pki.Request{CommonName: user, Organizations: groups, Client: true})
	if err != nil {
		return err
	}
	certPEM, err := os.ReadFile(cert)
	if err != nil {
		return err
	}
	keyPEM, err := os.ReadFile(key)
	if err != nil {
		return err
	}
	caPEM, err := os.ReadFile(c.caFile())
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
		return err
	}
	return os.WriteFile(file, pki.Kubeconfig(c.server(), caPEM, certPEM, keyPEM, c.context()), 0o600)
}

func (c cluster) pkiDir() string { return c.path("pki") }
func (c cluster) caFile() string { return c.path("pki", "ca.crt") }

// controlPlane describes etcd, the API server, the controller manager and the
// scheduler, in a network namespace of their own.
func (c cluster) controlPlane(ca *pki.CA, bin build.Binaries) (machine.Spec, error) {
	dir := c.machineDir(0)
	conf := func(name string) string { return filepath.Join(dir, name+".conf") }
	for _, k := range []struct {
		file, user string
		groups     []string
	}{
		{c.kubeconfig(), "bulkhead-cluster-admin", []string{"system:masters"}},
		{conf("controller-manager"), "system:kube-controller-manager", nil},
		{conf("scheduler"), "system:kube-scheduler", nil},
	} {
		if err := c.writeKubeconfig(ca, k.file, k.user, k.groups...); err != nil {
			return machine.Spec{}, err
		}
	}
	own4, own6 := c.addr4(controlPlaneLast), c.addr6(controlPlaneLast)
	loopback := netip.MustParseAddr("127.0.0.1")
	apiCert, apiKey, err := ca.Issue("apiserver", pki.Request{CommonName: "kube-apiserver", Server: true,
		DNSNames: []string{"localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc." + clusterDomain},
		IPs:      netIPs(own4, own6, loopback, apiService4, apiService6)})
	if err != nil {
		return machine.Spec{}, err
	}
	kubeletCert, kubeletKey, err := ca.Issue("apiserver-kubelet", pki.Request{CommonName: kubeletClient, Client: true})
	if err != nil {
		return machine.Spec{}, err
	}
	etcdCert, etcdKey, err := ca.Issue("etcd", pki.Request{CommonName: "etcd", Server: true, Client: true, IPs: netIPs(loopback)})
	if err != nil {
		return machine.Spec{}, err
	}
	etcdClientCert, etcdClientKey, err := ca.Issue("apiserver-etcd", pki.Request{CommonName: "kube-apiserver-etcd", Client: true})
	if err != nil {
		return machine.Spec{}, err
	}
	saKey, saPub, err := pki.ServiceAccountKey(c.pkiDir())
	if err != nil {
		return machine.Spec{}, err
	}
	spec := machine.Spec{
		Name:      c.context() + "-control-plane",
		Dir:       dir,
		Link:      bridgeName,
		Addresses: []netip.Prefix{netip.PrefixFrom(own4, 24), netip.PrefixFrom(own6, 64)},
		Sysctls:   map[string]string{"net/ipv4/ip_forward": "1", "net/ipv6/conf/all/forwarding": "1"},
		Daemons: []machine.Daemon{
			{Name: "etcd", Path: bin.Path("etcd"), Args: []string{
				"--name=default", "--data-dir=" + filepath.Join(dir, "etcd"),
				"--listen-client-urls=https://127.0.0.1:2379", "--advertise-client-urls=https://127.0.0.1:2379",
				"--listen-peer-urls=https://127.0.0.1:2380", "--initial-advertise-peer-urls=https://127.0.0.1:2380",
				"--initial-cluster=default=https://127.0.0.1:2380",
				"--client-cert-auth", "--trusted-ca-file=" + c.caFile(), "--cert-file=" + etcdCert, "--key-file=" + etcdKey,
				"--peer-client-cert-auth", "--peer-trusted-ca-file=" + c.caFile(), "--peer-cert-file=" + etcdCert, "--peer-key-file=" + etcdKey,
				// The cluster is thrown away with the machine: nothing is worth a flush.
				"--unsafe-no-fsync", "--quota-backend-bytes=1073741824", "--auto-compaction-retention=10m", "--log-level=warn",
			}},
			{Name: "kube-apiserver", Path: bin.Path("kube-apiserver"), Args: []string{
				"--etcd-servers=https://127.0.0.1:2379", "--etcd-cafile=" + c.caFile(), "--etcd-certfile=" + etcdClientCert, "--etcd-keyfile=" + etcdClientKey,
				fmt.Sprintf("--secure-port=%d", apiPort), "--advertise-address=" + own4.String(),
				"--service-cluster-ip-range=" + serviceCIDR4.String() + "," + serviceCIDR6.String(),
				"--client-ca-file=" + c.caFile(), "--tls-cert-file=" + apiCert, "--tls-private-key-file=" + apiKey,
				"--service-account-key-file=" + saPub, "--service-account-signing-key-file=" + saKey,
				"--service-account-issuer=https://kubernetes.default.svc." + clusterDomain,
				"--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction", "--allow-privileged",
				"--kubelet-certificate-authority=" + c.caFile(), "--kubelet-client-certificate=" + kubeletCert, "--kubelet-client-key=" + kubeletKey,
				"--kubelet-preferred-address-types=InternalIP", "--profiling=false",
			}},
			{Name: "kube-controller-manager", Path: bin.Path("kube-controller-manager"), Args: []string{
				"--kubeconfig=" + conf("controller-manager"), "--authentication-kubeconfig=" + conf("controller-manager"), "--authorization-kubeconfig=" + conf("controller-manager"),
				"--service-account-private-key-file=" + saKey, "--root-ca-file=" + c.caFile(), "--use-service-account-credentials",
				"--cluster-signing-cert-file=" + c.caFile(), "--cluster-signing-key-file=" + c.path("pki", "ca.key"),
				"--leader-elect=false", "--allocate-node-cidrs=false", "--bind-address=127.0.0.1", "--profiling=false",
			}},
			{Name: "kube-scheduler", Path: bin.Path("kube-scheduler"), Args: []string{
				"--kubeconfig=" + conf("scheduler"), "--authentication-kubeconfig=" + conf("scheduler"), "--authorization-kubeconfig=" + conf("scheduler"),
				"--leader-elect=false", "--bind-address=127.0.0.1", "--profiling=false",
			}},
		},
	}
	for n := 1; n <= c.Nodes; n++ {
		spec.Routes = append(spec.Routes, c.podRoutes(n)...)
	}
	return spec, nil
}

// netIPs are addresses as crypto/x509 wants them.
func netIPs(addrs ...netip.Addr) []net.IP {
	var ips []net.IP
	for _, a := range addrs {
		ips = append(ips, a.AsSlice())
	}
	return ips
}

// podRoutes lead to the pods of a node.
func (c cluster) podRoutes(n int) []machine.Route {
	cidrs := podCIDRs(n)
	return []machine.Route{{To: cidrs[0], Via: c.addr4(nodeLast(n))}, {To: cidrs[1], Via: c.addr6(nodeLast(n))}}
}
