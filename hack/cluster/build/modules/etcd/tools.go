//go:build tools

// Package tools pins the programs of this group, so that go.mod and go.sum name all they are built from.
package tools

import (
	_ "go.etcd.io/etcd/server/v3"
)
