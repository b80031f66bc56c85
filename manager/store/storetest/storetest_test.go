package storetest_test

import (
	"testing"

	"skein/manager/store"
	"skein/manager/store/storetest"
)

func TestLoopback(t *testing.T) {
	storetest.TestProposer(t, func(*testing.T) *store.Store {
		s, _ := storetest.New()
		return s
	})
}
