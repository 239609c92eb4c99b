/* The local APIC of one vCPU, as xAPIC (memory-mapped) and x2APIC (MSRs): Intel SDM volume 3, chapter 11 "Advanced
 * Programmable Interrupt Controller (APIC)". */
#pragma once

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "base/loop.h"

struct board;
struct wakeups;

/* Delivery modes (SDM 11.5.1, 11.6.1) */
enum apic_mode {
	APIC_FIXED = 0,
	APIC_LOWEST = 1,
	APIC_SMI = 2,
	APIC_NMI = 4,
	APIC_INIT = 5,
	APIC_STARTUP = 6,
	APIC_EXTINT = 7,
};

/* What travels between the IOAPIC, MSIs, IPIs and the local APICs. */
struct apic_message {
	uint32_t destination;
	bool wide;    /* a 32-bit x2APIC destination, else 8 bits */
	bool logical; /* destination mode */
	uint8_t mode; /* enum apic_mode */
	uint8_t vector;
	bool level; /* trigger mode: the end is broadcast to the IOAPIC */
};

/* Register numbers: the xAPIC offset / 16, which is also the x2APIC MSR less 0x800 (SDM table 11-6). */
enum lapic_register {
	LAPIC_ID = 0x02,
	LAPIC_VERSION = 0x03,
	LAPIC_TPR = 0x08,
	LAPIC_APR = 0x09,
	LAPIC_PPR = 0x0a,
	LAPIC_EOI = 0x0b,
	LAPIC_LDR = 0x0d,
	LAPIC_DFR = 0x0e,
	LAPIC_SVR = 0x0f,
	LAPIC_ISR = 0x10, /* 8 registers */
	LAPIC_TMR = 0x18,
	LAPIC_IRR = 0x20,
	LAPIC_ESR = 0x28,
	LAPIC_ICR = 0x30,
	LAPIC_ICR2 = 0x31,
	LAPIC_LVT = 0x32, /* 6 registers: enum lapic_lvt */
	LAPIC_TIMER_INITIAL = 0x38,
	LAPIC_TIMER_CURRENT = 0x39,
	LAPIC_TIMER_DIVIDE = 0x3e,
	LAPIC_SELF_IPI = 0x3f,
};

enum lapic_lvt { LVT_TIMER, LVT_THERMAL, LVT_PERFORMANCE, LVT_LINT0, LVT_LINT1, LVT_ERROR, LVT_COUNT };

#define LVT_MASKED (1u << 16)
#define SVR_ENABLED (1u << 8)
#define SVR_NO_EOI_BROADCAST (1u << 12)
#define APIC_BASE_BSP (1u << 8)
#define APIC_BASE_X2APIC (1u << 10)
#define APIC_BASE_ENABLED (1u << 11)
#define APIC_BASE_ADDRESS 0x000ffffffffff000ull
/* ESR bits (SDM 11.5.3) */
#define ESR_SEND_ILLEGAL_VECTOR (1u << 5)
#define ESR_RECEIVE_ILLEGAL_VECTOR (1u << 6)
#define ESR_ILLEGAL_REGISTER (1u << 7)

/* SDM 11.5.4. Ticks of the bus clock are nanoseconds (1 GHz) and divided by 1 to 128. */
struct lapic_timer {
	struct loop_timer loop;
	uint32_t initial, divide; /* registers */
	uint64_t deadline;	  /* of the next interrupt, CLOCK_MONOTONIC; 0: stopped */
	uint64_t period;	  /* ns */
	uint64_t tsc_deadline;	  /* IA32_TSC_DEADLINE; 0: disarmed */
};

/* The atomic fields are written with the lock held and read by other vCPUs without it, to find destinations and to see
 * whether something is pending. */
struct lapic {
	struct board *board;
	unsigned cpu; /* also the APIC ID, which cannot be changed */
	pthread_mutex_t lock;
	_Atomic uint64_t base; /* IA32_APIC_BASE */
	_Atomic uint32_t ldr, dfr, svr;
	_Atomic uint8_t tpr, ppr;
	uint32_t irr[8], isr[8], tmr[8];
	uint32_t lvt[LVT_COUNT];
	uint32_t esr, esr_new; /* as latched by the last write; what happened since */
	uint64_t icr;
	struct lapic_timer timer;
	atomic_bool pending; /* a vector can be delivered now */
	atomic_bool extint;  /* LINT0 passes the 8259's INTR on */
	bool eoi_offered;    /* the guest may have ended the highest vector in service, which is not known here yet */
};

void lapic_create(struct lapic *lapic, struct board *board, unsigned cpu);
void lapic_destroy(struct lapic *lapic);
/* Power-on, or after an INIT IPI (SDM 11.4.7.1 and 11.4.7.3). Takes the lock. */
void lapic_reset(struct lapic *lapic, bool init);

/* Delivers to all its destinations; true when a local APIC accepted it. Takes their locks. */
bool lapic_deliver(struct board *board, const struct apic_message *message, struct wakeups *w);
/* The vCPU's IPI: a write of the interrupt command register (SDM 11.6.1; 11.12.9 when `wide`). */
void lapic_send_ipi(struct lapic *lapic, uint64_t icr, bool wide, struct wakeups *w);
/* An interrupt to these local APICs, of the vector and mode that icr has; how many there were. */
unsigned lapic_send_to(struct board *board, uint64_t set, uint32_t icr, struct wakeups *w);
/* The 8259's INTR went up; called with the 8259's lock held. */
void lapic_extint_raised(struct lapic *lapic, struct wakeups *w);

/* The highest deliverable vector, moved from IRR to ISR, or -1. */
int lapic_acknowledge(struct lapic *lapic);
/* KVM's para-virtual EOI: see board_eoi_offer. */
bool lapic_eoi_offer(struct lapic *lapic);
void lapic_eoi_settle(struct lapic *lapic, bool ended, struct wakeups *w);
void lapic_set_tpr(struct lapic *lapic, uint8_t tpr, struct wakeups *w);

bool lapic_is_mapped_at(const struct lapic *lapic, uint64_t gpa);
uint64_t lapic_mmio_read(struct lapic *lapic, uint32_t offset, unsigned size);
void lapic_mmio_write(struct lapic *lapic, uint32_t offset, unsigned size, uint64_t value);
/* IA32_APIC_BASE, IA32_TSC_DEADLINE and the x2APIC registers; false: #GP. */
bool lapic_msr_read(struct lapic *lapic, uint32_t msr, uint64_t *value);
bool lapic_msr_write(struct lapic *lapic, uint32_t msr, uint64_t value);

/* ---- among lapic*.c; the lock is held unless said otherwise ---- */
bool lapic_accept(struct lapic *lapic, uint8_t vector, bool level, struct wakeups *w); /* takes the lock */
void lapic_update(
	struct lapic *lapic, struct wakeups *w); /* PPR and pending, after any change of what they depend on */
void lapic_raise_lvt(struct lapic *lapic, enum lapic_lvt which, struct wakeups *w);
void lapic_error(struct lapic *lapic, uint32_t bit, struct wakeups *w);
void lapic_set_lvt(struct lapic *lapic, enum lapic_lvt which, uint32_t value);
void lapic_eoi(struct lapic *lapic, struct wakeups *w); /* takes the lock, then the IOAPIC's */

void lapic_timer_reset(struct lapic *lapic);
void lapic_timer_fired(struct loop_timer *timer); /* on the loop's thread; takes the lock */
void lapic_timer_set_initial(struct lapic *lapic, uint32_t value);
void lapic_timer_set_divide(struct lapic *lapic, uint32_t value);
uint32_t lapic_timer_current(struct lapic *lapic);
/* Before the mode bits of LVT_TIMER become those of value. */
void lapic_timer_mode_changes(struct lapic *lapic, uint32_t value);
bool lapic_timer_in_tsc_mode(const struct lapic *lapic);
/* Writes IA32_TSC_DEADLINE; takes the lock. */
void lapic_timer_set_tsc_deadline(struct lapic *lapic, uint64_t value, struct wakeups *w);

static inline bool lapic_is_x2apic(const struct lapic *lapic)
{
	return atomic_load(&lapic->base) & APIC_BASE_X2APIC;
}

static inline bool lapic_is_enabled(const struct lapic *lapic)
{
	return atomic_load(&lapic->base) & APIC_BASE_ENABLED;
}
