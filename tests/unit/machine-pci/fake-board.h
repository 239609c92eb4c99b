/* A board of spaces and memory alone, which writes down the interrupts it is told of. */
#pragma once

#include "machine/board.h"

struct message {
	uint64_t address;
	uint32_t data;
};

struct board {
	struct space *pio, *mmio;
	struct guest_memory memory;
	struct message messages[16]; /* the last ones */
	unsigned messages_sent;
	bool level[24];
	unsigned level_changes;
	uint8_t reset_port;
	bool cpus_change;
	uint64_t cpus_absent;
};

void fake_board_create(struct board *board, uint64_t memory);
void fake_board_destroy(struct board *board);
