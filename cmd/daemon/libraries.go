package daemon

import (
	"context"
	"io"
	"log/slog"

	"github.com/sirupsen/logrus"
)

// quietLibraries sends what libraries say through logrus into our log, a level lower: their warnings are about what they could not try.
func quietLibraries(log *slog.Logger) {
	logrus.SetOutput(io.Discard)
	logrus.SetLevel(logrus.InfoLevel)
	logrus.StandardLogger().ReplaceHooks(logrus.LevelHooks{})
	logrus.AddHook(libraryHook{log.With("component", "library")})
}

type libraryHook struct{ log *slog.Logger }

// Levels implements logrus.Hook.
func (libraryHook) Levels() []logrus.Level { return logrus.AllLevels }

// Fire implements logrus.Hook.
func (h libraryHook) Fire(e *logrus.Entry) error {
	level := slog.LevelDebug
	if e.Level <= logrus.ErrorLevel {
		level = slog.LevelWarn
	}
	args := make([]any, 0, 2*len(e.Data))
	for k, v := range e.Data {
		args = append(args, k, v)
	}
	h.log.Log(context.Background(), level, e.Message, args...)
	return nil
}
