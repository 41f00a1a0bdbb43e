package netfilter

import (
	"encoding/binary"
	"time"

	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// rule is what a rule does, one expression after the other, until one doesn't
// match. Registers have 4 bytes, and a key of several parts has them in a row.
type rule []expr.Any

func join(parts ...rule) (r rule) {
	for _, p := range parts {
		r = append(r, p...)
	}
	return r
}

// Registers: the key (an IPv6 flow takes ten), and what is found. What a map gave
// is never a key, nor compared: the program nft would fail to list such a rule. It
// goes through the packet's mark instead, which nobody else has use for there.
const (
	regKey   = unix.NFT_REG32_00
	regFound = unix.NFT_REG32_11
	regMAC   = unix.NFT_REG32_12
	regTemp  = unix.NFT_REG32_14
)

func meta(key expr.MetaKey, to uint32) rule { return rule{&expr.Meta{Key: key, Register: to}} }
func iif(to uint32) rule                    { return meta(expr.MetaKeyIIF, to) }
func oif(to uint32) rule                    { return meta(expr.MetaKeyOIF, to) }

func load(base expr.PayloadBase, offset, length, to uint32) rule {
	return rule{&expr.Payload{OperationType: expr.PayloadLoad, DestRegister: to, Base: base, Offset: offset, Len: length}}
}

func network(offset, length, to uint32) rule {
	return load(expr.PayloadBaseNetworkHeader, offset, length, to)
}

func transport(offset, length, to uint32) rule {
	return load(expr.PayloadBaseTransportHeader, offset, length, to)
}

func compare(op expr.CmpOp, register uint32, value ...byte) rule {
	return rule{&expr.Cmp{Op: op, Register: register, Data: value}}
}

func equal(register uint32, value ...byte) rule { return compare(expr.CmpOpEq, register, value...) }
func differs(register uint32, value ...byte) rule {
	return compare(expr.CmpOpNeq, register, value...)
}

// masked leaves some bits of a register, and turns others over.
func masked(register uint32, mask, xor []byte) rule {
	return rule{&expr.Bitwise{SourceRegister: register, DestRegister: register, Len: uint32(len(mask)), Mask: mask, Xor: xor}}
}

func flags(mask byte) rule {
	return join(transport(13, 1, regTemp), masked(regTemp, []byte{mask}, []byte{0}))
}

// opens matches a SYN that no ACK goes with, nor FIN or RST: with those it opens
// nothing anywhere.
func opens() rule { return join(flags(0x17), equal(regTemp, 0x02)) }

// ends matches FIN and RST.
func ends() rule { return join(flags(0x05), differs(regTemp, 0)) }

// resets matches RST.
func resets() rule { return join(flags(0x04), differs(regTemp, 0)) }

func isIn(set string, key uint32) rule {
	return rule{&expr.Lookup{SetName: set, SourceRegister: key}}
}

func isNotIn(set string, key uint32) rule {
	return rule{&expr.Lookup{SetName: set, SourceRegister: key, Invert: true}}
}

func find(set string, key, to uint32) rule {
	return rule{&expr.Lookup{SetName: set, SourceRegister: key, DestRegister: to, IsDestRegSet: true}}
}

func immediate(to uint32, value ...byte) rule {
	return rule{&expr.Immediate{Register: to, Data: value}}
}

func verdict(kind expr.VerdictKind, chain string) rule {
	return rule{&expr.Verdict{Kind: kind, Chain: chain}}
}

func goTo(chain string) rule { return verdict(expr.VerdictGoto, chain) }
func jump(chain string) rule { return verdict(expr.VerdictJump, chain) }
func accept() rule           { return verdict(expr.VerdictAccept, "") }
func back() rule             { return verdict(expr.VerdictReturn, "") }
func drop() rule             { return verdict(expr.VerdictDrop, "") }

// refuseTCP drops, and sends an RST back.
func refuseTCP() rule { return rule{&expr.Reject{Type: unix.NFT_REJECT_TCP_RST}} }

// put writes an element that lasts for a while; 0 is for ever.
func put(set string, key, data uint32, lasts time.Duration, each ...expr.Any) rule {
	return rule{&expr.Dynset{SetName: set, SrcRegKey: key, SrcRegData: data, Operation: unix.NFT_DYNSET_OP_UPDATE, Timeout: lasts, Exprs: each}}
}

func counter() expr.Any { return &expr.Counter{} }

func remove(set string, key, data uint32) rule {
	return rule{&expr.Dynset{SetName: set, SrcRegKey: key, SrcRegData: data, Operation: dynsetDelete}}
}

// dynsetDelete is NFT_DYNSET_OP_DELETE, payloadPseudo NFT_PAYLOAD_L4CSUM_PSEUDOHDR.
const (
	dynsetDelete  = 2
	payloadPseudo = 1
)

// onlyMark replaces the packet's mark.
func onlyMark(v uint32) rule { return join(immediate(regFound, native(v)...), markFound()) }

// setMark changes bits of the packet's mark.
func setMark(mask, bits uint32) rule {
	return join(meta(expr.MetaKeyMARK, regTemp), masked(regTemp, native(^mask), native(bits)),
		rule{&expr.Meta{Key: expr.MetaKeyMARK, SourceRegister: true, Register: regTemp}})
}

func hasMark(bits uint32) rule {
	return join(meta(expr.MetaKeyMARK, regTemp), masked(regTemp, native(bits), native(0)), equal(regTemp, native(bits)...))
}

func lacksMark(bits uint32) rule {
	return join(meta(expr.MetaKeyMARK, regTemp), masked(regTemp, native(bits), native(0)), equal(regTemp, native(0)...))
}

// toMAC gives the frame to whom the register says.
func toMAC() rule {
	return rule{&expr.Payload{OperationType: expr.PayloadWrite, SourceRegister: regMAC, Base: expr.PayloadBaseLLHeader, Len: 6}}
}

func native(v uint32) []byte { return binaryutil.NativeEndian.PutUint32(v) }

func big16(v uint16) []byte { return binary.BigEndian.AppendUint16(nil, v) }

// raw is an expression that the library doesn't have, or not as a whole.
type raw struct {
	expr.Any
	name  string
	attrs []netlink.Attribute
}

func attr32(kind uint16, v uint32) netlink.Attribute {
	return netlink.Attribute{Type: kind, Data: binary.BigEndian.AppendUint32(nil, v)}
}

// forward sends the packet to the tenant that the mark names.
func forward() rule {
	return join(theMark(regTemp), find(setTenantMACs, regTemp, regMAC), toMAC(), theMark(regTemp), find(setTenants, regTemp, regFound), out())
}

func theMark(to uint32) rule { return meta(expr.MetaKeyMARK, to) }

// markFound makes what was found the mark.
func markFound() rule {
	return rule{&expr.Meta{Key: expr.MetaKeyMARK, SourceRegister: true, Register: regFound}}
}

// setPriority replaces the packet's priority, by which queueing disciplines tell it
// from others; it ends with the network namespace.
func setPriority(v uint32) rule {
	return join(immediate(regFound, native(v)...), rule{&expr.Meta{Key: expr.MetaKeyPRIORITY, SourceRegister: true, Register: regFound}})
}

func markIs(v uint32) rule { return join(theMark(regTemp), equal(regTemp, native(v)...)) }

// out sends the packet out at the interface that was found.
func out() rule {
	return rule{raw{name: "fwd", attrs: []netlink.Attribute{attr32(unix.NFTA_FWD_SREG_DEV, regFound)}}}
}

// readdress writes an address of the register into the IP header and into the
// checksums, whoever is to finish them.
func readdress(f family, offset, from uint32) rule {
	return rule{raw{name: "payload", attrs: []netlink.Attribute{
		attr32(unix.NFTA_PAYLOAD_SREG, from), attr32(unix.NFTA_PAYLOAD_BASE, unix.NFT_PAYLOAD_NETWORK_HEADER),
		attr32(unix.NFTA_PAYLOAD_OFFSET, offset), attr32(unix.NFTA_PAYLOAD_LEN, f.length),
		attr32(unix.NFTA_PAYLOAD_CSUM_TYPE, f.headerSum), attr32(unix.NFTA_PAYLOAD_CSUM_OFFSET, f.headerSumAt),
		attr32(unix.NFTA_PAYLOAD_CSUM_FLAGS, payloadPseudo),
	}}}
}

// toQuestion makes a SYN a segment that a connection acknowledges, as it would the SYN (RFC
// 5961, 4), and that opens none: where there is no connection, it is reset.
func toQuestion() rule {
	write := func(offset, length uint32) rule {
		return rule{&expr.Payload{OperationType: expr.PayloadWrite, SourceRegister: regTemp, Base: expr.PayloadBaseTransportHeader, Offset: offset, Len: length,
			CsumType: expr.CsumTypeInet, CsumOffset: 16}}
	}
	// What it acknowledges, and its flags, with the header's length before them.
	return join(immediate(regTemp, 0, 0, 0, 0), write(8, 4), transport(12, 2, regTemp), masked(regTemp, []byte{0xf0, 0}, []byte{0, 0x10}), write(12, 2))
}

// marshal writes a rule's expressions.
func (r rule) marshal(family byte) ([]byte, error) {
	var list []netlink.Attribute
	for _, e := range r {
		b, err := []byte(nil), error(nil)
		if own, ok := e.(raw); ok {
			if b, err = netlink.MarshalAttributes(own.attrs); err == nil {
				b, err = netlink.MarshalAttributes([]netlink.Attribute{
					{Type: unix.NFTA_EXPR_NAME, Data: []byte(own.name + "\x00")},
					{Type: unix.NLA_F_NESTED | unix.NFTA_EXPR_DATA, Data: b},
				})
			}
		} else {
			b, err = expr.Marshal(family, e)
		}
		if err != nil {
			return nil, err
		}
		list = append(list, netlink.Attribute{Type: unix.NLA_F_NESTED | unix.NFTA_LIST_ELEM, Data: b})
	}
	return netlink.MarshalAttributes(list)
}
