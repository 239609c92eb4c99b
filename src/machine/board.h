/* The virtual board: one for every VM engine. See docs/architecture.md for the memory map. A board owns its chips; the
 * devices are attached to it by src/vmm. All functions are safe from any thread unless they say otherwise.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "base/error.h"
#include "base/loop.h"
#include "machine/memory.h"
#include "machine/space.h"

/* Memory map */
#define BOARD_ECAM_BASE 0xe0000000ull  /* 256 MiB: 256 buses */
#define BOARD_ECAM_SIZE 0x10000000ull
#define BOARD_PCI_MMIO_BASE 0xc0000000ull /* 32-bit BARs, up to ECAM */
#define BOARD_PCI_MMIO_SIZE 0x20000000ull
#define BOARD_IOAPIC_BASE 0xfec00000ull
#define BOARD_LAPIC_BASE 0xfee00000ull
#define BOARD_PCI_MMIO64_BASE 0x8000000000ull /* 64-bit BARs: from 512 GiB */
#define BOARD_PCI_MMIO64_SIZE 0x8000000000ull

/* Ports */
#define BOARD_PORT_COM1 0x3f8 /* interrupt 4 */
#define BOARD_PORT_PM_BASE 0x600 /* ACPI: PM1a event 0x600 to 0x603, control 0x604 to 0x605, PM timer 0x608 to 0x60b */
#define BOARD_PORT_RESET 0xcf9	 /* ACPI reset register: value 6 */
#define BOARD_PORT_GPE 0x620 /* ACPI: 16 general-purpose events, status 0x620 to 0x621, enable 0x622 to 0x623 */
#define BOARD_PORT_PCI_HOTPLUG 0x630 /* see hotplug_pci.h; 12 bytes */
#define BOARD_PORT_HOTPLUG 0x640 /* see hotplug.h; 64 bytes */
#define BOARD_SCI_IRQ 9

/* General-purpose events: the DSDT's method _Exx of each says what has happened. */
enum board_gpe {
	BOARD_GPE_PCI = 1, /* hot plug: a PCI device has come, or is asked to go */
	BOARD_GPE_CPU = 2,
	BOARD_GPE_MEMORY = 3,
	BOARD_GPE_GENERATION = 4, /* VMGENID */
};

/* What can come and go beside PCI devices; numbers: of the vCPU, of the slot of memory (memory.h). */
enum board_hotplug { BOARD_HOTPLUG_CPU, BOARD_HOTPLUG_MEMORY };
enum board_hotplug_event {
	BOARD_HOTPLUG_GONE,    /* the guest has let go of it, whether or not somebody asked */
	BOARD_HOTPLUG_REFUSED, /* it will not */
};

enum board_event {
	BOARD_EVENT_POWER_OFF, /* ACPI S5 */
	BOARD_EVENT_RESET,     /* 0xcf9, i8042, keyboard reset line */
	/* The guest goes on after these */
	BOARD_EVENT_PANIC,	  /* its kernel has panicked */
	BOARD_EVENT_CRASH_KERNEL, /* and has started another kernel that saves what it can */
};

/* What the board asks of whoever built it (src/vmm). Called from any thread, without board locks held. */
struct board_host {
	void *opaque;
	void (*event)(void *opaque, enum board_event event);
	void (*interrupt_ready)(void *opaque, unsigned cpu);	 /* something is now pending for cpu: kick it */
	void (*init)(void *opaque, unsigned cpu);		 /* INIT IPI */
	void (*startup)(void *opaque, unsigned cpu, uint8_t vector); /* SIPI: starts at vector << 12, if waiting */
	void (*nmi)(void *opaque, unsigned cpu);		 /* NULL: NMIs are dropped */
	/* A test kernel wrote this to the debug exit port. NULL: there is no such port. */
	void (*debug_exit)(void *opaque, uint32_t value);
	/* The guest has let go of these PCI slots (bit n: slot n); whether or not somebody asked. On a vCPU's thread,
	 * in the middle of an access: a note, no more. May be NULL. */
	void (*pci_ejected)(void *opaque, uint32_t slots);
	/* Likewise. */
	void (*hotplug)(void *opaque, enum board_hotplug kind, unsigned number, enum board_hotplug_event event);
	void (*wake)(void *opaque, unsigned cpu); /* run cpu again even if it is halted with interrupts off */
};

struct board_config {
	unsigned cpus; /* 1 to 64: all that there can be */
	unsigned cpus_there; /* from the beginning, the others can be plugged in; 0: all */
	bool cpus_change; /* the guest is told of hot plug */
	struct guest_memory *memory;
	struct loop *loop; /* timers of the chips run on it */
	const struct board_host *host;
	uint64_t tsc_hz;			/* the guest's TSC frequency, for TSC deadline timers */
	uint64_t (*tsc_now)(void *opaque, unsigned cpu); /* the guest's TSC now; any thread; opaque is host->opaque */
};

/* Interrupt chips that an engine brings along: 8259s, IOAPIC, local APICs and 8254. Any thread may call these. */
struct board_chips {
	void *opaque;
	void (*reset)(void *opaque); /* power-on state, as firmware hands them over; the vCPUs are stopped */
	void (*irq)(void *opaque, unsigned gsi, bool level);
	void (*msi)(void *opaque, uint64_t address, uint32_t data);
	/* Guest writes of any size at gpa only add 1 to that eventfd from now on; on false: no more. A failure (-errno)
	 * leaves them to the board's space, where they mean the same. */
	int (*bell)(void *opaque, uint64_t gpa, int fd, bool on);
};

struct board;
struct pci_bus;
struct serial;

int board_create(struct board **board, const struct board_config *config, struct error *err);
/* On the loop's thread or when the loop has ended, with the vCPUs stopped; the loop must not run any more after it. */
void board_destroy(struct board *board);
/* Everything back to power-on state; the vCPUs are stopped while it is called. */
void board_reset(struct board *board);

struct space *board_pio(struct board *board);
struct space *board_mmio(struct board *board);
struct pci_bus *board_pci(struct board *board);
struct serial *board_serial(struct board *board);
struct guest_memory *board_memory(struct board *board);
struct loop *board_loop(struct board *board);

/* From now on these serve instead of the board's own, which stay unused; NULL: the board's own again. The vCPUs are
 * stopped; devices that are to have bells are attached later. */
void board_use_chips(struct board *board, const struct board_chips *chips);
/* Guest writes to bells (machine/space.h) ring them; otherwise nobody does and ops->write is called. */
bool board_has_bells(struct board *board);

/* Puts the VM generation ID (vmgenid.h) where the guest finds it: at each start. */
int board_write_generation(struct board *board, struct error *err);
/* The guest goes on from an earlier state: its VM generation ID changes, and it is told. The vCPUs are stopped. */
int board_new_generation(struct board *board, struct error *err);
/* The guest's ACPI power button is pressed. */
void board_power_button(struct board *board);

/* Sets a general-purpose event's status: an SCI if the guest has enabled it. */
void board_gpe(struct board *board, enum board_gpe gpe);

/* PCI hot plug: the guest learns that the device in this slot is new, or that it is asked to let go of it (it answers by
 * host->pci_ejected, or never). */
void board_pci_added(struct board *board, unsigned slot);
void board_pci_ask_removal(struct board *board, unsigned slot);

/* Hot plug of vCPUs and memory: which numbers (bit n) are there; one that is not comes; one that is there is asked to go
 * (the guest answers by host->hotplug, or never). The vCPU is ready to be started, the memory is plugged before. */
bool board_cpus_can_change(struct board *board);
uint64_t board_hotplug_there(struct board *board, enum board_hotplug kind);
void board_hotplug_add(struct board *board, enum board_hotplug kind, unsigned number);
void board_hotplug_ask_removal(struct board *board, enum board_hotplug kind, unsigned number);

/* Level of a global system interrupt: 0 to 15 reach both 8259s and the IOAPIC (with the usual override of 0 to 2), 16 to
 * 23 the IOAPIC only. */
void board_irq(struct board *board, unsigned gsi, bool level);
/* A message-signalled interrupt (SDM volume 3, section 11.11): what a write of data to address would do. */
void board_msi(struct board *board, uint64_t address, uint32_t data);

/* The engine's side: these fill struct engine_board (engine/engine.h). opaque is the struct board. */
uint64_t board_pio_read(void *board, unsigned cpu, uint16_t port, unsigned size);
void board_pio_write(void *board, unsigned cpu, uint16_t port, unsigned size, uint64_t value);
uint64_t board_mmio_read(void *board, unsigned cpu, uint64_t gpa, unsigned size);
void board_mmio_write(void *board, unsigned cpu, uint64_t gpa, unsigned size, uint64_t value);
bool board_msr_read(void *board, unsigned cpu, uint32_t msr, uint64_t *value);
bool board_msr_write(void *board, unsigned cpu, uint32_t msr, uint64_t value);
uint8_t board_cr8_read(void *board, unsigned cpu);
void board_cr8_write(void *board, unsigned cpu, uint8_t value);
int board_interrupt_ack(void *board, unsigned cpu);
bool board_interrupt_pending(void *board, unsigned cpu);
bool board_eoi_offer(void *board, unsigned cpu);
void board_eoi_settle(void *board, unsigned cpu, bool ended);
unsigned board_send_ipi(void *board, unsigned cpu, uint64_t cpus, uint32_t icr);
void board_wake_cpu(void *board, unsigned cpu);

/* Writes RSDP, XSDT, FADT, FACS, DSDT, MADT, MCFG into guest memory for this many CPUs and the attached PCI devices;
 * *rsdp is the root pointer's guest address (also findable in the BIOS area at 0xe0000). */
int acpi_write_tables(struct board *board, unsigned cpus, uint64_t *rsdp, struct error *err);
