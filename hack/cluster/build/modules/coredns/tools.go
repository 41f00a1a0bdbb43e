//go:build tools

// Package tools pins the programs of this group, so that go.mod and go.sum name all they are built from.
package tools

import (
	_ "github.com/coredns/coredns"
)
