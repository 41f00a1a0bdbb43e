package workloadapi

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"golang.org/x/sys/unix"
)

// The test binary runs itself again as what pods run.
const roleVariable = "BULKHEAD_WORKLOADAPI_TEST_ROLE"

func TestMain(m *testing.M) {
	role := os.Getenv(roleVariable)
	if role == "" {
		os.Exit(m.Run())
	}
	if err := roles[role](os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, role+":", err)
		os.Exit(1)
	}
}

var roles = map[string]func([]string) error{
	"fetch": fetch, "watch": watch, "connect": connect, "hold": hold, "idle": idle,
}

var tell = func() func(any) {
	var mu sync.Mutex
	lines := json.NewEncoder(os.Stdout)
	return func(v any) {
		mu.Lock()
		defer mu.Unlock()
		lines.Encode(v)
	}
}()

// fetched is what one client got of everything.
type fetched struct {
	ID, X509Error         string
	Subject, JWTError     string
	Token                 string
	Bundles               int
	Valid                 string // by ValidateJWTSVID
	WrongAudience         string
	ForeignID, NoAudience string
}

func text(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

// fetch is go-spiffe's client, as it is.
func fetch([]string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	c, err := workloadapi.New(ctx)
	if err != nil {
		return err
	}
	defer c.Close()
	var f fetched
	svids, err := c.FetchX509Context(ctx)
	f.X509Error = text(err)
	if err == nil {
		svid := svids.DefaultSVID()
		if _, _, err := x509svid.Verify(svid.Certificates, svids.Bundles); err != nil {
			f.X509Error = "doesn't verify: " + err.Error()
		}
		f.ID = svid.ID.String()
	}
	token, err := c.FetchJWTSVID(ctx, jwtsvid.Params{Audience: "db"})
	f.JWTError = text(err)
	if err == nil {
		f.Token = token.Marshal()
		bundles, err := c.FetchJWTBundles(ctx)
		if err != nil {
			return err
		}
		svid, err := jwtsvid.ParseAndValidate(f.Token, bundles, []string{"db"})
		if err != nil {
			f.JWTError = "doesn't verify: " + err.Error()
		} else {
			f.Subject = svid.ID.String()
		}
		if _, err := jwtsvid.ParseAndValidate(f.Token, bundles, []string{"other"}); err == nil {
			f.JWTError = "another audience takes it"
		}
		valid, err := c.ValidateJWTSVID(ctx, f.Token, "db")
		if err != nil {
			f.Valid = err.Error()
		} else {
			f.Valid = valid.ID.String()
		}
		_, err = c.ValidateJWTSVID(ctx, f.Token, "other")
		f.WrongAudience = text(err)
	}
	x, err := c.FetchX509Bundles(ctx)
	if err == nil {
		f.Bundles = x.Len()
	}
	_, err = c.FetchJWTSVID(ctx, jwtsvid.Params{Audience: "db", Subject: spiffeid.RequireFromString(foreignID)})
	f.ForeignID = text(err)
	_, err = c.FetchJWTSVID(ctx, jwtsvid.Params{})
	f.NoAudience = text(err)
	tell(f)
	return nil
}

// update is what a watcher is told.
type update struct {
	Serial string
	Root   string // subject key of the bundle's last root
	JWT    int    // keys
	Error  string
	Roots  int
}

type watcher struct{}

func (watcher) OnX509ContextUpdate(c *workloadapi.X509Context) {
	svid := c.DefaultSVID()
	b, err := c.Bundles.GetX509BundleForTrustDomain(svid.ID.TrustDomain())
	if err != nil {
		tell(update{Error: err.Error()})
		return
	}
	u := update{Serial: svid.Certificates[0].SerialNumber.String(), Roots: len(b.X509Authorities())}
	if _, _, err := x509svid.Verify(svid.Certificates, b); err != nil {
		u.Error = err.Error()
	}
	tell(u)
}
func (watcher) OnX509ContextWatchError(err error) { tell(update{Error: err.Error()}) }
func (watcher) OnJWTBundlesUpdate(s *jwtbundle.Set) {
	for _, b := range s.Bundles() {
		tell(update{JWT: len(b.JWTAuthorities())})
	}
}
func (watcher) OnJWTBundlesWatchError(err error) { tell(update{Error: err.Error()}) }

// watch tells all that is pushed, until its input ends.
func watch([]string) error {
	ctx, cancel := context.WithCancel(context.Background())
	go func() { io.Copy(io.Discard, os.Stdin); cancel() }()
	c, err := workloadapi.New(ctx)
	if err != nil {
		return err
	}
	defer c.Close()
	var wg sync.WaitGroup
	wg.Go(func() { c.WatchX509Context(ctx, watcher{}) })
	wg.Go(func() { c.WatchJWTBundles(ctx, watcher{}) })
	wg.Wait()
	return nil
}

// connect connects and hands the connection on over file 3, then lives until its
// input ends.
func connect([]string) error {
	path := strings.TrimPrefix(os.Getenv("SPIFFE_ENDPOINT_SOCKET"), "unix://")
	c, err := net.DialUnix("unix", nil, &net.UnixAddr{Net: "unix", Name: path})
	if err != nil {
		return err
	}
	f, err := c.File()
	if err != nil {
		return err
	}
	if err := unix.Sendmsg(3, []byte{0}, unix.UnixRights(int(f.Fd())), nil, 0); err != nil {
		return err
	}
	c.Close()
	f.Close()
	tell("passed")
	_, err = io.Copy(io.Discard, os.Stdin)
	return err
}

// hold takes as many connections and streams as it gets and begins new ones all
// the time, until it is killed.
func hold([]string) error {
	ctx := context.Background()
	var mu sync.Mutex
	refused := 0
	var silent []net.Conn // that say nothing
	for range 64 {
		go func() {
			for {
				c, err := workloadapi.New(ctx)
				if err != nil {
					continue
				}
				for range 8 {
					go func() {
						for {
							_, err := c.FetchX509Context(ctx)
							if err != nil {
								mu.Lock()
								refused++
								mu.Unlock()
							}
						}
					}()
				}
				time.Sleep(50 * time.Millisecond) // and another, with the old ones open
				if raw, err := net.Dial("unix", strings.TrimPrefix(os.Getenv("SPIFFE_ENDPOINT_SOCKET"), "unix://")); err == nil {
					mu.Lock()
					silent = append(silent, raw)
					mu.Unlock()
				}
			}
		}()
	}
	for {
		time.Sleep(50 * time.Millisecond)
		mu.Lock()
		tell(refused)
		mu.Unlock()
	}
}

// idle is a pod's process that is only there.
func idle([]string) error {
	tell("up")
	_, err := io.Copy(io.Discard, os.Stdin)
	return err
}

const foreignID = "spiffe://example.org/ns/team-z/sa/other"
