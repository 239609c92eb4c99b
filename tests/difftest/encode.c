/* A random instruction of a given form: the form's fixed bits, everything else drawn. The decoder is asked whether what
 * came out is still the same form; if not, another draw. */
#include <string.h>

#include "difftest.h"
#include "base/util.h"

#define TRIES 64

bool instruction_decode(struct instruction *i)
{
	return ZYAN_SUCCESS(ZydisDecoderDecodeFull(form_decoder(), i->bytes, sizeof(i->bytes), &i->info, i->ops));
}

static uint8_t *put_modrm(const struct form *f, struct rng *rng, int base, uint8_t *p)
{
	unsigned reg = f->reg_free ? rng_below(rng, 8) : f->reg;
	unsigned mod = f->mod == 3 ? 3 : base >= 0 ? 1 + rng_below(rng, 2) : rng_below(rng, 3);
	unsigned rm = f->rm_free ? rng_below(rng, 8) : f->rm;

	if (mod != 3 && base >= 0) {
		rm = base & 7;
		*p++ = mod << 6 | reg << 3 | rm;
		if (rm == 4)
			*p++ = 0x24; /* no index */
		return p;
	}
	*p++ = mod << 6 | reg << 3 | rm;
	if (mod != 3 && rm == 4)
		*p++ = rng_next(rng);
	return p;
}

/* Prefixes that change nothing: segment overrides, an address size that does not matter much, repeated or ignored
 * ones. */
static unsigned random_prefixes(const struct form *f, struct rng *rng, uint8_t *list, unsigned n)
{
	static const uint8_t segments[] = {0x64, 0x65, 0x64, 0x65, 0x26, 0x2e, 0x36, 0x3e};

	if (rng_chance(rng, 6))
		list[n++] = segments[rng_below(rng, ARRAY_SIZE(segments))];
	if (rng_chance(rng, 12) && !f->prefix_67)
		list[n++] = 0x67;
	if (f->encoding != FORM_LEGACY)
		return n;
	if (rng_chance(rng, 32))
		list[n++] = 0x66;
	if (rng_chance(rng, 64) && f->mnemonic != ZYDIS_MNEMONIC_LOOPE && f->mnemonic != ZYDIS_MNEMONIC_LOOPNE)
		list[n++] = 0xf2 + rng_below(rng, 2);
	if (rng_chance(rng, 64) && n)
		list[n] = list[rng_below(rng, n)], n++;
	return n;
}

static uint8_t *put_legacy(const struct form *f, struct rng *rng, int base, uint8_t *p)
{
	uint8_t rex = f->w << 3 | (rng_next(rng) & 7);

	if (base >= 0 && f->mod != 3)
		rex = (rex & 0xc) | base >> 3; /* no index: X is 0 */
	/* none in a quarter of the cases: high-byte registers, and the common short encodings */
	if (f->w || (base >= 8 && f->mod != 3) || !rng_chance(rng, 4))
		*p++ = 0x40 | rex;
	if (f->map)
		*p++ = 0x0f;
	if (f->map > 1)
		*p++ = f->map == 2 ? 0x38 : 0x3a;
	*p++ = f->opcode_free ? (f->opcode & ~7) | rng_below(rng, 8) : f->opcode;
	return p;
}

static uint8_t *put_vex(const struct form *f, struct rng *rng, int base, uint8_t *p)
{
	unsigned vvvv = f->vvvv_free ? rng_below(rng, 16) : 15;
	unsigned rxb = rng_below(rng, 8);
	/* W and L are often ignored: draw them sometimes */
	unsigned w = rng_chance(rng, 4) ? rng_below(rng, 2) : f->w;
	unsigned l = rng_chance(rng, 4) ? rng_below(rng, 2) : f->ll;

	if (base >= 0 && f->mod != 3)
		rxb = (rxb & 4) | 2 | !(base >> 3); /* inverted */
	if (f->map == 1 && !w && (rxb & 3) == 3 && !rng_chance(rng, 3)) {
		*p++ = 0xc5;
		*p++ = (rxb & 4) << 5 | vvvv << 3 | l << 2 | f->prefix_66;
	} else {
		*p++ = 0xc4;
		*p++ = rxb << 5 | f->map;
		*p++ = w << 7 | vvvv << 3 | l << 2 | f->prefix_66;
	}
	*p++ = f->opcode;
	return p;
}

static uint8_t *put_evex(const struct form *f, struct rng *rng, int base, uint8_t *p)
{
	unsigned vvvv = f->vvvv_free ? rng_below(rng, 32) : 31;
	unsigned w = rng_chance(rng, 8) ? rng_below(rng, 2) : f->w;
	/* with b and registers LL is the rounding mode */
	unsigned ll = (f->b && f->mod == 3) || rng_chance(rng, 8) ? rng_below(rng, 4) : f->ll;
	unsigned aaa = f->aaa ? 1 + rng_below(rng, 7) : 0;

	unsigned rxbr = rng_below(rng, 16);

	if (base >= 0 && f->mod != 3)
		rxbr = (rxbr & 9) | 4 | !(base >> 3) << 1; /* inverted */
	/* X extends a vector register in ModRM.rm and means nothing for a general one, where some CPUs then use a stale rsp */
	if (f->mod == 3 && f->rm_general)
		rxbr |= 4;
	*p++ = 0x62;
	*p++ = rxbr << 4 | f->map;
	*p++ = w << 7 | (vvvv & 15) << 3 | 4 | f->prefix_66;
	/* V' belongs to the vector index where there is one; the decoder refuses the wrong draws */
	*p++ = f->z << 7 | ll << 5 | f->b << 4 | (f->vvvv_free ? vvvv >> 4 : rng_below(rng, 2)) << 3 | aaa;
	*p++ = f->opcode;
	return p;
}

static void draw(const struct form *f, struct rng *rng, int base, struct instruction *out)
{
	uint8_t bytes[48], prefixes[8], *p = bytes;
	unsigned n = 0;

	if (f->encoding == FORM_LEGACY) {
		if (f->prefix_66)
			prefixes[n++] = 0x66;
		if (f->prefix_rep)
			prefixes[n++] = f->prefix_rep;
		if (f->prefix_lock)
			prefixes[n++] = 0xf0;
	}
	if (f->prefix_67)
		prefixes[n++] = 0x67;
	n = random_prefixes(f, rng, prefixes, n);
	for (unsigned i = n; i > 1; i--) { /* any order is legal */
		unsigned j = rng_below(rng, i);
		uint8_t swap = prefixes[i - 1];

		prefixes[i - 1] = prefixes[j];
		prefixes[j] = swap;
	}
	memcpy(p, prefixes, n);
	p += n;
	if (f->encoding == FORM_LEGACY)
		p = put_legacy(f, rng, base, p);
	else if (f->encoding == FORM_VEX)
		p = put_vex(f, rng, base, p);
	else
		p = put_evex(f, rng, base, p);
	if (f->has_modrm)
		p = put_modrm(f, rng, base, p);
	/* Displacement and immediates: whatever follows. Small displacements are common in real code. */
	for (unsigned i = 0; i < 2; i++) {
		uint64_t value = rng_next(rng);

		memcpy(p, &value, 8);
		p += 8;
	}
	memcpy(out->bytes, bytes, sizeof(out->bytes));
}

bool form_encode(const struct form *form, struct rng *rng, int base, struct instruction *out)
{
	for (unsigned i = 0; i < TRIES; i++) {
		draw(form, rng, i < TRIES / 2 ? base : -1, out);
		out->form = form;
		if (instruction_decode(out) && form_key(&out->info, out->ops) == form->key) {
			out->length = out->info.length;
			return true;
		}
	}
	return false;
}
