/* Random processor states: values at the edges of what instructions distinguish, rather than noise. */
#include <string.h>

#include "difftest.h"
#include "base/util.h"

#define XSAVE_HEADER 512
#define XSAVE_ST 32
#define XSAVE_XMM 160

/* xoroshiro128+ (Blackman and Vigna), seeded by splitmix64 */
static uint64_t splitmix(uint64_t *x)
{
	uint64_t z = *x += 0x9e3779b97f4a7c15ull;

	z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
	z = (z ^ z >> 27) * 0x94d049bb133111ebull;
	return z ^ z >> 31;
}

void rng_seed(struct rng *r, uint64_t seed, uint64_t stream)
{
	uint64_t x = seed;

	x = splitmix(&x) + stream;
	r->s[0] = splitmix(&x);
	r->s[1] = splitmix(&x) | 1;
}

uint64_t rng_next(struct rng *r)
{
	uint64_t a = r->s[0], b = r->s[1], sum = a + b;

	b ^= a;
	r->s[0] = (a << 24 | a >> 40) ^ b ^ b << 16;
	r->s[1] = b << 37 | b >> 27;
	return sum;
}

uint64_t state_random_integer(struct rng *rng)
{
	switch (rng_below(rng, 5)) {
	case 0:
		return (int64_t)rng_below(rng, 256) - 128;
	case 1:
		return (1ull << rng_below(rng, 64)) + rng_below(rng, 5) - 2;
	case 2:
		return rng_next(rng) >> rng_below(rng, 64);
	case 3: /* the upper half must not matter, or be cleared */
		return rng_next(rng) << 32 | (uint32_t)((1u << rng_below(rng, 32)) - rng_below(rng, 3));
	default:
		return rng_next(rng);
	}
}

static uint32_t random_float(struct rng *rng)
{
	uint32_t sign = rng_below(rng, 2) << 31, fraction = rng_next(rng) & 0x7fffff;

	switch (rng_below(rng, 8)) {
	case 0:
		return sign;
	case 1:
		return sign | fraction; /* denormal */
	case 2:
		return sign | 0x7f800000 | (rng_chance(rng, 2) ? 0 : fraction); /* infinity, NaNs */
	case 3:
		return sign | (uint32_t)rng_below(rng, 256) << 23 | fraction;
	default:
		return sign | (uint32_t)(112 + rng_below(rng, 40)) << 23 |
		       (rng_chance(rng, 2) ? fraction & 0x7f0000 : fraction);
	}
}

static uint64_t random_double(struct rng *rng)
{
	uint64_t sign = rng_below(rng, 2) << 63, fraction = rng_next(rng) & 0xfffffffffffffull;

	switch (rng_below(rng, 8)) {
	case 0:
		return sign;
	case 1:
		return sign | fraction;
	case 2:
		return sign | 0x7ff0000000000000ull | (rng_chance(rng, 2) ? 0 : fraction);
	case 3:
		return sign | rng_below(rng, 2048) << 52 | fraction;
	default:
		return sign | (1000 + rng_below(rng, 70)) << 52 |
		       (rng_chance(rng, 2) ? fraction & 0xff00000000000ull : fraction);
	}
}

static void random_lanes(struct rng *rng, uint8_t *to, unsigned bytes)
{
	unsigned kind = rng_below(rng, 8);

	for (unsigned i = 0; i < bytes; i += 8) {
		uint64_t v = rng_next(rng);

		if (kind == 0)
			v = random_float(rng) | (uint64_t)random_float(rng) << 32;
		else if (kind == 1)
			v = random_double(rng);
		else if (kind == 2)
			v = (uint32_t)(v & 0xff) | (uint64_t)((v >> 32) % 256) << 32; /* small integers */
		else if (kind == 3)
			v = rng_chance(rng, 2) ? 0 : ~0ull;
		else if (kind == 4)
			v = state_random_integer(rng);
		else if (kind == 5)
			v &= 0x3f3f3f3f3f3f3f3full; /* in-range shuffle indices */
		memcpy(to + i, &v, 8);
	}
}

static void random_x87(struct rng *rng, uint8_t *x)
{
	uint16_t fcw = 0x37f, fsw = rng_below(rng, 8) << 11;

	if (rng_chance(rng, 4))
		fcw = (fcw & ~0xf00) | rng_below(rng, 16) << 8; /* precision, rounding */
	if (rng_chance(rng, 12))
		fcw = (fcw & ~0x3f) | rng_below(rng, 64);
	if (rng_chance(rng, 2))
		fsw |= rng_next(rng) & 0x4700; /* condition bits */
	if (rng_chance(rng, 16))
		fsw |= rng_next(rng) & 0x7f;
	/* an unmasked exception that is pending shows as ES and B, as the processor would leave it */
	if (fsw & ~fcw & 0x3f)
		fsw |= 0x8080;
	memcpy(x, &fcw, 2);
	memcpy(x + 2, &fsw, 2);
	x[4] = rng_chance(rng, 2) ? 0xff : rng_chance(rng, 3) ? 0 : rng_next(rng);
	for (unsigned i = 0; i < 8; i++) {
		uint64_t mantissa = rng_next(rng) | 1ull << 63;
		uint16_t exponent = 16383 - 40 + rng_below(rng, 80);
		uint8_t *st = x + XSAVE_ST + 16 * i;

		switch (rng_below(rng, 8)) {
		case 0:
			exponent = mantissa = 0;
			break;
		case 1:
			exponent = 0; /* denormal or pseudo-denormal */
			mantissa = rng_next(rng);
			break;
		case 2:
			exponent = 0x7fff; /* infinity, NaNs, unsupported */
			mantissa = rng_chance(rng, 2) ? 1ull << 63 : rng_next(rng);
			break;
		case 3:
			exponent = rng_next(rng) & 0x7fff;
			break;
		case 4:
			mantissa &= 0xffff000000000000ull;
			break;
		}
		if (rng_chance(rng, 2))
			exponent |= 0x8000;
		memcpy(st, &mantissa, 8);
		memcpy(st + 8, &exponent, 2);
	}
}

static void random_vectors(struct rng *rng, uint8_t *x)
{
	const struct xsave_layout *l = xsave_layout();

	for (unsigned i = 0; i < 16; i++) {
		uint8_t lanes[64];

		random_lanes(rng, lanes, 64);
		memcpy(x + XSAVE_XMM + 16 * i, lanes, 16);
		if (l->avx)
			memcpy(x + l->avx + 16 * i, lanes + 16, 16);
		if (l->zmm_high)
			memcpy(x + l->zmm_high + 32 * i, lanes + 32, 32);
	}
	for (unsigned i = 0; i < 16 && l->zmm_16; i++)
		random_lanes(rng, x + l->zmm_16 + 64 * i, 64);
	for (unsigned i = 0; i < 8 && l->opmask; i++) {
		uint64_t k = rng_chance(rng, 4) ? (rng_chance(rng, 2) ? 0 : ~0ull) : rng_next(rng);

		memcpy(x + l->opmask + 8 * i, &k, 8);
	}
}

void state_randomize(struct cpu_state *s, struct rng *rng)
{
	uint32_t mxcsr = 0x1f80, mxcsr_mask = 0xffff;
	uint64_t components = xsave_layout()->xcr0;

	for (unsigned i = 0; i < 16; i++)
		s->gpr[i] = state_random_integer(rng);
	s->rflags = 0x202 | (rng_next(rng) & FLAGS_ARITHMETIC);
	if (rng_chance(rng, 8))
		s->rflags |= FLAG_DF;
	s->fs_base = rng_chance(rng, 2) ? ARENA_BASE + (rng_next(rng) & 0xfff) : rng_next(rng) & 0x7fffffffffffull;
	s->gs_base = rng_chance(rng, 2) ? ARENA_BASE - (rng_next(rng) & 0xfff) : -(rng_next(rng) & 0x7fffffffffffull);
	memset(s->xsave, 0, XSAVE_HEADER + 64);
	random_x87(rng, s->xsave);
	if (rng_chance(rng, 3))
		mxcsr |= rng_next(rng) & 0xe07f; /* flush to zero, rounding, denormals are zero, sticky flags */
	if (rng_chance(rng, 12))
		mxcsr = (mxcsr & ~0x1f80) | (rng_next(rng) & 0x1f80);
	memcpy(s->xsave + 24, &mxcsr, 4);
	memcpy(s->xsave + 28, &mxcsr_mask, 4);
	random_vectors(rng, s->xsave);
	/* now and then some components in their initial configuration */
	if (rng_chance(rng, 8))
		components &= rng_next(rng);
	memcpy(s->xsave + XSAVE_HEADER, &components, 8);
}
