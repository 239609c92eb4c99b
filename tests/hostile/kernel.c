/* A guest that hates its machine: random values to every port, MMIO register, MSR, PCI configuration register and virtio
 * queue, on two vCPUs, until somebody ends it. It prints its seed at each start and "alive" now and then. */
#include "hostile.h"

struct frame {
	uint64_t r11, r10, r9, r8, rdi, rsi, rdx, rcx, rax, vector, error, rip, cs, rflags, rsp, ss;
};

struct fixup {
	uint64_t from, to;
};

extern const struct fixup fixups[], fixups_end[];
extern const char stubs[], open_window[], closed_window[];
extern uint32_t start_info;
void give_up(void);

static struct {
	uint16_t low, selector, flags, middle;
	uint32_t high, zero;
} idt[256] __attribute__((aligned(16)));

/* ---- output ---- */

static void serial_set_up(void)
{
	out8(0x3f9, 0);	   /* no interrupts */
	out8(0x3fb, 0x03); /* 8 bits, divisor latch closed */
	out8(0x3fc, 0x03); /* no loopback */
	out8(0x3fa, 0x07);
}

static void put(char c)
{
	for (unsigned i = 0; i < 10000 && !(in8(0x3fd) & 0x20); i++)
		;
	out8(0x3f8, (uint8_t)c);
}

static void say(const char *text, uint64_t number)
{
	while (*text)
		put(*text++);
	for (int shift = 60; shift >= 0; shift -= 4)
		put("0123456789abcdef"[number >> shift & 15]);
	put('\n');
}

/* ---- exceptions and interrupts ---- */

void exception(struct frame *f)
{
	/* An interrupt may have an exception's vector. */
	if (f->vector >= 32 || f->vector == 2 || (f->rip >= (uint64_t)open_window && f->rip <= (uint64_t)closed_window)) {
		write32(0xfee000b0, 0);
		return;
	}
	for (const struct fixup *x = fixups; x < fixups_end; x++) {
		if (x->from == f->rip) {
			f->rip = x->to;
			return;
		}
	}
	/* It has hurt itself: by a device's write into it, or a mode that it has lost. */
	serial_set_up();
	say("hurt by exception ", f->vector);
	say("           at rip ", f->rip);
	give_up();
}

static void load_idt(void)
{
	struct {
		uint16_t limit;
		uint64_t base;
	} __attribute__((packed)) pointer = {sizeof(idt) - 1, (uint64_t)idt};

	for (unsigned i = 0; i < 256; i++) {
		uint64_t at = (uint64_t)stubs + 16 * i;

		idt[i].low = (uint16_t)at;
		idt[i].selector = 8;
		idt[i].flags = 0x8e00;
		idt[i].middle = (uint16_t)(at >> 16);
		idt[i].high = (uint32_t)(at >> 32);
	}
	__asm__ volatile("lidt %0" : : "m"(pointer));
}

/* ---- random numbers ---- */

uint64_t next(struct rng *r) /* splitmix64 */
{
	uint64_t z = r->state += 0x9e3779b97f4a7c15;

	z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
	z = (z ^ z >> 27) * 0x94d049bb133111eb;
	return z ^ z >> 31;
}

uint64_t nasty(struct rng *r)
{
	static const uint64_t edges[] = {0, 1, 0xff, 0xffff, 0x7fffffff, 0x80000000, 0xffffffff, 0x7fffffffffffffff,
		0x8000000000000000, ~0ull, 0xfffffffffffff000, 0x3ffffff, 0x4000000, 0xfee00000, 0xfec00000, 0xe0000000};

	switch (below(r, 5)) {
	case 0:
		return edges[below(r, sizeof(edges) / sizeof(edges[0]))];
	case 1:
		return 1ull << below(r, 64);
	case 2:
		return JUNK + below(r, JUNK_SIZE);
	case 3:
		return below(r, 256);
	}
	return next(r);
}

/* ---- accesses ---- */

void touch(struct rng *r, uint64_t at)
{
	uint64_t value = nasty(r);

	switch (below(r, 14)) {
	case 0:
		write8(at, (uint8_t)value);
		break;
	case 1:
		write16(at, (uint16_t)value);
		break;
	case 2:
		write64(at, value);
		break;
	case 3:
	case 4:
	case 5:
		write32(at, (uint32_t)value);
		break;
	case 6:
		__asm__ volatile("1: lock xaddl %k0, (%1)\n2:" FIXUP : "+r"(value) : "r"(at) : "memory");
		break;
	case 7:
		__asm__ volatile("1: lock btsq %1, (%0)\n2:" FIXUP : : "r"(at), "r"(value & 4095) : "memory", "cc");
		break;
	case 8: {
		uint64_t to = at, count = below(r, 64);

		__asm__ volatile("1: rep stosb\n2:" FIXUP : "+D"(to), "+c"(count) : "a"(value) : "memory");
		break;
	}
	case 9: {
		uint64_t from = at, to = JUNK + below(r, JUNK_SIZE - 4096), count = below(r, 64);

		__asm__ volatile("1: rep movsq\n2:" FIXUP : "+S"(from), "+D"(to), "+c"(count) : : "memory");
		break;
	}
	case 10:
		__asm__ volatile("1: movups (%0), %%xmm0\n2:" FIXUP : : "r"(at) : "memory"); /* nobody else uses vectors */
		break;
	case 11:
		__asm__ volatile("1: movups %%xmm0, (%0)\n2:" FIXUP : : "r"(at) : "memory");
		break;
	case 12:
		__asm__ volatile("1: cmpxchg16b (%0)\n2:" FIXUP : : "r"(at & ~15ull), "a"(value), "b"(value), "c"(0), "d"(0)
				 : "memory", "cc");
		break;
	default:
		read32(at);
	}
}

/* ---- what it does ---- */

/* Those that end it, by power-off or reset, are for rare occasions: the rest would starve. */
static int ends(uint16_t port, unsigned size)
{
	static const uint16_t ports[] = {0x604, 0x605, 0xcf9, 0x64, 0x92};

	for (unsigned i = 0; i < sizeof(ports) / sizeof(ports[0]); i++)
		if (port <= ports[i] && ports[i] < port + size)
			return 1;
	return 0;
}

static void ports(struct rng *r)
{
	static const uint16_t known[] = {0x20, 0x21, 0xa0, 0xa1, 0x40, 0x41, 0x42, 0x43, 0x60, 0x61, 0x64, 0x70, 0x71, 0x80,
		0x92, 0x3f8, 0x2f8, 0xcf8, 0xcf9, 0xcfc, 0x510, 0x511, 0x600, 0x602, 0x604, 0x608, 0x505, 0xf4, 0x4d0};
	uint16_t port = below(r, 3) ? (uint16_t)(known[below(r, sizeof(known) / 2)] + below(r, 8)) : (uint16_t)next(r);
	uint32_t value = (uint32_t)nasty(r);
	uint64_t at = JUNK + below(r, JUNK_SIZE - 65536), count = below(r, 40);

	if (ends(port, 4) && below(r, 300))
		return;
	switch (below(r, 8)) {
	case 0:
		__asm__ volatile("outb %b0, %1" : : "a"(value), "d"(port));
		break;
	case 1:
		__asm__ volatile("outw %w0, %1" : : "a"(value), "d"(port));
		break;
	case 2:
	case 3:
		out32(port, value);
		break;
	case 4:
		in8(port);
		in32(port);
		break;
	case 5:
		__asm__ volatile("rep outsb" : "+S"(at), "+c"(count) : "d"(port) : "memory");
		break;
	case 6:
		__asm__ volatile("rep insl" : "+D"(at), "+c"(count) : "d"(port) : "memory");
		break;
	case 7:
		__asm__ volatile("rep outsw" : "+S"(at), "+c"(count) : "d"(port) : "memory");
	}
}

static void msrs(struct rng *r)
{
	static const struct {
		uint32_t first, count;
	} ranges[] = {{0, 0x200}, {0x200, 0x600}, {0x800, 0x100}, {0xc0000080, 0x90}, {0xc0010000, 0x200}, {0x40000000, 0x100},
		{0x4b564d00, 16}, {0x10, 4}, {0x6e0, 1}, {0x1b, 1}, {0xda0, 1}};
	unsigned k = (unsigned)below(r, sizeof(ranges) / sizeof(ranges[0]));
	uint32_t msr = below(r, 20) ? ranges[k].first + (uint32_t)below(r, ranges[k].count) : (uint32_t)next(r);
	uint64_t value = nasty(r);
	uint32_t low = (uint32_t)value, high = (uint32_t)(value >> 32);

	if (below(r, 2))
		__asm__ volatile("1: wrmsr\n2:" FIXUP : : "c"(msr), "a"(low), "d"(high) : "memory");
	else
		__asm__ volatile("1: rdmsr\n2:" FIXUP : "+a"(low), "+d"(high) : "c"(msr));
}

static void mmio(struct rng *r)
{
	static const struct {
		uint64_t first, size;
	} ranges[] = {{0xfee00000, 0x1000}, {0xfec00000, 0x1000}, {0xe0000000, 0x100000}, {0xe0000000, 0x10000000},
		{0xc0000000, 0x20000000}, {0xfed00000, 0x100000}, {0xa0000, 0x60000}, {0xf0000000, 0x10000000},
		{0x8000000000, 0x100000000}, {JUNK, JUNK_SIZE}, {0x4000000, 0x80000000}};
	unsigned k = (unsigned)below(r, sizeof(ranges) / sizeof(ranges[0]));
	uint64_t at = ranges[k].first + below(r, ranges[k].size);

	/* An INIT to the first vCPU is a reset. */
	if (at >> 12 == 0xfee00 && (at & 0xfff) >= 0x2c0 && (at & 0xfff) < 0x320 && below(r, 50))
		return;
	touch(r, below(r, 4) ? at & ~3ull : at);
}

static void configuration(struct rng *r)
{
	uint32_t address = 0x80000000 | (uint32_t)(below(r, 4) ? below(r, 20) << 11 : next(r) & 0xffff00) |
			   (uint32_t)(next(r) & 0xfc);

	if (below(r, 2)) {
		out32(0xcf8, below(r, 10) ? address : (uint32_t)next(r));
		out32(0xcfc, (uint32_t)nasty(r));
	} else {
		touch(r, 0xe0000000 + (below(r, 20) << 15) + below(r, 0x200));
	}
}

static void processor(struct rng *r)
{
	uint32_t a = (uint32_t)nasty(r), b, c = (uint32_t)below(r, 40), d = 0;

	switch (below(r, 6)) {
	case 0:
		a = below(r, 2) ? (uint32_t)below(r, 40) : 0x80000000 + (uint32_t)below(r, 40);
		__asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
		break;
	case 1: /* interrupts that devices have raised */
		__asm__ volatile(".globl open_window, closed_window\nsti\nopen_window: nop\nnop\nclosed_window: cli");
		break;
	case 2:
		__asm__ volatile("1: xsetbv\n2:" FIXUP : : "a"(a), "d"(d), "c"(0));
		break;
	case 3:
		__asm__ volatile("1: invlpg (%0)\n2:" FIXUP "wbinvd" : : "r"(nasty(r)) : "memory");
		break;
	case 4:
		__asm__ volatile("1: movq %0, %%dr7\n2:" FIXUP : : "r"(0x400ull));
		__asm__ volatile("1: movq %0, %%cr8\n2:" FIXUP : : "r"(nasty(r)));
		break;
	case 5: /* kvm's hypercalls */
		__asm__ volatile("1: vmcall\n2:" FIXUP : "+a"(a) : "b"(nasty(r)), "c"(nasty(r)), "d"(nasty(r)), "S"(nasty(r))
				 : "memory");
		break;
	}
}

/* The other vCPU: mostly to this loop, sometimes to anywhere below 1 MiB. */
static void start_other(struct rng *r)
{
	for (unsigned i = 0; i < (unsigned)(ap_end - ap_start); i++)
		((volatile char *)0x8000)[i] = ap_start[i];
	write32(0xfee000f0, 0x1ff);
	write32(0xfee00310, 1u << 24);
	write32(0xfee00300, 0x4500); /* INIT */
	write32(0xfee00310, 1u << 24);
	write32(0xfee00300, 0x4600 | (below(r, 4) ? 8 : (uint32_t)below(r, 256)));
}

static uint64_t seed(void)
{
	const char *text = (const char *)*(const uint64_t *)(uint64_t)(start_info + 24);
	uint64_t value = 0;
	uint32_t low, high;

	for (; *text && (text[0] != 's' || text[1] != '='); text++)
		;
	if (!*text) { /* after a reset it is to be another one; s= repeats a run exactly, with one vCPU */
		__asm__ volatile("rdtsc" : "=a"(low), "=d"(high));
		return (uint64_t)high << 32 | low;
	}
	for (text += 2; *text && *text != ' '; text++)
		value = value << 4 | (uint64_t)(*text <= '9' ? *text - '0' : *text - 'a' + 10);
	return value;
}

void hostile(unsigned cpu)
{
	struct rng rng = {.state = seed() + cpu};

	load_idt();
	if (cpu == 0) {
		serial_set_up();
		say("hostile, seed ", rng.state);
	}
	for (uint64_t round = 0;; round++) {
		if (cpu == 0 && round % 4096 == 0) {
			serial_set_up();
			say("alive ", round);
			devices_find(&rng);
			start_other(&rng);
		}
		switch (below(&rng, 16)) {
		case 0:
		case 1:
			ports(&rng);
			break;
		case 2:
		case 3:
			msrs(&rng);
			break;
		case 4:
		case 5:
			mmio(&rng);
			break;
		case 6:
			configuration(&rng);
			break;
		case 7:
			processor(&rng);
			break;
		case 8:
			touch(&rng, devices_window(&rng));
			break;
		default:
			devices_attack(&rng);
		}
	}
}
