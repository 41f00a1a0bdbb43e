package netfilter

import (
	"fmt"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/steer"
)

// networkHeader is SKF_NET_OFF: the packet's IP header, wherever its data begins.
const networkHeader = 0xfff00000

// shareWorkers has the kernel choose among a generation's sockets for what pods open
// by both addresses, without the ports: what a pod has with one destination shares a
// worker, and with it a tunnel (decision 48). The program stays with the sockets.
func shareWorkers(sockets []steer.Socket, generation int, seed uint32) error {
	port := steer.Outbound.PortOf(generation)
	var workers []steer.Socket
	for _, s := range sockets {
		if s.Port == port {
			workers = append(workers, s)
		}
	}
	if len(workers) < 2 {
		return nil // a single one may be in no group
	}
	program, err := bpf.Assemble(workerOf(uint32(len(workers)), seed))
	if err != nil {
		return fmt.Errorf("assemble the choice among %d workers: %w", len(workers), err)
	}
	code := make([]unix.SockFilter, len(program))
	for i, p := range program {
		code[i] = unix.SockFilter{Code: p.Op, Jt: p.Jt, Jf: p.Jf, K: p.K}
	}
	// It is that of all sockets of the port.
	if err := unix.SetsockoptSockFprog(workers[0].FD, unix.SOL_SOCKET, unix.SO_ATTACH_REUSEPORT_CBPF, &unix.SockFprog{Len: uint16(len(code)), Filter: &code[0]}); err != nil {
		return fmt.Errorf("choose among the %d sockets of port %d by addresses: %w", len(workers), port, err)
	}
	return nil
}

// workerOf returns a hash of a packet's addresses modulo the number of workers. For one
// seed it depends on nothing else: the ACK that answers a SYN cookie must find the listener
// that the SYN found. Where the kernel has fewer sockets by then, it chooses itself.
func workerOf(workers, seed uint32) []bpf.Instruction {
	const hash = 0 // where it is kept
	four, six := addressHash(hash, 12, 20), addressHash(hash, 8, 40)
	program := []bpf.Instruction{
		bpf.LoadConstant{Dst: bpf.RegA, Val: seed},
		bpf.StoreScratch{Src: bpf.RegA, N: hash},
		bpf.LoadAbsolute{Off: networkHeader, Size: 1},
		bpf.ALUOpConstant{Op: bpf.ALUOpShiftRight, Val: 4}, // the version
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: 6, SkipTrue: uint8(len(four) + 1)},
	}
	program = append(append(program, four...), bpf.Jump{Skip: uint32(len(six))})
	return append(append(program, six...),
		bpf.LoadScratch{Dst: bpf.RegA, N: hash},
		bpf.ALUOpConstant{Op: bpf.ALUOpMul, Val: 3266489917},
		bpf.ALUOpConstant{Op: bpf.ALUOpShiftRight, Val: 16}, // the lower bits of a product know less
		bpf.ALUOpConstant{Op: bpf.ALUOpMod, Val: workers},
		bpf.RetA{},
	)
}

// addressHash adds the words of the IP header from one byte to another to the hash.
func addressHash(hash int, from, to uint32) (program []bpf.Instruction) {
	for at := from; at < to; at += 4 {
		program = append(program,
			bpf.LoadScratch{Dst: bpf.RegX, N: hash},
			bpf.LoadAbsolute{Off: networkHeader + at, Size: 4},
			bpf.ALUOpX{Op: bpf.ALUOpXor},
			bpf.ALUOpConstant{Op: bpf.ALUOpMul, Val: 2654435761},
			bpf.TAX{},
			bpf.ALUOpConstant{Op: bpf.ALUOpShiftRight, Val: 15},
			bpf.ALUOpX{Op: bpf.ALUOpXor},
			bpf.StoreScratch{Src: bpf.RegA, N: hash},
		)
	}
	return program
}
