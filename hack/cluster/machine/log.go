package machine

import (
	"os"
	"sync"
)

// log is a file that starts anew when it is full, keeping the one before. It is
// safe for concurrent use.
type log struct {
	name string
	mu   sync.Mutex
	f    *os.File
	size int64
}

func openLog(name string) (*log, error) {
	f, err := os.OpenFile(name, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, err
	}
	return &log{name: name, f: f, size: info.Size()}, nil
}

// Write never fails: a daemon must not end for a disk that is full.
func (l *log) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.size+int64(len(p)) > logBytes {
		if err := os.Rename(l.name, l.name+".old"); err != nil {
			return len(p), nil
		}
		f, err := os.OpenFile(l.name, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
		if err != nil {
			return len(p), nil
		}
		l.f.Close()
		l.f, l.size = f, 0
	}
	n, _ := l.f.Write(p)
	l.size += int64(n)
	return len(p), nil
}
