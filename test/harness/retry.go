package harness

import (
	"context"
	"net/http"
	"strings"
	"time"

	"k8s.io/streaming/pkg/httpstream/wsstream"
)

// tries are how often something is asked of an API server that may have no time for it.
const tries = 3

// pause returns after a while that grows with the tries that there were.
func pause(ctx context.Context, try int) {
	select {
	case <-ctx.Done():
	case <-time.After(time.Duration(try) * time.Second):
	}
}

// retrying reads again what an API server couldn't answer. Writes aren't repeated: nobody
// knows what became of the first.
type retrying struct{ http.RoundTripper }

// RoundTrip implements http.RoundTripper.
func (r retrying) RoundTrip(q *http.Request) (*http.Response, error) {
	// Streams are exec's to begin again.
	once := q.Method != http.MethodGet || len(q.Header[wsstream.WebSocketProtocolHeader]) > 0
	for try := 1; ; try++ {
		a, err := r.RoundTripper.RoundTrip(q)
		if once || try == tries || q.Context().Err() != nil {
			return a, err
		}
		if err == nil {
			if a.StatusCode < http.StatusInternalServerError {
				return a, nil
			}
			a.Body.Close()
		}
		pause(q.Context(), try)
	}
}

// passing reports whether kubectl's error is one of an API server that is busy or just
// beginning.
func passing(stderr string) bool {
	for _, says := range []string{
		"etcdserver: ", "connection refused", "connection reset by peer", "i/o timeout", "TLS handshake timeout", "unexpected EOF", "http2: client connection lost",
		"the server is currently unable to handle the request", "request did not complete within", "InternalError",
	} {
		if strings.Contains(stderr, says) {
			return true
		}
	}
	return false
}
