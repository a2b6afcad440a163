package main

// The order in which parts of a process end.

import (
	"context"
	"errors"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// TestRunWhile: the background ends after serve, and if it ends first, serve ends with it.
func TestRunWhile(t *testing.T) {
	bad, worse := errors.New("bad"), errors.New("worse")
	for name, c := range map[string]struct {
		stop, fail, end time.Duration // after which the context ends, the background fails and serve ends; 0: not by itself
		serveErr        error
		want            []string
		took            time.Duration
	}{
		"told to end":      {stop: 3, want: []string{"serve terminated", "background"}, took: 3 + 5 + 7},
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
						time.Sleep(7 * unit) // leaving takes time
						return nil
					}
				}, func(ctx context.Context) error {
					select {
					case <-after(c.end):
						note("serve")
						return c.serveErr
					case <-ctx.Done():
						time.Sleep(5 * unit) // requests in flight
						if errors.Is(context.Cause(ctx), errTerminated) {
							note("serve terminated")
						} else {
							note("serve")
						}
						return nil
					}
				})
				if errors.Is(err, bad) != (c.fail > 0) || errors.Is(err, worse) != (c.serveErr != nil) {
					t.Errorf("error %v", err)
				}
				if took := time.Since(begin); took != c.took*unit || !slices.Equal(ended, c.want) {
					t.Errorf("ended %q after %v, want %q after %v", ended, took, c.want, c.took*unit)
				}
			})
		})
	}
}

// TestRunTogether: the first part that ends ends all, and all errors are returned.
func TestRunTogether(t *testing.T) {
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
			t.Errorf("%v after %v", err, time.Since(begin))
		}
	})
}
