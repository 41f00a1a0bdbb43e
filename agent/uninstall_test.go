package agent

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

// answers is an API server that answers each Get alike.
type answers struct {
	client.WithWatch
	err      error
	deleting bool
}

func (a answers) Get(_ context.Context, _ client.ObjectKey, o client.Object, _ ...client.GetOption) error {
	if a.deleting {
		o.SetDeletionTimestamp(&metav1.Time{Time: time.Now()})
	}
	return a.err
}

func TestIsUninstalled(t *testing.T) {
	unauthorized := apierrors.NewUnauthorized("the account is gone")
	resource := schema.GroupResource{Group: appsv1.GroupName, Resource: "daemonsets"}
	for _, test := range []struct {
		name string
		kube answers
		// told is when a watch says that the namespace goes; 0 is never.
		told time.Duration
		want bool
	}{
		{name: "restarted", kube: answers{}},
		{name: "gone", kube: answers{err: apierrors.NewNotFound(resource, daemonSet)}, want: true},
		{name: "going", kube: answers{deleting: true}, want: true},
		{name: "away", kube: answers{err: errors.New("connection refused")}, told: time.Second},
		{name: "without rights, told late", kube: answers{err: unauthorized}, told: time.Second, want: true},
		{name: "forbidden, told late", kube: answers{err: apierrors.NewForbidden(resource, daemonSet, nil)}, told: time.Second, want: true},
		{name: "without rights", kube: answers{err: unauthorized}},
		{name: "told too late", kube: answers{err: unauthorized}, told: lastWord + time.Second},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a := &Agent{kube: test.kube, uninstallTold: make(chan struct{})}
				if test.told > 0 {
					time.AfterFunc(test.told, func() { a.setUninstall(func() { a.namespaceGone = true }) })
				}
				if got := a.isUninstalled(); got != test.want {
					t.Errorf("%v, want %v", got, test.want)
				}
			})
		})
	}
}
