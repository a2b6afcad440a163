package main

// The parts of a process run together: they end together, and SIGHUP reloads them. A reload
// that fails changes nothing.

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"os/signal"
	"syscall"
)

// Serve runs until ctx ends, or one of the parts fails. On SIGHUP it calls
// reload. parts end together; stop is called when it begins to end.
func Serve(ctx context.Context, log *slog.Logger, m *Metrics, reload func() error, stop func(), parts ...func(context.Context) error) error {
	reloads := m.Counter("telemeter_reloads_total", "Reloads of keys, tokens, certificates and rules by result.", "result")
	reloads.Add(0, "ok")
	reloads.Add(0, "failed")
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	hup := make(chan os.Signal, 1)
	signal.Notify(hup, syscall.SIGHUP)
	defer signal.Stop(hup)
	ended := make(chan error, len(parts))
	for _, part := range parts {
		go func() { ended <- part(ctx) }()
	}
	var errs []error
	stopping := ctx.Done()
	for left := len(parts); left > 0; {
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
			stop()
			stopping = nil
		case err := <-ended:
			left--
			errs = append(errs, err)
			cancel()
		}
	}
	return errors.Join(errs...)
}
