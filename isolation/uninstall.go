package isolation

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/vishvananda/netlink"
)

// Uninstall ends and removes everything that a Manager with these Options ever
// made and that is still there, whatever state a crash left it in. No Manager may
// be open. Folders that others use too, RunDir and LibDir, are left if they
// aren't empty.
func Uninstall(o Options) error {
	m, err := newManager(o)
	if err != nil {
		return fmt.Errorf("uninstall isolation: %w", err)
	}
	defer m.Close()
	var errs []error
	for _, file := range m.foundFiles() {
		index := m.indexes.get(file)
		if s, _, err := readState(filepath.Join(m.o.RunDir, "state", file)); err == nil {
			index = s.Index
		}
		errs = append(errs, m.removeLeftovers(file, index))
	}
	errs = append(errs, m.removeLinks(), m.cgroups.removeAll())
	for _, path := range []string{
		filepath.Join(m.o.RunDir, "netns"), filepath.Join(m.o.RunDir, "state"), filepath.Join(m.o.RunDir, "tenants"),
		filepath.Join(m.o.RunDir, "root"), filepath.Join(m.o.LibDir, "log"), filepath.Join(m.o.LibDir, "envoy"),
		filepath.Join(m.o.LibDir, "indexes.json"),
	} {
		// Nothing is mounted below anymore, or an error above says so.
		if errors.Join(errs...) == nil {
			errs = append(errs, os.RemoveAll(path))
		}
	}
	// Fails if others have something there.
	os.Remove(m.o.RunDir)
	os.Remove(m.o.LibDir)
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("uninstall isolation: %w", err)
	}
	return nil
}

// removeLinks removes veths whose index is no longer known, by their names and
// the hardware addresses that only we give.
func (m *Manager) removeLinks() error {
	links, err := netlink.LinkList()
	for i := 0; i < 10 && errors.Is(err, netlink.ErrDumpInterrupted); i++ { // others change while it is read
		links, err = netlink.LinkList()
	}
	if err != nil {
		return fmt.Errorf("list links: %w", err)
	}
	var errs []error
	for _, l := range links {
		for index := uint16(1); strings.HasPrefix(l.Attrs().Name, m.o.LinkPrefix) && index <= maxIndex; index++ {
			mac, _ := hardwareAddrs(index)
			if l.Attrs().Name == m.o.linkName(index) && l.Attrs().HardwareAddr.String() == mac.String() {
				errs = append(errs, removeLink(l))
			}
		}
	}
	return errors.Join(errs...)
}
