// Reading a packet's headers.
#pragma once

#define IPV4_FRAGMENT 0x3fff
#define IPV4_OFFSET 0x1fff
#define MAX_EXTENSION_HEADERS 6

// <linux/icmp.h> draws in the C library.
#define ICMP_DEST_UNREACH 3
#define ICMP_TIME_EXCEEDED 11
#define ICMP_PARAMETERPROB 12

struct packet {
	struct addr source, destination;
	__u16 source_port, destination_port;
	// Of what comes after the IP headers.
	__u32 offset;
	__u8 protocol;
	__u8 fragment;
	// A fragment without the headers behind IP's.
	__u8 later;
	// Of TCP.
	__u8 flags;
	__u32 sequence, acknowledged;
	// The sequence number of what comes after it. Before it is known, the length that IP says.
	__u32 next;
};

#define TCP_FIN 1
#define TCP_SYN 2
#define TCP_RST 4
#define TCP_ACK 16

enum parsed { PARSED, NOT_IP, MALFORMED };

static __always_inline void map_ipv4(struct addr *a, __be32 v4)
{
	__u32 words[4] = { 0, 0, bpf_htonl(0xffff), v4 };
	__builtin_memcpy(a, words, sizeof(*a));
}

static __always_inline int is_mapped(const struct addr *a)
{
	__u32 w[4];
	__builtin_memcpy(w, a, sizeof(w));
	return !w[0] && !w[1] && w[2] == bpf_htonl(0xffff);
}

static __always_inline int is_extension_header(__u8 protocol)
{
	return protocol == IPPROTO_HOPOPTS || protocol == IPPROTO_ROUTING || protocol == IPPROTO_FRAGMENT ||
	       protocol == IPPROTO_DSTOPTS || protocol == IPPROTO_AH;
}

static __always_inline enum parsed parse_ipv4(struct __sk_buff *skb, struct packet *p)
{
	struct iphdr ip;
	if (bpf_skb_load_bytes(skb, ETH_HLEN, &ip, sizeof(ip)) || ip.ihl < 5)
		return MALFORMED;
	map_ipv4(&p->source, ip.saddr);
	map_ipv4(&p->destination, ip.daddr);
	p->protocol = ip.protocol;
	p->fragment = (ip.frag_off & bpf_htons(IPV4_FRAGMENT)) != 0;
	p->later = (ip.frag_off & bpf_htons(IPV4_OFFSET)) != 0;
	p->offset = ETH_HLEN + ip.ihl * 4;
	p->next = bpf_ntohs(ip.tot_len);
	return PARSED;
}

static __always_inline enum parsed parse_ipv6(struct __sk_buff *skb, struct packet *p)
{
	struct ipv6hdr ip;
	if (bpf_skb_load_bytes(skb, ETH_HLEN, &ip, sizeof(ip)))
		return MALFORMED;
	__builtin_memcpy(&p->source, &ip.saddr, sizeof(p->source));
	__builtin_memcpy(&p->destination, &ip.daddr, sizeof(p->destination));
	// They would be taken for those of IPv4.
	if (is_mapped(&p->source) || is_mapped(&p->destination))
		return MALFORMED;
	p->offset = ETH_HLEN + sizeof(ip);
	if (ip.payload_len)
		p->next = sizeof(ip) + bpf_ntohs(ip.payload_len);
	__u8 next = ip.nexthdr;
	for (int i = 0; i < MAX_EXTENSION_HEADERS; i++) {
		struct {
			__u8 next, length;
			__be16 fragment;
		} header;
		if (!is_extension_header(next))
			break;
		if (bpf_skb_load_bytes(skb, p->offset, &header, sizeof(header)))
			return MALFORMED;
		if (next == IPPROTO_FRAGMENT) {
			// What is behind it can be read in the first fragment only, so
			// later ones could hide TCP behind another extension header.
			if (is_extension_header(header.next))
				return MALFORMED;
			// An "atomic" fragment is a whole packet.
			p->fragment = (header.fragment & bpf_htons(0xfff9)) != 0;
			p->later = (header.fragment & bpf_htons(0xfff8)) != 0;
			p->offset += 8;
		} else if (next == IPPROTO_AH) {
			p->offset += (header.length + 2) * 4;
		} else {
			p->offset += (header.length + 1) * 8;
		}
		next = header.next;
	}
	if (is_extension_header(next))
		return MALFORMED;
	p->protocol = next;
	return PARSED;
}

static __always_inline enum parsed parse(struct __sk_buff *skb, struct packet *p)
{
	enum parsed result;
	__builtin_memset(p, 0, sizeof(*p));
	if (skb->protocol == bpf_htons(ETH_P_IP))
		result = parse_ipv4(skb, p);
	else if (skb->protocol == bpf_htons(ETH_P_IPV6))
		result = parse_ipv6(skb, p);
	else if (skb->protocol == bpf_htons(ETH_P_8021Q) || skb->protocol == bpf_htons(ETH_P_8021AD))
		// The kernel has taken off one tag already; TCP may be behind the second.
		return MALFORMED;
	else
		return NOT_IP;
	if (result != PARSED || p->protocol != IPPROTO_TCP || p->fragment)
		return result;
	struct {
		__be16 source, destination;
		__be32 sequence, acknowledged;
		__u8 offset, flags;
	} __attribute__((packed)) tcp;
	if (bpf_skb_load_bytes(skb, p->offset, &tcp, sizeof(tcp)))
		return MALFORMED;
	p->source_port = bpf_ntohs(tcp.source);
	p->destination_port = bpf_ntohs(tcp.destination);
	p->flags = tcp.flags;
	p->sequence = bpf_ntohl(tcp.sequence);
	p->acknowledged = bpf_ntohl(tcp.acknowledged);
	// Behind what IP says there may be padding. It says nothing of what is longer than 64 KiB.
	__u32 headers = p->offset + (tcp.offset >> 4) * 4, end = p->next ? ETH_HLEN + p->next : skb->len;
	p->next = p->sequence + (end > headers ? end - headers : 0) + ((p->flags & (TCP_SYN | TCP_FIN)) != 0);
	// Opens nothing anywhere, and would be taken for what does.
	if (p->flags & TCP_SYN && p->flags & (TCP_FIN | TCP_RST))
		return MALFORMED;
	return PARSED;
}

static __always_inline int opens(const struct packet *p)
{
	return (p->flags & (TCP_SYN | TCP_ACK)) == TCP_SYN;
}

// quotes_tcp tells whether the packet is an ICMP error about a TCP packet, where
// that one was sent to, and its ports.
static __always_inline int quotes_tcp(struct __sk_buff *skb, const struct packet *p, struct addr *sent_to, __be16 ports[2])
{
	__u8 type;
	if (p->fragment || bpf_skb_load_bytes(skb, p->offset, &type, sizeof(type)))
		return 0;
	if (p->protocol == IPPROTO_ICMP) {
		struct iphdr ip;
		if (type != ICMP_DEST_UNREACH && type != ICMP_TIME_EXCEEDED && type != ICMP_PARAMETERPROB)
			return 0;
		if (bpf_skb_load_bytes(skb, p->offset + 8, &ip, sizeof(ip)) || ip.protocol != IPPROTO_TCP)
			return 0;
		map_ipv4(sent_to, ip.daddr);
		return bpf_skb_load_bytes(skb, p->offset + 8 + ip.ihl * 4, ports, 4) == 0;
	}
	if (p->protocol == IPPROTO_ICMPV6) {
		struct ipv6hdr ip;
		// Types below 128 are errors.
		if (type >= 128 || bpf_skb_load_bytes(skb, p->offset + 8, &ip, sizeof(ip)) || ip.nexthdr != IPPROTO_TCP)
			return 0;
		__builtin_memcpy(sent_to, &ip.daddr, sizeof(*sent_to));
		return bpf_skb_load_bytes(skb, p->offset + 8 + sizeof(ip), ports, 4) == 0;
	}
	return 0;
}
