package loop

import (
	"context"
	"log/slog"
	"time"

	"skein/manager/store"
)

// Run drives a controller until the context, which ends with the leadership term, is cancelled. Proposals that fail are tried again
// with growing pauses; only the end of the context ends Run.
func Run(ctx context.Context, st *store.Store, ctl Controller) error {
	watcher := st.Watch(ctl.Kinds()...)
	defer watcher.Close()
	d := NewDriver(st, ctl)
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		wake, err := d.Round(ctx, time.Now())
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil {
			slog.Warn("changes could not be committed, trying again", "controller", ctl.Name(), "err", err)
		}
		timer.Stop()
		var due <-chan time.Time
		if !wake.IsZero() {
			timer.Reset(time.Until(wake))
			due = timer.C
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-watcher.C():
			d.Mark(watcher.Take())
		case <-due:
		}
	}
}
