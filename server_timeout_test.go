package main

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"
)

// A lazyTimeout ends with its parent and at its deadline, which counts from when it was made,
// whenever the first caller asks. After stop it has ended, if its timer had started; otherwise it
// ends with its parent.
func TestLazyTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		parent, end := context.WithCancel(t.Context())
		defer end()
		begin := time.Now()
		late, stopped, unused, child := newLazyTimeout(parent, time.Minute), newLazyTimeout(parent, time.Minute), newLazyTimeout(parent, time.Minute), newLazyTimeout(parent, time.Hour)
		time.Sleep(50 * time.Second)
		if at, ok := late.Deadline(); !ok || !at.Equal(begin.Add(time.Minute)) || late.Err() != nil || stopped.Err() != nil || child.Err() != nil {
			t.Errorf("the deadline is %v, the errors are %v, %v and %v", at.Sub(begin), late.Err(), stopped.Err(), child.Err())
		}
		stopped.stop()
		unused.stop()
		if stopped.Err() != context.Canceled || unused.Err() != nil {
			t.Errorf("after stop, the errors are %v and %v, want one that was started to end", stopped.Err(), unused.Err())
		}
		<-late.Done()
		if took := time.Since(begin); took != time.Minute || !errors.Is(late.Err(), context.DeadlineExceeded) {
			t.Errorf("ended after %v with %v, want a minute", took, late.Err())
		}
		late.stop()
		end()
		<-child.Done()
		<-unused.Done()
		if child.Err() != context.Canceled {
			t.Errorf("after its parent ended: %v", child.Err())
		}
		child.stop()
	})
}
