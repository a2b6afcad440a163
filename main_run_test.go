package main

// Tests of the order in which the parts of a process end, in virtual time.

import (
	"context"
	"errors"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// runWhile ends background only after serve has returned. If background returns first, serve ends
// too. The errors of both are returned.
func TestRunWhile(t *testing.T) {
	bad, worse := errors.New("bad"), errors.New("worse")
	for name, c := range map[string]struct {
		// Units of time after which the context ends, background fails and serve returns by
		// itself. With 0 it does not happen.
		stop, fail, end time.Duration
		serveErr        error         // returned by serve when it returns by itself
		want            []string      // the parts in the order in which they end
		took            time.Duration // units of time until runWhile returns
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
						time.Sleep(7 * unit) // background takes this long to end
						return nil
					}
				}, func(ctx context.Context) error {
					select {
					case <-after(c.end):
						note("serve")
						return c.serveErr
					case <-ctx.Done():
						time.Sleep(5 * unit) // serve takes this long to end
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

// When one part returns, runUntilOneEnds ends the others, waits for them, and returns all errors.
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
