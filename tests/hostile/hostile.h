/* The hostile kernel: one page of helpers. Every access that may fault is written with a fixup: the handler goes on
 * behind it. */
#pragma once

#include <stdint.h>

#define FIXUP "\n.pushsection .fixups, \"a\"\n.quad 1b, 2b\n.popsection\n"

extern const char ap_start[], ap_end[];

struct rng {
	uint64_t state;
};

uint64_t next(struct rng *r);
static inline uint64_t below(struct rng *r, uint64_t n)
{
	return next(r) % n;
}

/* Values that break things more often than even ones do. */
uint64_t nasty(struct rng *r);

static inline void out8(uint16_t port, uint8_t v)
{
	__asm__ volatile("outb %0, %1" : : "a"(v), "Nd"(port));
}

static inline void out32(uint16_t port, uint32_t v)
{
	__asm__ volatile("outl %0, %1" : : "a"(v), "Nd"(port));
}

static inline uint8_t in8(uint16_t port)
{
	uint8_t v;

	__asm__ volatile("inb %1, %0" : "=a"(v) : "Nd"(port));
	return v;
}

static inline uint32_t in32(uint16_t port)
{
	uint32_t v;

	__asm__ volatile("inl %1, %0" : "=a"(v) : "Nd"(port));
	return v;
}

static inline void write32(uint64_t at, uint32_t v)
{
	__asm__ volatile("1: movl %k0, (%1)\n2:" FIXUP : : "r"(v), "r"(at) : "memory");
}

static inline void write16(uint64_t at, uint16_t v)
{
	__asm__ volatile("1: movw %w0, (%1)\n2:" FIXUP : : "r"(v), "r"(at) : "memory");
}

static inline void write8(uint64_t at, uint8_t v)
{
	__asm__ volatile("1: movb %b0, (%1)\n2:" FIXUP : : "q"(v), "r"(at) : "memory");
}

static inline void write64(uint64_t at, uint64_t v)
{
	__asm__ volatile("1: movq %q0, (%1)\n2:" FIXUP : : "r"(v), "r"(at) : "memory");
}

static inline uint32_t read32(uint64_t at)
{
	uint32_t v = 0;

	__asm__ volatile("1: movl (%1), %k0\n2:" FIXUP : "+r"(v) : "r"(at) : "memory");
	return v;
}

/* Any size, any alignment, reads and writes, read-modify-writes, strings and vectors. */
void touch(struct rng *r, uint64_t at);

/* queues.c: devices as a driver finds them, driven as none does */
void devices_find(struct rng *r);
void devices_attack(struct rng *r);
uint64_t devices_window(struct rng *r); /* an address in some device's BAR */

/* Memory that is the kernel's to lose: 16 MiB from here. */
#define JUNK 0x1000000ull
#define JUNK_SIZE 0x1000000ull
