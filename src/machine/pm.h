/* ACPI's fixed hardware (ACPI 6.4, section 4.8): PM1a event and control blocks, the PM timer, the reset register,
 * and a block of 16 general-purpose events (section 4.8.4.1). */
#pragma once

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "base/loop.h"
#include "machine/space.h"

struct board;

#define PM_TIMER_HZ 3579545

struct pm {
	struct board *board;
	pthread_mutex_t lock;
	uint16_t status, enable, control;
	uint8_t reset_port;
	uint64_t start;		 /* of the PM timer, CLOCK_MONOTONIC */
	uint64_t carries;	 /* changes of the PM timer's top bit already turned into TMR_STS */
	struct loop_timer timer; /* the next such change, while TMR_EN is set */
	struct io_region region;
	uint16_t gpe_status, gpe_enable;
	struct io_region gpe_region;
};

int pm_create(struct pm *pm, struct board *board, struct error *err);
void pm_destroy(struct pm *pm);
void pm_reset(struct pm *pm);
void pm_power_button(struct pm *pm);
void pm_gpe(struct pm *pm, unsigned gpe); /* 0 to 15 */
