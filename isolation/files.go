package isolation

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/model"
)

// keptLogs is how many generations' logs of a tenant are kept.
const keptLogs = 4

// rootDir is where each proxy, in its own mount namespace, builds its root.
func (o Options) rootDir() string { return filepath.Join(o.RunDir, "root") }

// makeXDSDir creates the folder of a generation's socket. The proxy may look into
// it and change nothing; it is never replaced while a process has it mounted.
func (o Options) makeXDSDir(t model.Tenant, generation int, uid uint32) error {
	dir := o.xdsDir(t, generation)
	if err := os.MkdirAll(dir, 0o750); err != nil {
		return fmt.Errorf("create folder of the xDS socket: %w", err)
	}
	if err := errors.Join(os.Chown(dir, 0, int(uid)), os.Chmod(dir, 0o750)); err != nil {
		return fmt.Errorf("hand over folder of the xDS socket: %w", err)
	}
	return nil
}

// openLog opens a generation's log for appending; the proxy opens it by name too.
func (o Options) openLog(t model.Tenant, generation int, uid uint32) (*os.File, error) {
	if err := os.MkdirAll(o.logDir(t), 0o700); err != nil {
		return nil, fmt.Errorf("create log: %w", err)
	}
	f, err := os.OpenFile(o.logPath(t, generation), os.O_CREATE|os.O_WRONLY|os.O_APPEND|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("create log: %w", err)
	}
	if err := f.Chown(int(uid), int(uid)); err != nil {
		f.Close()
		return nil, fmt.Errorf("hand over log: %w", err)
	}
	return f, nil
}

// turnLog keeps the log's second half of two logTurn: it is copied, since the
// proxy holds the file, and cut. Lines written in between are lost.
func turnLog(path string) error {
	info, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil || info.Size() < logTurn {
		return err
	}
	in, err := os.Open(path)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(path+".1", os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, io.LimitReader(in, LogLimit))
	return errors.Join(err, out.Close(), os.Truncate(path, 0))
}

// pruneLogs keeps the logs of the newest generations.
func (o Options) pruneLogs(t model.Tenant, running []int) {
	paths, err := filepath.Glob(filepath.Join(o.logDir(t), "envoy*.log"))
	if err != nil {
		return
	}
	number := func(path string) (n int) {
		fmt.Sscanf(filepath.Base(path), "envoy%d.log", &n)
		return n
	}
	slices.SortFunc(paths, func(a, b string) int { return number(b) - number(a) })
	for i, path := range paths {
		if i >= keptLogs && !slices.Contains(running, number(path)) {
			os.Remove(path)
			os.Remove(path + ".1")
		}
	}
}
