package main

// The parts of a process run together and end together. One that others need may outlive them.
// SIGHUP reloads; a reload that fails changes nothing.

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"os/signal"
	"syscall"
)

// runUntilOneEnds runs parts until ctx ends or one of them does, and returns the errors of all.
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

// runWhile runs serve, and background until serve has returned. If background ends first, the
// context of serve ends. It returns the errors of both.
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

// runWithReloads runs the parts of a process until ctx ends or one of them does. On SIGHUP it calls
// reload. It calls onStop when the parts begin to end.
func runWithReloads(ctx context.Context, log *slog.Logger, m *Metrics, reload func() error, onStop func(), parts ...func(context.Context) error) error {
	reloads := m.Counter("telemeter_reloads_total", "Reloads of keys, tokens, certificates and rules by result.", "result")
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
				log.Error("reload failed; what was loaded before stays in use", "err", err)
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
