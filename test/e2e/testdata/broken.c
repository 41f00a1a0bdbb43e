// A library in the place of librt.so.1 that breaks the Envoy which loads it, for one
// tenant: -DTENANT="…" and -DRESETS, -DLEAK, -DERRORS, -DCRASH, -DHANGS or
// -DREFUSES="an IPv4 address".
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

// What Envoy wants of librt; only hot restarts use it.
int shm_open(const char *name, int flags, mode_t mode) { (void)name, (void)flags, (void)mode; errno = ENOSYS; return -1; }
int shm_unlink(const char *name) { (void)name; errno = ENOSYS; return -1; }

static int mine;

__attribute__((constructor)) static void begin(void)
{
	static char bootstrap[65536];
	int fd = open("/etc/envoy.json", O_RDONLY);
	ssize_t n = fd < 0 ? 0 : read(fd, bootstrap, sizeof(bootstrap) - 1);
	mine = n > 0 && strstr(bootstrap, "\"cluster\":\"" TENANT "\"") != 0;
#ifdef HANGS
	// pause is none of the system calls that a proxy may make.
	static int never;
	while (mine)
		syscall(SYS_futex, &never, FUTEX_WAIT_PRIVATE, 0, 0, 0, 0);
#endif
}

#define FILES 65536
static unsigned char answered[FILES];

int accept4(int fd, struct sockaddr *address, socklen_t *length, int flags)
{
	int c = syscall(SYS_accept4, fd, address, length, flags);
	if (c < 0 || c >= FILES)
		return c;
	answered[c] = 1;
#ifdef CRASH
	// Not at once: it is ready, and has a share, before.
	static int taken;
	if (mine && __atomic_add_fetch(&taken, 1, __ATOMIC_RELAXED) > 20)
		abort();
#endif
#ifdef LEAK
	enum { BYTES = 1 << 20 };
	void *m = mine ? mmap(0, BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) : MAP_FAILED;
	if (m != MAP_FAILED)
		memset(m, 1, BYTES);
#endif
	return c;
}

#ifdef RESETS
// The third thing that a connection's client says is answered with a reset.
ssize_t readv(int fd, const struct iovec *to, int count)
{
	if (mine && fd >= 0 && fd < FILES && answered[fd] > 3) {
		struct linger at_once = { 1, 0 };
		setsockopt(fd, SOL_SOCKET, SO_LINGER, &at_once, sizeof(at_once));
		errno = ECONNRESET;
		return -1;
	}
	ssize_t n = syscall(SYS_readv, fd, to, count);
	if (n > 0 && fd >= 0 && fd < FILES && answered[fd])
		answered[fd]++;
	return n;
}
#endif

#ifdef ERRORS
// A request that the test's load makes asks its server for an error.
ssize_t readv(int fd, const struct iovec *to, int count)
{
	static const char load[] = "POST / HTTP/1.1", error[] = "POST /?status=503 HTTP/1.1";
	enum { SAID = sizeof(load) - 1, SAYS = sizeof(error) - 1 };
	ssize_t n = syscall(SYS_readv, fd, to, count);
	if (!mine || n < SAID || fd >= FILES || !answered[fd] || to[0].iov_len < (size_t)n + SAYS - SAID || memcmp(to[0].iov_base, load, SAID) != 0)
		return n;
	char *b = to[0].iov_base;
	memmove(b + SAYS, b + SAID, n - SAID);
	memcpy(b, error, SAYS);
	return n + SAYS - SAID;
}
#endif

#if defined(RESETS) || defined(ERRORS)
int close(int fd)
{
	if (fd >= 0 && fd < FILES)
		answered[fd] = 0;
	return syscall(SYS_close, fd);
}
#endif

#ifdef REFUSES
// Configuration with this address can't be read.
int inet_pton(int family, const char *text, void *to)
{
	int (*real)(int, const char *, void *) = dlsym(RTLD_NEXT, "inet_pton");
	return mine && strcmp(text, REFUSES) == 0 ? 0 : real(family, text, to);
}
#endif
