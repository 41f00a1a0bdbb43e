// Package live shows what changes in the cluster for as long as somebody looks.
package live

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"io"
	"time"
)

// Look returns what there is to see, and whether nothing comes after it.
type Look func(context.Context) (now []byte, done bool, err error)

// Pace is how a view looks. The zero value is for people.
type Pace struct {
	// Every is the time between two looks. Default: 1 s.
	Every time.Duration
	// Most is the longest that it becomes while looks are in vain. Default: 30 s.
	Most time.Duration
	// Patience is how long a look may take. Default: 15 s.
	Patience time.Duration
}

func (p Pace) orDefault() Pace {
	return Pace{Every: cmp.Or(p.Every, time.Second), Most: cmp.Or(p.Most, 30*time.Second), Patience: cmp.Or(p.Patience, 15*time.Second)}
}

// Follow writes what look sees whenever that has changed, until it is done or ctx is. An
// API server that can't be asked for a while doesn't end it: it tells problems so, and
// looks again, later each time. It returns the error of a first look, and those that
// final says of that no later look will be better.
func Follow(ctx context.Context, look Look, p Pace, final func(error) bool, w, problems io.Writer) error {
	p = p.orDefault()
	var told []byte
	wait, inVain := p.Every, false
	for {
		within, cancel := context.WithTimeout(ctx, p.Patience)
		now, done, err := look(within)
		cancel()
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil && (told == nil || final(err)):
			return err
		case err != nil:
			if inVain {
				wait = min(2*wait, p.Most)
			}
			inVain = true
			if _, err := fmt.Fprintf(problems, "%v; what is above may be old; looking again in %s\n", err, wait); err != nil {
				return err
			}
		default:
			if inVain {
				if _, err := fmt.Fprintln(problems, "the API server answers again"); err != nil {
					return err
				}
			}
			wait, inVain = p.Every, false
			if told != nil && !bytes.Equal(now, told) {
				if _, err := fmt.Fprintln(w); err != nil {
					return err
				}
			}
			if !bytes.Equal(now, told) {
				if _, err := w.Write(now); err != nil {
					return err
				}
				told = now
			}
			if done {
				return nil
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(wait):
		}
	}
}
