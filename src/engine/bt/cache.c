/* The code cache. W^X: the memory is mapped twice, once to write and once to run. */
#include <stdlib.h>
#include <sys/mman.h>

#include "engine/bt/bt.h"

#define CODE_SIZE (64ul << 20)
#define ARENA_SIZE (96ul << 20)
#define BLOCK_ROOM 65536u /* no block's code is longer */
#define ARENA_ROOM (256u << 10)

/* ---- memory ---- */

void *cache_alloc(struct bt_vm *vm, size_t size)
{
	void *p = vm->arena + vm->arena_used;

	size = align_up(size, 16);
	if (vm->arena_size - vm->arena_used < size)
		return NULL;
	vm->arena_used += size;
	return p;
}

bool cache_has_room(struct bt_vm *vm)
{
	return vm->code_size - vm->code_used > BLOCK_ROOM && vm->arena_size - vm->arena_used > ARENA_ROOM &&
		vm->blocks < vm->blocks_max;
}

/* ---- common stubs ---- */

static void emit_save(struct emitter *e, uint32_t registers)
{
	for (unsigned r = 0; r < 16; r++)
		if (registers & 1u << r)
			emit_store(e, V_GPR(r), r);
}

static void emit_reload(struct emitter *e, uint32_t registers)
{
	for (unsigned r = 0; r < 16; r++)
		if (registers & 1u << r)
			emit_load(e, r, V_GPR(r));
}

#define CALLER_SAVED (1u << RAX | 1u << RCX | 1u << RDX | 1u << RSI | 1u << RDI | 1u << R8 | 1u << R9)
#define CALLEE_SAVED (1u << RBX | 1u << RBP | 1u << R12 | 1u << R13 | 1u << R14 | 1u << R15)

static const uint8_t *stub_begin(struct emitter *e)
{
	while ((uintptr_t)e->p & 15)
		emit8(e, 0xcc);
	return emit_here(e);
}

static void emit_exit(struct emitter *e, uint32_t code, const uint8_t *exit_mem)
{
	emit_store_imm32(e, V(exit_code), code);
	emit_jump(e, exit_mem);
}

static void make_stubs(struct bt_vm *vm)
{
	struct emitter stubs = { .p = vm->code_write, .end = vm->code_write + 65536, .to_run = vm->code_run - vm->code_write };
	struct emitter *e = &stubs;
	const uint8_t *slow_common, *leave;
	uint8_t *fail;

	/* void enter(struct bt_vcpu *v, const uint8_t *code) */
	vm->enter = (void (*)(struct bt_vcpu *, const uint8_t *))(uintptr_t)stub_begin(e);
	EMIT(e, 0x53, 0x55, 0x41, 0x54, 0x41, 0x55, 0x41, 0x56, 0x41, 0x57); /* push rbx rbp r12 r13 r14 r15 */
	EMIT(e, 0x48, 0x83, 0xec, 0x08);				     /* sub rsp, 8 */
	emit_store(e, V(host_rsp), RSP);
	emit_store(e, V(scratch) + 24, RSI);
	emit_reload(e, 0xf3ff); /* all but r10, r11 */
	EMIT(e, 0x65, 0xff, 0x24, 0x25); /* jmp gs:[scratch 3] */
	emit32(e, V(scratch) + 24);

	vm->exit_mem = stub_begin(e);
	emit_save(e, 0xf3ff);
	emit_load(e, RSP, V(host_rsp));
	EMIT(e, 0x48, 0x83, 0xc4, 0x08);
	EMIT(e, 0x41, 0x5f, 0x41, 0x5e, 0x41, 0x5d, 0x41, 0x5c, 0x5d, 0x5b, 0xc3);

	vm->exit_lookup = stub_begin(e);
	emit_store(e, V(rip), R10);
	emit_exit(e, BT_EXIT_LOOKUP, vm->exit_mem);

	for (unsigned set = 0; set < BT_SETS; set++) {
		uint32_t pc = V(jump) + set * (uint32_t)sizeof(((struct bt_vcpu *)0)->jump[0]) + 16;

		vm->second_way[set] = stub_begin(e);
		emit_test_byte(e, V(kick));
		emit_jcc(e, CC_NE, vm->exit_lookup);
		emit_alu_imm(e, ALU_AND, R10, -4096);
		emit_store(e, V(page), R10);
		EMIT(e, 0x65, 0x41, 0xff, 0xa3); /* jmp gs:[r11 + code] */
		emit32(e, pc + 8);
	}

	for (int host_flags = 0; host_flags < 2; host_flags++) {
		const struct {
			const uint8_t **stub;
			uint32_t code;
		} exits[] = { { &vm->exit_link[host_flags], BT_EXIT_LINK }, { &vm->exit_system[host_flags], BT_EXIT_SYSTEM } };

		for (unsigned k = 0; k < ARRAY_SIZE(exits); k++) {
			*exits[k].stub = stub_begin(e);
			if (host_flags) {
				emit_move(e, R11, RAX);
				EMIT(e, 0x9f, 0x0f, 0x90, 0xc0);
				emit_gs(e, 2, 0x89, RAX, V(arith));
				emit_move(e, RAX, R11);
			}
			emit_store(e, V(exit_argument), R10);
			emit_exit(e, exits[k].code, vm->exit_mem);
		}
	}
	vm->exit_slow = stub_begin(e);
	emit_store(e, V(exit_argument), R10);
	emit_exit(e, BT_EXIT_SLOW, vm->exit_mem);

	/* A TLB miss: r10 address, r11 where to go on, v->access. C only needs the registers that it may change saved. */
	slow_common = stub_begin(e);
	emit_store(e, V(resume), R11);
	emit_save(e, CALLER_SAVED | 1u << RSP);
	emit_load(e, RDI, V(self));
	emit_move(e, RSI, R10);
	emit_load(e, RSP, V(host_rsp));
	emit_imm64(e, RAX, (uint64_t)(uintptr_t)bt_slow_access);
	EMIT(e, 0xff, 0xd0);	   /* call rax */
	EMIT(e, 0x48, 0x85, 0xc0); /* test rax, rax */
	fail = emit_jcc_forward(e, CC_E);
	emit_move(e, R10, RAX);
	emit_reload(e, CALLER_SAVED | 1u << RSP);
	EMIT(e, 0x65, 0xff, 0x24, 0x25); /* jmp gs:[resume] */
	emit32(e, V(resume));
	emit_land(e, fail);
	leave = emit_here(e);
	emit_save(e, CALLEE_SAVED);
	emit_load(e, RSP, V(host_rsp));
	EMIT(e, 0x48, 0x83, 0xc4, 0x08);
	EMIT(e, 0x41, 0x5f, 0x41, 0x5e, 0x41, 0x5d, 0x41, 0x5c, 0x5d, 0x5b, 0xc3);

	/* A string instruction in the middle of a block. */
	vm->string = stub_begin(e);
	emit_store(e, V(resume), R11);
	emit_save(e, CALLER_SAVED | 1u << RSP);
	emit_load(e, RDI, V(self));
	emit_move(e, RSI, R10);
	emit_load(e, RSP, V(host_rsp));
	emit_imm64(e, RAX, (uint64_t)(uintptr_t)bt_string);
	EMIT(e, 0xff, 0xd0);
	EMIT(e, 0x48, 0x85, 0xc0);
	emit_jcc(e, CC_E, leave);
	emit_reload(e, CALLER_SAVED | 1u << RSP);
	EMIT(e, 0x65, 0xff, 0x24, 0x25);
	emit32(e, V(resume));

	for (unsigned set = 0; set < BT_SETS; set++) {
		for (unsigned class = 0; class < 8; class++) {
			for (unsigned bits = 0; bits < 4; bits++) {
				vm->slow[set][class][bits] = stub_begin(e);
				emit_store_imm32(e, V(access), (class == 7 ? 10 : 1u << class) | bits << 16 | set << 18);
				emit_jump(e, slow_common);
			}
		}
	}
	vm->code_used = vm->code_stubs = align_up((size_t)(e->p - vm->code_write), 64);
}

int cache_create(struct bt_vm *vm, struct error *err)
{
	int fd = memfd_create("hostel-code", MFD_CLOEXEC);
	uint64_t pages = memory_page_count(vm->memory);

	pthread_mutex_init(&vm->translate_lock, NULL);
	pthread_mutex_init(&vm->exclusive_lock, NULL);
	pthread_mutex_init(&vm->written_lock, NULL);
	pthread_cond_init(&vm->exclusive_wake, NULL);
	pthread_cond_init(&vm->exclusive_done, NULL);
	if (fd < 0 || ftruncate(fd, CODE_SIZE) < 0)
		return error_errno(err, "cannot make memory for the code cache");
	vm->code_fd = fd;
	vm->code_size = CODE_SIZE;
	vm->code_write = mmap(NULL, CODE_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	vm->code_run = mmap(NULL, CODE_SIZE, PROT_READ | PROT_EXEC, MAP_SHARED, fd, 0);
	vm->arena_size = ARENA_SIZE;
	vm->arena = mmap(NULL, ARENA_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	vm->blocks_max = 1u << 20;
	vm->by_address = mmap(NULL, vm->blocks_max * sizeof(*vm->by_address), PROT_READ | PROT_WRITE,
		MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	vm->page_blocks = mmap(NULL, pages * sizeof(*vm->page_blocks), PROT_READ | PROT_WRITE,
		MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	vm->hash = mmap(NULL, sizeof(*vm->hash) << BT_HASH_BITS, PROT_READ | PROT_WRITE,
		MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (vm->code_write == MAP_FAILED || vm->code_run == MAP_FAILED || vm->arena == MAP_FAILED ||
		vm->by_address == MAP_FAILED || vm->page_blocks == MAP_FAILED || vm->hash == MAP_FAILED)
		return error_errno(err, "cannot map the code cache");
	make_stubs(vm);
	return 0;
}

void cache_destroy(struct bt_vm *vm)
{
	munmap(vm->code_write, vm->code_size);
	munmap((void *)(uintptr_t)vm->code_run, vm->code_size);
	munmap(vm->arena, vm->arena_size);
	munmap(vm->by_address, vm->blocks_max * sizeof(*vm->by_address));
	munmap(vm->page_blocks, memory_page_count(vm->memory) * sizeof(*vm->page_blocks));
	munmap((void *)vm->hash, sizeof(*vm->hash) << BT_HASH_BITS);
	close(vm->code_fd);
}

/* ---- blocks by address ---- */

static unsigned hash_of(uint64_t phys, uint32_t mode)
{
	uint64_t h = (phys ^ (uint64_t)mode << 40) * 0x9e3779b97f4a7c15ull;

	return (unsigned)(h >> (64 - BT_HASH_BITS));
}

struct bt_block *cache_find(struct bt_vm *vm, uint64_t phys, uint32_t mode, uint64_t second_page)
{
	struct bt_block *b = atomic_load_explicit(&vm->hash[hash_of(phys, mode)], memory_order_acquire);

	for (; b; b = b->next)
		if (b->phys == phys && b->mode == mode &&
			(second_page == 1 ? b->second_page != 0 : b->second_page == second_page))
			return b;
	return NULL;
}

struct bt_block *cache_by_host(struct bt_vm *vm, const uint8_t *host)
{
	unsigned low = 0, high = __atomic_load_n(&vm->blocks, __ATOMIC_ACQUIRE);

	while (low < high) {
		unsigned middle = (low + high) / 2;
		struct bt_block *b = vm->by_address[middle];

		if (host < b->entry_mem)
			high = middle;
		else if (host >= b->entry_mem + b->host_size)
			low = middle + 1;
		else
			return b;
	}
	return NULL;
}

void cache_add(struct bt_vm *vm, struct bt_block *b, uint64_t index, uint64_t index2)
{
	vm->by_address[vm->blocks] = b;
	__atomic_store_n(&vm->blocks, vm->blocks + 1, __ATOMIC_RELEASE);
	b->page_index[0] = index;
	b->page_index[1] = index2;
	if (index == UINT64_MAX)
		return;
	b->page_next[0] = vm->page_blocks[index];
	vm->page_blocks[index] = b;
	if (index2 != index) {
		b->page_next[1] = vm->page_blocks[index2];
		vm->page_blocks[index2] = b;
	}
	b->next = atomic_load_explicit(&vm->hash[hash_of(b->phys, b->mode)], memory_order_relaxed);
	atomic_store_explicit(&vm->hash[hash_of(b->phys, b->mode)], b, memory_order_release);
}

/* ---- links ---- */

static void patch(struct bt_site *site, int32_t value)
{
	__atomic_store_n((int32_t *)(void *)site->patch, value, __ATOMIC_RELEASE);
}

void cache_patch(struct bt_vm *vm, struct bt_site *site, const uint8_t *to)
{
	patch(site, (int32_t)(to - (site->patch + 4 + (vm->code_run - vm->code_write))));
}

void cache_link(struct bt_vm *vm, struct bt_site *site, struct bt_block *target)
{
	const uint8_t *to = site->wants_mem ? target->entry_mem : target->entry_host;

	scope_lock(&vm->translate_lock);
	if (site->target || site->block->dead || target->dead || target->second_page)
		return;
	site->target = target;
	site->next_incoming = target->incoming;
	target->incoming = site;
	cache_patch(vm, site, to);
}

static void unlink_incoming(struct bt_block *b)
{
	for (struct bt_site *s = b->incoming, *next; s; s = next) {
		next = s->next_incoming;
		patch(s, s->unlinked);
		s->target = NULL;
		s->next_incoming = NULL;
	}
	b->incoming = NULL;
}

/* ---- invalidation; everything here runs inside an exclusive section ---- */

static void leave_page_list(struct bt_vm *vm, struct bt_block *b, uint64_t index)
{
	struct bt_block **link = &vm->page_blocks[index];

	while (*link && *link != b)
		link = &(*link)->page_next[(*link)->page_index[0] == index ? 0 : 1];
	if (*link)
		*link = b->page_next[b->page_index[0] == index ? 0 : 1];
}

static void drop_block(struct bt_vm *vm, struct bt_block *b)
{
	struct bt_block *_Atomic *bucket = &vm->hash[hash_of(b->phys, b->mode)];

	if (*bucket == b) {
		*bucket = b->next;
	} else {
		struct bt_block *p = *bucket;

		while (p && p->next != b)
			p = p->next;
		if (p)
			p->next = b->next;
	}
	leave_page_list(vm, b, b->page_index[0]);
	if (b->page_index[1] != b->page_index[0])
		leave_page_list(vm, b, b->page_index[1]);
	unlink_incoming(b);
	b->dead = true;
}

static bool block_covers(const struct bt_block *b, uint64_t index, unsigned offset, unsigned size)
{
	unsigned start = (unsigned)(b->phys & 0xfff), end = start + b->size;

	if (b->page_index[0] != b->page_index[1]) {
		if (b->page_index[1] == index) {
			start = 0;
			end -= BT_PAGE_SIZE;
		} else {
			end = BT_PAGE_SIZE;
		}
	}
	return start < offset + size && offset < end;
}

static void clear_all_jumps(struct bt_vm *vm)
{
	for (unsigned k = 0; k < vm->cpus; k++)
		if (vm->vcpu[k])
			tlb_clear_jumps(vm->vcpu[k]);
}

static void drop_in_page(struct bt_vm *vm, uint64_t index, unsigned offset, unsigned size, uint64_t *dropped)
{
	bool any = false;

	for (struct bt_block *b = vm->page_blocks[index], *next; b; b = next) {
		next = b->page_next[b->page_index[0] == index ? 0 : 1];
		if (block_covers(b, index, offset, size)) {
			drop_block(vm, b);
			any = true;
			++*dropped;
		}
	}
	if (any) {
		clear_all_jumps(vm);
		atomic_fetch_add(&vm->generation, 1);
	}
	if (!vm->page_blocks[index])
		__atomic_and_fetch(&vm->memory->page_flags[index], (uint8_t)~MEMORY_PAGE_CODE, __ATOMIC_SEQ_CST);
}

static bool page_covered(struct bt_vm *vm, uint64_t index, unsigned offset, unsigned size)
{
	scope_lock(&vm->translate_lock);
	if (!vm->page_blocks[index])
		return true; /* flagged without a block: the flag goes */
	for (struct bt_block *b = vm->page_blocks[index]; b; b = b->page_next[b->page_index[0] == index ? 0 : 1])
		if (block_covers(b, index, offset, size))
			return true;
	return false;
}

void cache_page_written(struct bt_vcpu *v, uint64_t index, unsigned offset, unsigned size)
{
	struct bt_vm *vm = v->vm;

	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	if (!(__atomic_load_n(&vm->memory->page_flags[index], __ATOMIC_SEQ_CST) & MEMORY_PAGE_CODE))
		return;
	v->private->statistics[STAT_CODE_WRITES]++;
	/* Instructions kept by slow.c are of such pages too, whether a block covers them or not. */
	atomic_fetch_add(&vm->generation, 1);
	if (!page_covered(vm, index, offset, size))
		return;
	exclusive_begin(v);
	drop_in_page(vm, index, offset, size, &v->private->statistics[STAT_INVALIDATED]);
	exclusive_end(v);
}

/* From a device's thread: it cannot wait for vCPUs, so it leaves a note that they read before they go on. */
void cache_device_wrote(void *opaque, uint64_t gpa, uint64_t size)
{
	struct bt_vm *vm = opaque;
	uint64_t first, index;

	if (!size || !memory_page(vm->memory, gpa, &first))
		return;
	pthread_mutex_lock(&vm->written_lock);
	for (uint64_t at = gpa & ~0xfffull; at < gpa + size; at += BT_PAGE_SIZE) {
		if (!memory_page(vm->memory, at, &index) ||
			!(__atomic_load_n(&vm->memory->page_flags[index], __ATOMIC_SEQ_CST) & MEMORY_PAGE_CODE))
			continue;
		if (vm->written_count < ARRAY_SIZE(vm->written))
			vm->written[vm->written_count] = index;
		if (vm->written_count <= ARRAY_SIZE(vm->written))
			vm->written_count++;
	}
	if (vm->written_count)
		vm->written_pending = true;
	pthread_mutex_unlock(&vm->written_lock);
	if (vm->written_pending)
		for (unsigned k = 0; k < vm->cpus; k++)
			if (vm->vcpu[k])
				vm->vcpu[k]->kick = 1;
}

/* The host addresses in the TLBs stay mapped, so that it is enough that they are forgotten soon. */
int cache_memory_changes(void *opaque, const struct memory_range *range, bool comes, struct error *err)
{
	struct bt_vm *vm = opaque;

	for (unsigned k = 0; !comes && k < vm->cpus; k++) {
		if (!vm->vcpu[k])
			continue;
		vm->vcpu[k]->private->flush_wanted = true;
		vm->vcpu[k]->kick = 1;
	}
	return 0;
}

void cache_drop_pages(struct bt_vcpu *v)
{
	struct bt_vm *vm = v->vm;

	exclusive_begin(v);
	pthread_mutex_lock(&vm->written_lock);
	if (vm->written_count > ARRAY_SIZE(vm->written))
		cache_flush(vm);
	else
		for (unsigned k = 0; k < vm->written_count; k++)
			drop_in_page(vm, vm->written[k], 0, BT_PAGE_SIZE, &v->private->statistics[STAT_INVALIDATED]);
	vm->written_count = 0;
	vm->written_pending = false;
	pthread_mutex_unlock(&vm->written_lock);
	exclusive_end(v);
}

void cache_flush(struct bt_vm *vm)
{
	for (unsigned k = 0; k < vm->blocks; k++) {
		struct bt_block *b = vm->by_address[k];

		for (int side = 0; side < 2; side++) {
			if (b->page_index[side] == UINT64_MAX)
				continue;
			vm->page_blocks[b->page_index[side]] = NULL;
			__atomic_and_fetch(&vm->memory->page_flags[b->page_index[side]], (uint8_t)~MEMORY_PAGE_CODE,
				__ATOMIC_SEQ_CST);
		}
	}
	for (unsigned k = 0; k < 1u << BT_HASH_BITS; k++)
		vm->hash[k] = NULL;
	__atomic_store_n(&vm->blocks, 0, __ATOMIC_RELEASE);
	vm->code_used = vm->code_stubs;
	vm->arena_used = 0;
	vm->flushes++;
	atomic_fetch_add(&vm->generation, 1);
	clear_all_jumps(vm);
}

void cache_protect_page(struct bt_vcpu *v, uint64_t index, uint8_t *host)
{
	struct bt_vm *vm = v->vm;

	if (__atomic_load_n(&vm->memory->page_flags[index], __ATOMIC_SEQ_CST) & MEMORY_PAGE_CODE)
		return;
	exclusive_begin(v);
	__atomic_or_fetch(&vm->memory->page_flags[index], MEMORY_PAGE_CODE, __ATOMIC_SEQ_CST);
	for (unsigned k = 0; k < vm->cpus; k++)
		if (vm->vcpu[k])
			tlb_drop_host_page(vm->vcpu[k], host);
	exclusive_end(v);
}

/* ---- exclusive sections ---- */

void exclusive_enter_running(struct bt_vcpu *v)
{
	struct bt_vm *vm = v->vm;

	pthread_mutex_lock(&vm->exclusive_lock);
	while (vm->exclusive_wanted)
		pthread_cond_wait(&vm->exclusive_done, &vm->exclusive_lock);
	vm->running++;
	v->private->running = true;
	pthread_mutex_unlock(&vm->exclusive_lock);
}

void exclusive_leave_running(struct bt_vcpu *v)
{
	struct bt_vm *vm = v->vm;

	pthread_mutex_lock(&vm->exclusive_lock);
	vm->running--;
	v->private->running = false;
	pthread_cond_signal(&vm->exclusive_wake);
	pthread_mutex_unlock(&vm->exclusive_lock);
}

void exclusive_begin(struct bt_vcpu *v)
{
	struct bt_vm *vm = v->vm;

	if (vm->cpus == 1)
		return;
	pthread_mutex_lock(&vm->exclusive_lock);
	while (vm->exclusive_wanted) {
		vm->running--;
		pthread_cond_signal(&vm->exclusive_wake);
		pthread_cond_wait(&vm->exclusive_done, &vm->exclusive_lock);
		vm->running++;
	}
	vm->exclusive_wanted = true;
	vm->exclusive_owner = v;
	for (unsigned k = 0; k < vm->cpus; k++)
		if (vm->vcpu[k] && vm->vcpu[k] != v)
			vm->vcpu[k]->kick = 1;
	while (vm->running > 1)
		pthread_cond_wait(&vm->exclusive_wake, &vm->exclusive_lock);
	pthread_mutex_unlock(&vm->exclusive_lock);
	v->private->statistics[STAT_EXCLUSIVE]++;
}

void exclusive_end(struct bt_vcpu *v)
{
	struct bt_vm *vm = v->vm;

	if (vm->cpus == 1)
		return;
	pthread_mutex_lock(&vm->exclusive_lock);
	vm->exclusive_wanted = false;
	vm->exclusive_owner = NULL;
	pthread_cond_broadcast(&vm->exclusive_done);
	pthread_mutex_unlock(&vm->exclusive_lock);
}
