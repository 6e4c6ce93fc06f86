/* A tap interface at one end, the stream protocol of passt at the other: what a fast virtual machine is to passt.
 *
 *     relay TAP SOCKET
 *
 * makes the interface in the network namespace it runs in, connects to the UNIX socket, prints "ready", and copies
 * frames both ways until either end closes. The interface has no offloads, as a machine without them: each frame is a
 * packet at its MTU. It is C, and does no more than this, so that it takes as little as possible of what is measured:
 * the frames that the interface has ready go out in one write, and what the socket has ready comes in one read.
 */

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>
#include <arpa/inet.h>
#include <linux/if.h>
#include <linux/if_tun.h>

enum { FRAME_MAX = 65535, LENGTH = 4, BATCH = 1 << 20 };

static int tap, stream;

static void fail(const char *what)
{
	fprintf(stderr, "relay: %s: %s\n", what, strerror(errno));
	_exit(1);
}

/* From the interface to passt; runs in a thread of its own. */
static void *outwards(void *unused)
{
	static char buffer[BATCH];
	struct pollfd ready = { .fd = tap, .events = POLLIN };
	(void)unused;

	for (;;) {
		size_t end = 0;
		while (end + LENGTH + FRAME_MAX <= sizeof(buffer)) {
			ssize_t size = read(tap, buffer + end + LENGTH, FRAME_MAX);
			if (size < 0 && errno == EAGAIN)
				break;
			if (size < 0)
				fail("tap");
			uint32_t length = htonl(size);
			memcpy(buffer + end, &length, LENGTH);
			end += LENGTH + size;
		}
		for (size_t sent = 0; sent < end; ) {
			ssize_t size = send(stream, buffer + sent, end - sent, MSG_NOSIGNAL);
			if (size < 0)
				fail("send");
			sent += size;
		}
		if (!end)
			poll(&ready, 1, -1);
	}
	return NULL;
}

/* From passt to the interface. */
static void inwards(void)
{
	static char buffer[BATCH];
	size_t end = 0;

	for (;;) {
		ssize_t size = recv(stream, buffer + end, sizeof(buffer) - end, 0);
		if (size < 0)
			fail("receive");
		if (!size)
			_exit(0);
		end += size;

		size_t at = 0;
		uint32_t length;
		while (end - at >= LENGTH) {
			memcpy(&length, buffer + at, LENGTH);
			length = ntohl(length);
			if (length > FRAME_MAX) {
				errno = EMSGSIZE;
				fail("frame");
			}
			if (end - at - LENGTH < length)
				break;
			/* A frame that the interface does not take is lost, as on a wire. */
			if (write(tap, buffer + at + LENGTH, length) < 0 && errno == EBADFD)
				fail("tap");
			at += LENGTH + length;
		}
		memmove(buffer, buffer + at, end - at);
		end -= at;
	}
}

int main(int argc, char **argv)
{
	struct ifreq request = { .ifr_flags = IFF_TAP | IFF_NO_PI };
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	pthread_t thread;

	if (argc != 3 || strlen(argv[1]) >= IFNAMSIZ || strlen(argv[2]) >= sizeof(address.sun_path)) {
		fprintf(stderr, "Usage: relay TAP SOCKET\n");
		return 2;
	}
	strcpy(request.ifr_name, argv[1]);
	tap = open("/dev/net/tun", O_RDWR | O_NONBLOCK);
	if (tap < 0 || ioctl(tap, TUNSETIFF, &request))
		fail("/dev/net/tun");
	strcpy(address.sun_path, argv[2]);
	stream = socket(AF_UNIX, SOCK_STREAM, 0);
	if (stream < 0 || connect(stream, (struct sockaddr *)&address, sizeof(address)))
		fail(argv[2]);
	puts("ready");
	fflush(stdout);
	errno = pthread_create(&thread, NULL, outwards, NULL);
	if (errno)
		fail("thread");
	inwards();
}
