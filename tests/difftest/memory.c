/* What lies in the arena's pages before a case runs: one of a few background images, and the case's patches. */
#include <stdlib.h>
#include <string.h>

#include "difftest.h"

/* Qword i of an image of that kind. */
static uint64_t image_word(unsigned kind, struct rng *rng)
{
	uint64_t r = rng_next(rng);

	switch (kind) {
	case 0:
		return r;
	case 1: /* small 32-bit integers */
		return (r & 0x1f) | (r >> 8 & 0x1f) << 32;
	case 2: /* floats around 1 */
		return 0x3f00000040000000ull ^ (r & 0x80ffff0080ffff00ull);
	case 3: /* doubles around 1 */
		return 0x3ff0000000000000ull ^ (r & 0x803fffffffffffffull);
	case 4:
		return 0;
	case 5:
		return state_random_integer(rng);
	case 6: /* addresses of arena data */
		return ARENA_BASE + r % (2 * PAGE_BYTES);
	default: /* runs of equal bytes, for string comparisons and scans */
		return rng_below(rng, 8) ? 0x4141414141414141ull : r;
	}
}

int generator_init(struct generator *g, const struct forms *forms, uint64_t seed, const char *filter, bool single,
	struct error *err)
{
	*g = (struct generator){.forms = forms, .seed = seed, .filter = filter, .single = single};
	for (unsigned i = 0; i < BACKGROUND_IMAGES; i++) {
		struct rng rng;

		rng_seed(&rng, seed, ~(uint64_t)i);
		for (unsigned page = 0; page < ARENA_PAGES; page++)
			for (unsigned at = 0; at < PAGE_BYTES; at += 8) {
				uint64_t word = image_word(i, &rng);

				memcpy(g->images[i][page] + at, &word, 8);
			}
	}
	g->chosen = malloc((forms->count + 1) * sizeof(*g->chosen));
	if (!g->chosen)
		return error_set(err, ENOMEM, "no memory for the list of forms");
	for (size_t i = 0; i < forms->count; i++)
		if (!filter || strstr(forms->list[i].name, filter))
			g->chosen[g->chosen_count++] = i;
	if (!g->chosen_count)
		return error_set(
			err, ENOENT, "no instruction form contains '%s': try --list to see their names", filter);
	return 0;
}

void generator_free(struct generator *g)
{
	free(g->chosen);
	g->chosen = NULL;
}

static void put_byte(uint8_t pages[ARENA_PAGES][PAGE_BYTES], uint64_t address, uint8_t value)
{
	uint64_t at = address - ARENA_BASE;

	if (at < ARENA_PAGES * PAGE_BYTES && arena_layout[at / PAGE_BYTES] != ARENA_NONE)
		pages[at / PAGE_BYTES][at % PAGE_BYTES] = value;
}

void generate_memory(const struct generator *g, const struct test_case *t, uint8_t pages[ARENA_PAGES][PAGE_BYTES])
{
	for (unsigned page = 0; page < ARENA_PAGES; page++)
		if (arena_layout[page] == ARENA_CODE)
			memset(pages[page], 0xcc, PAGE_BYTES); /* int3: wherever a branch goes, the case ends */
		else if (arena_layout[page] != ARENA_NONE)
			memcpy(pages[page], g->images[t->image][page], PAGE_BYTES);
	for (unsigned i = 0; i < t->patches; i++)
		for (unsigned j = 0; j < t->patch[i].length; j++)
			put_byte(pages, t->patch[i].address + j, t->patch[i].bytes[j]);
	for (unsigned i = 0; i < t->code_length; i++)
		put_byte(pages, t->code_address + i, t->code[i]);
}
