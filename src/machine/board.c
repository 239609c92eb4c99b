/* The board: its chips put together, where an access or an interrupt goes, and the engine's side of it. */
#include "machine/board.h"

#include <stdlib.h>

#include "base/cleanup.h"
#include "machine/board_internal.h"
#include "machine/pci_internal.h"

#define PIO_LIMIT 0x10000ull
#define MMIO_LIMIT (1ull << 52) /* the architecture's widest physical address */
#define COM1_IRQ 4

/* MSI address and data (SDM volume 3, section 11.11) */
#define MSI_ADDRESS 0xfeeull /* bits 20 and up */

static uint64_t size_mask(unsigned size)
{
	return size >= 8 ? ~0ull : (1ull << (8 * size)) - 1;
}

/* ---- making and ending ---- */

int board_add_ports(struct board *board, struct io_region *region, const char *name, const struct io_ops *ops,
	uint16_t base, unsigned size, struct error *err)
{
	*region = (struct io_region){.name = name, .ops = ops, .base = base, .size = size};
	return space_add(board->pio, region, err);
}

static int create_chips(struct board *board, struct error *err)
{
	int ret = pic_create(&board->pic, board, err);

	if (!ret)
		ret = ioapic_create(&board->ioapic, board, err);
	if (!ret)
		ret = pit_create(&board->pit, board, err);
	if (!ret)
		ret = cmos_create(&board->cmos, board, err);
	if (!ret)
		ret = pm_create(&board->pm, board, err);
	if (!ret)
		ret = i8042_create(&board->i8042, board, err);
	if (!ret)
		ret = serial_create(&board->serial, board, BOARD_PORT_COM1, COM1_IRQ, err);
	if (!ret)
		ret = pci_create(&board->pci, board, err);
	if (!ret)
		ret = hotplug_pci_create(&board->hotplug_pci, board, err);
	if (!ret)
		ret = hotplug_create(&board->hotplug, board, err);
	if (!ret)
		ret = pvpanic_create(&board->pvpanic, board, err);
	if (!ret)
		ret = debug_exit_create(&board->debug_exit, board, err);
	if (!ret)
		ret = vmgenid_create(&board->vmgenid, err);
	return ret;
}

static void reset_chips(struct board *board)
{
	/* Devices first: they lower their lines. */
	serial_reset(board->serial);
	pit_reset(&board->pit);
	cmos_reset(&board->cmos);
	pm_reset(&board->pm);
	hotplug_pci_reset(&board->hotplug_pci);
	hotplug_reset(&board->hotplug);
	i8042_reset(&board->i8042);
	pic_reset(&board->pic);
	ioapic_reset(&board->ioapic);
	for (unsigned i = 0; i < board->config.cpus; i++)
		lapic_reset(&board->lapics[i], false);
	if (board->chips)
		board->chips->reset(board->chips->opaque);
}

int board_create(struct board **out, const struct board_config *config, struct error *err)
{
	struct board *board;
	int ret;

	if (config->cpus < 1 || config->cpus > BOARD_CPUS_MAX)
		return error_set(err, EINVAL, "board: %u CPUs; choose 1 to %d", config->cpus, BOARD_CPUS_MAX);
	if (!config->tsc_hz)
		return error_set(err, EINVAL, "board: the guest's TSC frequency is not known");
	board = calloc(1, sizeof(*board));
	if (!board)
		return error_set(err, ENOMEM, "board: out of memory");
	board->config = *config;
	if (!config->cpus_there)
		board->config.cpus_there = config->cpus;
	board->host = *config->host;
	board->lapics = calloc(config->cpus, sizeof(*board->lapics));
	if (!board->lapics) {
		free(board);
		return error_set(err, ENOMEM, "board: out of memory");
	}
	for (unsigned i = 0; i < config->cpus; i++)
		lapic_create(&board->lapics[i], board, i);
	ret = space_create(&board->pio, "port", PIO_LIMIT, err);
	if (!ret)
		ret = space_create(&board->mmio, "memory", MMIO_LIMIT, err);
	if (!ret)
		ret = create_chips(board, err);
	if (ret) {
		board_destroy(board);
		return ret;
	}
	reset_chips(board);
	*out = board;
	return 0;
}

void board_destroy(struct board *board)
{
	if (!board)
		return;
	hotplug_destroy(&board->hotplug);
	hotplug_pci_destroy(&board->hotplug_pci);
	pci_destroy(board->pci);
	serial_destroy(board->serial);
	i8042_destroy(&board->i8042);
	pm_destroy(&board->pm);
	cmos_destroy(&board->cmos);
	pit_destroy(&board->pit);
	ioapic_destroy(&board->ioapic);
	pic_destroy(&board->pic);
	for (unsigned i = 0; i < board->config.cpus; i++)
		lapic_destroy(&board->lapics[i]);
	space_destroy(board->mmio);
	space_destroy(board->pio);
	free(board->lapics);
	free(board);
}

void board_reset(struct board *board)
{
	pci_reset(board->pci);
	reset_chips(board);
}

void board_use_chips(struct board *board, const struct board_chips *chips)
{
	board->chips = chips;
	space_use_bells(board->mmio, chips ? chips->bell : NULL, chips ? chips->opaque : NULL);
}

bool board_has_bells(struct board *board)
{
	return board->chips && board->chips->bell;
}

struct space *board_pio(struct board *board)
{
	return board->pio;
}

struct space *board_mmio(struct board *board)
{
	return board->mmio;
}

struct pci_bus *board_pci(struct board *board)
{
	return board->pci;
}

struct serial *board_serial(struct board *board)
{
	return board->serial;
}

struct guest_memory *board_memory(struct board *board)
{
	return board->config.memory;
}

struct loop *board_loop(struct board *board)
{
	return board->config.loop;
}

/* ---- towards the host ---- */

void board_wake(struct board *board, const struct wakeups *w)
{
	const struct board_host *host = &board->host;

	for (uint64_t rest = w->init; rest; rest &= rest - 1)
		host->init(host->opaque, __builtin_ctzll(rest));
	for (uint64_t rest = w->startup; rest; rest &= rest - 1)
		host->startup(host->opaque, __builtin_ctzll(rest), w->startup_vector);
	if (host->nmi) {
		for (uint64_t rest = w->nmi; rest; rest &= rest - 1)
			host->nmi(host->opaque, __builtin_ctzll(rest));
	}
	for (uint64_t rest = w->kick; rest; rest &= rest - 1)
		host->interrupt_ready(host->opaque, __builtin_ctzll(rest));
}

void board_event(struct board *board, enum board_event event)
{
	serial_flush(board->serial);
	board->host.event(board->host.opaque, event);
}

void board_power_button(struct board *board)
{
	pm_power_button(&board->pm);
}

void board_gpe(struct board *board, enum board_gpe gpe)
{
	pm_gpe(&board->pm, gpe);
}

/* ---- interrupts ---- */

void board_line(struct board *board, unsigned gsi, bool level, struct wakeups *w)
{
	/* Pin 2 carries the timer (the MADT's override); interrupt 2 of the 8259s is the cascade. */
	if (gsi == 2)
		return;
	if (board->chips) {
		/* Interrupt 0 is the 8254's, and theirs. */
		if (gsi)
			board->chips->irq(board->chips->opaque, gsi, level);
		return;
	}
	if (gsi < 16)
		pic_line(&board->pic, gsi, level, w);
	ioapic_line(&board->ioapic, gsi == 0 ? 2 : gsi, level, w);
}

void board_irq(struct board *board, unsigned gsi, bool level)
{
	struct wakeups w = {0};

	board_line(board, gsi, level, &w);
	board_wake(board, &w);
}

void board_msi(struct board *board, uint64_t address, uint32_t data)
{
	const struct apic_message message = {
		.destination = address >> 12 & 0xff,
		.logical = address & 1 << 2,
		.mode = data >> 8 & 7,
		.vector = data,
		.level = data & 1 << 15 && (data >> 8 & 7) <= APIC_LOWEST,
	};
	struct wakeups w = {0};

	/* The guest may have given the device any address: what is RAM is written, as a real device would. */
	if (address >> 20 != MSI_ADDRESS) {
		memory_write(board->config.memory, address, &data, sizeof(data));
		return;
	}
	if (board->chips) {
		board->chips->msi(board->chips->opaque, address, data);
		return;
	}
	/* A level-triggered message whose level is 0 is a de-assertion, which nobody waits for. */
	if (message.level && !(data & 1 << 14))
		return;
	lapic_deliver(board, &message, &w);
	board_wake(board, &w);
}

bool board_interrupt_pending(void *opaque, unsigned cpu)
{
	const struct board *board = opaque;
	const struct lapic *l = &board->lapics[cpu];

	return atomic_load(&l->pending) || (cpu == 0 && atomic_load(&board->pic.output) && atomic_load(&l->extint));
}

int board_interrupt_ack(void *opaque, unsigned cpu)
{
	struct board *board = opaque;
	struct lapic *l = &board->lapics[cpu];
	int vector = -1;

	/* ExtINT is not subject to the local APIC's priorities (SDM 11.8.3). */
	if (cpu == 0 && atomic_load(&board->pic.output) && atomic_load(&l->extint))
		vector = pic_acknowledge(&board->pic);
	if (vector < 0 && atomic_load(&l->pending))
		vector = lapic_acknowledge(l);
	return vector;
}

bool board_eoi_offer(void *opaque, unsigned cpu)
{
	struct board *board = opaque;

	return lapic_eoi_offer(&board->lapics[cpu]);
}

void board_eoi_settle(void *opaque, unsigned cpu, bool ended)
{
	struct board *board = opaque;
	struct wakeups w = {0};

	lapic_eoi_settle(&board->lapics[cpu], ended, &w);
	board_wake(board, &w);
}

unsigned board_send_ipi(void *opaque, unsigned cpu, uint64_t cpus, uint32_t icr)
{
	struct board *board = opaque;
	struct wakeups w = {0};
	unsigned sent = lapic_send_to(board, cpus, icr, &w);

	board_wake(board, &w);
	return sent;
}

void board_wake_cpu(void *opaque, unsigned cpu)
{
	struct board *board = opaque;

	if (board->host.wake)
		board->host.wake(board->host.opaque, cpu);
}

/* ---- accesses ---- */

uint64_t board_pio_read(void *opaque, unsigned cpu, uint16_t port, unsigned size)
{
	struct board *board = opaque;
	uint64_t value;

	if (!space_read(board->pio, port, size, &value))
		return size_mask(size);
	return value & size_mask(size);
}

void board_pio_write(void *opaque, unsigned cpu, uint16_t port, unsigned size, uint64_t value)
{
	struct board *board = opaque;

	space_write(board->pio, port, size, value & size_mask(size));
}

uint64_t board_mmio_read(void *opaque, unsigned cpu, uint64_t gpa, unsigned size)
{
	struct board *board = opaque;
	struct lapic *l = &board->lapics[cpu];
	uint64_t value;

	/* Each vCPU sees its own local APIC, wherever it has put it; one moved onto RAM stays hidden behind the RAM. */
	if (lapic_is_mapped_at(l, gpa))
		value = lapic_mmio_read(l, gpa & 0xfff, size);
	else if (!space_read(board->mmio, gpa, size, &value))
		value = ~0ull;
	return value & size_mask(size);
}

void board_mmio_write(void *opaque, unsigned cpu, uint64_t gpa, unsigned size, uint64_t value)
{
	struct board *board = opaque;
	struct lapic *l = &board->lapics[cpu];

	value &= size_mask(size);
	if (lapic_is_mapped_at(l, gpa))
		lapic_mmio_write(l, gpa & 0xfff, size, value);
	else
		space_write(board->mmio, gpa, size, value);
}

bool board_msr_read(void *opaque, unsigned cpu, uint32_t msr, uint64_t *value)
{
	struct board *board = opaque;

	return lapic_msr_read(&board->lapics[cpu], msr, value);
}

bool board_msr_write(void *opaque, unsigned cpu, uint32_t msr, uint64_t value)
{
	struct board *board = opaque;

	return lapic_msr_write(&board->lapics[cpu], msr, value);
}

uint8_t board_cr8_read(void *opaque, unsigned cpu)
{
	struct board *board = opaque;

	return atomic_load(&board->lapics[cpu].tpr) >> 4;
}

void board_cr8_write(void *opaque, unsigned cpu, uint8_t value)
{
	struct board *board = opaque;
	struct wakeups w = {0};

	lapic_set_tpr(&board->lapics[cpu], value << 4, &w);
	board_wake(board, &w);
}
