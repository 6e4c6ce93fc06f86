/* A tap interface at one end, a vhost-user front end at the other: what a fast virtual machine is to passt --vhost-user.
 *
 *     vhost_relay [-n] TAP SOCKET
 *
 * makes the interface in the network namespace it runs in, connects to the UNIX socket, shares a memory of its own with
 * two rings in it, prints "ready", and moves frames both ways until either end closes. Frames have the virtio-net header
 * on both sides, so the kernel of the namespace is the machine's: it leaves out checksums and segmentation as far as the
 * back end takes that. -n: no offloads. Memory: each frame out has three buffers (128 bytes, 32 KiB, the rest), as a
 * super-frame of Linux has. If the back end does not take unfinished checksums, it has one, since Linux does not scatter
 * frames then. Buffers for frames in are pages, merged. Kicks and calls go by event indices where the back end has them,
 * as in Linux: a call for frames in when there is one, for buffers out when most of them were used.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <unistd.h>
#include <linux/if.h>
#include <linux/if_tun.h>

#ifndef TUN_F_USO4
#define TUN_F_USO4 0x20
#define TUN_F_USO6 0x40
#endif

enum {
	NUM = 256, PAGE = 4096, HEADER = 12,
	SLOTS = NUM / 3, FIRST = 128, SECOND = 32768, SLOT = 73728,
	RING = 16384, OUT_AREA = 2 * RING + NUM * PAGE,
	MEMORY = OUT_AREA + SLOTS * SLOT,
};
enum { GET_FEATURES = 1, SET_FEATURES, SET_OWNER, SET_MEM_TABLE = 5, SET_VRING_NUM = 8, SET_VRING_ADDR, SET_VRING_BASE,
       SET_VRING_KICK = 12, SET_VRING_CALL, SET_PROTOCOL_FEATURES = 16, SET_VRING_ENABLE = 18 };

#define BIT(n) (1ULL << (n))
static const uint64_t base_bits = BIT(15) | BIT(28) | BIT(29) | BIT(30) | BIT(32);
static const uint64_t offload_bits = BIT(0) | BIT(1) | BIT(7) | BIT(8) | BIT(11) | BIT(12);
static const uint64_t uso_bits = BIT(54) | BIT(55) | BIT(56);

struct desc { uint64_t addr; uint32_t len; uint16_t flags, next; };
struct avail { uint16_t flags, idx, ring[NUM], event; };
struct used { uint16_t flags, idx; struct { uint32_t id, len; } ring[NUM]; uint16_t event; };
struct ring { struct desc *desc; struct avail *avail; struct used *used; int kick, call; uint16_t kicked; };

static char *memory;
static int tap, control, file, scattered, event_idx;
static struct ring in, out;

static void fail(const char *what)
{
	fprintf(stderr, "vhost_relay: %s: %s\n", what, strerror(errno));
	_exit(1);
}

static void tell(uint32_t request, const void *payload, uint32_t size, int fd)
{
	struct { uint32_t request, flags, size; char payload[256]; } message = { request, 1, size, "" };
	struct iovec part = { &message, 12 + size };
	union { char bytes[CMSG_SPACE(sizeof(int))]; struct cmsghdr align; } room;
	struct msghdr m = { .msg_iov = &part, .msg_iovlen = 1 };

	memcpy(message.payload, payload, size);
	if (fd >= 0) {
		m.msg_control = room.bytes;
		m.msg_controllen = sizeof(room.bytes);
		struct cmsghdr *c = CMSG_FIRSTHDR(&m);
		c->cmsg_level = SOL_SOCKET;
		c->cmsg_type = SCM_RIGHTS;
		c->cmsg_len = CMSG_LEN(sizeof(int));
		memcpy(CMSG_DATA(c), &fd, sizeof(int));
	}
	if (sendmsg(control, &m, MSG_NOSIGNAL) != (ssize_t)(12 + size))
		fail("send");
}

static uint64_t ask(uint32_t request)
{
	struct { uint32_t request, flags, size; uint64_t value; } __attribute__((packed)) reply;

	tell(request, "", 0, -1);
	if (recv(control, &reply, sizeof(reply), MSG_WAITALL) != sizeof(reply))
		fail("reply");
	return reply.value;
}

static void lay_out(struct ring *r, unsigned index)
{
	char *at = memory + index * RING;

	r->desc = (void *)at;
	r->avail = (void *)(at + NUM * sizeof(struct desc));
	r->used = (void *)(((uintptr_t)(r->avail + 1) + 63) & ~63UL);
	r->kick = eventfd(0, 0);
	r->call = eventfd(0, 0);
	if (r->kick < 0 || r->call < 0)
		fail("eventfd");
}

static void start(struct ring *r, uint32_t index)
{
	uint32_t state[2] = { index, 1 };
	struct { uint32_t index, flags; uint64_t desc, used, avail, log; } a = {
		index, 0, (uintptr_t)r->desc, (uintptr_t)r->used, (uintptr_t)r->avail, 0
	};
	uint64_t value = index;

	tell(SET_VRING_ENABLE, state, 8, -1);
	state[1] = NUM;
	tell(SET_VRING_NUM, state, 8, -1);
	state[1] = 0;
	tell(SET_VRING_BASE, state, 8, -1);
	tell(SET_VRING_ADDR, &a, sizeof(a), -1);
	tell(SET_VRING_KICK, &value, 8, r->kick);
	tell(SET_VRING_CALL, &value, 8, r->call);
}

static void offer(struct ring *r, uint16_t head)
{
	r->avail->ring[r->avail->idx % NUM] = head;
	__atomic_store_n(&r->avail->idx, (uint16_t)(r->avail->idx + 1), __ATOMIC_RELEASE);
}

static void kick(struct ring *r)
{
	uint64_t one = 1;
	uint16_t old = r->kicked, now = r->avail->idx, event;

	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	r->kicked = now;
	event = __atomic_load_n(&r->used->event, __ATOMIC_RELAXED);
	if (event_idx ? (uint16_t)(now - event - 1) >= (uint16_t)(now - old)
		      : __atomic_load_n(&r->used->flags, __ATOMIC_RELAXED) & 1)
		return;
	if (write(r->kick, &one, 8) < 0)
		fail("kick");
}

/* Wait until the back end has used `count` entries behind `seen`, if calls go by event indices; else one. */
static void wait_used(struct ring *r, uint16_t seen, uint16_t count)
{
	uint64_t calls;

	if (!event_idx)
		count = 1;
	__atomic_store_n(&r->avail->event, (uint16_t)(seen + count - 1), __ATOMIC_RELAXED);
	__atomic_store_n(&r->avail->flags, 0, __ATOMIC_RELAXED);
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	while ((uint16_t)(__atomic_load_n(&r->used->idx, __ATOMIC_ACQUIRE) - seen) < count)
		if (read(r->call, &calls, 8) < 0)
			fail("call");
	if (!event_idx) /* an index that was passed asks for no call */
		__atomic_store_n(&r->avail->flags, 1, __ATOMIC_RELAXED);
}

/* From the interface to the back end; runs in a thread of its own. */
static void *outwards(void *unused)
{
	struct pollfd ready = { .fd = tap, .events = POLLIN };
	uint16_t unused_slots[SLOTS], seen = 0;
	unsigned left = SLOTS;
	(void)unused;

	for (unsigned i = 0; i < SLOTS; i++)
		unused_slots[i] = 3 * i;
	for (;;) {
		unsigned sent = 0;
		for (;;) {
			uint16_t now = __atomic_load_n(&out.used->idx, __ATOMIC_ACQUIRE);
			for (; seen != now; seen++)
				unused_slots[left++] = out.used->ring[seen % NUM].id;
			if (!left)
				break;
			uint16_t head = unused_slots[left - 1];
			char *at = memory + OUT_AREA + head / 3 * SLOT;
			struct iovec parts[3] = { { at, FIRST }, { at + PAGE, SECOND }, { at + PAGE + SECOND, SLOT - PAGE - SECOND } };
			if (!scattered)
				parts[0].iov_len = SLOT;
			ssize_t size = readv(tap, parts, scattered ? 3 : 1);
			if (size < 0 && errno == EAGAIN)
				break;
			if (size < 0)
				fail("tap");
			left--;
			for (int i = 0; i < 3; i++) {
				size_t n = size > (ssize_t)parts[i].iov_len ? parts[i].iov_len : (size_t)size;
				size -= n;
				out.desc[head + i] = (struct desc){ (uintptr_t)parts[i].iov_base, n, size > 0, head + i + 1 };
				if (!size)
					break;
			}
			offer(&out, head);
			if (++sent % 16 == 0)
				kick(&out);
		}
		if (sent)
			kick(&out);
		if (!left)
			wait_used(&out, seen, SLOTS * 3 / 4);
		else if (!sent)
			poll(&ready, 1, -1);
	}
	return NULL;
}

/* A back end may say that a checksum is right (VIRTIO_NET_HDR_F_DATA_VALID) and not compute it. A tap takes no such word,
 * and trusts only its own machine: so the frame goes on as one whose checksum is still to be made. */
static void trust(unsigned char *header)
{
	unsigned char *frame = header + HEADER;
	int six = frame[12] == 0x86 && frame[13] == 0xdd, protocol = frame[six ? 20 : 23];
	uint16_t start = six ? 54 : 14 + 4 * (frame[14] & 15), at = protocol == IPPROTO_TCP ? 16 : 6;

	if ((!six && (frame[12] != 8 || frame[13])) || (protocol != IPPROTO_TCP && protocol != IPPROTO_UDP))
		return;
	header[0] = 1;
	memcpy(header + 6, &start, 2);
	memcpy(header + 8, &at, 2);
}

/* From the back end to the interface. */
static void inwards(void)
{
	uint16_t seen = 0;

	for (;;) {
		wait_used(&in, seen, 1);
		uint16_t now = __atomic_load_n(&in.used->idx, __ATOMIC_ACQUIRE);
		while (seen != now) {
			struct iovec parts[NUM];
			unsigned count = 1, given = 0;
			for (unsigned i = 0; i < count; i++) {
				if (seen == now || i == NUM) {
					errno = EPROTO;
					fail("merged buffers");
				}
				uint32_t id = in.used->ring[seen % NUM].id;
				parts[i] = (struct iovec){ memory + 2 * RING + id * PAGE, in.used->ring[seen % NUM].len };
				seen++;
				if (!i)
					count = *(uint16_t *)((char *)parts[0].iov_base + 10);
			}
			if (*(char *)parts[0].iov_base == 2)
				trust(parts[0].iov_base);
			/* A frame that the interface does not take is lost, as on a wire. */
			if (writev(tap, parts, count) < 0 && errno == EBADFD)
				fail("tap");
			for (; given < count; given++)
				offer(&in, ((char *)parts[given].iov_base - memory - 2 * RING) / PAGE);
		}
		kick(&in);
	}
}

/* The control socket says nothing once the rings run: it only ends. */
static void *watch(void *unused)
{
	char byte;
	(void)unused;

	while (recv(control, &byte, 1, 0) > 0)
		;
	_exit(0);
}

int main(int argc, char **argv)
{
	struct ifreq request = { .ifr_flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR };
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	int plain = argc > 1 && !strcmp(argv[1], "-n"), size = HEADER;
	uint64_t features, protocol = 1 | 8;
	pthread_t thread;

	argv += plain;
	if (argc - plain != 3 || strlen(argv[1]) >= IFNAMSIZ || strlen(argv[2]) >= sizeof(address.sun_path)) {
		fprintf(stderr, "Usage: vhost_relay [-n] TAP SOCKET\n");
		return 2;
	}
	strcpy(request.ifr_name, argv[1]);
	tap = open("/dev/net/tun", O_RDWR | O_NONBLOCK);
	if (tap < 0 || ioctl(tap, TUNSETIFF, &request) || ioctl(tap, TUNSETVNETHDRSZ, &size))
		fail("/dev/net/tun");
	file = memfd_create("machine", MFD_ALLOW_SEALING);
	if (file < 0 || ftruncate(file, MEMORY))
		fail("memfd");
	memory = mmap(NULL, MEMORY, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
	if (memory == MAP_FAILED)
		fail("mmap");
	lay_out(&in, 0);
	lay_out(&out, 1);
	out.avail->flags = 1; /* what is used is looked at before each frame: until `wait_used`, no call is of use */
	for (unsigned i = 0; i < NUM; i++) {
		in.desc[i] = (struct desc){ (uintptr_t)memory + 2 * RING + i * PAGE, PAGE, 2, 0 };
		offer(&in, i);
	}

	strcpy(address.sun_path, argv[2]);
	control = socket(AF_UNIX, SOCK_STREAM, 0);
	if (control < 0 || connect(control, (struct sockaddr *)&address, sizeof(address)))
		fail(argv[2]);
	features = ask(GET_FEATURES) & (plain ? base_bits : base_bits | offload_bits | uso_bits);
	scattered = !!(features & BIT(0));
	event_idx = !!(features & BIT(29));
	unsigned offload = scattered ? TUN_F_CSUM : 0;
	offload |= (features & BIT(11) ? TUN_F_TSO4 : 0) | (features & BIT(12) ? TUN_F_TSO6 : 0);
	if (features & BIT(56) && !ioctl(tap, TUNSETOFFLOAD, offload | TUN_F_USO4 | TUN_F_USO6))
		;
	else if (ioctl(tap, TUNSETOFFLOAD, offload))
		fail("TUNSETOFFLOAD");
	struct { uint32_t count, padding; uint64_t guest, size, user, offset; } table = {
		1, 0, (uintptr_t)memory, MEMORY, (uintptr_t)memory, 0
	};
	tell(SET_OWNER, "", 0, -1);
	tell(SET_PROTOCOL_FEATURES, &protocol, 8, -1);
	tell(SET_FEATURES, &features, 8, -1);
	tell(SET_MEM_TABLE, &table, sizeof(table), file);
	start(&in, 0);
	start(&out, 1);
	puts("ready");
	fflush(stdout);
	errno = pthread_create(&thread, NULL, outwards, NULL);
	if (!errno)
		errno = pthread_create(&thread, NULL, watch, NULL);
	if (errno)
		fail("thread");
	inwards();
}
