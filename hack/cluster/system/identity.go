package system

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

func recordPath(dir, name string) string { return filepath.Join(dir, name+".json") }

// save writes the record in one step.
func (p *Process) save() error {
	data, err := json.Marshal(p.rec)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(p.path), 0o755); err != nil {
		return err
	}
	tmp := p.path + ".tmp"
	f, err := os.Create(tmp)
	if err != nil {
		return err
	}
	_, err = f.Write(append(data, '\n'))
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	return os.Rename(tmp, p.path)
}

// forget removes the record, unless it is of a later daemon of this name.
func (p *Process) forget() error {
	now, err := Load(filepath.Dir(p.path), p.rec.Name)
	if errors.Is(err, os.ErrNotExist) || err == nil && !p.rec.same(now.rec) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := os.Remove(p.path); err != nil {
		return fmt.Errorf("forget %s: %w", p.rec.Name, err)
	}
	return nil
}

// same tells whether two records mean one process.
func (r record) same(o record) bool {
	return r.PID == o.PID && r.Start == o.Start && r.Boot == o.Boot
}

// identify returns who pid is now, or an error if it is nobody: that has ended
// and only waits to be reaped counts as nobody.
func identify(pid int) (record, error) {
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return record{}, fmt.Errorf("identify the boot: %w", err)
	}
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return record{}, fmt.Errorf("identify process %d: %w", pid, err)
	}
	state, start, err := parseStat(stat)
	if err != nil {
		return record{}, fmt.Errorf("identify process %d: %w", pid, err)
	}
	if state == "Z" || state == "X" {
		return record{}, fmt.Errorf("identify process %d: %w", pid, os.ErrProcessDone)
	}
	return record{PID: pid, Start: start, Boot: strings.TrimSpace(string(boot))}, nil
}

// parseStat returns the fields 3 and 22 of /proc/<pid>/stat.
func parseStat(stat []byte) (state string, start uint64, err error) {
	// Field 2 is the name of the program, which may have blanks and
	// parentheses itself.
	i := bytes.LastIndexByte(stat, ')')
	fields := strings.Fields(string(stat[i+1:]))
	if i < 0 || len(fields) < 20 {
		return "", 0, fmt.Errorf("unknown format of stat: %q", stat)
	}
	start, err = strconv.ParseUint(fields[19], 10, 64)
	if err != nil {
		return "", 0, fmt.Errorf("unknown format of stat: %w", err)
	}
	return fields[0], start, nil
}

// open returns a pidfd of the daemon, which keeps meaning it, or nil if it has
// ended.
func (p *Process) open() (*os.File, error) {
	fd, err := unix.PidfdOpen(p.rec.PID, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("open process %d of %s: %w", p.rec.PID, p.rec.Name, err)
	}
	// Looked at after opening: if pid means the daemon now, it did before.
	if !p.Running() {
		unix.Close(fd)
		return nil, nil
	}
	// So that waiting for it can be called off.
	if err := unix.SetNonblock(fd, true); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("open process %d of %s: %w", p.rec.PID, p.rec.Name, err)
	}
	return os.NewFile(uintptr(fd), "pidfd"), nil
}

// waitEnd returns nil once the process of a pidfd has ended, or the error of
// ctx.
func waitEnd(ctx context.Context, pidfd *os.File) error {
	conn, err := pidfd.SyscallConn()
	if err != nil {
		return err
	}
	if err := pidfd.SetReadDeadline(time.Time{}); err != nil {
		return fmt.Errorf("wait for a process: %w", err)
	}
	called := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		_ = pidfd.SetReadDeadline(time.Unix(1, 0))
		close(called)
	})
	var pollErr error
	err = conn.Read(func(fd uintptr) bool {
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		var n int
		n, pollErr = unix.Poll(fds, 0)
		if errors.Is(pollErr, unix.EINTR) {
			pollErr = nil
			return false
		}
		return pollErr != nil || n > 0
	})
	if !stop() {
		<-called // or it might spoil the next wait
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return ctx.Err()
	}
	return errors.Join(err, pollErr)
}

// signal sends a signal to the process of a pidfd, which may have ended.
func signal(pidfd *os.File, sig unix.Signal) error {
	conn, err := pidfd.SyscallConn()
	if err != nil {
		return err
	}
	var sent error
	if err := conn.Control(func(fd uintptr) { sent = unix.PidfdSendSignal(int(fd), sig, nil, 0) }); err != nil {
		return err
	}
	if sent != nil && !errors.Is(sent, unix.ESRCH) {
		return fmt.Errorf("send %v: %w", sig, sent)
	}
	return nil
}
