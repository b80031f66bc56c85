// Package e2e drives real clusters through the stock docker command line, as a user would.
package e2e

import (
	"os"
	"testing"

	"skein/test/lab"
)

func TestMain(m *testing.M) { os.Exit(lab.Main(m)) }
