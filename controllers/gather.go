package controllers

import (
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	utilruntime "k8s.io/apimachinery/pkg/util/runtime"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
	gatewayv1beta1 "sigs.k8s.io/gateway-api/apis/v1beta1"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
)

// sliceService is the index of EndpointSlices by the service that they belong to.
const sliceService = "service"

func indexSlice(o client.Object) []string {
	if name := o.GetLabels()[discoveryv1.LabelServiceName]; name != "" {
		return []string{name}
	}
	return nil
}

func newScheme() *runtime.Scheme {
	scheme := runtime.NewScheme()
	utilruntime.Must(clientgoscheme.AddToScheme(scheme))
	utilruntime.Must(v1alpha1.AddToScheme(scheme))
	utilruntime.Must(gatewayv1.Install(scheme))
	utilruntime.Must(gatewayv1beta1.Install(scheme))
	return scheme
}

// cacheOptions keep of each object what translate reads. namespace is the
// operator's; of the cluster's Secrets only its own one is read.
func cacheOptions(namespace string) cache.Options {
	own := func(name string) cache.ByObject {
		config := cache.Config{}
		if name != "" {
			config.FieldSelector = fields.OneTermEqualSelector("metadata.name", name)
		}
		return cache.ByObject{Namespaces: map[string]cache.Config{namespace: config}}
	}
	return cache.Options{
		DefaultTransform: cache.TransformStripManagedFields(),
		ByObject: map[client.Object]cache.ByObject{
			&corev1.Pod{}:                {Transform: stripPod},
			&corev1.Service{}:            {Transform: stripService},
			&corev1.Node{}:               {Transform: stripNode},
			&corev1.Namespace{}:          {Transform: stripNamespace},
			&discoveryv1.EndpointSlice{}: {Transform: stripEndpointSlice},
			&networkingv1.ServiceCIDR{}:  {Transform: stripServiceCIDR},
			&corev1.Secret{}:             own(SecretAuthority),
			&corev1.ConfigMap{}:          own(""),
		},
	}
}

// stripMeta keeps what tells one object, and one version of it, from another.
func stripMeta(m metav1.ObjectMeta) metav1.ObjectMeta {
	return metav1.ObjectMeta{Namespace: m.Namespace, Name: m.Name, UID: m.UID, ResourceVersion: m.ResourceVersion, CreationTimestamp: m.CreationTimestamp, DeletionTimestamp: m.DeletionTimestamp}
}

func stripPod(o any) (any, error) {
	p, ok := o.(*corev1.Pod)
	if !ok {
		return o, nil
	}
	out := &corev1.Pod{
		ObjectMeta: stripMeta(p.ObjectMeta),
		Spec:       corev1.PodSpec{NodeName: p.Spec.NodeName, ServiceAccountName: p.Spec.ServiceAccountName, HostNetwork: p.Spec.HostNetwork},
		Status:     corev1.PodStatus{Phase: p.Status.Phase, PodIPs: p.Status.PodIPs},
	}
	if v := p.Labels[v1alpha1.LabelOptOut]; v != "" {
		out.Labels = map[string]string{v1alpha1.LabelOptOut: v}
	}
	for _, name := range []string{corev1.MirrorPodAnnotationKey, v1alpha1.AnnotationExcludeOutbound, v1alpha1.AnnotationExcludeInbound} {
		if v, ok := p.Annotations[name]; ok {
			if out.Annotations == nil {
				out.Annotations = map[string]string{}
			}
			out.Annotations[name] = v
		}
	}
	return out, nil
}

func stripService(o any) (any, error) {
	s, ok := o.(*corev1.Service)
	if !ok {
		return o, nil
	}
	out := &corev1.Service{ObjectMeta: stripMeta(s.ObjectMeta), Spec: corev1.ServiceSpec{Type: s.Spec.Type, ClusterIPs: s.Spec.ClusterIPs}}
	if c := meta.FindStatusCondition(s.Status.Conditions, v1alpha1.ConditionServed); c != nil {
		out.Status.Conditions = []metav1.Condition{*c}
	}
	for _, p := range s.Spec.Ports {
		out.Spec.Ports = append(out.Spec.Ports, corev1.ServicePort{Name: p.Name, Protocol: p.Protocol, Port: p.Port, AppProtocol: p.AppProtocol})
	}
	return out, nil
}

func stripNode(o any) (any, error) {
	n, ok := o.(*corev1.Node)
	if !ok {
		return o, nil
	}
	out := &corev1.Node{ObjectMeta: stripMeta(n.ObjectMeta), Spec: corev1.NodeSpec{PodCIDR: n.Spec.PodCIDR, PodCIDRs: n.Spec.PodCIDRs}}
	out.Labels = n.Labels
	for _, c := range n.Status.Conditions {
		if c.Type == corev1.NodeReady {
			out.Status.Conditions = []corev1.NodeCondition{{Type: c.Type, Status: c.Status, LastTransitionTime: c.LastTransitionTime}}
		}
	}
	return out, nil
}

func stripNamespace(o any) (any, error) {
	n, ok := o.(*corev1.Namespace)
	if !ok {
		return o, nil
	}
	out := &corev1.Namespace{ObjectMeta: stripMeta(n.ObjectMeta)}
	out.Labels = n.Labels
	return out, nil
}

func stripEndpointSlice(o any) (any, error) {
	s, ok := o.(*discoveryv1.EndpointSlice)
	if !ok {
		return o, nil
	}
	out := &discoveryv1.EndpointSlice{ObjectMeta: stripMeta(s.ObjectMeta), AddressType: s.AddressType, Ports: s.Ports}
	if v := s.Labels[discoveryv1.LabelServiceName]; v != "" {
		out.Labels = map[string]string{discoveryv1.LabelServiceName: v}
	}
	for _, e := range s.Endpoints {
		k := discoveryv1.Endpoint{Addresses: e.Addresses, Conditions: e.Conditions, Hints: e.Hints}
		if r := e.TargetRef; r != nil {
			k.TargetRef = &corev1.ObjectReference{Kind: r.Kind, Namespace: r.Namespace, UID: r.UID}
		}
		out.Endpoints = append(out.Endpoints, k)
	}
	return out, nil
}

func stripServiceCIDR(o any) (any, error) {
	s, ok := o.(*networkingv1.ServiceCIDR)
	if !ok {
		return o, nil
	}
	return &networkingv1.ServiceCIDR{ObjectMeta: stripMeta(s.ObjectMeta), Spec: s.Spec}, nil
}
