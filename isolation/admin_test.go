package isolation

import (
	"errors"
	"net"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// What a taken-over proxy answers the agent's probes with isn't read without an end,
// headers included.
func TestAdminHeadersAreBounded(t *testing.T) {
	const generation = 997
	l, err := net.Listen("unix", "@"+adminName(generation))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	wrote := make(chan int, 1)
	go func() {
		total := 0
		defer func() { wrote <- total }()
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		line := []byte("X: " + strings.Repeat("x", 4096) + "\r\n")
		_, err = c.Write([]byte("HTTP/1.1 200 OK\r\n"))
		for err == nil && total < 8<<20 {
			var n int
			n, err = c.Write(line)
			total += n
		}
		if err != nil && !errors.Is(err, unix.EPIPE) && !errors.Is(err, unix.ECONNRESET) {
			t.Error(err)
		}
	}()
	if ready(t.Context(), threadNetns, generation) {
		t.Error("it is ready")
	}
	// The socket holds some of it, unread.
	if n := <-wrote; n > 1<<20 {
		t.Errorf("%d bytes of headers were taken", n)
	}
}
