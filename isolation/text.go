package isolation

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// textCgroup is whom Envoy's text is charged to, beside the tenants' cgroups. No
// tenant has this name: the only one that begins with an underscore is "_node".
// The kernel charges a page of a file to the cgroup of whoever read it first, and
// leaves it there. So who reads is a process of this cgroup: not the first
// tenant, which would pay some 50 MiB for all, and not the agent, whose limit
// would push the pages out and have the next tenant read and pay for them again.
const textCgroup = "_envoy"

// readTimeout is for a slow disk.
const readTimeout = 2 * time.Minute

// neutralDigest is treeDigest by a process in textCgroup.
func (m *Manager) neutralDigest(tree string) (string, error) {
	if _, err := os.Stat(tree); err != nil {
		return "", err
	}
	if err := m.cgroups.ensure(textCgroup); err != nil {
		return "", err
	}
	config, err := json.Marshal(initConfig{ReadTree: tree})
	if err != nil {
		return "", err
	}
	answer, out, err := os.Pipe()
	if err != nil {
		return "", err
	}
	defer answer.Close()
	l, err := launch(m.o.Launcher, out)
	out.Close()
	if err != nil {
		return "", err
	}
	defer l.close()
	digest, err := m.readDigest(l, config, answer)
	if err != nil {
		l.child.Kill()
	}
	state, waited := l.child.Wait()
	if err == nil && waited == nil && !state.Success() {
		err = errors.New(state.String())
	}
	if err := errors.Join(err, waited); err != nil {
		return "", fmt.Errorf("read %s in a cgroup of its own: %w", tree, err)
	}
	return digest, nil
}

func (m *Manager) readDigest(l *launched, config []byte, answer *os.File) (string, error) {
	if err := m.cgroups.join(textCgroup, l.child.Pid); err != nil {
		return "", err
	}
	if err := l.configure(config, readTimeout, nil); err != nil {
		return "", err
	}
	if err := answer.SetReadDeadline(time.Now().Add(readTimeout)); err != nil {
		return "", err
	}
	digest, err := io.ReadAll(io.LimitReader(answer, 128))
	if err == nil && len(digest) != 64 {
		err = fmt.Errorf("its answer %q is no digest: %w", digest, unix.EPROTO)
	}
	return string(digest), err
}
