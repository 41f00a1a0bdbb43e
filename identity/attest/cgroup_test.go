package attest

import (
	"errors"
	"strings"
	"testing"
)

const (
	uid1 = "0a9cb2b6-5a1f-4c0e-8d3e-3f4f0f1a2b3c"
	uid2 = "11111111-2222-3333-4444-555555555555"
	sys1 = "0a9cb2b6_5a1f_4c0e_8d3e_3f4f0f1a2b3c"
	sys2 = "11111111_2222_3333_4444_555555555555"
)

func TestPodOfCgroups(t *testing.T) {
	fs, systemd, nested := PodCgroups{[]string{"/kubepods"}}, PodCgroups{[]string{"/kubepods.slice"}}, PodCgroups{[]string{"/kubelet.slice/kubelet-kubepods.slice"}}
	for name, c := range map[string]struct {
		where   PodCgroups
		cgroups string
		want    string // "" if refused
	}{
		"v2":                        {fs, "0::/kubepods/burstable/pod" + uid1 + "/c1", uid1},
		"v2 guaranteed":             {fs, "0::/kubepods/pod" + uid1 + "/c1", uid1},
		"v2 besteffort":             {fs, "0::/kubepods/besteffort/pod" + uid1 + "/c1", uid1},
		"v2 systemd":                {systemd, "0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod" + sys1 + ".slice/cri-containerd-c1.scope", uid1},
		"v2 systemd guaranteed":     {systemd, "0::/kubepods.slice/kubepods-pod" + sys1 + ".slice/cri-containerd-c1.scope", uid1},
		"v2 systemd, cgroup root":   {nested, "0::/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-besteffort.slice/kubelet-kubepods-besteffort-pod" + sys1 + ".slice/cri-containerd-c1.scope", uid1},
		"v1":                        {fs, "5:memory:/kubepods/burstable/pod" + uid1 + "/c1\n4:cpu,cpuacct:/kubepods/burstable/pod" + uid1 + "/c1\n1:name=systemd:/kubepods/burstable/pod" + uid1 + "/c1", uid1},
		"v1, one hierarchy unused":  {fs, "5:memory:/kubepods/burstable/pod" + uid1 + "/c1\n4:rdma:/", uid1},
		"hybrid":                    {fs, "5:memory:/kubepods/pod" + uid1 + "/c1\n0::/kubepods/pod" + uid1 + "/c1", uid1},
		"hybrid, empty v2":          {fs, "5:memory:/kubepods/pod" + uid1 + "/c1\n0::/", uid1},
		"static pod":                {fs, "0::/kubepods/pod8d2ad3ab1d3a4d2d1b7b0f0d7b0f0d7b/c1", "8d2ad3ab1d3a4d2d1b7b0f0d7b0f0d7b"},
		"nested by the pod":         {fs, "0::/kubepods/pod" + uid1 + "/c1/kubepods/burstable/pod" + uid2 + "/c2", uid1},
		"nested as if systemd":      {fs, "0::/kubepods/pod" + uid1 + "/kubepods.slice/kubepods-pod" + sys2 + ".slice", uid1},
		"nested, systemd":           {systemd, "0::/kubepods.slice/kubepods-pod" + sys1 + ".slice/cri-containerd-c1.scope/kubepods.slice/kubepods-pod" + sys2 + ".slice", uid1},
		"nested class":              {fs, "0::/kubepods/pod" + uid1 + "/burstable/pod" + uid2, uid1},
		"container named like it":   {fs, "0::/kubepods/pod" + uid1 + "/pod" + uid2, uid1},
		"two pods":                  {fs, "5:memory:/kubepods/pod" + uid1 + "/c1\n0::/kubepods/pod" + uid2 + "/c1", ""},
		"node's service":            {fs, "0::/system.slice/kubepods/pod" + uid1 + "/c1", ""},
		"node's user":               {systemd, "0::/user.slice/user-1000.slice/user@1000.service/kubepods.slice/kubepods-pod" + sys1 + ".slice", ""},
		"similar root":              {fs, "0::/kubepods2/pod" + uid1 + "/c1\n1:a:/kubepodsx/pod" + uid1, ""},
		"other driver":              {systemd, "0::/kubepods/pod" + uid1 + "/c1", ""},
		"other node's on a machine": {PodCgroups{[]string{"/node1/kubepods"}}, "0::/node2/kubepods/pod" + uid1 + "/c1", ""},
		"no pod":                    {fs, "0::/kubepods/burstable", ""},
		"kubepods itself":           {fs, "0::/kubepods", ""},
		"class in place of a pod":   {fs, "0::/kubepods/burstable/burstable/pod" + uid1, ""},
		"another class":             {fs, "0::/kubepods/mine/pod" + uid1, ""},
		"class of the other slice":  {systemd, "0::/kubepods.slice/kubepods-burstable.slice/kubepods-besteffort-pod" + sys1 + ".slice/c1", ""},
		"no UID":                    {fs, "0::/kubepods/pod/c1", ""},
		"UID with a path":           {fs, "0::/kubepods/pod../pod" + uid1, ""},
		"UID with a space":          {fs, "0::/kubepods/poda b/c1", ""},
		"long UID":                  {fs, "0::/kubepods/pod" + strings.Repeat("a", 129) + "/c1", ""},
		"relative":                  {fs, "0::/../kubepods/pod" + uid1 + "/c1", ""},
		"relative elsewhere":        {fs, "1:a:/kubepods/pod" + uid1 + "/c1\n0::/../../c1", ""},
		"no path":                   {fs, "0::kubepods/pod" + uid1, ""},
		"no format":                 {fs, "kubepods/pod" + uid1, ""},
		"nothing":                   {fs, "", ""},
		"root":                      {fs, "0::/", ""},
		"no pods known":             {PodCgroups{}, "0::/kubepods/pod" + uid1 + "/c1", ""},
	} {
		got, err := c.where.pod(strings.NewReader(c.cgroups + "\n"))
		if got != c.want || (err == nil) != (c.want != "") {
			t.Errorf("%s: %q, %v; want %q", name, got, err, c.want)
		}
	}
}

func TestPodCgroupsByOwnCgroup(t *testing.T) {
	for name, c := range map[string]struct {
		cgroups string
		want    string // "" is an error
	}{
		"pod":                 {"0::/kubepods/burstable/pod" + uid1 + "/c1", "/kubepods"},
		"cgroup root":         {"5:memory:/kubelet/kubepods/pod" + uid1 + "/c1\n0::/kubelet/kubepods/pod" + uid1 + "/c1", "/kubelet/kubepods"},
		"systemd":             {"0::/kubepods.slice/kubepods-pod" + sys1 + ".slice/cri-containerd-c1.scope", "/kubepods.slice"},
		"systemd cgroup root": {"0::/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod" + sys1 + ".slice/c1", "/kubelet.slice/kubelet-kubepods.slice"},
		"nested":              {"0::/kubepods/pod" + uid1 + "/c1/kubepods/pod" + uid2, "/kubepods"},
		"no pod":              {"0::/system.slice/agent.service", "/kubepods,/kubepods.slice"},
		"two":                 {"5:memory:/a/kubepods/pod" + uid1 + "\n0::/b/kubepods/pod" + uid1, ""},
	} {
		got, err := podCgroupsOf(strings.NewReader(c.cgroups + "\n"))
		if strings.Join(got.roots, ",") != c.want || (err == nil) != (c.want != "") {
			t.Errorf("%s: %q, %v; want %q", name, got.roots, err, c.want)
		}
	}
	if _, err := podCgroupsOf(strings.NewReader("0::/../other\n")); !errors.Is(err, errHidden) {
		t.Errorf("an agent in a cgroup namespace of its own: %v", err)
	}
	for _, root := range []string{"", "kubepods", "/", "/pods", "/a/../kubepods", "/kubepods/", "/kubepods/x"} {
		if _, err := NewPodCgroups(root); err == nil {
			t.Errorf("%q is taken", root)
		}
	}
}

func FuzzPodOfCgroups(f *testing.F) {
	f.Add("0::/kubepods/burstable/pod" + uid1 + "/c1")
	f.Add("0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod" + sys1 + ".slice/c1")
	f.Fuzz(func(t *testing.T, below string) {
		// Whatever a pod makes below its own cgroup, it is that pod or none.
		for _, own := range []string{"0::/kubepods/pod" + uid1 + "/", "0::/kubepods/burstable/pod" + uid1 + "/c1/"} {
			if strings.ContainsAny(below, "\n\r") {
				return
			}
			got, err := PodCgroups{[]string{"/kubepods", "/kubepods.slice"}}.pod(strings.NewReader(own + below + "\n"))
			if err == nil && got != uid1 {
				t.Errorf("%q below pod %s is pod %s", below, uid1, got)
			}
		}
	})
}
