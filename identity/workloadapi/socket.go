package workloadapi

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// listen binds a socket that everybody may connect to, in place of what is there.
// The directory stays the same one, so mounts of it show the new socket.
func listen(path string) (*net.UnixListener, error) {
	parent := filepath.Dir(path)
	if err := os.MkdirAll(parent, 0o755); err != nil {
		return nil, fmt.Errorf("make directory of socket: %w", err)
	}
	fd, err := unix.Open(parent, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open directory of socket %s: %w", parent, err)
	}
	defer unix.Close(fd)
	dir := fmt.Sprintf("/proc/self/fd/%d/", fd) // shorter than socket paths may be
	// A kubelet that was first may have made it, with a mode and owner of its own.
	if err := errors.Join(os.Chown(dir, os.Geteuid(), os.Getegid()), os.Chmod(dir, 0o755)); err != nil {
		return nil, fmt.Errorf("own directory of socket: %w", err)
	}
	name, temporary := dir+filepath.Base(path), dir+filepath.Base(path)+".new"
	if err := os.Remove(temporary); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("remove half-made socket: %w", err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: temporary})
	if err != nil {
		return nil, fmt.Errorf("bind %s: %w", path, err)
	}
	l.SetUnlinkOnClose(false)
	// At once: there is always a socket, and nobody finds one that refuses all.
	if err := errors.Join(os.Chmod(temporary, 0o666), os.Rename(temporary, name)); err != nil {
		return nil, errors.Join(fmt.Errorf("put socket %s in place: %w", path, err), l.Close())
	}
	return l, nil
}
