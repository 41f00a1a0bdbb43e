package machine

import (
	"bufio"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// supervisor starts the daemons, starts them again when they end, and reaps
// whatever else ends in the machine.
type supervisor struct {
	daemons []*daemon
	signals chan os.Signal
}

type daemon struct {
	Daemon
	log     *log
	pid     int // 0: doesn't run
	started time.Time
	backoff time.Duration
	due     time.Time
}

const (
	minBackoff = 250 * time.Millisecond
	maxBackoff = 5 * time.Second
)

func newSupervisor(spec Spec) (*supervisor, error) {
	s := &supervisor{signals: make(chan os.Signal, 64)}
	signal.Notify(s.signals, unix.SIGCHLD, unix.SIGTERM, unix.SIGINT)
	for _, d := range spec.Daemons {
		l, err := openLog(filepath.Join(logDir(spec), d.Name+".log"))
		if err != nil {
			return nil, err
		}
		s.daemons = append(s.daemons, &daemon{Daemon: d, log: l})
	}
	return s, nil
}

// logDir is LogDir as the machine sees it.
func logDir(spec Spec) string {
	if spec.Root {
		return "/var/log/machine"
	}
	return spec.LogDir()
}

// run returns after SIGTERM, when all daemons have ended or had their time.
func (s *supervisor) run() {
	for {
		next := s.startDue()
		timer := time.NewTimer(next)
		select {
		case sig := <-s.signals:
			if sig != unix.SIGCHLD {
				s.stop()
				return
			}
			s.reap()
		case <-timer.C:
		}
		timer.Stop()
	}
}

// startDue starts what is due and returns for how long nothing else is.
func (s *supervisor) startDue() time.Duration {
	next := time.Hour
	for _, d := range s.daemons {
		if d.pid != 0 {
			continue
		}
		wait := time.Until(d.due)
		if wait <= 0 && d.After != "" {
			if _, err := os.Stat(d.After); err != nil {
				wait = 50 * time.Millisecond
			}
		}
		if wait <= 0 {
			if err := d.start(); err == nil {
				continue
			} else {
				fmt.Fprintf(d.log, "init: %v\n", err)
				wait = d.later()
			}
		}
		next = min(next, wait)
	}
	return next
}

func (d *daemon) start() error {
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	null, err := os.Open(os.DevNull)
	if err != nil {
		r.Close()
		w.Close()
		return err
	}
	// Not exec.Cmd: its Wait and reap would take each other's children.
	p, err := os.StartProcess(d.Path, append([]string{d.Path}, d.Args...), &os.ProcAttr{
		Env:   append(os.Environ(), d.Env...),
		Files: []*os.File{null, w, w},
		Sys:   &unix.SysProcAttr{Setsid: true},
	})
	null.Close()
	w.Close()
	if err != nil {
		r.Close()
		return err
	}
	d.pid, d.started = p.Pid, time.Now()
	p.Release()
	fmt.Fprintf(d.log, "init: %s started as %d\n", d.Name, d.pid)
	go func() {
		defer r.Close()
		for lines := bufio.NewReaderSize(r, 64<<10); ; {
			line, err := lines.ReadSlice('\n')
			d.log.Write(line)
			if err != nil && err != bufio.ErrBufferFull {
				return
			}
		}
	}()
	return nil
}

// later says when to try again.
func (d *daemon) later() time.Duration {
	if time.Since(d.started) > 30*time.Second {
		d.backoff = 0
	}
	d.backoff = min(max(2*d.backoff, minBackoff), maxBackoff)
	d.due = time.Now().Add(d.backoff)
	return d.backoff
}

// reap takes leave of all processes that have ended.
func (s *supervisor) reap() {
	for {
		var status unix.WaitStatus
		pid, err := unix.Wait4(-1, &status, unix.WNOHANG, nil)
		if err == unix.EINTR {
			continue
		}
		if pid <= 0 || err != nil {
			return
		}
		for _, d := range s.daemons {
			if d.pid == pid {
				d.pid = 0
				fmt.Fprintf(d.log, "init: %s ended (exit code %d, signal %d); next start in %v\n",
					d.Name, status.ExitStatus(), status.Signal(), d.later())
			}
		}
	}
}

// stop ends the daemons, last first; the kernel ends the rest with pid 1.
func (s *supervisor) stop() {
	for i := len(s.daemons) - 1; i >= 0; i-- {
		if d := s.daemons[i]; d.pid != 0 {
			unix.Kill(d.pid, unix.SIGTERM)
			d.due = time.Now().Add(time.Hour)
		}
	}
	deadline := time.After(stopGrace)
	for {
		left := false
		for _, d := range s.daemons {
			left = left || d.pid != 0
		}
		if !left {
			return
		}
		select {
		case <-s.signals:
			s.reap()
		case <-deadline:
			return
		}
	}
}
