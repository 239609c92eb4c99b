/* What counts as a difference, and how a case is shown to a person. */
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "difftest.h"
#include "base/util.h"

#define XSTATE_X87 1u
#define XSTATE_SSE 2u
#define XSTATE_AVX 4u
#define XSTATE_OPMASK 0x20u
#define XSTATE_ZMM_HIGH 0x40u
#define XSTATE_ZMM_16 0x80u

static const char *const gpr_names[16] = {
	"rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"};

/* The part of an XSAVE image that is compared, components in their initial configuration spelled out. */
struct vectors {
	uint16_t fcw, fsw;
	uint8_t ftw; /* abridged: one bit a register, 1 is not empty */
	uint32_t mxcsr;
	uint8_t st[8][10];
	uint8_t zmm[32][64];
	uint64_t k[8];
};

static void expand(const uint8_t *x, struct vectors *v)
{
	const struct xsave_layout *l = xsave_layout();
	uint64_t present;

	memset(v, 0, sizeof(*v));
	memcpy(&present, x + 512, 8);
	v->fcw = 0x37f;
	if (present & XSTATE_X87) {
		memcpy(&v->fcw, x, 2);
		memcpy(&v->fsw, x + 2, 2);
		v->ftw = x[4];
		for (unsigned i = 0; i < 8; i++)
			memcpy(v->st[i], x + 32 + 16 * i, 10);
	}
	memcpy(&v->mxcsr, x + 24, 4);
	for (unsigned i = 0; i < 16; i++) {
		if (present & XSTATE_SSE)
			memcpy(v->zmm[i], x + 160 + 16 * i, 16);
		if (present & XSTATE_AVX && l->avx)
			memcpy(v->zmm[i] + 16, x + l->avx + 16 * i, 16);
		if (present & XSTATE_ZMM_HIGH && l->zmm_high)
			memcpy(v->zmm[i] + 32, x + l->zmm_high + 32 * i, 32);
		if (present & XSTATE_ZMM_16 && l->zmm_16)
			memcpy(v->zmm[16 + i], x + l->zmm_16 + 64 * i, 64);
	}
	if (present & XSTATE_OPMASK && l->opmask)
		memcpy(v->k, x + l->opmask, sizeof(v->k));
}

struct report {
	char *text;
	size_t size, used;
	bool any;
};

__attribute__((format(printf, 2, 3))) static void differ(struct report *r, const char *format, ...)
{
	va_list args;
	int n;

	r->any = true;
	if (r->used + 1 >= r->size)
		return;
	va_start(args, format);
	n = vsnprintf(r->text + r->used, r->size - r->used, format, args);
	va_end(args);
	r->used = min(r->size - 1, r->used + n);
}

static void hex(char *to, const uint8_t *bytes, unsigned n)
{
	for (unsigned i = 0; i < n; i++) /* most significant first, as registers are written */
		sprintf(to + 2 * i, "%02x", bytes[n - 1 - i]);
	to[2 * n] = 0;
}

static void compare_bytes(
	struct report *r, const char *name, unsigned number, const uint8_t *native, const uint8_t *engine, unsigned n)
{
	char a[130], b[130];

	if (!memcmp(native, engine, n))
		return;
	hex(a, native, n);
	hex(b, engine, n);
	differ(r, "  %s%u\n    native %s\n    engine %s\n", name, number, a, b);
}

static void compare_vectors(struct report *r, const struct outcome *native, const struct outcome *engine)
{
	struct vectors a, b;

	expand(native->state.xsave, &a);
	expand(engine->state.xsave, &b);
	if (!memcmp(&a, &b, sizeof(a)))
		return;
	if (a.mxcsr != b.mxcsr)
		differ(r, "  mxcsr: native %#x, engine %#x\n", a.mxcsr, b.mxcsr);
	if (a.fcw != b.fcw || a.fsw != b.fsw || a.ftw != b.ftw)
		differ(r, "  x87 fcw/fsw/ftw: native %#x %#x %#x, engine %#x %#x %#x\n", a.fcw, a.fsw, a.ftw, b.fcw,
			b.fsw, b.ftw);
	for (unsigned i = 0; i < 8; i++)
		compare_bytes(r, "st", i, a.st[i], b.st[i], 10);
	for (unsigned i = 0; i < 32; i++)
		compare_bytes(r, "zmm", i, a.zmm[i], b.zmm[i], 64);
	for (unsigned i = 0; i < 8; i++)
		if (a.k[i] != b.k[i])
			differ(r, "  k%u: native %#" PRIx64 ", engine %#" PRIx64 "\n", i, a.k[i], b.k[i]);
}

static void decode_case(const struct test_case *t, unsigned n, struct instruction *i)
{
	memset(i->bytes, 0, sizeof(i->bytes));
	memcpy(i->bytes, t->code + t->offset[n], min(sizeof(i->bytes), (size_t)t->code_length - t->offset[n]));
	i->offset = t->offset[n];
	if (!instruction_decode(i))
		memset(&i->info, 0, sizeof(i->info));
	i->length = i->info.length;
}

/* Shifts and rotates by CL or by a masked immediate and repeated string instructions may leave flags as they were. */
static bool writes_flags_always(const struct instruction *i)
{
	return i->info.meta.category != ZYDIS_CATEGORY_SHIFT && i->info.meta.category != ZYDIS_CATEGORY_ROTATE &&
	       !(i->info.attributes & (ZYDIS_ATTRIB_HAS_REP | ZYDIS_ATTRIB_HAS_REPE | ZYDIS_ATTRIB_HAS_REPNE));
}

/* Flags that some instruction before `end` leaves undefined and none after it sets again; by position in the block, for
 * a block with branches simply those of every instruction. *read: one of the instructions reads such a flag. */
static uint64_t undefined_flags(const struct test_case *t, unsigned end, bool *read)
{
	uint64_t undefined = 0, tested = 0;
	bool branches = false;

	*read = false;
	for (unsigned n = 0; n < t->instructions; n++) {
		struct instruction i;

		decode_case(t, n, &i);
		branches |= i.info.meta.branch_type != ZYDIS_BRANCH_TYPE_NONE;
	}
	for (unsigned n = 0; n < t->instructions; n++) {
		struct instruction i;

		decode_case(t, n, &i);
		if (!i.info.cpu_flags || (!branches && n >= end))
			continue;
		tested |= i.info.cpu_flags->tested;
		*read |= (undefined & i.info.cpu_flags->tested) != 0;
		if (!branches && writes_flags_always(&i))
			undefined &= ~(uint64_t)(i.info.cpu_flags->modified | i.info.cpu_flags->set_0 |
						 i.info.cpu_flags->set_1);
		undefined |= i.info.cpu_flags->undefined;
	}
	if (branches)
		*read = (undefined & tested) != 0;
	return undefined;
}

static int instruction_at(const struct test_case *t, uint64_t rip)
{
	for (unsigned n = 0; n < t->instructions; n++)
		if (t->code_address + t->offset[n] == rip)
			return n;
	return -1;
}

/* Arithmetic flags that nobody reads from instruction n on before they are overwritten, on every path: a translator
 * that knows that need not have them right when instruction n faults. */
static uint64_t dead_flags(const struct test_case *t, int n, uint64_t candidates, unsigned depth)
{
	uint64_t written = 0;

	for (; n >= 0 && (unsigned)n < t->instructions && depth && (candidates & ~written); n++, depth--) {
		struct instruction i;

		decode_case(t, n, &i);
		if (i.info.cpu_flags) {
			candidates &= ~(i.info.cpu_flags->tested & ~written);
			if (writes_flags_always(&i))
				written |= i.info.cpu_flags->modified | i.info.cpu_flags->set_0 |
					   i.info.cpu_flags->set_1 | i.info.cpu_flags->undefined;
		}
		if (i.info.meta.branch_type != ZYDIS_BRANCH_TYPE_NONE) {
			uint64_t next = t->code_address + i.offset + i.length, other = 0, after;

			if (!i.info.raw.imm[0].is_relative)
				return candidates & written;
			after = candidates & ~written;
			other = dead_flags(t, instruction_at(t, next + i.info.raw.imm[0].value.s), after, depth - 1);
			if (i.info.meta.category == ZYDIS_CATEGORY_COND_BR)
				other &= dead_flags(t, n + 1, after, depth - 1);
			return (candidates & written) | other;
		}
	}
	return candidates & written;
}

static uint64_t ignored_flags(
	const struct test_case *t, const struct compare_options *options, const struct outcome *native)
{
	uint64_t ignored = 0x10000; /* RF: set in what an exception pushes, of no meaning after it */
	int at = instruction_at(t, native->state.rip);
	bool read;

	ignored |= undefined_flags(t, at >= 0 ? (unsigned)at : t->instructions, &read);
	if (at >= 0) {
		struct instruction i;

		decode_case(t, at, &i);
		if (i.info.meta.category == ZYDIS_CATEGORY_STRINGOP) /* of which element, is not said */
			ignored |= FLAGS_ARITHMETIC;
	}
	/* a return address that was changed leads into the middle of an instruction: what comes then is not known here */
	if (options->lax_fault_flags && at < 0 && native->vector != 3 && native->state.rip > t->code_address &&
		native->state.rip < t->code_address + t->offset[t->instructions - 1])
		ignored |= FLAGS_ARITHMETIC;
	if (options->lax_fault_flags && at >= 0)
		ignored |= dead_flags(t, at, FLAGS_ARITHMETIC, 64);
	return ignored;
}

/* Offset and base each of their own: AMD wants the offset canonical too, Intel only their sum. */
static bool segment_sum_differs(const struct test_case *t, const struct outcome *native, const struct outcome *engine)
{
	int n = instruction_at(t, native->state.rip);
	struct instruction i;

	if (n < 0 || native->vector != 13 || engine->vector != 14 ||
		native->state.rip != engine->state.rip)
		return false;
	decode_case(t, n, &i);
	for (unsigned o = 0; o < i.info.operand_count; o++)
		if (i.ops[o].type == ZYDIS_OPERAND_TYPE_MEMORY &&
			(i.ops[o].mem.segment == ZYDIS_REGISTER_FS || i.ops[o].mem.segment == ZYDIS_REGISTER_GS))
			return true;
	return false;
}

/* Does the faulting instruction move an image of the FPU? */
static bool in_image(const struct test_case *t, const struct outcome *native)
{
	int n = instruction_at(t, native->state.rip);
	struct instruction i;

	if (n < 0)
		return false;
	decode_case(t, n, &i);
	switch (i.info.mnemonic) {
	case ZYDIS_MNEMONIC_FLDENV:
	case ZYDIS_MNEMONIC_FNSTENV:
	case ZYDIS_MNEMONIC_FRSTOR:
	case ZYDIS_MNEMONIC_FNSAVE:
	case ZYDIS_MNEMONIC_FXRSTOR:
	case ZYDIS_MNEMONIC_FXRSTOR64:
	case ZYDIS_MNEMONIC_FXSAVE:
	case ZYDIS_MNEMONIC_FXSAVE64:
	case ZYDIS_MNEMONIC_XRSTOR:
	case ZYDIS_MNEMONIC_XRSTOR64:
	case ZYDIS_MNEMONIC_XSAVE:
	case ZYDIS_MNEMONIC_XSAVE64:
	case ZYDIS_MNEMONIC_XSAVEC:
	case ZYDIS_MNEMONIC_XSAVEC64:
	case ZYDIS_MNEMONIC_XSAVEOPT:
	case ZYDIS_MNEMONIC_XSAVEOPT64:
		return true;
	default:
		return false;
	}
}

static void compare_exception(
	struct report *r, const struct test_case *t, const struct outcome *native, const struct outcome *engine)
{
	uint32_t ignored = 0;

	if (native->vector != engine->vector) {
		differ(r,
			"  ended by: native vector %d (error %#x, cr2 %#" PRIx64
			"), engine vector %d (error %#x, cr2 %#" PRIx64 ") %s\n",
			native->vector, native->error_code, native->cr2, engine->vector, engine->error_code,
			engine->cr2, engine->vector < 0 ? engine->message : "");
		return;
	}
	if (native->vector == 14) {
		if (native->cr2 != engine->cr2 && !(in_image(t, native) && native->cr2 - engine->cr2 + 4096 < 8192))
			differ(r, "  cr2: native %#" PRIx64 ", engine %#" PRIx64 "\n", native->cr2, engine->cr2);
		/* Linux calls every fault above its TASK_SIZE_MAX a protection violation, to give nothing away. */
		if (native->cr2 >= 0x7ffffffff000)
			ignored |= 1;
		if (in_image(t, native))
			ignored |= 1; /* as which of several bytes faults */
		if (t->ring0)
			ignored |= 4; /* the host's ring is always 3 */
	} else if (native->vector != 13 && native->vector != 12 && native->vector != 17) {
		return; /* no error code */
	}
	if ((native->error_code ^ engine->error_code) & ~ignored)
		differ(r, "  error code of vector %d: native %#x, engine %#x\n", native->vector, native->error_code,
			engine->error_code);
	if (native->vector == 14 && t->ring0 && engine->error_code & 4)
		differ(r, "  error code: the user bit is set in ring 0 (%#x)\n", engine->error_code);
}

static void compare_memory(struct report *r, const struct test_case *t, uint8_t before[ARENA_PAGES][PAGE_BYTES],
	const struct outcome *native, const struct outcome *engine)
{
	unsigned shown = 0;

	for (unsigned page = 0; page < ARENA_PAGES; page++) {
		const uint8_t *expected = arena_layout[page] == ARENA_DATA ? native->pages[page] : before[page];

		if (arena_layout[page] == ARENA_NONE || !memcmp(expected, engine->pages[page], PAGE_BYTES))
			continue;
		for (unsigned i = 0; i < PAGE_BYTES; i++) {
			uint64_t address = ARENA_BASE + page * PAGE_BYTES + i;

			if (expected[i] == engine->pages[page][i] || address - t->ignore_address < t->ignore_length)
				continue;
			if (shown++ < 24)
				differ(r, "  memory %#" PRIx64 ": native %02x, engine %02x (before %02x)\n", address,
					expected[i], engine->pages[page][i], before[page][i]);
		}
	}
	if (shown > 24)
		differ(r, "  and %u more bytes of memory\n", shown - 24);
}

bool compare_outcomes(const struct test_case *t, const struct compare_options *options,
	uint8_t before[ARENA_PAGES][PAGE_BYTES], const struct outcome *native, const struct outcome *engine, char *text,
	size_t size)
{
	struct report r = {.text = text, .size = size};
	bool reads_undefined;
	uint64_t flags;

	text[0] = 0;
	if (native->vector == 17 || segment_sum_differs(t, native, engine))
		return false;
	compare_exception(&r, t, native, engine);
	if (engine->vector < 0)
		return true;
	undefined_flags(t, t->instructions, &reads_undefined);
	if (options->lax_fault_flags && reads_undefined)
		return false;
	if (native->state.rip != engine->state.rip)
		differ(&r, "  rip: native %#" PRIx64 ", engine %#" PRIx64 "\n", native->state.rip, engine->state.rip);
	for (unsigned i = 0; i < 16; i++)
		if (native->state.gpr[i] != engine->state.gpr[i])
			differ(&r, "  %s: native %#" PRIx64 ", engine %#" PRIx64 "\n", gpr_names[i],
				native->state.gpr[i], engine->state.gpr[i]);
	flags = (native->state.rflags ^ engine->state.rflags) & ~0x10000ull;
	if (flags && flags & ~ignored_flags(t, options, native))
		differ(&r, "  rflags: native %#" PRIx64 ", engine %#" PRIx64 " (differing %#" PRIx64 ")\n",
			native->state.rflags, engine->state.rflags, flags & ~ignored_flags(t, options, native));
	if (native->state.fs_base != engine->state.fs_base || native->state.gs_base != engine->state.gs_base)
		differ(&r, "  fs/gs base changed\n");
	compare_vectors(&r, native, engine);
	compare_memory(&r, t, before, native, engine);
	return r.any;
}

static void print_state(const struct cpu_state *s)
{
	struct vectors v;

	for (unsigned i = 0; i < 16; i++)
		printf("  %-3s %016" PRIx64 "%s", gpr_names[i], s->gpr[i], i % 4 == 3 ? "\n" : "");
	printf("  rip %016" PRIx64 "  rflags %06" PRIx64 "  fs %016" PRIx64 "  gs %016" PRIx64 "\n", s->rip, s->rflags,
		s->fs_base, s->gs_base);
	expand(s->xsave, &v);
	printf("  mxcsr %04x  fcw %04x  fsw %04x  ftw %02x  k", v.mxcsr, v.fcw, v.fsw, v.ftw);
	for (unsigned i = 0; i < 8; i++)
		printf(" %" PRIx64, v.k[i]);
	printf("\n");
}

static bool uses_class(const struct test_case *t, ZydisRegisterClass class, unsigned number)
{
	for (unsigned n = 0; n < t->instructions; n++) {
		struct instruction i;

		decode_case(t, n, &i);
		for (unsigned o = 0; o < i.info.operand_count; o++) {
			ZydisRegister regs[2] = {i.ops[o].type == ZYDIS_OPERAND_TYPE_REGISTER ? i.ops[o].reg.value : 0,
				i.ops[o].type == ZYDIS_OPERAND_TYPE_MEMORY ? i.ops[o].mem.index : 0};

			for (unsigned r = 0; r < 2; r++) {
				ZydisRegister wide =
					ZydisRegisterGetLargestEnclosing(ZYDIS_MACHINE_MODE_LONG_64, regs[r]);

				if (regs[r] && ZydisRegisterGetClass(wide) == class &&
					(unsigned)ZydisRegisterGetId(wide) == number)
					return true;
			}
		}
	}
	return false;
}

static void print_used_vectors(const struct test_case *t)
{
	struct vectors v;
	char line[130];

	expand(t->state.xsave, &v);
	for (unsigned i = 0; i < 32; i++)
		if (uses_class(t, ZYDIS_REGCLASS_ZMM, i)) {
			hex(line, v.zmm[i], 64);
			printf("  zmm%-2u %s\n", i, line);
		}
	for (unsigned i = 0; i < 8; i++)
		if (uses_class(t, ZYDIS_REGCLASS_MMX, i) || uses_class(t, ZYDIS_REGCLASS_X87, i)) {
			hex(line, v.st[i], 10);
			printf("  st%u %s\n", i, line);
		}
}

void print_case(const struct test_case *t, const struct forms *forms)
{
	ZydisFormatter formatter;

	ZydisFormatterInit(&formatter, ZYDIS_FORMATTER_STYLE_INTEL);
	printf("case %" PRIu64 ", ring %u, memory image %u, code at %#" PRIx64 "\n", t->number, t->ring0 ? 0 : 3,
		t->image, t->code_address);
	for (unsigned n = 0; n < t->instructions; n++) {
		struct instruction i;
		unsigned end = n + 1 < t->instructions ? t->offset[n + 1] : t->code_length;
		char text[160] = "illegal", bytes[40] = "";

		decode_case(t, n, &i);
		if (i.length)
			ZydisFormatterFormatInstruction(&formatter, &i.info, i.ops, i.info.operand_count_visible, text,
				sizeof(text), t->code_address + i.offset, NULL);
		for (unsigned j = 0; j < (i.length ? i.length : min(16u, end - i.offset)); j++)
			sprintf(bytes + 2 * j, "%02x", i.bytes[j]);
		printf("  %08" PRIx64 "  %-30s %-50s ; %s\n", t->code_address + i.offset, bytes, text,
			t->form[n] == UINT32_MAX ? "" : forms->list[t->form[n]].name);
	}
	printf("state before:\n");
	print_state(&t->state);
	print_used_vectors(t);
	for (unsigned i = 0; i < t->patches; i++) {
		printf("  memory %#" PRIx64 " =", t->patch[i].address);
		for (unsigned j = 0; j < t->patch[i].length; j++)
			printf(" %02x", t->patch[i].bytes[j]);
		printf("\n");
	}
}

void print_outcome(const char *title, const struct outcome *o)
{
	printf("%s: vector %d, error %#x, cr2 %#" PRIx64 "\n", title, o->vector, o->error_code, o->cr2);
	print_state(&o->state);
}
