package identity

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/bulkhead-mesh/bulkhead/model"
)

// A full key directory costs what the next start would have found, and nothing else:
// no certificate that is served, and no file that was whole.
func TestFullDirectory(t *testing.T) {
	dir := keyDir(t)
	// Room for two files; each is less than a page.
	size := func(files int) string { return fmt.Sprint("size=", files*os.Getpagesize()) }
	if err := errors.Join(os.Mkdir(dir, 0o700), unix.Mount("test", dir, "tmpfs", tmpfsFlags, size(2))); err != nil {
		t.Fatal(err)
	}
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t, dir)
		ids := []model.Identity{reviews, ratings}
		pods := []Pod{pod("1", reviews), pod("2", ratings)}
		content := func() (files [][]byte) {
			for _, id := range ids {
				files = append(files, must[[]byte](t)(os.ReadFile(filepath.Join(dir, fileName(id)))))
			}
			return files
		}
		versions := func() (versions []string) {
			for _, id := range ids {
				_, _, v := n.certificate(teamA, id)
				versions = append(versions, v)
			}
			return versions
		}
		unkept := func(want int) {
			t.Helper()
			synctest.Wait()
			h := n.Health()
			if h.Unkept != want || (want > 0) != errors.Is(h.KeepError, unix.ENOSPC) {
				t.Fatalf("%d keys aren't kept, want %d: %v", h.Unkept, want, h.KeepError)
			}
			if want > 0 && !strings.Contains(h.KeepError.Error(), dir) {
				t.Errorf("the error doesn't say where: %v", h.KeepError)
			}
		}
		n.start()
		defer func() { n.stop() }()
		n.bundle()
		n.SetPods(pods)
		n.ready("1")
		n.ready("2")
		unkept(0)
		first, files := versions(), content()

		// Renewed, with no room for a second file of either.
		time.Sleep(35 * time.Minute)
		renewed := versions()
		if renewed[0] == first[0] || renewed[1] == first[1] {
			t.Fatal("not renewed")
		}
		unkept(2)
		// One more identity serves as well.
		n.SetPods(append(pods, pod("3", other)))
		n.ready("3")
		n.certificate(teamB, other)
		unkept(3)
		if now := content(); !slices.EqualFunc(now, files, bytes.Equal) || len(n.files()) != 2 {
			t.Errorf("what was there has changed: %q", n.files())
		}
		said := strings.Count(n.log.String(), "key can't be kept")
		time.Sleep(5 * time.Minute)
		if again := strings.Count(n.log.String(), "key can't be kept"); again != said || said != 3 {
			t.Errorf("said %d times, and %d five minutes later", said, again)
		}
		n.stop()

		// What was whole is found and still valid, without an operator.
		n.signer.set(func(Pod) error { return status.Error(codes.Unavailable, "operator is away") })
		n.start()
		n.bundle()
		n.SetPods(append(pods, pod("3", other)))
		if v := versions(); !slices.Equal(v, first) {
			t.Errorf("versions %v after the start, the files have %v", v, first)
		}
		unkept(0) // nothing is newer than its file
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := n.WaitReady(ctx, "3"); err == nil {
			t.Error("a key was found that couldn't be kept")
		}

		// The operator is back, and then there is room: kept without another signature.
		n.signer.set(nil)
		n.ready("3")
		time.Sleep(time.Minute)
		unkept(3)
		asked := len(n.signer.calls())
		if err := unix.Mount("", dir, "", unix.MS_REMOUNT|tmpfsFlags, size(16)); err != nil {
			t.Fatal(err)
		}
		time.Sleep(fileRetry + time.Second)
		unkept(0)
		if n := len(n.signer.calls()); n != asked {
			t.Errorf("signed %d times more", n-asked)
		}
		if len(n.files()) != 3 {
			t.Errorf("files %q", n.files())
		}
		for _, e := range n.entries {
			if b := must[[]byte](t)(os.ReadFile(filepath.Join(dir, fileName(e.id)))); !bytes.Equal(b, e.credential.encode()) {
				t.Errorf("the file of %s isn't what is served", e.id)
			}
		}
	})
}
