#include "engine/bt/insn.h"

#include <cpuid.h>

#include "engine/bt/bt.h"

#define ALL FLAGS_ARITHMETIC

const ZydisDecoder *insn_decoder(uint32_t mode)
{
	static ZydisDecoder decoders[4];
	static pthread_once_t once = PTHREAD_ONCE_INIT;
	void prepare(void)
	{
		ZydisDecoderInit(&decoders[0], ZYDIS_MACHINE_MODE_LEGACY_16, ZYDIS_STACK_WIDTH_16);
		ZydisDecoderInit(&decoders[1], ZYDIS_MACHINE_MODE_LEGACY_32, ZYDIS_STACK_WIDTH_32);
		ZydisDecoderInit(&decoders[2], ZYDIS_MACHINE_MODE_LONG_64, ZYDIS_STACK_WIDTH_64);
		/* In 64-bit mode AMD's near branches take an operand-size prefix (APM volume 3, 1.2.7); Intel's ignore it. */
		ZydisDecoderInit(&decoders[3], ZYDIS_MACHINE_MODE_LONG_64, ZYDIS_STACK_WIDTH_64);
		ZydisDecoderEnableMode(&decoders[3], ZYDIS_DECODER_MODE_AMD_BRANCHES, ZYAN_TRUE);
	}
	unsigned code = (mode & BT_MODE_CODE) >> 2;

	pthread_once(&once, prepare);
	return &decoders[code == 2 && (mode & BT_MODE_AMD) ? 3 : code];
}

/* SDM volume 2, table 2-3: with ModRM.mod 0, a SIB base of 5 means no base but a disp32, whatever REX.B says. Zydis 4.0
 * takes r13d for the base there when the address size is 32 bits. */
static void mend_base(struct bt_decoded *d)
{
	const ZydisDecodedInstruction *n = &d->insn;

	if (!(n->attributes & ZYDIS_ATTRIB_HAS_SIB) || n->raw.modrm.mod != 0 || n->raw.sib.base != 5 || n->address_width == 16)
		return;
	for (unsigned k = 0; k < n->operand_count; k++) {
		ZydisDecodedOperand *op = &d->operands[k];

		if (op->type == ZYDIS_OPERAND_TYPE_MEMORY && op->visibility == ZYDIS_OPERAND_VISIBILITY_EXPLICIT) {
			op->mem.base = ZYDIS_REGISTER_NONE;
			op->mem.disp.has_displacement = ZYAN_TRUE;
			op->mem.disp.value = n->raw.disp.value;
		}
	}
}

bool host_is_amd(void)
{
	static int amd = -1;
	uint32_t a, b, c, d;

	if (amd < 0) {
		__cpuid(0, a, b, c, d);
		amd = b == 0x68747541 || b == 0x6f677948; /* Auth, Hygo */
	}
	return amd;
}

bool insn_is_narrow_branch(const ZydisDecodedInstruction *d, uint32_t mode)
{
	if ((mode & BT_MODE_CODE) != BT_MODE_CODE64 || !(mode & BT_MODE_AMD) || d->raw.rex.W)
		return false;
	for (unsigned k = 0; k < d->raw.prefix_count; k++)
		if (d->raw.prefixes[k].value == 0x66)
			return true;
	return false;
}

/* UD0 and UD1 have no ModRM byte on AMD: at a page's end they do not reach for the next page. */
static bool is_short_ud(const uint8_t *bytes, unsigned n)
{
	unsigned at = 0;

	while (at < n && (bytes[at] == 0x66 || bytes[at] == 0x67 || (bytes[at] & 0xe7) == 0x26 || (bytes[at] & 0xfe) == 0x64 ||
		bytes[at] == 0xf0 || (bytes[at] & 0xfe) == 0xf2 || (bytes[at] & 0xf0) == 0x40))
		at++;
	return host_is_amd() && at + 2 <= n && bytes[at] == 0x0f && (bytes[at + 1] == 0xb9 || bytes[at + 1] == 0xff);
}

bool insn_decode(struct insn *i, uint32_t mode, const uint8_t *bytes, unsigned n, bool *more)
{
	const ZydisDecoder *decoder = insn_decoder(mode);
	ZydisDecoderContext context;
	ZyanStatus status;

	*more = false;
	status = ZydisDecoderDecodeInstruction(decoder, &context, bytes, min(n, 15u), &i->d.insn);
	if (!ZYAN_SUCCESS(status)) {
		*more = status == ZYDIS_STATUS_NO_MORE_DATA && n < 15 && !is_short_ud(bytes, n);
		i->too_long = status == ZYDIS_STATUS_INSTRUCTION_TOO_LONG || (status == ZYDIS_STATUS_NO_MORE_DATA && n >= 15);
		i->too_long = i->too_long && !is_short_ud(bytes, min(n, 15u));
		return false;
	}
	ZydisDecoderDecodeOperands(decoder, &context, &i->d.insn, i->d.operands, i->d.insn.operand_count);
	mend_base(&i->d);
	memcpy(i->bytes, bytes, i->d.insn.length);
	return true;
}

/* A shift or rotation whose count may be zero leaves the flags as they are. */
static bool is_shift(ZydisMnemonic m)
{
	switch (m) {
	case ZYDIS_MNEMONIC_SHL:
	case ZYDIS_MNEMONIC_SHR:
	case ZYDIS_MNEMONIC_SAR:
	case ZYDIS_MNEMONIC_ROL:
	case ZYDIS_MNEMONIC_ROR:
	case ZYDIS_MNEMONIC_RCL:
	case ZYDIS_MNEMONIC_RCR:
	case ZYDIS_MNEMONIC_SHLD:
	case ZYDIS_MNEMONIC_SHRD:
	case ZYDIS_MNEMONIC_SALC:
		return true;
	default:
		return false;
	}
}

static void insn_flags(const ZydisDecodedInstruction *d, uint32_t *tested, uint32_t *killed, uint32_t *touched)
{
	const ZydisAccessedFlags *f = d->cpu_flags;

	*tested = *killed = *touched = 0;
	if (!f)
		return;
	*tested = f->tested & ALL;
	*touched = (f->modified | f->set_0 | f->set_1 | f->undefined) & ALL;
	*killed = is_shift(d->mnemonic) ? 0 : *touched;
	if (d->attributes & (ZYDIS_ATTRIB_HAS_REP | ZYDIS_ATTRIB_HAS_REPE | ZYDIS_ATTRIB_HAS_REPNE))
		*killed = 0; /* no repetition, no flags */
	/* Undefined flags count as overwritten, or AF would be live everywhere; these two leave theirs alone on many CPUs and
	 * programs have come to rely on it. */
	if (d->mnemonic == ZYDIS_MNEMONIC_BSF || d->mnemonic == ZYDIS_MNEMONIC_BSR)
		*killed = 0;
}

bool insn_moves_state(ZydisMnemonic m)
{
	switch (m) {
	case ZYDIS_MNEMONIC_FXSAVE:
	case ZYDIS_MNEMONIC_FXSAVE64:
	case ZYDIS_MNEMONIC_FXRSTOR:
	case ZYDIS_MNEMONIC_FXRSTOR64:
	case ZYDIS_MNEMONIC_XSAVE:
	case ZYDIS_MNEMONIC_XSAVE64:
	case ZYDIS_MNEMONIC_XSAVEC:
	case ZYDIS_MNEMONIC_XSAVEC64:
	case ZYDIS_MNEMONIC_XSAVEOPT:
	case ZYDIS_MNEMONIC_XSAVEOPT64:
	case ZYDIS_MNEMONIC_XSAVES:
	case ZYDIS_MNEMONIC_XSAVES64:
	case ZYDIS_MNEMONIC_XRSTOR:
	case ZYDIS_MNEMONIC_XRSTOR64:
	case ZYDIS_MNEMONIC_XRSTORS:
	case ZYDIS_MNEMONIC_XRSTORS64:
		return true;
	default:
		return false;
	}
}

static enum insn_kind kind_by_mnemonic(const ZydisDecodedInstruction *d, uint32_t mode)
{
	bool code64 = (mode & BT_MODE_CODE) == BT_MODE_CODE64;

	if (insn_moves_state(d->mnemonic))
		return INSN_SLOW;
	switch (d->mnemonic) {
	case ZYDIS_MNEMONIC_LEA:
		return INSN_LEA;
	case ZYDIS_MNEMONIC_PUSH:
		return INSN_PUSH;
	case ZYDIS_MNEMONIC_POP:
		return INSN_POP;
	case ZYDIS_MNEMONIC_LEAVE:
		return d->operand_width == (code64 ? 64 : 32) ? INSN_LEAVE : INSN_SLOW;
	case ZYDIS_MNEMONIC_CALL:
		return d->meta.branch_type == ZYDIS_BRANCH_TYPE_FAR ? INSN_SYSTEM : INSN_CALL;
	case ZYDIS_MNEMONIC_RET:
		return d->meta.branch_type == ZYDIS_BRANCH_TYPE_FAR ? INSN_SYSTEM : INSN_RET;
	case ZYDIS_MNEMONIC_JMP:
		return d->meta.branch_type == ZYDIS_BRANCH_TYPE_FAR ? INSN_SYSTEM : INSN_JUMP;
	case ZYDIS_MNEMONIC_JO:
	case ZYDIS_MNEMONIC_JNO:
	case ZYDIS_MNEMONIC_JB:
	case ZYDIS_MNEMONIC_JNB:
	case ZYDIS_MNEMONIC_JZ:
	case ZYDIS_MNEMONIC_JNZ:
	case ZYDIS_MNEMONIC_JBE:
	case ZYDIS_MNEMONIC_JNBE:
	case ZYDIS_MNEMONIC_JS:
	case ZYDIS_MNEMONIC_JNS:
	case ZYDIS_MNEMONIC_JP:
	case ZYDIS_MNEMONIC_JNP:
	case ZYDIS_MNEMONIC_JL:
	case ZYDIS_MNEMONIC_JNL:
	case ZYDIS_MNEMONIC_JLE:
	case ZYDIS_MNEMONIC_JNLE:
		return INSN_JCC;
	case ZYDIS_MNEMONIC_LOOP:
	case ZYDIS_MNEMONIC_LOOPE:
	case ZYDIS_MNEMONIC_LOOPNE:
	case ZYDIS_MNEMONIC_JCXZ:
	case ZYDIS_MNEMONIC_JECXZ:
	case ZYDIS_MNEMONIC_JRCXZ:
		return INSN_LOOP;
	case ZYDIS_MNEMONIC_CLD:
		return INSN_CLD;
	case ZYDIS_MNEMONIC_STD:
		return INSN_STD;
	case ZYDIS_MNEMONIC_BT:
	case ZYDIS_MNEMONIC_BTS:
	case ZYDIS_MNEMONIC_BTR:
	case ZYDIS_MNEMONIC_BTC:
		return INSN_BITS;
	case ZYDIS_MNEMONIC_CLI:
		return (mode & BT_MODE_SET) == BT_SET_USER ? INSN_SYSTEM : INSN_CLI;
	case ZYDIS_MNEMONIC_STI:
		return (mode & BT_MODE_SET) == BT_SET_USER ? INSN_SYSTEM : INSN_STI;
	case ZYDIS_MNEMONIC_SWAPGS:
		return (mode & BT_MODE_SET) == BT_SET_USER ? INSN_SYSTEM : INSN_SWAPGS;
	case ZYDIS_MNEMONIC_NOP:
		/* 0f 0d, prefetch of a register, is undefined on AMD and a nop on Intel. */
		return d->opcode == 0x0d && d->raw.modrm.mod == 3 && mode & BT_MODE_AMD ? INSN_SYSTEM : INSN_NOTHING;
	case ZYDIS_MNEMONIC_ENDBR32:
	case ZYDIS_MNEMONIC_ENDBR64:
	case ZYDIS_MNEMONIC_PREFETCH:
	case ZYDIS_MNEMONIC_PREFETCHNTA:
	case ZYDIS_MNEMONIC_PREFETCHT0:
	case ZYDIS_MNEMONIC_PREFETCHT1:
	case ZYDIS_MNEMONIC_PREFETCHT2:
	case ZYDIS_MNEMONIC_PREFETCHW:
	case ZYDIS_MNEMONIC_PREFETCHWT1:
	case ZYDIS_MNEMONIC_CLDEMOTE:
		return INSN_NOTHING;
	case ZYDIS_MNEMONIC_LGDT: /* Zydis does not call all of these privileged */
	case ZYDIS_MNEMONIC_LIDT:
	case ZYDIS_MNEMONIC_LLDT:
	case ZYDIS_MNEMONIC_LTR:
	case ZYDIS_MNEMONIC_LMSW:
	case ZYDIS_MNEMONIC_CLTS:
	case ZYDIS_MNEMONIC_HLT:
	case ZYDIS_MNEMONIC_INVD:
	case ZYDIS_MNEMONIC_WBINVD:
	case ZYDIS_MNEMONIC_INVLPG:
	case ZYDIS_MNEMONIC_INVPCID:
	case ZYDIS_MNEMONIC_RDMSR:
	case ZYDIS_MNEMONIC_WRMSR:
	case ZYDIS_MNEMONIC_SYSRET:
	case ZYDIS_MNEMONIC_SYSEXIT:
	case ZYDIS_MNEMONIC_XSETBV:
	case ZYDIS_MNEMONIC_CPUID:
	case ZYDIS_MNEMONIC_LAR:
	case ZYDIS_MNEMONIC_LSL:
	case ZYDIS_MNEMONIC_VERR:
	case ZYDIS_MNEMONIC_VERW:
	case ZYDIS_MNEMONIC_SGDT:
	case ZYDIS_MNEMONIC_SIDT:
	case ZYDIS_MNEMONIC_SLDT:
	case ZYDIS_MNEMONIC_STR:
	case ZYDIS_MNEMONIC_SMSW:
	case ZYDIS_MNEMONIC_IN:
	case ZYDIS_MNEMONIC_OUT:
	case ZYDIS_MNEMONIC_INSB:
	case ZYDIS_MNEMONIC_INSW:
	case ZYDIS_MNEMONIC_INSD:
	case ZYDIS_MNEMONIC_OUTSB:
	case ZYDIS_MNEMONIC_OUTSW:
	case ZYDIS_MNEMONIC_OUTSD:
	case ZYDIS_MNEMONIC_RDTSC:
	case ZYDIS_MNEMONIC_RDTSCP:
	case ZYDIS_MNEMONIC_RDPMC:
	case ZYDIS_MNEMONIC_RDPID:
	case ZYDIS_MNEMONIC_SYSCALL:
	case ZYDIS_MNEMONIC_SYSENTER:
	case ZYDIS_MNEMONIC_IRET:
	case ZYDIS_MNEMONIC_IRETD:
	case ZYDIS_MNEMONIC_IRETQ:
	case ZYDIS_MNEMONIC_INT:
	case ZYDIS_MNEMONIC_INT3:
	case ZYDIS_MNEMONIC_INT1:
	case ZYDIS_MNEMONIC_INTO:
	case ZYDIS_MNEMONIC_LDS:
	case ZYDIS_MNEMONIC_LES:
	case ZYDIS_MNEMONIC_LFS:
	case ZYDIS_MNEMONIC_LGS:
	case ZYDIS_MNEMONIC_LSS:
	case ZYDIS_MNEMONIC_RDFSBASE:
	case ZYDIS_MNEMONIC_RDGSBASE:
	case ZYDIS_MNEMONIC_WRFSBASE:
	case ZYDIS_MNEMONIC_WRGSBASE:
	case ZYDIS_MNEMONIC_PUSHF:
	case ZYDIS_MNEMONIC_PUSHFD:
	case ZYDIS_MNEMONIC_PUSHFQ:
	case ZYDIS_MNEMONIC_POPF:
	case ZYDIS_MNEMONIC_POPFD:
	case ZYDIS_MNEMONIC_POPFQ:
	case ZYDIS_MNEMONIC_STAC:
	case ZYDIS_MNEMONIC_CLAC:
	case ZYDIS_MNEMONIC_XGETBV:
	case ZYDIS_MNEMONIC_MONITOR:
	case ZYDIS_MNEMONIC_MWAIT:
	case ZYDIS_MNEMONIC_MONITORX:
	case ZYDIS_MNEMONIC_MWAITX:
	case ZYDIS_MNEMONIC_CLFLUSH:
	case ZYDIS_MNEMONIC_CLFLUSHOPT:
	case ZYDIS_MNEMONIC_CLWB:
	case ZYDIS_MNEMONIC_CLZERO:
	case ZYDIS_MNEMONIC_UD0:
	case ZYDIS_MNEMONIC_UD1:
	case ZYDIS_MNEMONIC_UD2:
	case ZYDIS_MNEMONIC_VMCALL:
	case ZYDIS_MNEMONIC_VMMCALL:
	case ZYDIS_MNEMONIC_VMFUNC:
	case ZYDIS_MNEMONIC_XBEGIN:
	case ZYDIS_MNEMONIC_XEND:
	case ZYDIS_MNEMONIC_XABORT:
	case ZYDIS_MNEMONIC_XTEST:
	case ZYDIS_MNEMONIC_RDPKRU:
	case ZYDIS_MNEMONIC_WRPKRU:
	case ZYDIS_MNEMONIC_RDPRU:
	case ZYDIS_MNEMONIC_UMONITOR:
	case ZYDIS_MNEMONIC_UMWAIT:
	case ZYDIS_MNEMONIC_TPAUSE:
	case ZYDIS_MNEMONIC_SERIALIZE:
	case ZYDIS_MNEMONIC_ENQCMD:
	case ZYDIS_MNEMONIC_PTWRITE:
	case ZYDIS_MNEMONIC_GETSEC:
	case ZYDIS_MNEMONIC_RSM:
		return INSN_SYSTEM;
	case ZYDIS_MNEMONIC_ENTER:
	case ZYDIS_MNEMONIC_XLAT:
	case ZYDIS_MNEMONIC_PUSHA:
	case ZYDIS_MNEMONIC_PUSHAD:
	case ZYDIS_MNEMONIC_POPA:
	case ZYDIS_MNEMONIC_POPAD:
	case ZYDIS_MNEMONIC_BOUND:
	case ZYDIS_MNEMONIC_ARPL:
	case ZYDIS_MNEMONIC_AAA:
	case ZYDIS_MNEMONIC_AAS:
	case ZYDIS_MNEMONIC_AAM:
	case ZYDIS_MNEMONIC_AAD:
	case ZYDIS_MNEMONIC_DAA:
	case ZYDIS_MNEMONIC_DAS:
	case ZYDIS_MNEMONIC_SALC:
	case ZYDIS_MNEMONIC_FNSTENV:
	case ZYDIS_MNEMONIC_FLDENV:
	case ZYDIS_MNEMONIC_FNSAVE:
	case ZYDIS_MNEMONIC_FRSTOR:
	case ZYDIS_MNEMONIC_MASKMOVQ:
	case ZYDIS_MNEMONIC_MASKMOVDQU:
	case ZYDIS_MNEMONIC_VMASKMOVDQU:
	case ZYDIS_MNEMONIC_MOVDIR64B:
		return INSN_SLOW;
	default:
		break;
	}
	switch (d->meta.category) {
	case ZYDIS_CATEGORY_STRINGOP:
		return INSN_STRING;
	case ZYDIS_CATEGORY_GATHER:
	case ZYDIS_CATEGORY_SCATTER:
		return INSN_SLOW;
	default:
		return d->attributes & ZYDIS_ATTRIB_IS_PRIVILEGED ? INSN_SYSTEM : INSN_PLAIN;
	}
}

bool insn_is_floating(const ZydisDecodedInstruction *d)
{
	switch (d->meta.isa_ext) {
	case ZYDIS_ISA_EXT_X87:
	case ZYDIS_ISA_EXT_MMX:
	case ZYDIS_ISA_EXT_SSE:
	case ZYDIS_ISA_EXT_SSE2:
	case ZYDIS_ISA_EXT_SSE3:
	case ZYDIS_ISA_EXT_SSSE3:
	case ZYDIS_ISA_EXT_SSE4:
	case ZYDIS_ISA_EXT_SSE4A:
	case ZYDIS_ISA_EXT_AES:
	case ZYDIS_ISA_EXT_PCLMULQDQ:
	case ZYDIS_ISA_EXT_SHA:
	case ZYDIS_ISA_EXT_GFNI:
		return true;
	default:
		return (d->encoding == ZYDIS_INSTRUCTION_ENCODING_VEX || d->encoding == ZYDIS_INSTRUCTION_ENCODING_EVEX) &&
			d->meta.isa_ext != ZYDIS_ISA_EXT_BMI1 && d->meta.isa_ext != ZYDIS_ISA_EXT_BMI2;
	}
}

bool insn_waits_for_x87(const struct bt_decoded *d)
{
	switch (d->insn.mnemonic) {
	case ZYDIS_MNEMONIC_FNSAVE:
	case ZYDIS_MNEMONIC_FNSTENV:
	case ZYDIS_MNEMONIC_FNSTCW:
	case ZYDIS_MNEMONIC_FNSTSW: return false;
	default: break;
	}
	for (unsigned k = 0; k < d->insn.operand_count; k++)
		if (d->operands[k].type == ZYDIS_OPERAND_TYPE_REGISTER &&
			ZydisRegisterGetClass(d->operands[k].reg.value) == ZYDIS_REGCLASS_MMX)
			return true;
	return d->insn.meta.isa_ext == ZYDIS_ISA_EXT_X87;
}

void insn_classify(struct insn *i, uint32_t mode)
{
	const ZydisDecodedInstruction *d = &i->d.insn;
	bool code64 = (mode & BT_MODE_CODE) == BT_MODE_CODE64;

	insn_flags(d, &i->tested, &i->killed, &i->touched);
	i->kind = kind_by_mnemonic(d, mode);
	i->memory = NULL;
	i->bits = false;
	for (unsigned k = 0; k < d->operand_count; k++) {
		const ZydisDecodedOperand *op = &i->d.operands[k];

		if (op->type == ZYDIS_OPERAND_TYPE_REGISTER &&
			(ZydisRegisterGetClass(op->reg.value) == ZYDIS_REGCLASS_SEGMENT ||
				ZydisRegisterGetClass(op->reg.value) == ZYDIS_REGCLASS_CONTROL ||
				ZydisRegisterGetClass(op->reg.value) == ZYDIS_REGCLASS_DEBUG) &&
			op->visibility == ZYDIS_OPERAND_VISIBILITY_EXPLICIT)
			i->kind = INSN_SYSTEM;
		if (op->type == ZYDIS_OPERAND_TYPE_REGISTER && op->visibility == ZYDIS_OPERAND_VISIBILITY_IMPLICIT &&
			ZydisRegisterGetClass(op->reg.value) == ZYDIS_REGCLASS_SEGMENT &&
			(i->kind == INSN_PUSH || i->kind == INSN_POP))
			i->kind = INSN_SYSTEM;
		if (op->type != ZYDIS_OPERAND_TYPE_MEMORY)
			continue;
		if (op->mem.type == ZYDIS_MEMOP_TYPE_VSIB)
			i->kind = INSN_SLOW;
		if (op->mem.type == ZYDIS_MEMOP_TYPE_MEM && op->visibility == ZYDIS_OPERAND_VISIBILITY_EXPLICIT)
			i->memory = op;
		else if (op->mem.type == ZYDIS_MEMOP_TYPE_MEM && i->kind == INSN_PLAIN)
			i->kind = INSN_SLOW; /* an implicit one that no other kind covers */
	}
	if (i->kind == INSN_SYSTEM || i->kind == INSN_NOTHING)
		return;
	if (insn_is_floating(d) && ((mode & BT_MODE_NO_FPU) ||
		((mode & BT_MODE_NO_XSAVE) && d->encoding != ZYDIS_INSTRUCTION_ENCODING_LEGACY)))
		i->kind = INSN_SLOW; /* raises #NM or #UD */
	if (i->memory && (i->memory->size == 0 || i->memory->size > 512))
		i->kind = i->kind == INSN_LEA ? INSN_LEA : INSN_SLOW;
	/* Expanding loads and compressing stores touch as many elements as the mask has bits set. */
	if (i->memory && (d->meta.category == ZYDIS_CATEGORY_EXPAND || d->meta.category == ZYDIS_CATEGORY_COMPRESS))
		i->kind = INSN_SLOW;
	if (i->kind == INSN_BITS && (!i->memory || i->d.operands[1].type != ZYDIS_OPERAND_TYPE_REGISTER))
		i->kind = INSN_PLAIN;
	i->bits = i->kind == INSN_BITS;
	if (!code64) {
		/* Limits and rights of FS and GS are checked in address.c, unless there are none. */
		if (i->memory && i->kind != INSN_LEA &&
			((i->memory->mem.segment == ZYDIS_REGISTER_FS && !(mode & BT_MODE_OPEN_FS)) ||
				(i->memory->mem.segment == ZYDIS_REGISTER_GS && !(mode & BT_MODE_OPEN_GS))))
			i->kind = INSN_SLOW;
		/* What 32-bit code does with 16-bit addresses or stack slots is rare enough. */
		if (d->address_width != 32 && (i->memory || i->kind == INSN_LEA || i->kind == INSN_LOOP))
			i->kind = INSN_SLOW;
		if (d->operand_width == 16 &&
			(i->kind == INSN_PUSH || i->kind == INSN_POP || i->kind == INSN_CALL || i->kind == INSN_RET ||
				i->kind == INSN_JUMP || i->kind == INSN_JCC || i->kind == INSN_LOOP))
			i->kind = INSN_SLOW;
	} else if (d->operand_width == 16 && (i->kind == INSN_PUSH || i->kind == INSN_POP || i->kind == INSN_LEAVE)) {
		i->kind = INSN_SLOW;
	} else if (insn_is_narrow_branch(d, mode) &&
		(i->kind == INSN_CALL || i->kind == INSN_RET || i->kind == INSN_JUMP || i->kind == INSN_JCC ||
			i->kind == INSN_LOOP)) {
		i->kind = INSN_SLOW; /* AMD truncates rip there, Intel ignores the prefix */
	}
	if (i->kind == INSN_POP && i->memory)
		i->kind = INSN_SLOW; /* its address is formed after rsp has moved */
	if (i->bits && code64 && d->address_width == 32)
		i->kind = INSN_SLOW; /* the address wraps after the bit number has moved it */
}

uint32_t insn_flags_live(const uint8_t *page, unsigned offset, uint32_t mode)
{
	const ZydisDecoder *decoder = insn_decoder(mode);
	uint32_t open = ALL, live = 0; /* not yet overwritten; read before that */
	ZydisDecodedInstruction d;

	for (int n = 0; n < 8 && open; n++) {
		uint32_t tested, killed, touched;
		enum insn_kind kind;

		if (offset >= BT_PAGE_SIZE ||
			!ZYAN_SUCCESS(ZydisDecoderDecodeInstruction(
				decoder, NULL, page + offset, BT_PAGE_SIZE - offset, &d)))
			return live | open;
		insn_flags(&d, &tested, &killed, &touched);
		live |= tested & open;
		kind = kind_by_mnemonic(&d, mode);
		if (kind != INSN_PLAIN && kind != INSN_NOTHING && kind != INSN_LEA && kind != INSN_PUSH && kind != INSN_POP &&
			kind != INSN_BITS && kind != INSN_LEAVE)
			return live | open;
		open &= ~killed;
		offset += d.length;
	}
	return live | open;
}
