package main

// This file runs the parts of a process concurrently and ends them together. A part that other
// parts need ends after them. SIGHUP starts a reload. A reload must change nothing if it fails.

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"os/signal"
	"syscall"
)

// runUntilOneEnds runs parts concurrently. When ctx ends or one part returns, it cancels the
// context of all parts. It returns when all parts have returned, with their errors joined.
func runUntilOneEnds(ctx context.Context, parts ...func(context.Context) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	ended := make(chan error, len(parts))
	for _, part := range parts {
		go func() { ended <- part(ctx) }()
	}
	var errs []error
	for range parts {
		errs = append(errs, <-ended)
		cancel()
	}
	return errors.Join(errs...)
}

// runWhile runs serve and background concurrently. When ctx ends, runWhile cancels the context of
// serve. It cancels the context of background only after serve has returned. If background returns
// first, runWhile cancels the context of serve. It returns the errors of both, joined.
func runWhile(ctx context.Context, background, serve func(context.Context) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	backgroundCtx, end := context.WithCancel(context.WithoutCancel(ctx))
	defer end()
	ended := make(chan error, 1)
	go func() {
		err := background(backgroundCtx)
		cancel()
		ended <- err
	}()
	err := serve(ctx)
	end()
	return errors.Join(err, <-ended)
}

// runWithReloads runs parts like runUntilOneEnds. On SIGHUP it calls reload, and it logs and counts
// the result; a SIGHUP during a reload leads to one more reload. When ctx ends or one part returns,
// it calls onStop without waiting for the other parts. If all parts have returned before that call,
// the call may be left out.
func runWithReloads(ctx context.Context, log *slog.Logger, m *Metrics, reload func() error, onStop func(), parts ...func(context.Context) error) error {
	reloads := m.Counter("telemeter_reloads_total", "Reloads of keys, tokens, certificates and rules, by result.", "result")
	reloads.Add(0, "ok")
	reloads.Add(0, "failed")
	hup := make(chan os.Signal, 1)
	signal.Notify(hup, syscall.SIGHUP)
	defer signal.Stop(hup)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	ended := make(chan error, 1)
	go func() {
		err := runUntilOneEnds(ctx, parts...)
		cancel()
		ended <- err
	}()
	stopping := ctx.Done()
	for {
		select {
		case <-hup:
			if err := reload(); err != nil {
				reloads.Inc("failed")
				log.Error("reload failed; the files loaded before stay in use", "err", err)
			} else {
				reloads.Inc("ok")
				log.Info("reloaded")
			}
		case <-stopping:
			log.Info("stopping")
			onStop()
			stopping = nil
		case err := <-ended:
			return err
		}
	}
}
