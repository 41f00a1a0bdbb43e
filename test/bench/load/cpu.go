package load

import (
	"fmt"
	"os"
	"time"
)

// CPU is CPU time that was used.
type CPU struct {
	// All is the whole machine's, by /proc/stat: both ends of the load, the proxies,
	// and all that the kernel did for them, in interrupts too.
	All time.Duration `json:"all"`
	// Kernel is the part of All that wasn't spent in user space.
	Kernel time.Duration `json:"kernel"`
	// Processes is the part of All that the scheduler counted to Options.Processes.
	Processes time.Duration `json:"processes"`
}

func (c CPU) minus(o CPU) CPU {
	return CPU{c.All - o.All, c.Kernel - o.Kernel, c.Processes - o.Processes}
}

// tick is the unit of /proc/stat, whatever the kernel's own.
const tick = 10 * time.Millisecond

// ReadCPU is what has been used since the machine began, and of these processes since
// they did.
func ReadCPU(processes ...int) (CPU, error) { return readCPU(processes) }

func readCPU(processes []int) (c CPU, err error) {
	b, err := os.ReadFile("/proc/stat")
	if err != nil {
		return c, err
	}
	var user, nice, system, idle, iowait, irq, softirq int64
	if _, err := fmt.Sscanf(string(b), "cpu %d %d %d %d %d %d %d", &user, &nice, &system, &idle, &iowait, &irq, &softirq); err != nil {
		return c, fmt.Errorf("read /proc/stat: %w", err)
	}
	c.Kernel = time.Duration(system+irq+softirq) * tick
	c.All = c.Kernel + time.Duration(user+nice)*tick
	used, err := ReadSched(processes...)
	c.Processes = used.Ran
	return c, err
}
