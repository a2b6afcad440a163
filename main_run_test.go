package main

// Tests of runWhile and runUntilOneEnds: the order in which they end the concurrent parts of a
// process. The tests run in virtual time.

import (
	"context"
	"errors"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// runWhile runs the functions serve and background concurrently. When its context ends, it ends
// serve. When serve has returned, it ends background. If background returns first, runWhile ends
// serve. It returns the errors of both functions.
func TestRunWhile(t *testing.T) {
	bad, worse := errors.New("bad"), errors.New("worse")
	for name, c := range map[string]struct {
		// Times in seconds after the start: when the context ends (stop), when background fails
		// (fail), and when serve returns by itself (end). 0 means never.
		stop, fail, end time.Duration
		serveErr        error         // error that serve returns at the time end
		want            []string      // names of the two functions in the order in which they must end; "serve terminated" if serve got the cause errTerminated
		took            time.Duration // time in seconds until runWhile must return
	}{
		"context ends":     {stop: 3, want: []string{"serve terminated", "background"}, took: 3 + 5 + 7},
		"background fails": {fail: 2, want: []string{"background", "serve"}, took: 2 + 5},
		"serve ends":       {end: 4, want: []string{"serve", "background"}, took: 4 + 7},
		"serve fails":      {end: 4, serveErr: worse, want: []string{"serve", "background"}, took: 4 + 7},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				const unit = time.Second
				after := func(n time.Duration) <-chan time.Time {
					if n == 0 {
						return nil
					}
					return time.After(n * unit)
				}
				var mu sync.Mutex
				var ended []string
				note := func(s string) {
					mu.Lock()
					defer mu.Unlock()
					ended = append(ended, s)
				}
				ctx, cancel := context.WithCancelCause(t.Context())
				defer cancel(nil)
				if c.stop > 0 {
					time.AfterFunc(c.stop*unit, func() { cancel(errTerminated) })
				}
				begin := time.Now()
				err := runWhile(ctx, func(ctx context.Context) error {
					defer note("background")
					select {
					case <-after(c.fail):
						return bad
					case <-ctx.Done():
						time.Sleep(7 * unit) // background needs 7 s to end after its context has ended
						return nil
					}
				}, func(ctx context.Context) error {
					select {
					case <-after(c.end):
						note("serve")
						return c.serveErr
					case <-ctx.Done():
						time.Sleep(5 * unit) // serve needs 5 s to end after its context has ended
						if errors.Is(context.Cause(ctx), errTerminated) {
							note("serve terminated")
						} else {
							note("serve")
						}
						return nil
					}
				})
				if errors.Is(err, bad) != (c.fail > 0) || errors.Is(err, worse) != (c.serveErr != nil) {
					t.Errorf("runWhile returned %v; want the error of background: %v, of serve: %v", err, c.fail > 0, c.serveErr != nil)
				}
				if took := time.Since(begin); took != c.took*unit || !slices.Equal(ended, c.want) {
					t.Errorf("the parts ended as %q, all after %v; want %q after %v", ended, took, c.want, c.took*unit)
				}
			})
		})
	}
}

// When one of the functions that runUntilOneEnds runs returns, runUntilOneEnds ends the contexts of
// the others, waits until they have returned, and returns the errors of all.
func TestRunUntilOneEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		first, second := errors.New("first"), errors.New("second")
		begin := time.Now()
		err := runUntilOneEnds(t.Context(), func(context.Context) error {
			time.Sleep(time.Second)
			return first
		}, func(ctx context.Context) error {
			<-ctx.Done()
			time.Sleep(time.Second)
			return second
		})
		if !errors.Is(err, first) || !errors.Is(err, second) || time.Since(begin) != 2*time.Second {
			t.Errorf("runUntilOneEnds returned %v after %v, want both errors after 2s", err, time.Since(begin))
		}
	})
}
