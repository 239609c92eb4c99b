/* What the files of engine `bt` share among themselves: the VM, its code cache, blocks, and who does what.
 *
 *   run.c        the engine's table of functions; the loop: events, find a block, enter it, handle why it came back
 *   translate.c  guest instructions to host code, one block at a time; finding blocks (translation.h is for these four)
 *   emit_insn.c    the host code of one instruction: as it is, re-addressed, or by a template
 *   emit_flow.c    of stack instructions, jumps, calls; the ways out of a block
 *   emit_memory.c  flags, the address of an operand, the TLB check
 *   insn.c       what the translator must know of one instruction: kind, flags read and written, memory operand
 *   cache.c      the code cache: memory, common stubs, blocks by address, linking, invalidation, exclusive sections
 *   tlb.c        page-table walks, software TLB, access to linear memory from C
 *   string.c     string instructions, in bulk
 *   slow.c       one instruction at a time: bounce buffers, page crossings, devices, 16-bit code (slow.h is for these four)
 *   address.c      registers by name, segments, addresses of operands
 *   flow.c         stack and control flow in C, decimal arithmetic
 *   xsave.c        FXSAVE and the XSAVE family
 *   vector.c     memory instructions with per-element masks and addresses: gathers, scatters, masked moves
 *   lockstep.c   a test: blocks against their instructions one by one
 *   signals.c    host faults in translated code become guest exceptions
 *   fpu.c        parking the guest's floating-point and vector state while C code needs the registers
 *   system.c exception.c segment.c control.c port.c msr.c cpuid.c paravirt.c   the privileged architecture (system.h)
 *
 * README.md tells how they work together. */
#pragma once

#include <pthread.h>
#include <stdatomic.h>

#include "base/cleanup.h"
#include "engine/bt/emit.h"
#include "engine/bt/system.h"
#include "engine/bt/vcpu.h"

#define BT_BLOCK_INSNS 48
#define BT_PAGE_SIZE 4096u
#define BT_HASH_BITS 16

struct bt_block;

/* A place in translated code from which it goes back to C, with what C needs to know. */
struct bt_site {
	struct bt_block *block;
	int32_t offset;		      /* of the target or the instruction, from the start of the block's page */
	bool linkable, far_linked, wants_mem;     /* a direct jump; and which of the target's entries it takes */
	uint8_t *patch;		      /* linkable: the rel32 (writable mapping) ... */
	int32_t unlinked;	      /* ... and its value while it leads to its stub */
	struct bt_block *target;      /* linked to, or NULL */
	struct bt_site *next_incoming;
	const struct bt_decoded *decoded; /* for BT_EXIT_SYSTEM */
};

/* One guest instruction of a block: where its host code begins, where it is, and where its flags are when its host
 * instruction faults. */
struct bt_side {
	uint16_t host, guest;
	uint8_t flags_in_host;
};

struct bt_block {
	struct bt_block *next;	      /* in its hash bucket */
	uint64_t phys;		      /* guest physical address of the first byte */
	uint64_t second_page;	      /* gpa of the second page when its only instruction crosses pages, else 0 */
	uint32_t mode;
	uint16_t size, sides;	      /* guest bytes; entries in side */
	uint32_t host_size;
	const uint8_t *entry_mem;     /* takes the flags from v->arith ... */
	const uint8_t *entry_host;    /* ... or in the host's flags */
	struct bt_side *side;
	struct bt_site *incoming;     /* direct jumps linked to this block */
	struct bt_block *page_next[2]; /* in the lists of page_index[0] and [1] */
	uint64_t page_index[2];	      /* equal when there is only one; UINT64_MAX for stubs */
	bool stub;		      /* one instruction over bounce buffers: v->rip is already right */
	bool dead;
};

struct bt_slow_cache; /* slow.c */

struct bt_vm {
	const struct cpu_model *model;
	const struct engine_board *board;
	struct guest_memory *memory;
	unsigned cpus;
	bool stop_on_exception, single, exact_flags;
	unsigned lockstep;
	int trace; /* HOSTEL_BT_TRACE */
	struct bt_vcpu *vcpu[64];

	/* code cache: one memfd, mapped writable and, elsewhere, executable */
	int code_fd;
	uint8_t *code_write, *code_run;
	size_t code_size, code_used, code_stubs; /* up to code_stubs: common stubs, never flushed */
	uint8_t *arena;
	size_t arena_size, arena_used;
	struct bt_block *_Atomic *hash;
	struct bt_block **by_address;
	unsigned blocks, blocks_max;
	struct bt_block **page_blocks; /* by page index (memory_page) */
	pthread_mutex_t translate_lock;
	struct bt_translation *translation;
	_Atomic uint64_t generation; /* changes whenever translated code was dropped */
	uint64_t flushes;

	/* common stubs (executable addresses) */
	void (*enter)(struct bt_vcpu *v, const uint8_t *code);
	const uint8_t *exit_mem;	     /* exit_code is set, flags are in memory */
	const uint8_t *exit_lookup;	     /* r10: target pc; flags in memory */
	const uint8_t *second_way[BT_SETS]; /* the same, and r11: offset of its jump cache entry, whose second way it is */
	const uint8_t *exit_link[2];	     /* r10: struct bt_site; flags in memory, or [1] in the host's */
	const uint8_t *exit_system[2];
	const uint8_t *exit_slow;	     /* r10: struct bt_site */
	const uint8_t *string;		     /* r10: struct bt_site, r11: where to go on; a call of bt_string */
	const uint8_t *slow[BT_SETS][8][4];  /* by set, log2 of size (7: 10 bytes), bit 0 write, bit 1 masked */

	/* exclusive sections */
	pthread_mutex_t exclusive_lock;
	pthread_cond_t exclusive_wake, exclusive_done;
	_Atomic bool exclusive_wanted;
	struct bt_vcpu *exclusive_owner;
	unsigned running;
	/* pages written by devices, to be looked at before guest code goes on */
	pthread_mutex_t written_lock;
	unsigned written_count;
	uint64_t written[256]; /* page indexes; more than fit: everything is dropped */
	_Atomic bool written_pending;
};

struct fetch_entry {
	uint64_t page; /* virtual page address | 1, or 0 */
	uint64_t gpa;
	const uint8_t *host;
	uint64_t index; /* memory_page index */
	bool global;
};
#define BT_FETCH_ENTRIES 256

struct bt_private {
	struct fetch_entry fetch[BT_SETS][BT_FETCH_ENTRIES];
	uint16_t jumps_filled[BT_SETS][512]; /* jump cache entries in use, for clearing */
	unsigned jumps_count[BT_SETS];	     /* over 512: look at all */
	uint64_t jump_pages[BT_SETS][64];	/* which hashed pages the jump caches may hold */
	uint64_t large_base[BT_SETS], large_mask[BT_SETS]; /* region that holds all large pages cached */
	uint16_t filled[BT_SETS][256];	/* TLB entries that are not global, for flushing */
	unsigned filled_count[BT_SETS]; /* over 256: look at all */
	bool jump_local[BT_SETS], fetch_local[BT_SETS]; /* holds something that is not global */
	_Atomic bool leave, flush_wanted;
	bool running;
	bool fpu_parked;
	bool dirty_single;
	uint32_t jump_mode[BT_SETS];
	unsigned budget;	/* of vcpu_step */
	uint8_t *signal_stack;
	struct bt_slow_cache *slow_cache;
	struct bt_lockstep *lockstep; /* NULL: off */
	uint64_t statistics[32];
	size_t fpu_size;
	uint8_t *fpu; /* XSAVE area, standard layout, 64-byte aligned */
	uint8_t bounce[8][256] __attribute__((aligned(64)));
	uint8_t wide_bounce[8192] __attribute__((aligned(64)));
};

enum bt_statistic {
	STAT_EXIT_LOOKUP, STAT_EXIT_SYSTEM, STAT_EXIT_FAULT, STAT_EXIT_SLOW, STAT_EXIT_KICK, STAT_EXIT_LINK,
	STAT_TRANSLATIONS, STAT_TRANSLATED_INSNS, STAT_TLB_FILLS, STAT_TLB_FLUSHES, STAT_PAGE_FLUSHES, STAT_EXCEPTIONS,
	STAT_INTERRUPTS, STAT_CODE_WRITES, STAT_INVALIDATED, STAT_CACHE_FLUSHES, STAT_HALTS, STAT_STRING, STAT_EXCLUSIVE,
	STAT_COUNT
};

/* ---- cache.c ---- */
int cache_create(struct bt_vm *vm, struct error *err);
void cache_destroy(struct bt_vm *vm);
void *cache_alloc(struct bt_vm *vm, size_t size); /* from the arena; NULL when full */
/* Room for another block? Under translate_lock. */
bool cache_has_room(struct bt_vm *vm);
/* Drops all blocks. Inside an exclusive section. */
void cache_flush(struct bt_vm *vm);
/* Makes a translated block known. Under translate_lock. index2: of the second page, when there is one. */
void cache_add(struct bt_vm *vm, struct bt_block *block, uint64_t index, uint64_t index2);
struct bt_block *cache_find(struct bt_vm *vm, uint64_t phys, uint32_t mode, uint64_t second_page);
struct bt_block *cache_by_host(struct bt_vm *vm, const uint8_t *host);
void cache_link(struct bt_vm *vm, struct bt_site *site, struct bt_block *target);
/* Leads a direct jump to code that is no block. Under translate_lock. */
void cache_patch(struct bt_vm *vm, struct bt_site *site, const uint8_t *to);
/* Guest memory [offset, offset + size) of page `index` is about to be, or was, changed: drops the blocks over it. Not
 * inside an exclusive section (it enters one). */
void cache_page_written(struct bt_vcpu *v, uint64_t index, unsigned offset, unsigned size);
void cache_device_wrote(void *vm, uint64_t gpa, uint64_t size);
int cache_memory_changes(void *vm, const struct memory_range *range, bool comes, struct error *err);
void cache_drop_pages(struct bt_vcpu *v); /* does what cache_device_wrote asked for */
/* Makes writes to page `index` come to cache_page_written, on every vCPU, before it returns. */
void cache_protect_page(struct bt_vcpu *v, uint64_t index, uint8_t *host);
/* All other vCPUs are out of translated code and look-ups between these two. */
void exclusive_begin(struct bt_vcpu *v);
void exclusive_end(struct bt_vcpu *v);
/* Around the time in which a vCPU may be in translated code. enter waits while somebody is exclusive. */
void exclusive_enter_running(struct bt_vcpu *v);
void exclusive_leave_running(struct bt_vcpu *v);

/* ---- translate.c ---- */
int translate_create(struct bt_vm *vm, struct error *err);
void translate_destroy(struct bt_vm *vm);
/* Finds or makes the block at v->rip in v->mode. NULL: v->fault is set (instruction fetch), or *slow is set: the
 * instruction there has to be run by slow_execute. */
struct bt_block *block_find(struct bt_vcpu *v, bool *slow);
/* Lets a direct jump whose target is a block over two pages go through the jump cache: such blocks are not linked to. */
void translate_far_link(struct bt_vcpu *v, struct bt_site *site);
/* A stub that runs one instruction with its memory operand at v->bounce[0]. Under no lock. NULL: cannot be done. */
struct bt_block *translate_stub(struct bt_vcpu *v, const struct bt_decoded *d, const uint8_t *bytes);

/* ---- tlb.c ---- */
/* Fills the TLB for an access; the host address, or NULL: *fault says whether v->fault is set (else: device memory or
 * code page, to be done slowly). */
uint8_t *tlb_fill(struct bt_vcpu *v, enum bt_set set, uint64_t linear, bool write, bool *fault);
/* Instruction fetch translation; NULL: v->fault is set. */
const struct fetch_entry *tlb_fetch(struct bt_vcpu *v, uint64_t linear);
/* The page of `linear` for an access that a C function makes for the current privilege: host address of the page when it is
 * RAM (code pages too: call cache_page_written for *index after writing), NULL with *fault false when it is not RAM. */
uint8_t *tlb_host_page(struct bt_vcpu *v, uint64_t linear, bool write, bool user, uint64_t *index, bool *fault);
/* v->rip of the instruction whose translation host_pc lies in. */
void tlb_find_rip(struct bt_vcpu *v, uint64_t host_pc);
void tlb_drop_host_page(struct bt_vcpu *v, const uint8_t *host); /* its write tags */
void tlb_clear_jumps(struct bt_vcpu *v);
void tlb_reset(struct bt_vcpu *v);
static inline uint64_t tlb_invalid(unsigned index)
{
	return ((uint64_t)index ^ 1) << 12;
}
static inline unsigned jump_index(uint64_t pc)
{
	return (unsigned)((pc ^ pc >> 12) & (BT_JUMP_ENTRIES - 1));
}

/* What an empty entry n of the jump cache holds: no pc that guest code can jump to has it and belongs there. */
static inline uint64_t jump_no_pc(unsigned n)
{
	return 1ull << 63 | (n == 0);
}

/* ---- slow.c ---- */
enum system_result slow_execute(struct bt_vcpu *v);
/* Translated code came from v->resume with v->rip not canonical: undoes an indirect branch, whose fault it is. */
enum system_result slow_branch_fault(struct bt_vcpu *v);
/* system_execute, with the vector state parked where the board is called. */
enum system_result slow_system(struct bt_vcpu *v, const struct bt_decoded *d);
int slow_create(struct bt_vcpu *v);
void slow_destroy(struct bt_vcpu *v);
/* An element-wise memory instruction that has no single operand: gathers, scatters, maskmov. */
enum system_result vector_execute(struct bt_vcpu *v, const struct bt_decoded *d);
/* Bytes of the memory operand that a masked instruction touches, as a bit mask; all ones when it is not masked. */
uint64_t vector_enabled(struct bt_vcpu *v, const struct bt_decoded *d);
/* String instructions (string.c). */
enum system_result string_execute(struct bt_vcpu *v, const struct bt_decoded *d);

/* ---- lockstep.c ---- */
enum lockstep_result {
	LOCKSTEP_NOT,	  /* nothing was run */
	LOCKSTEP_RAN,	  /* the block at v->rip was run; v->exit_code says how it ended */
	LOCKSTEP_DIFFERS, /* and it was not what its instructions do */
};
int lockstep_create(struct bt_vcpu *v);
void lockstep_destroy(struct bt_vcpu *v);
enum lockstep_result lockstep_run(struct bt_vcpu *v);
void lockstep_page_written(struct bt_vcpu *v, uint64_t gpa); /* is about to be, perhaps */
void lockstep_statistics(const struct bt_vcpu *v, uint64_t *compared, uint64_t *left_out);

/* ---- signals.c ---- */
void signals_install(void);
void signals_thread(struct bt_vcpu *v);

/* ---- fpu.c ---- */
void fpu_park(struct bt_vcpu *v);   /* host registers are C's afterwards; does nothing when already so */
void fpu_unpark(struct bt_vcpu *v); /* the guest's are back */
int fpu_create(struct bt_vcpu *v);
void fpu_destroy(struct bt_vcpu *v);
void fpu_reset(struct bt_vcpu *v);

/* ---- called from translated code ---- */
uint64_t bt_slow_access(struct bt_vcpu *v, uint64_t linear);
/* A string instruction. 1: go on behind it; 0: v->exit_code and v->rip are set. */
uint64_t bt_string(struct bt_vcpu *v, const struct bt_site *site);

/* Without the C library, which may use the registers that hold the guest's vector state. Powers of two up to 8 bytes are
 * copied in one access each. */
static inline void bytes_copy(void *to, const void *from, unsigned long n)
{
	switch (n) {
	case 8: *(volatile uint64_t *)to = *(const volatile uint64_t *)from; return;
	case 4: *(volatile uint32_t *)to = *(const volatile uint32_t *)from; return;
	case 2: *(volatile uint16_t *)to = *(const volatile uint16_t *)from; return;
	case 1: *(volatile uint8_t *)to = *(const volatile uint8_t *)from; return;
	default: __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(n)::"memory");
	}
}

static inline void bytes_zero(void *to, unsigned long n)
{
	__asm__ volatile("rep stosb" : "+D"(to), "+c"(n) : "a"(0) : "memory");
}

/* rip and mode helpers */
static inline unsigned mode_code_bits(uint32_t mode)
{
	return (mode & BT_MODE_CODE) == BT_MODE_CODE64 ? 64 : (mode & BT_MODE_CODE) == BT_MODE_CODE32 ? 32 : 16;
}
const ZydisDecoder *insn_decoder(uint32_t mode);
