/* A vCPU over 1 MiB of flat memory, with what translator and TLB supply to the privileged architecture replaced by the
 * least that does. */
#pragma once

#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <string.h>
#include <cmocka.h>

#include "base/util.h"
#include "engine/bt/system.h"

#define FAKE_MEMORY 0x100000
#define GDT 0x1000
#define IDT 0x2000
#define TSS 0x3000
#define LDT 0x4000
#define CODE 0x8000
#define HANDLER 0x9000 /* + 16 * vector */
#define STACK0 0x10000 /* tops */
#define STACK3 0x20000
#define STACK_IST 0x30000

/* Selectors of the GDT that fake_long and fake_protected build */
#define KERNEL32 0x08
#define KERNEL64 0x10
#define KERNEL_DATA 0x18
#define USER32 0x23
#define USER_DATA 0x2b
#define USER64 0x33
#define ABSENT_DATA 0x38
#define TASK 0x40
#define CONFORMING64 0x50
#define GATE 0x5b /* call gate of DPL 3 to KERNEL64 (long mode) or KERNEL32 */
#define EXECUTE_ONLY 0x68
#define LOCAL 0x70
#define USER_STACK16 0x83

struct fake {
	struct bt_vcpu *v;
	uint8_t memory[FAKE_MEMORY];
	uint64_t absent; /* a page that is not there: linear address */
	unsigned flushes, kept_global, flushed_pages, mode_updates, parks;
	uint64_t tsc, port_value, msr_value, apic_base;
	unsigned port, port_size, ports;
	uint8_t cr8;
	bool eoi_refused, eoi_ended; /* what the board answers and was told */
	uint64_t ipi_cpus;
	uint32_t ipi_icr;
	int woken;
};
extern struct fake fake;

int fake_setup(void **state);
int fake_teardown(void **state);

/* Long mode, at CPL 0 or 3, 64-bit code; 32-bit protected mode without paging; real mode. Each with all 256 gates. */
struct bt_vcpu *fake_long(unsigned cpl);
struct bt_vcpu *fake_protected(unsigned cpl);
struct bt_vcpu *fake_real(void);
void fake_use_model(const char *name);

void fake_gate64(unsigned vector, uint16_t selector, uint64_t offset, unsigned type, unsigned dpl, unsigned ist);
void fake_gate32(unsigned vector, uint16_t selector, uint32_t offset, unsigned type, unsigned dpl);
void fake_descriptor(uint16_t selector, uint64_t base, uint32_t limit, uint16_t attributes);
void poke(uint64_t address, uint64_t value, unsigned size);
uint64_t peek(uint64_t address, unsigned size);

/* Decodes the bytes in the vCPU's mode and executes them at v->rip. */
enum system_result execute(const void *bytes, size_t size);
#define EXECUTE(...) execute((const uint8_t[]){__VA_ARGS__}, sizeof((const uint8_t[]){__VA_ARGS__}))

void assert_fault(enum system_result result, int vector, int error); /* error -1: none */

extern const struct CMUnitTest exception_tests[], instruction_tests[], model_tests[];
extern const unsigned exception_count, instruction_count, model_count;
