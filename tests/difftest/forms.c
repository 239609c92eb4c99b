/* The instruction forms: found by walking the opcode space through the decoder, so that none is left out because a
 * person forgot it. Two encodings belong to the same form when mnemonic, opcode, operand kinds, operand sizes, operand
 * roles, vector length, masking, broadcast, rounding, lock and repetition agree. */
#include <cpuid.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "difftest.h"
#include "base/cleanup.h"
#include "base/util.h"

/* Left out by name; README.md gives the reasons. */
static const ZydisMnemonic excluded[] = {
	/* answers differ from one execution to the next, or belong to the CPU model, not to the instruction */
	ZYDIS_MNEMONIC_RDTSC,
	ZYDIS_MNEMONIC_RDTSCP,
	ZYDIS_MNEMONIC_RDRAND,
	ZYDIS_MNEMONIC_RDSEED,
	ZYDIS_MNEMONIC_RDPID,
	ZYDIS_MNEMONIC_RDPRU,
	ZYDIS_MNEMONIC_RDPMC,
	ZYDIS_MNEMONIC_CPUID,
	ZYDIS_MNEMONIC_XGETBV,
	/* the host kernel answers instead of the processor (calls, UMIP emulation), or they leave the sandbox */
	ZYDIS_MNEMONIC_SYSCALL,
	ZYDIS_MNEMONIC_SYSENTER,
	ZYDIS_MNEMONIC_SYSEXIT,
	ZYDIS_MNEMONIC_INT,
	ZYDIS_MNEMONIC_INT1,
	ZYDIS_MNEMONIC_INT3,
	ZYDIS_MNEMONIC_IRET,
	ZYDIS_MNEMONIC_IRETD,
	ZYDIS_MNEMONIC_IRETQ,
	ZYDIS_MNEMONIC_SGDT,
	ZYDIS_MNEMONIC_SIDT,
	ZYDIS_MNEMONIC_SLDT,
	ZYDIS_MNEMONIC_STR,
	ZYDIS_MNEMONIC_SMSW,
	ZYDIS_MNEMONIC_UIRET,
	/* segment registers and descriptors: the guest's tables are not the host's */
	ZYDIS_MNEMONIC_LAR,
	ZYDIS_MNEMONIC_LSL,
	ZYDIS_MNEMONIC_VERR,
	ZYDIS_MNEMONIC_VERW,
	ZYDIS_MNEMONIC_LSS,
	ZYDIS_MNEMONIC_LFS,
	ZYDIS_MNEMONIC_LGS,
	ZYDIS_MNEMONIC_RDFSBASE,
	ZYDIS_MNEMONIC_RDGSBASE,
	ZYDIS_MNEMONIC_WRFSBASE,
	ZYDIS_MNEMONIC_WRGSBASE,
	/* wait for something */
	ZYDIS_MNEMONIC_MWAITX,
	ZYDIS_MNEMONIC_MONITORX,
	ZYDIS_MNEMONIC_UMWAIT,
	ZYDIS_MNEMONIC_TPAUSE,
	ZYDIS_MNEMONIC_UMONITOR,
};

/* Whole instruction sets left out: virtualization and its calls, trusted execution, transactions, AMX, CET, vendors'
 * oddities. */
static const ZydisISAExt excluded_sets[] = {
	ZYDIS_ISA_EXT_AMD3DNOW,
	ZYDIS_ISA_EXT_AMD_INVLPGB,
	ZYDIS_ISA_EXT_AMX_BF16,
	ZYDIS_ISA_EXT_AMX_INT8,
	ZYDIS_ISA_EXT_AMX_TILE,
	ZYDIS_ISA_EXT_CET,
	ZYDIS_ISA_EXT_ENQCMD,
	ZYDIS_ISA_EXT_HRESET,
	ZYDIS_ISA_EXT_KEYLOCKER,
	ZYDIS_ISA_EXT_KEYLOCKER_WIDE,
	ZYDIS_ISA_EXT_KNC,
	ZYDIS_ISA_EXT_KNCE,
	ZYDIS_ISA_EXT_KNCV,
	ZYDIS_ISA_EXT_MPX,
	ZYDIS_ISA_EXT_PADLOCK,
	ZYDIS_ISA_EXT_PCONFIG,
	ZYDIS_ISA_EXT_PT,
	ZYDIS_ISA_EXT_RTM,
	ZYDIS_ISA_EXT_SGX,
	ZYDIS_ISA_EXT_SGX_ENCLV,
	ZYDIS_ISA_EXT_SMX,
	ZYDIS_ISA_EXT_SNP,
	ZYDIS_ISA_EXT_SVM,
	ZYDIS_ISA_EXT_TDX,
	ZYDIS_ISA_EXT_TSX_LDTRK,
	ZYDIS_ISA_EXT_UINTR,
	ZYDIS_ISA_EXT_VMFUNC,
	ZYDIS_ISA_EXT_VTX,
	ZYDIS_ISA_EXT_MCOMMIT,
	ZYDIS_ISA_EXT_XOP,
	ZYDIS_ISA_EXT_PKU,
	ZYDIS_ISA_EXT_WAITPKG,
};

/* Leave their memory image with the FPU's last instruction and data pointers, which are the host's under a translator,
 * or load it. */
static const ZydisMnemonic images[] = {
	ZYDIS_MNEMONIC_FNSTENV,
	ZYDIS_MNEMONIC_FNSAVE,
	ZYDIS_MNEMONIC_FLDENV,
	ZYDIS_MNEMONIC_FRSTOR,
	ZYDIS_MNEMONIC_FXSAVE,
	ZYDIS_MNEMONIC_FXSAVE64,
	ZYDIS_MNEMONIC_FXRSTOR,
	ZYDIS_MNEMONIC_FXRSTOR64,
	ZYDIS_MNEMONIC_XSAVE,
	ZYDIS_MNEMONIC_XSAVE64,
	ZYDIS_MNEMONIC_XSAVEC,
	ZYDIS_MNEMONIC_XSAVEC64,
	ZYDIS_MNEMONIC_XSAVEOPT,
	ZYDIS_MNEMONIC_XSAVEOPT64,
	ZYDIS_MNEMONIC_XRSTOR,
	ZYDIS_MNEMONIC_XRSTOR64,
};

/* Ring 0 instructions that are asked to raise their exception at ring 3. The others of their kind are dropped. */
static const ZydisMnemonic privileged[] = {
	ZYDIS_MNEMONIC_HLT,
	ZYDIS_MNEMONIC_CLI,
	ZYDIS_MNEMONIC_STI,
	ZYDIS_MNEMONIC_CLTS,
	ZYDIS_MNEMONIC_IN,
	ZYDIS_MNEMONIC_OUT,
	ZYDIS_MNEMONIC_INSB,
	ZYDIS_MNEMONIC_INSW,
	ZYDIS_MNEMONIC_INSD,
	ZYDIS_MNEMONIC_OUTSB,
	ZYDIS_MNEMONIC_OUTSW,
	ZYDIS_MNEMONIC_OUTSD,
	ZYDIS_MNEMONIC_RDMSR,
	ZYDIS_MNEMONIC_WRMSR,
	ZYDIS_MNEMONIC_LGDT,
	ZYDIS_MNEMONIC_LIDT,
	ZYDIS_MNEMONIC_LLDT,
	ZYDIS_MNEMONIC_LTR,
	ZYDIS_MNEMONIC_LMSW,
	ZYDIS_MNEMONIC_INVLPG,
	ZYDIS_MNEMONIC_INVD,
	ZYDIS_MNEMONIC_WBINVD,
	ZYDIS_MNEMONIC_SWAPGS,
	ZYDIS_MNEMONIC_SYSRET,
	ZYDIS_MNEMONIC_XSETBV,
	ZYDIS_MNEMONIC_INVPCID,
};

const ZydisDecoder *form_decoder(void)
{
	static ZydisDecoder decoder;
	static bool ready;

	if (!ready) {
		unsigned a, b = 0, c = 0, d = 0;

		ZydisDecoderInit(&decoder, ZYDIS_MACHINE_MODE_LONG_64, ZYDIS_STACK_WIDTH_64);
		/* Near branches with an operand size prefix: AMD truncates, Intel ignores the prefix. */
		__get_cpuid(0, &a, &b, &c, &d);
		ZydisDecoderEnableMode(&decoder, ZYDIS_DECODER_MODE_AMD_BRANCHES, c == signature_AMD_ecx);
		ready = true;
	}
	return &decoder;
}

static uint64_t mix(uint64_t hash, uint64_t value)
{
	hash = (hash ^ value) * 0x9e3779b97f4a7c15ull;
	return hash ^ hash >> 29;
}

static bool opcode_register(const ZydisDecodedInstruction *insn, const ZydisDecodedOperand *ops)
{
	for (unsigned i = 0; i < insn->operand_count; i++)
		if (ops[i].encoding == ZYDIS_OPERAND_ENCODING_OPCODE)
			return true;
	return false;
}

#define KEY_ATTRIBUTES (ZYDIS_ATTRIB_HAS_LOCK | ZYDIS_ATTRIB_HAS_REP | ZYDIS_ATTRIB_HAS_REPE | ZYDIS_ATTRIB_HAS_REPNE)

uint64_t form_key(const ZydisDecodedInstruction *insn, const ZydisDecodedOperand *ops)
{
	uint64_t h = mix(0, insn->mnemonic);

	bool branch = insn->meta.branch_type != ZYDIS_BRANCH_TYPE_NONE || insn->meta.category == ZYDIS_CATEGORY_RET;

	h = mix(h, insn->encoding << 16 | insn->opcode_map << 8 | (branch ? insn->operand_width : 0));
	h = mix(h, opcode_register(insn, ops) ? insn->opcode & ~7 : insn->opcode);
	h = mix(h, insn->attributes & KEY_ATTRIBUTES);
	h = mix(h, insn->avx.vector_length << 16 | insn->avx.mask.mode << 8 | insn->avx.broadcast.mode);
	h = mix(h, (insn->avx.rounding.mode != 0) << 1 | insn->avx.has_sae);
	for (unsigned i = 0; i < insn->operand_count; i++) {
		const ZydisDecodedOperand *o = &ops[i];

		h = mix(h, o->type << 24 | o->visibility << 16 | o->encoding << 8 | o->actions);
		if (o->encoding == ZYDIS_OPERAND_ENCODING_MASK)
			continue;
		h = mix(h, o->size);
		if (o->type == ZYDIS_OPERAND_TYPE_REGISTER)
			h = mix(h, o->encoding == ZYDIS_OPERAND_ENCODING_NONE
					   ? (unsigned)o->reg.value
					   : 1000u + ZydisRegisterGetClass(o->reg.value));
		else if (o->type == ZYDIS_OPERAND_TYPE_MEMORY)
			h = mix(h,
				o->mem.type << 1 | (o->mem.type == ZYDIS_MEMOP_TYPE_VSIB &&
							   ZydisRegisterGetClass(o->mem.index) == ZYDIS_REGCLASS_XMM));
	}
	return h;
}

/* One line for people, also what --form searches: "vaddps zmm{k},zmm,m32{1to16} evex.1.58". */
static void form_name(struct form *f, const ZydisDecodedInstruction *insn, const ZydisDecodedOperand *ops)
{
	static const char *const encodings[] = {"", "vex.", "evex."};
	const char *lock = insn->attributes & ZYDIS_ATTRIB_HAS_LOCK ? "lock " : "";
	const char *rep = insn->attributes & ZYDIS_ATTRIB_HAS_REPNE			      ? "repne "
			  : insn->attributes & (ZYDIS_ATTRIB_HAS_REP | ZYDIS_ATTRIB_HAS_REPE) ? "rep "
											      : "";
	size_t n = snprintf(f->name, sizeof(f->name), "%s%s%s", lock, rep, ZydisMnemonicGetString(insn->mnemonic));
	const char *comma = " ";

	for (unsigned i = 0; i < insn->operand_count && n < sizeof(f->name) - 40; i++) {
		const ZydisDecodedOperand *o = &ops[i];

		if (o->encoding == ZYDIS_OPERAND_ENCODING_MASK && insn->encoding == ZYDIS_INSTRUCTION_ENCODING_EVEX) {
			if (f->aaa)
				n += snprintf(f->name + n, sizeof(f->name) - n, f->z ? "{k}{z}" : "{k}");
			continue;
		}
		if (o->visibility == ZYDIS_OPERAND_VISIBILITY_HIDDEN)
			continue;
		n += snprintf(f->name + n, sizeof(f->name) - n, "%s", comma);
		comma = ",";
		switch (o->type) {
		case ZYDIS_OPERAND_TYPE_REGISTER: {
			static const char *const classes[] = {[ZYDIS_REGCLASS_GPR8] = "r8",
				[ZYDIS_REGCLASS_GPR16] = "r16",
				[ZYDIS_REGCLASS_GPR32] = "r32",
				[ZYDIS_REGCLASS_GPR64] = "r64",
				[ZYDIS_REGCLASS_X87] = "st",
				[ZYDIS_REGCLASS_MMX] = "mm",
				[ZYDIS_REGCLASS_XMM] = "xmm",
				[ZYDIS_REGCLASS_YMM] = "ymm",
				[ZYDIS_REGCLASS_ZMM] = "zmm",
				[ZYDIS_REGCLASS_MASK] = "k"};
			unsigned class = ZydisRegisterGetClass(o->reg.value);
			bool fixed = o->encoding == ZYDIS_OPERAND_ENCODING_NONE;

			n += snprintf(f->name + n, sizeof(f->name) - n, "%s",
				!fixed && class < ARRAY_SIZE(classes) && classes[class]
					? classes[class]
					: ZydisRegisterGetString(o->reg.value));
			break;
		}
		case ZYDIS_OPERAND_TYPE_MEMORY:
			n += snprintf(f->name + n, sizeof(f->name) - n, "%s%u",
				o->mem.type == ZYDIS_MEMOP_TYPE_VSIB ? "vm" : "m", o->size);
			break;
		case ZYDIS_OPERAND_TYPE_IMMEDIATE:
			n += snprintf(f->name + n, sizeof(f->name) - n, "%s%u", o->imm.is_relative ? "rel" : "imm",
				insn->raw.imm[0].size);
			break;
		default:
			break;
		}
	}
	snprintf(f->name + n, sizeof(f->name) - n, "%s%s%s %s%u.%02x%s", insn->avx.broadcast.mode && f->b ? "{b}" : "",
		insn->avx.rounding.mode ? "{er}" : "", insn->avx.has_sae ? "{sae}" : "", encodings[f->encoding], f->map,
		f->opcode, f->prefix_67 ? " a32" : "");
}

static bool in_list(const ZydisMnemonic *list, size_t n, ZydisMnemonic mnemonic)
{
	for (size_t i = 0; i < n; i++)
		if (list[i] == mnemonic)
			return true;
	return false;
}

static bool touches_system_register(const ZydisDecodedInstruction *insn, const ZydisDecodedOperand *ops)
{
	for (unsigned i = 0; i < insn->operand_count; i++) {
		ZydisRegisterClass class = ops[i].type == ZYDIS_OPERAND_TYPE_REGISTER
						   ? ZydisRegisterGetClass(ops[i].reg.value)
						   : ZYDIS_REGCLASS_INVALID;

		if (class == ZYDIS_REGCLASS_SEGMENT || class == ZYDIS_REGCLASS_TEST || class == ZYDIS_REGCLASS_BOUND ||
			class == ZYDIS_REGCLASS_TMM)
			return true;
	}
	return false;
}

static bool is_excluded(struct form *f, const ZydisDecodedInstruction *insn, const ZydisDecodedOperand *ops)
{
	for (unsigned i = 0; i < ARRAY_SIZE(excluded_sets); i++)
		if (insn->meta.isa_ext == excluded_sets[i])
			return true;
	if (in_list(excluded, ARRAY_SIZE(excluded), insn->mnemonic) || touches_system_register(insn, ops) ||
		insn->meta.branch_type == ZYDIS_BRANCH_TYPE_FAR)
		return true;
	f->control_flow = insn->meta.branch_type != ZYDIS_BRANCH_TYPE_NONE || insn->meta.category == ZYDIS_CATEGORY_RET;
	if (f->control_flow && insn->operand_width == 16)
		return true; /* vendors disagree, nobody uses it */
	f->privileged = insn->attributes & ZYDIS_ATTRIB_IS_PRIVILEGED ||
			in_list(privileged, ARRAY_SIZE(privileged), insn->mnemonic);
	if ((f->privileged && !in_list(privileged, ARRAY_SIZE(privileged), insn->mnemonic)) &&
		insn->mnemonic != ZYDIS_MNEMONIC_MOV)
		return true;
	return false;
}

struct enumeration {
	struct forms *forms;
	const struct isa_source *source;
	size_t room, table_size;
	uint64_t *table; /* keys seen, open addressing */
};

static bool seen_before(struct enumeration *e, uint64_t key)
{
	size_t at = key & (e->table_size - 1);

	while (e->table[at] && e->table[at] != key)
		at = (at + 1) & (e->table_size - 1);
	if (e->table[at])
		return true;
	e->table[at] = key;
	return false;
}

static void classify(struct form *f, const ZydisDecodedInstruction *insn, const ZydisDecodedOperand *ops)
{
	f->mnemonic = insn->mnemonic;
	f->isa_set = insn->meta.isa_set;
	f->has_modrm = insn->attributes & ZYDIS_ATTRIB_HAS_MODRM;
	f->opcode_free = opcode_register(insn, ops);
	f->image = in_list(images, ARRAY_SIZE(images), f->mnemonic);
	f->popf = f->mnemonic == ZYDIS_MNEMONIC_POPF || f->mnemonic == ZYDIS_MNEMONIC_POPFQ;
	f->general = insn->meta.isa_ext == ZYDIS_ISA_EXT_BASE || insn->meta.isa_ext == ZYDIS_ISA_EXT_LONGMODE;
	f->may_lock = insn->attributes & ZYDIS_ATTRIB_ACCEPTS_LOCK;
	for (unsigned i = 0; i < insn->operand_count; i++) {
		f->reg_free |= ops[i].encoding == ZYDIS_OPERAND_ENCODING_MODRM_REG;
		f->rm_free |= ops[i].encoding == ZYDIS_OPERAND_ENCODING_MODRM_RM;
		f->rm_general |= ops[i].encoding == ZYDIS_OPERAND_ENCODING_MODRM_RM &&
				 ops[i].type == ZYDIS_OPERAND_TYPE_REGISTER &&
				 ops[i].reg.value >= ZYDIS_REGISTER_AL && ops[i].reg.value <= ZYDIS_REGISTER_R15;
		f->vvvv_free |= ops[i].encoding == ZYDIS_OPERAND_ENCODING_NDSNDD;
	}
}

/* Decodes bytes and, if they are a new form that is wanted, keeps template as its representative. */
static int consider(
	struct enumeration *e, const struct form *template, const uint8_t *bytes, size_t n, struct error *err)
{
	ZydisDecodedInstruction insn;
	ZydisDecodedOperand ops[ZYDIS_MAX_OPERAND_COUNT];
	struct forms *forms = e->forms;
	struct form f = *template;

	if (!ZYAN_SUCCESS(ZydisDecoderDecodeFull(form_decoder(), bytes, n, &insn, ops)))
		return 0;
	f.key = form_key(&insn, ops);
	if (seen_before(e, f.key))
		return 0;
	classify(&f, &insn, ops);
	if (is_excluded(&f, &insn, ops) ||
		(e->source->fewer_components && insn.meta.isa_ext >= ZYDIS_ISA_EXT_XSAVE &&
			insn.meta.isa_ext <= ZYDIS_ISA_EXT_XSAVES)) {
		forms->dropped_excluded++;
		return 0;
	}
	if (isa_offered(e->source, f.isa_set) == 0) {
		forms->dropped_isa++;
		return 0;
	}
	form_name(&f, &insn, ops);
	if (forms->count == e->room) {
		size_t room = e->room ? e->room * 2 : 4096;
		struct form *list = realloc(forms->list, room * sizeof(*list));

		if (!list)
			return error_set(err, ENOMEM, "no memory for %zu instruction forms", room);
		forms->list = list;
		e->room = room;
	}
	forms->list[forms->count++] = f;
	if (forms->count * 2 > e->table_size)
		return error_set(
			err, E2BIG, "more than %zu instruction forms: enlarge the table in forms.c", forms->count);
	return 0;
}

static int walk_modrm(struct enumeration *e, struct form *f, uint8_t *bytes, size_t at, struct error *err)
{
	for (unsigned modrm = 0; modrm < 256; modrm++) {
		/* Memory: mod 0 with a SIB byte, base rax, index rcx, does for all (vector indices need one). */
		if (modrm < 0xc0 && ((modrm >> 6) != 0 || (modrm & 7) != 4))
			continue;
		bytes[at] = modrm;
		bytes[at + 1] = modrm < 0xc0 ? 0x08 : 0;
		f->mod = modrm >> 6;
		f->reg = modrm >> 3 & 7;
		f->rm = modrm & 7;
		/* Opcode extensions in rm exist in legacy maps 0 and 1 only. */
		if (f->mod == 3 && f->rm > 1 && (f->encoding != FORM_LEGACY || f->map > 1))
			continue;
		int ret = consider(e, f, bytes, at + 12, err);

		if (ret)
			return ret;
	}
	return 0;
}

static int walk_legacy(struct enumeration *e, struct error *err)
{
	static const uint8_t reps[] = {0, 0xf2, 0xf3};

	/* bits: 0 operand size, 1 and 2 repetition, 3 REX.W, 4 lock, 5 address size; the plainest comes first */
	for (unsigned variant = 0; variant < 64; variant++) {
		struct form f = {.encoding = FORM_LEGACY,
			.prefix_66 = variant & 1,
			.w = variant >> 3 & 1,
			.prefix_lock = variant >> 4 & 1,
			.prefix_67 = variant >> 5};

		if ((variant >> 1 & 3) == 3)
			continue;
		f.prefix_rep = reps[variant >> 1 & 3];
		for (unsigned op = 0; op < 4 * 256; op++) {
			uint8_t bytes[32] = {0};
			size_t n = 0;

			f.map = op >> 8;
			f.opcode = op;
			if (f.prefix_66)
				bytes[n++] = 0x66;
			if (f.prefix_rep)
				bytes[n++] = f.prefix_rep;
			if (f.prefix_67)
				bytes[n++] = 0x67;
			if (f.prefix_lock)
				bytes[n++] = 0xf0;
			if (f.w)
				bytes[n++] = 0x48;
			if (f.map)
				bytes[n++] = 0x0f;
			if (f.map > 1)
				bytes[n++] = f.map == 2 ? 0x38 : 0x3a;
			/* prefixes and escapes are no opcodes */
			if (f.map == 0 && (op == 0x0f || op == 0x62 || op == 0xc4 || op == 0xc5 || op == 0x8f + 256 ||
						  (op & 0xf0) == 0x40 || op == 0x66 || op == 0x67 || op == 0xf0 ||
						  op == 0xf2 || op == 0xf3 || op == 0x26 || op == 0x2e || op == 0x36 ||
						  op == 0x3e || op == 0x64 || op == 0x65))
				continue;
			if (f.map == 1 && (f.opcode == 0x38 || f.opcode == 0x3a))
				continue;
			bytes[n++] = f.opcode;
			int ret = walk_modrm(e, &f, bytes, n, err);

			if (ret)
				return ret;
		}
	}
	return 0;
}

static int walk_vex(struct enumeration *e, struct error *err)
{
	for (unsigned i = 0; i < 3 * 4 * 2 * 2 * 256; i++) {
		struct form f = {.encoding = FORM_VEX,
			.opcode = i,
			.prefix_66 = i >> 8 & 3,
			.ll = i >> 10 & 1,
			.w = i >> 11 & 1,
			.map = 1 + (i >> 12)};

		for (unsigned vvvv = 0; vvvv < 2; vvvv++) {
			uint8_t bytes[32] = {0xc4, 0xe0 | f.map,
				f.w << 7 | (vvvv ? 14 : 15) << 3 | f.ll << 2 | f.prefix_66, f.opcode};
			int ret = walk_modrm(e, &f, bytes, 4, err);

			if (ret)
				return ret;
		}
	}
	return 0;
}

static int walk_evex(struct enumeration *e, struct error *err)
{
	static const uint8_t maps[] = {1, 2, 3, 5, 6};
	static const struct {
		uint8_t z, aaa;
	} masks[] = {{0, 0}, {0, 1}, {1, 1}};

	for (unsigned i = 0; i < ARRAY_SIZE(maps) * 256 * 4 * 4 * 2 * 2 * 3; i++) {
		unsigned rest = i / 256;
		struct form f = {.encoding = FORM_EVEX, .opcode = i};

		f.prefix_66 = rest & 3;
		f.ll = rest >> 2 & 3;
		f.w = rest >> 4 & 1;
		f.b = rest >> 5 & 1;
		f.z = masks[(rest >> 6) % 3].z;
		f.aaa = masks[(rest >> 6) % 3].aaa;
		f.map = maps[(rest >> 6) / 3];
		for (unsigned vvvv = 0; vvvv < 2; vvvv++) {
			uint8_t bytes[32] = {0x62, 0xf0 | f.map, f.w << 7 | (vvvv ? 14 : 15) << 3 | 4 | f.prefix_66,
				f.z << 7 | f.ll << 5 | f.b << 4 | 8 | f.aaa, f.opcode};
			int ret = walk_modrm(e, &f, bytes, 5, err);

			if (ret)
				return ret;
		}
	}
	return 0;
}

int forms_enumerate(struct forms *forms, const struct isa_source *source, struct error *err)
{
	struct enumeration e = {.forms = forms, .source = source, .table_size = 1 << 17};
	scope_free uint64_t *table = calloc(e.table_size, sizeof(*table));
	int ret;

	if (!table)
		return error_set(err, ENOMEM, "no memory for the table of forms");
	e.table = table;
	*forms = (struct forms){0};
	ret = walk_legacy(&e, err);
	if (!ret)
		ret = walk_vex(&e, err);
	if (!ret)
		ret = walk_evex(&e, err);
	if (!ret)
		ret = forms_list_general(forms, err);
	if (ret)
		forms_free(forms);
	return ret;
}

int forms_list_general(struct forms *forms, struct error *err)
{
	free(forms->general);
	forms->general_count = 0;
	forms->general = malloc((forms->count + 1) * sizeof(*forms->general));
	if (!forms->general)
		return error_set(err, ENOMEM, "no memory for the list of general-purpose forms");
	for (size_t i = 0; i < forms->count; i++)
		if (forms->list[i].general)
			forms->general[forms->general_count++] = i;
	return 0;
}

void forms_free(struct forms *forms)
{
	free(forms->list);
	free(forms->general);
	*forms = (struct forms){0};
}
