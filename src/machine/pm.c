/* ACPI's fixed hardware. The machine is always in ACPI mode: there is no SMI command port and SCI_EN cannot be cleared.
 */
#include "machine/pm.h"

#include "base/cleanup.h"
#include "base/util.h"
#include "machine/board_internal.h"
#include "machine/pci_internal.h"

/* Offsets from BOARD_PORT_PM_BASE */
enum { PM1_STATUS = 0, PM1_ENABLE = 2, PM1_CONTROL = 4, PM_TIMER = 8, PM_SIZE = 12 };

/* PM1 status and enable (ACPI 6.4, tables 4.11 and 4.12) */
enum { TMR = 1 << 0, GLOBAL = 1 << 5, POWER_BUTTON = 1 << 8, RTC = 1 << 10, WAKE = 1 << 15 };
#define PM1_STATUS_BITS (TMR | GLOBAL | POWER_BUTTON | WAKE)
/* RTC can be enabled, as kernels insist, but never happens: the clock would set it to wake the machine from sleep. */
#define PM1_ENABLE_BITS (TMR | GLOBAL | POWER_BUTTON | RTC)

/* PM1 control (table 4.13) */
enum { SCI_EN = 1 << 0, SLP_TYP_SHIFT = 10, SLP_EN = 1 << 13 };
#define PM1_CONTROL_BITS 0x1c02 /* SLP_TYP and BM_RLD */
#define SLP_TYP_S5 5		/* as the DSDT's \_S5 says */

/* Reset control register, port 0xcf9 (Intel ICH9 data sheet, section 13.7.5) */
enum { RESET_CPU = 1 << 2 };

static uint64_t timer_value(const struct pm *pm)
{
	return scale(clock_now() - pm->start, PM_TIMER_HZ, NS_PER_SECOND);
}

/* Notes changes of bit 31 in TMR_STS (ACPI 6.4, section 4.8.2.1), watches for the next while the guest wants to know,
 * and drives the SCI. The lock is held. */
static void update(struct pm *pm, struct wakeups *w)
{
	struct loop *loop = pm->board->config.loop;
	uint64_t carries = timer_value(pm) >> 31;

	if (carries != pm->carries)
		pm->status |= TMR;
	pm->carries = carries;
	if (pm->enable & TMR && !(pm->status & TMR))
		loop_timer_set(loop, &pm->timer, pm->start + scale_up((carries + 1) << 31, NS_PER_SECOND, PM_TIMER_HZ));
	else
		loop_timer_cancel(loop, &pm->timer);
	board_line(pm->board, BOARD_SCI_IRQ,
		(pm->status & pm->enable & PM1_ENABLE_BITS) || (pm->gpe_status & pm->gpe_enable), w);
}

static void timer_fired(struct loop_timer *timer)
{
	struct pm *pm = container_of(timer, struct pm, timer);
	struct wakeups w = {0};

	{
		scope_lock(&pm->lock);
		update(pm, &w);
	}
	board_wake(pm->board, &w);
}

void pm_power_button(struct pm *pm)
{
	struct wakeups w = {0};

	{
		scope_lock(&pm->lock);
		pm->status |= POWER_BUTTON;
		update(pm, &w);
	}
	board_wake(pm->board, &w);
}

void pm_gpe(struct pm *pm, unsigned gpe)
{
	struct wakeups w = {0};

	{
		scope_lock(&pm->lock);
		pm->gpe_status |= 1u << gpe;
		update(pm, &w);
	}
	board_wake(pm->board, &w);
}

/* Two bytes of status, cleared by writing ones, then two of enables (ACPI 6.4, section 4.8.4.1). */
static uint64_t gpe_read(struct io_region *region, uint64_t offset, unsigned size)
{
	struct pm *pm = container_of(region, struct pm, gpe_region);
	scope_lock(&pm->lock);

	return (pm->gpe_status | (uint32_t)pm->gpe_enable << 16) >> (8 * offset);
}

static void gpe_write(struct io_region *region, uint64_t offset, unsigned size, uint64_t value)
{
	struct pm *pm = container_of(region, struct pm, gpe_region);
	struct wakeups w = {0};

	{
		scope_lock(&pm->lock);
		for (unsigned i = 0; i < size; i++, value >>= 8) {
			unsigned shift = (offset + i) & 1 ? 8 : 0;
			uint16_t bits = (value & 0xff) << shift, keep = 0xff00 >> shift;

			if (offset + i < 2)
				pm->gpe_status &= ~bits;
			else
				pm->gpe_enable = (pm->gpe_enable & keep) | bits;
		}
		update(pm, &w);
	}
	board_wake(pm->board, &w);
}

/* The whole block as bytes, so that every width and alignment of access works. */
static uint64_t region_read(struct io_region *region, uint64_t offset, unsigned size)
{
	struct pm *pm = container_of(region, struct pm, region);
	struct wakeups w = {0};
	unsigned __int128 all;

	{
		scope_lock(&pm->lock);
		if (offset < PM_TIMER)
			update(pm, &w);
		all = pm->status | (uint64_t)pm->enable << 16 | (uint64_t)(pm->control | SCI_EN) << 32;
		all |= (unsigned __int128)(uint32_t)timer_value(pm) << 64;
	}
	board_wake(pm->board, &w);
	return all >> (8 * offset);
}

/* Writes one byte; true: the guest wants to sleep. */
static bool write_byte(struct pm *pm, unsigned offset, uint8_t value)
{
	unsigned shift = offset & 1 ? 8 : 0;
	uint16_t bits = value << shift, keep = 0xff00 >> shift;

	switch (offset & ~1u) {
	case PM1_STATUS:
		pm->status &= ~(bits & PM1_STATUS_BITS);
		break;
	case PM1_ENABLE:
		pm->enable = (pm->enable & keep) | (bits & PM1_ENABLE_BITS);
		break;
	case PM1_CONTROL:
		pm->control = (pm->control & keep) | (bits & PM1_CONTROL_BITS);
		return bits & SLP_EN;
	}
	return false;
}

static void region_write(struct io_region *region, uint64_t offset, unsigned size, uint64_t value)
{
	struct pm *pm = container_of(region, struct pm, region);
	struct wakeups w = {0};
	bool off = false;

	{
		scope_lock(&pm->lock);
		for (unsigned i = 0; i < size; i++, value >>= 8) {
			if (write_byte(pm, offset + i, value))
				off = pm->control >> SLP_TYP_SHIFT == SLP_TYP_S5;
		}
		update(pm, &w);
	}
	board_wake(pm->board, &w);
	if (off)
		board_event(pm->board, BOARD_EVENT_POWER_OFF);
}

uint8_t board_reset_port_read(struct board *board)
{
	scope_lock(&board->pm.lock);
	return board->pm.reset_port;
}

void board_reset_port_write(struct board *board, uint8_t value)
{
	{
		scope_lock(&board->pm.lock);
		board->pm.reset_port = value & ~RESET_CPU;
	}
	if (value & RESET_CPU)
		board_event(board, BOARD_EVENT_RESET);
}

static const struct io_ops region_ops = {.read = region_read, .write = region_write};
static const struct io_ops gpe_ops = {.read = gpe_read, .write = gpe_write};

void pm_reset(struct pm *pm)
{
	struct wakeups w = {0};

	scope_lock(&pm->lock);
	pm->status = pm->enable = pm->control = 0;
	pm->gpe_status = pm->gpe_enable = 0;
	pm->reset_port = 0;
	pm->start = clock_now();
	pm->carries = 0;
	update(pm, &w); /* lowers the SCI; there is nobody to wake */
}

int pm_create(struct pm *pm, struct board *board, struct error *err)
{
	pm->board = board;
	pm->timer.function = timer_fired;
	pthread_mutex_init(&pm->lock, NULL);
	int ret = board_add_ports(board, &pm->region, "ACPI PM", &region_ops, BOARD_PORT_PM_BASE, PM_SIZE, err);

	if (!ret)
		ret = board_add_ports(board, &pm->gpe_region, "ACPI GPE", &gpe_ops, BOARD_PORT_GPE, 4, err);
	return ret;
}

void pm_destroy(struct pm *pm)
{
	if (!pm->board)
		return; /* never created */
	loop_timer_cancel(pm->board->config.loop, &pm->timer);
	pthread_mutex_destroy(&pm->lock);
}
