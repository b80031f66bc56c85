package supervisor

import (
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

func (c *container) resize(r *request) error {
	p, err := c.find(r.ExecID)
	if err != nil {
		return err
	}
	if p.console == nil {
		return c.errf(errdefs.ErrFailedPrecondition, "resize: the process has no terminal")
	}
	err = control(p.console, func(fd int) error {
		return unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &unix.Winsize{Row: r.Rows, Col: r.Cols})
	})
	if err != nil {
		return c.wrap("resize", err)
	}
	return nil
}
