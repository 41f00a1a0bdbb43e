package system

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
)

// logKeeperName is the name under which this program's executable keeps a
// daemon's log.
const logKeeperName = "bulkhead-cluster-log"

// startLogKeeper starts a process that writes to a log what is written to the
// returned end of a pipe. It ends when nobody has that end any more: with the
// daemon and all to whom the daemon left it. The caller closes its own.
func startLogKeeper(path string, limit int64) (*os.File, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("make the directory of the log: %w", err)
	}
	// Here an error can still be told.
	l, err := openLog(path, limit)
	if err != nil {
		return nil, fmt.Errorf("open the log: %w", err)
	}
	l.file.Close()
	read, write, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer read.Close()
	cmd := exec.Cmd{
		Path:        "/proc/self/exe",
		Args:        []string{logKeeperName, path, strconv.FormatInt(limit, 10)},
		Dir:         "/",
		Stdin:       read,
		SysProcAttr: &syscall.SysProcAttr{Setsid: true},
	}
	if err := cmd.Start(); err != nil {
		write.Close()
		return nil, fmt.Errorf("start the keeper of the log: %w", err)
	}
	go func() { _ = cmd.Wait() }()
	return write, nil
}

// logKeeper does not return.
func logKeeper() {
	if len(os.Args) != 3 {
		os.Exit(2)
	}
	limit, err := strconv.ParseInt(os.Args[2], 10, 64)
	if err != nil {
		os.Exit(2)
	}
	l := &logFile{path: os.Args[1], limit: limit}
	buf := make([]byte, 64<<10)
	for {
		n, err := os.Stdin.Read(buf)
		// What cannot be written is lost: the daemon must not stand still
		// because a disk is full.
		_ = l.write(buf[:n])
		if errors.Is(err, io.EOF) {
			os.Exit(0)
		}
		if err != nil {
			os.Exit(1)
		}
	}
}

// logFile is a file, and the one before it at <path>.1, each at most limit bytes.
type logFile struct {
	path  string
	limit int64
	file  *os.File // nil: to be opened
}

func openLog(path string, limit int64) (*logFile, error) {
	f, err := os.OpenFile(path, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	return &logFile{path: path, limit: limit, file: f}, nil
}

func (l *logFile) write(data []byte) error {
	for len(data) > 0 {
		if l.file == nil {
			o, err := openLog(l.path, l.limit)
			if err != nil {
				return err
			}
			l.file = o.file
		}
		// Asked each time: the keeper of an earlier daemon may write there too
		// as long as a child of that one lives.
		info, err := l.file.Stat()
		if err != nil {
			return err
		}
		room := l.limit - info.Size()
		if room <= 0 {
			l.file.Close()
			l.file = nil
			if err := os.Rename(l.path, l.path+".1"); err != nil && !errors.Is(err, os.ErrNotExist) {
				return err
			}
			continue
		}
		n, err := l.file.Write(data[:min(int64(len(data)), room)])
		data = data[n:]
		if err != nil {
			return err
		}
	}
	return nil
}
