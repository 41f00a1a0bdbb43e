package isolation

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/bulkhead-mesh/bulkhead/model"
)

// checkTenant refuses what isn't a tenant: its name becomes a path.
func checkTenant(t model.Tenant) error {
	parsed, err := model.ParseTenant(t.String())
	if err != nil {
		return err
	}
	if parsed != t {
		return fmt.Errorf("%w: %q", model.ErrTenant, t.String())
	}
	return nil
}

func (o Options) netnsPath(t model.Tenant) string {
	return filepath.Join(o.RunDir, "netns", t.FileName())
}

func (o Options) statePath(t model.Tenant) string {
	return filepath.Join(o.RunDir, "state", t.FileName())
}

func (o Options) tenantDir(t model.Tenant) string {
	return filepath.Join(o.RunDir, "tenants", t.FileName())
}

func (o Options) xdsDir(t model.Tenant, generation int) string {
	return filepath.Join(o.tenantDir(t), fmt.Sprintf("xds%d", generation))
}

func (o Options) logDir(t model.Tenant) string {
	return filepath.Join(o.LibDir, "log", t.FileName())
}

func (o Options) logPath(t model.Tenant, generation int) string {
	return filepath.Join(o.logDir(t), fmt.Sprintf("envoy%d.log", generation))
}

// makeDirs creates what all tenants share. Only root looks into tenants' folders.
func (o Options) makeDirs() error {
	for _, d := range []struct {
		path string
		mode os.FileMode
	}{
		{o.RunDir, 0o755},
		{filepath.Join(o.RunDir, "netns"), 0o700},
		{filepath.Join(o.RunDir, "state"), 0o700},
		{filepath.Join(o.RunDir, "tenants"), 0o700},
		{filepath.Join(o.RunDir, "root"), 0o700},
		{o.LibDir, 0o755},
		{filepath.Join(o.LibDir, "log"), 0o700},
		{filepath.Join(o.LibDir, "envoy"), 0o755},
	} {
		if err := os.MkdirAll(d.path, d.mode); err != nil {
			return fmt.Errorf("create directory: %w", err)
		}
	}
	return nil
}

// writeAtomic replaces a file as a whole: after a crash it is the old or the new.
func writeAtomic(path string, data []byte) error {
	tmp, err := os.CreateTemp(filepath.Dir(path), ".tmp-")
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	_, err = tmp.Write(data)
	err = errors.Join(err, tmp.Sync(), tmp.Close())
	if err == nil {
		err = os.Rename(tmp.Name(), path)
	}
	if err != nil {
		os.Remove(tmp.Name())
		return fmt.Errorf("write %s: %w", path, err)
	}
	return nil
}
