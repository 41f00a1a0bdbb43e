// Package cost meters what tenants take on a node: the CPU and memory of their
// proxies, and the bytes and connections of their pods. What it is given are
// counters that begin anew with a cgroup or a pod; what it keeps only grows, and
// survives the agent.
package cost
