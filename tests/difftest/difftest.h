/* The differential tester of a software engine: the host CPU is the oracle. See README.md in this folder. */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <Zydis/Zydis.h>

#include "base/error.h"

/* ---- the arena: the only memory a case can reach, at the same addresses natively and in the guest ---- */
#define ARENA_BASE 0x10000000ull /* low, so that absolute disp32 and 32-bit addresses reach it */
#define ARENA_PAGES 8
#define PAGE_BYTES 4096u

enum arena_kind { ARENA_NONE, ARENA_DATA, ARENA_READONLY, ARENA_CODE };
#define ARENA_LAYOUT                                                                                                   \
	{                                                                                                              \
		ARENA_DATA, ARENA_DATA, ARENA_NONE, ARENA_READONLY, ARENA_DATA, ARENA_NONE, ARENA_CODE, ARENA_CODE     \
	}
#define ARENA_CODE_FIRST 6
#define ARENA_CODE_PAGES 2
#define CODE_BASE (ARENA_BASE + ARENA_CODE_FIRST * PAGE_BYTES)
#define CODE_END (CODE_BASE + ARENA_CODE_PAGES * PAGE_BYTES)
extern const enum arena_kind arena_layout[ARENA_PAGES];

/* ---- processor state ---- */
#define FLAGS_ARITHMETIC 0x8d5ull /* CF PF AF ZF SF OF */
#define FLAG_TF 0x100ull
#define FLAG_DF 0x400ull

#define XSAVE_BYTES 4096
struct cpu_state {
	uint64_t gpr[16]; /* in encoding order */
	uint64_t rip, rflags, fs_base, gs_base;
	uint8_t xsave[XSAVE_BYTES] __attribute__((aligned(64))); /* standard layout, as far as xsave_size */
};

/* Where the components lie in the standard XSAVE layout (CPUID leaf 0xd). */
struct xsave_layout {
	uint64_t xcr0;
	uint32_t size, avx, opmask, zmm_high, zmm_16;
};
const struct xsave_layout *xsave_layout(void);

/* How a case ended. */
struct outcome {
	int vector; /* exception; negative when the runner itself failed */
	uint32_t error_code;
	uint64_t cr2; /* for vector 14 */
	struct cpu_state state;
	uint8_t pages[ARENA_PAGES][PAGE_BYTES]; /* those that exist */
	char message[256];			/* for vector < 0 */
};
enum { OUTCOME_TIMEOUT = -1, OUTCOME_ENGINE_EXIT = -2, OUTCOME_OTHER_SIGNAL = -3 };

/* ---- random numbers: a case follows from (seed, number) alone ---- */
struct rng {
	uint64_t s[2];
};
void rng_seed(struct rng *r, uint64_t seed, uint64_t stream);
uint64_t rng_next(struct rng *r);
static inline uint64_t rng_below(struct rng *r, uint64_t n)
{
	return ((unsigned __int128)rng_next(r) * n) >> 64;
}
static inline bool rng_chance(struct rng *r, unsigned one_in)
{
	return rng_below(r, one_in) == 0;
}

/* ---- instruction forms ---- */
enum form_encoding { FORM_LEGACY, FORM_VEX, FORM_EVEX };

struct form {
	uint64_t key; /* hash of everything that distinguishes it; see forms.c */
	char name[112];
	ZydisMnemonic mnemonic;
	ZydisISASet isa_set;
	/* the template it was found with; *_free fields may be drawn at random */
	uint8_t encoding, map, opcode, prefix_66, prefix_rep, prefix_67, prefix_lock, w, ll, b, z, aaa;
	uint8_t mod, reg, rm;
	bool has_modrm, reg_free, rm_free, vvvv_free, opcode_free;
	bool rm_general; /* ModRM.rm names a general register */
	bool privileged; /* raises #GP or #UD outside ring 0: only run there */
	bool image;	 /* stores or loads FPU environment images: only as a case's last instruction */
	bool control_flow;
	bool may_lock; /* accepts a lock prefix (as a form of its own) */
	bool popf;
	bool general; /* of the base instruction set */
};

struct forms {
	struct form *list;
	size_t count;
	size_t *general; /* indices of the legacy-encoded general-purpose ones, drawn more often */
	size_t general_count;
	unsigned dropped_isa, dropped_excluded; /* forms left out, by reason */
};
/* Where CPUID's answers come from: the host, or a CPU model of the engine. */
struct isa_source {
	bool fewer_components; /* than the host: what XSAVE does is not what it does there */
	void (*cpuid)(const void *model, uint32_t leaf, uint32_t subleaf, uint32_t out[4]);
	const void *model;
};
void isa_host_cpuid(const void *model, uint32_t leaf, uint32_t subleaf, uint32_t out[4]);
/* Whether that CPUID offers the instructions of a set: 1, 0, or -1 for sets it has no bit for. */
int isa_offered(const struct isa_source *source, ZydisISASet set);

/* All forms that the decoder knows in 64-bit mode, that CPUID offers and that README.md does not exclude. */
int forms_enumerate(struct forms *forms, const struct isa_source *source, struct error *err);
int forms_list_general(struct forms *forms, struct error *err); /* again, after list was shortened */
void forms_free(struct forms *forms);
uint64_t form_key(const ZydisDecodedInstruction *insn, const ZydisDecodedOperand *ops);
const ZydisDecoder *form_decoder(void);

/* Encodes a random instruction of that form (random registers, addressing, immediates, prefixes) and decodes it again.
 * base: the register that a memory operand shall be based on, or -1. false when that did not succeed within a bounded
 * number of tries. */
struct instruction {
	const struct form *form; /* NULL: one of the generator's own (loops, calls) */
	uint8_t bytes[16];
	uint8_t length;
	uint16_t offset; /* in the case's code */
	ZydisDecodedInstruction info;
	ZydisDecodedOperand ops[ZYDIS_MAX_OPERAND_COUNT];
};
bool form_encode(const struct form *form, struct rng *rng, int base, struct instruction *out);
bool instruction_decode(struct instruction *i); /* again, after its bytes were patched */

/* ---- a case ---- */
#define CASE_INSTRUCTIONS 24
#define CASE_PATCHES 24

struct patch {
	uint64_t address;
	uint8_t length, bytes[64];
};

struct test_case {
	uint64_t number;
	bool ring0;
	unsigned image; /* which background image fills the data pages */
	struct cpu_state state;
	uint64_t code_address;
	unsigned code_length, instructions, patches;
	uint8_t code[CASE_INSTRUCTIONS * 16 + 2];
	uint16_t offset[CASE_INSTRUCTIONS];
	uint32_t form[CASE_INSTRUCTIONS]; /* index into forms, or UINT32_MAX */
	struct patch patch[CASE_PATCHES];
	/* bytes that hold the FPU's instruction and data pointers after the run: not compared */
	uint64_t ignore_address, ignore_length;
};

#define BACKGROUND_IMAGES 8
struct generator {
	const struct forms *forms;
	uint64_t seed;
	const char *filter; /* only forms whose name contains it; NULL for all */
	bool single;	    /* no sequences */
	size_t *chosen;	    /* indices of forms that pass the filter */
	size_t chosen_count;
	uint8_t images[BACKGROUND_IMAGES][ARENA_PAGES][PAGE_BYTES];
};
int generator_init(struct generator *g, const struct forms *forms, uint64_t seed, const char *filter, bool single,
	struct error *err);
void generator_free(struct generator *g);
void generate_case(const struct generator *g, uint64_t number, struct test_case *t);
/* The arena as it is before the case runs. */
void generate_memory(const struct generator *g, const struct test_case *t, uint8_t pages[ARENA_PAGES][PAGE_BYTES]);
void state_randomize(struct cpu_state *s, struct rng *rng);
uint64_t state_random_integer(struct rng *rng);

/* ---- the oracle: runs on this CPU, in this process. One per process, since signal handlers are. ---- */
int native_init(struct error *err);
uint8_t *native_page(unsigned page); /* writable alias of an arena page */
/* Runs from state until an exception; arena contents as they are. out->pages is left alone. */
void native_execute(const struct cpu_state *state, struct outcome *out);

/* ---- the engine under test, behind engine/engine.h ---- */
struct guest;
struct engine;
extern const struct engine engine_native; /* stand-in: the oracle behind the engine interface */
struct cpu_model;
int guest_create(struct guest **guest, const struct engine *engine, const struct cpu_model *model,
	bool one_instruction_blocks, bool exact_flags, struct error *err);
void guest_destroy(struct guest *guest);
void guest_execute(
	struct guest *guest, const struct test_case *t, uint8_t pages[ARENA_PAGES][PAGE_BYTES], struct outcome *out);

/* ---- comparison ---- */
struct compare_options {
	bool lax_fault_flags;
};
/* Writes what differs, one item a line, into text; true when something does. before: the arena before the case. */
bool compare_outcomes(const struct test_case *t, const struct compare_options *options,
	uint8_t before[ARENA_PAGES][PAGE_BYTES], const struct outcome *native, const struct outcome *engine, char *text,
	size_t size);
void print_case(const struct test_case *t, const struct forms *forms);
void print_outcome(const char *title, const struct outcome *o);
