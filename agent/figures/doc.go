// Package figures counts how two processes of one tenant fare side by side: what
// Envoy's statistics, the kernel's counters and the process's own say of each, as
// what was added in the same time.
package figures
