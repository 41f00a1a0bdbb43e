package soak

import (
	"bytes"
	"fmt"
)

// file is an entry of an initramfs.
type file struct {
	name         string
	mode         uint32
	major, minor uint32
	data         []byte
}

// archive is a cpio archive of the kind "newc", as the kernel unpacks it.
func archive(files []file) []byte {
	var b bytes.Buffer
	pad := func() {
		for b.Len()%4 != 0 {
			b.WriteByte(0)
		}
	}
	for i, f := range append(files, file{name: "TRAILER!!!"}) {
		fmt.Fprintf(&b, "070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X", i+1, f.mode, 0, 0, 1, 0, len(f.data), 0, 0, f.major, f.minor, len(f.name)+1, 0)
		b.WriteString(f.name + "\x00")
		pad()
		b.Write(f.data)
		pad()
	}
	return b.Bytes()
}
