/* A vCPU's way into the guest and back: KVM_RUN, and the switch over why it came back (Linux,
 * Documentation/virt/kvm/api.rst, section 5). The interrupt chips are in the kernel, HLT and IPIs never come here.
 */
#include "engine/kvm/kvm.h"

#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/util.h"

/* ---- exits that the board answers ---- */

static void port_exit(struct engine_vcpu *v)
{
	const struct engine_board *board = v->vm->board;
	struct kvm_run *run = v->run;
	uint8_t *data = (uint8_t *)run + run->io.data_offset;
	unsigned size = run->io.size;

	v->statistics[KVM_STAT_PORT]++;
	for (uint32_t i = 0; i < run->io.count; i++, data += size) {
		uint64_t value = 0;

		if (run->io.direction == KVM_EXIT_IO_OUT) {
			memcpy(&value, data, size);
			board->pio_write(board->opaque, v->index, run->io.port, size, value);
		} else {
			value = board->pio_read(board->opaque, v->index, run->io.port, size);
			memcpy(data, &value, size);
		}
	}
}

/* KVM hands over what is left of an access at the end of a page: any length up to 8. The board has those of the bus. */
static void mmio_exit(struct engine_vcpu *v)
{
	const struct engine_board *board = v->vm->board;
	struct kvm_run *run = v->run;
	uint64_t gpa = run->mmio.phys_addr;
	unsigned left = min(run->mmio.len, 8u), done = 0;

	v->statistics[KVM_STAT_MMIO]++;
	while (left) {
		unsigned size = left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
		uint64_t value = 0;

		if (run->mmio.is_write) {
			memcpy(&value, run->mmio.data + done, size);
			board->mmio_write(board->opaque, v->index, gpa + done, size, value);
		} else {
			value = board->mmio_read(board->opaque, v->index, gpa + done, size);
			memcpy(run->mmio.data + done, &value, size);
		}
		done += size;
		left -= size;
	}
}

/* ---- exits that end it ---- */

static void describe_internal_error(const struct kvm_run *run, char *text, size_t size)
{
	static const char *const kinds[] = {"an error without a kind", "an instruction that KVM cannot emulate",
		"several exceptions at once", "an exit while an event was delivered", "an exit for an unknown reason"};
	uint32_t kind = run->internal.suberror;
	size_t used;

	used = (size_t)snprintf(text, size, "KVM_EXIT_INTERNAL_ERROR %u: %s", kind,
		kind < ARRAY_SIZE(kinds) ? kinds[kind] : "of a kind unknown here");
	if (kind == KVM_INTERNAL_ERROR_EMULATION && run->emulation_failure.ndata >= 3 &&
		(run->emulation_failure.flags & KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES)) {
		used += (size_t)snprintf(text + min(used, size), size - min(used, size), ", bytes");
		for (unsigned i = 0; i < min((unsigned)run->emulation_failure.insn_size, 15u) && used < size; i++)
			used += (size_t)snprintf(
				text + used, size - used, " %02x", run->emulation_failure.insn_bytes[i]);
		return;
	}
	for (unsigned i = 0; i < min(run->internal.ndata, 4u) && used < size; i++)
		used += (size_t)snprintf(text + used, size - used, "%s %llx", i ? "" : ", data",
			(unsigned long long)run->internal.data[i]);
}

void kvm_describe_exit(const struct kvm_run *run, char *text, size_t size)
{
	switch (run->exit_reason) {
	case KVM_EXIT_INTERNAL_ERROR:
		describe_internal_error(run, text, size);
		break;
	case KVM_EXIT_FAIL_ENTRY:
		snprintf(text, size, "KVM_EXIT_FAIL_ENTRY: the CPU refuses the guest's state, reason %#llx",
			(unsigned long long)run->fail_entry.hardware_entry_failure_reason);
		break;
	case KVM_EXIT_SHUTDOWN:
		snprintf(text, size, "a triple fault");
		break;
	case KVM_EXIT_HLT:
		snprintf(text, size, "a halt for ever");
		break;
	default:
		snprintf(text, size, "KVM's exit reason %u, which nobody expects", run->exit_reason);
	}
}

/* ---- the loop ---- */

static bool leave(struct engine_exit *exit, enum engine_exit_reason reason)
{
	exit->reason = reason;
	return false;
}

/* True: run on. */
static bool handle_exit(struct engine_vcpu *v, struct engine_exit *exit)
{
	switch (v->run->exit_reason) {
	case KVM_EXIT_IO:
		port_exit(v);
		return true;
	case KVM_EXIT_MMIO:
		mmio_exit(v);
		return true;
	case KVM_EXIT_INTR:
		return true;
	case KVM_EXIT_HLT: /* not with a local APIC in the kernel */
		v->statistics[KVM_STAT_HALT]++;
		return leave(exit, ENGINE_EXIT_HALTED);
	case KVM_EXIT_SHUTDOWN:
		return leave(exit, ENGINE_EXIT_TRIPLE_FAULT);
	default:
		v->statistics[KVM_STAT_OTHER]++;
		kvm_describe_exit(v->run, exit->message, sizeof(exit->message));
		return leave(exit, ENGINE_EXIT_ERROR);
	}
}

/* The pair with kvm_vcpu_kick(): there first `leave`, then immediate_exit, then the signal; here first immediate_exit,
 * then `leave`. What was kicked for is seen, or KVM_RUN ends at once the next time round. KVM completes the port or
 * memory access under way before it ends (api.rst, section 5, immediate_exit), so that the state is whole then. */
static bool is_called(struct engine_vcpu *v)
{
	__atomic_store_n(&v->run->immediate_exit, 0, __ATOMIC_SEQ_CST);
	return atomic_exchange(&v->leave, false);
}

static void accept_signal(void)
{
	sigset_t set;

	sigemptyset(&set);
	sigaddset(&set, kvm_signal());
	pthread_sigmask(SIG_UNBLOCK, &set, NULL);
}

void kvm_vcpu_run(struct engine_vcpu *v, struct engine_exit *exit)
{
	memset(exit, 0, sizeof(*exit));
	if (!atomic_load(&v->thread)) {
		accept_signal();
		atomic_store(&v->thread, (int)syscall(SYS_gettid));
	}
	v->changed = true;
	do {
		v->statistics[KVM_STAT_EXITS]++;
		while (ioctl(v->fd, KVM_RUN, 0) < 0) {
			if (errno != EINTR && errno != EAGAIN) {
				snprintf(exit->message, sizeof(exit->message), "KVM_RUN: %s", strerror(errno));
				exit->reason = ENGINE_EXIT_ERROR;
				return;
			}
			v->statistics[KVM_STAT_INTERRUPTED]++;
			if (is_called(v)) {
				exit->reason = ENGINE_EXIT_KICKED;
				return;
			}
		}
	} while (handle_exit(v, exit));
}

/* An interrupt needs no kick: the kernel's chips see to it. */
void kvm_vcpu_kick(struct engine_vcpu *v, bool leave)
{
	int thread;

	if (!leave)
		return;
	atomic_store(&v->leave, true);
	__atomic_store_n(&v->run->immediate_exit, 1, __ATOMIC_SEQ_CST);
	thread = atomic_load(&v->thread);
	/* A thread that has ended meanwhile is an error that is none. */
	if (thread)
		syscall(SYS_tgkill, getpid(), thread, kvm_signal());
}

void kvm_vcpu_statistics(struct engine_vcpu *v, char *text, size_t size)
{
	static const char *const names[KVM_STATS] = {
		"exits", "exits_port", "exits_mmio", "exits_halt", "exits_interrupted", "exits_other"};
	size_t used = 0;

	if (size)
		text[0] = '\0';
	for (unsigned i = 0; i < KVM_STATS && used < size; i++)
		used += (size_t)snprintf(
			text + used, size - used, "%s %llu\n", names[i], (unsigned long long)v->statistics[i]);
}
