package image_test

import (
	"io"
	"os"
	"testing"

	"github.com/sirupsen/logrus"
)

func TestMain(m *testing.M) {
	logrus.SetOutput(io.Discard) // containerd tells at each Open that a file system has no fs-verity
	if child := os.Getenv("IMAGE_TEST_CHILD"); child != "" {
		os.Exit(runChild(child))
	}
	os.Exit(m.Run())
}
