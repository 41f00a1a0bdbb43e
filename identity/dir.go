package identity

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/model"
)

const (
	// 4096 identities of a page each, more than a node has pods.
	tmpfsOptions  = "mode=0700,size=16m,nr_inodes=8192"
	tmpfsFlags    = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	maxFileSize   = 64 << 10
	fileSuffix    = ".pem"
	tempSuffix    = ".new"
	statfsWanted  = unix.ST_NOSUID | unix.ST_NODEV | unix.ST_NOEXEC
	directoryMode = 0o700
)

// openDir makes dir a private tmpfs, unless it is one.
func openDir(dir string, log *slog.Logger) error {
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return err
	}
	if err := os.Mkdir(dir, directoryMode); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	mounted, err := isTmpfsMount(dir)
	if err != nil {
		return err
	}
	if !mounted {
		// Files under the mount would stay, unseen, on whatever is below.
		left, err := os.ReadDir(dir)
		if err != nil {
			return err
		}
		if len(left) > 0 {
			return fmt.Errorf("%s has files and isn't a tmpfs: move them away", dir)
		}
		err = unix.Mount("bulkhead-keys", dir, "tmpfs", tmpfsFlags, tmpfsOptions+",noswap")
		if errors.Is(err, unix.EINVAL) {
			log.Warn("keys may be swapped out: this kernel's tmpfs doesn't know noswap", "dir", dir)
			err = unix.Mount("bulkhead-keys", dir, "tmpfs", tmpfsFlags, tmpfsOptions)
		}
		if err != nil {
			return fmt.Errorf("mount tmpfs on %s: %w", dir, err)
		}
	}
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return fmt.Errorf("statfs %s: %w", dir, err)
	}
	if st.Flags&statfsWanted != statfsWanted {
		if err := unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_BIND|tmpfsFlags, ""); err != nil {
			return fmt.Errorf("remount %s with nosuid,nodev,noexec: %w", dir, err)
		}
	}
	if err := errors.Join(os.Chown(dir, os.Geteuid(), os.Getegid()), os.Chmod(dir, directoryMode)); err != nil {
		return err
	}
	return nil
}

// isTmpfsMount reports whether dir, a directory and no link, is where a tmpfs is
// mounted; being somewhere in one isn't enough.
func isTmpfsMount(dir string) (bool, error) {
	var sx unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, dir, unix.AT_SYMLINK_NOFOLLOW, unix.STATX_TYPE, &sx); err != nil {
		return false, fmt.Errorf("statx %s: %w", dir, err)
	}
	if sx.Mode&unix.S_IFMT != unix.S_IFDIR {
		return false, fmt.Errorf("%s isn't a directory", dir)
	}
	if sx.Attributes_mask&unix.STATX_ATTR_MOUNT_ROOT == 0 {
		return false, fmt.Errorf("statx %s: the kernel doesn't tell mount points (5.8 does)", dir)
	}
	if sx.Attributes&unix.STATX_ATTR_MOUNT_ROOT == 0 {
		return false, nil
	}
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return false, fmt.Errorf("statfs %s: %w", dir, err)
	}
	if st.Type != unix.TMPFS_MAGIC {
		return false, fmt.Errorf("%s is a mount of another kind than tmpfs: unmount it", dir)
	}
	return true, nil
}

// Uninstall removes the keys in dir ("" is DefaultDir), its mount and itself. It
// is idempotent; no Store may use dir any more.
func Uninstall(dir string) error {
	if dir == "" {
		dir = DefaultDir
	}
	for {
		mounted, err := isTmpfsMount(dir)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("remove keys: %w", err)
		}
		if !mounted {
			if err := os.Remove(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("remove keys: %w", err)
			}
			return nil
		}
		// The files first: another mount namespace may hold a copy of the mount.
		files, err := os.ReadDir(dir)
		if err != nil {
			return fmt.Errorf("remove keys: %w", err)
		}
		for _, f := range files {
			if err := os.RemoveAll(filepath.Join(dir, f.Name())); err != nil {
				return fmt.Errorf("remove keys: %w", err)
			}
		}
		if err := unix.Unmount(dir, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
			return fmt.Errorf("unmount %s: %w", dir, err)
		}
	}
}

// fileName is the file of an identity; SPIFFE IDs can be longer than file names.
func fileName(id model.Identity) string {
	sum := sha256.Sum256([]byte(id.String()))
	return hex.EncodeToString(sum[:]) + fileSuffix
}

// writeFile replaces a file at once: after a crash it is the old or the new one.
// Nothing is synced, since nothing in a tmpfs outlives the kernel.
func writeFile(path string, data []byte) error {
	temp := path + tempSuffix
	if err := removeFile(temp); err != nil {
		return err
	}
	f, err := os.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err := errors.Join(err, f.Close()); err != nil {
		return errors.Join(err, removeFile(temp))
	}
	if err := os.Rename(temp, path); err != nil {
		return errors.Join(err, removeFile(temp))
	}
	return nil
}

func removeFile(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// readDir reads the credentials that a former process left and removes files
// that are none: half-written ones, and those that no version of this reads.
func readDir(dir string, log *slog.Logger) (map[model.Identity]*credential, error) {
	files, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	found := map[model.Identity]*credential{}
	for _, f := range files {
		path := filepath.Join(dir, f.Name())
		c, err := readFile(path, f)
		if err == nil {
			found[c.id] = c
			continue
		}
		log.Warn("removing a file that isn't a key of ours", "file", path, "error", err)
		if err := os.RemoveAll(path); err != nil {
			return nil, err
		}
	}
	return found, nil
}

func readFile(path string, f fs.DirEntry) (*credential, error) {
	info, err := f.Info()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() || info.Size() > maxFileSize || !strings.HasSuffix(f.Name(), fileSuffix) {
		return nil, errors.New("neither its name nor its kind or size is a key's")
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	c, err := parseCredential(data)
	if err != nil {
		return nil, err
	}
	if fileName(c.id) != f.Name() {
		return nil, fmt.Errorf("it is named after another identity than %s", c.id)
	}
	return c, nil
}
