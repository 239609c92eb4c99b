/* A board for tests: see fake-board.h. */
#include "fake-board.h"

#include <stdio.h>
#include <stdlib.h>

#include "machine/pci_internal.h"

void fake_board_create(struct board *board, uint64_t memory)
{
	struct error err = {0};

	*board = (struct board){0};
	if (space_create(&board->pio, "ports", 0x10000, &err) ||
		space_create(&board->mmio, "memory", 1ull << 52, &err) ||
		(memory && memory_create(&board->memory, memory, &err))) {
		fprintf(stderr, "%s\n", err.text);
		exit(1);
	}
}

void fake_board_destroy(struct board *board)
{
	space_destroy(board->pio);
	space_destroy(board->mmio);
	if (board->memory.ranges)
		memory_destroy(&board->memory);
}

struct space *board_pio(struct board *board)
{
	return board->pio;
}

struct space *board_mmio(struct board *board)
{
	return board->mmio;
}

struct guest_memory *board_memory(struct board *board)
{
	return &board->memory;
}

bool board_cpus_can_change(struct board *board)
{
	return board->cpus_change;
}

uint64_t board_hotplug_there(struct board *board, enum board_hotplug kind)
{
	return kind == BOARD_HOTPLUG_CPU ? ~board->cpus_absent : 0;
}

void board_irq(struct board *board, unsigned gsi, bool level)
{
	board->level[gsi] = level;
	board->level_changes++;
}

void board_msi(struct board *board, uint64_t address, uint32_t data)
{
	board->messages[board->messages_sent++ % 16] = (struct message){address, data};
}

uint8_t board_reset_port_read(struct board *board)
{
	return board->reset_port;
}

void board_reset_port_write(struct board *board, uint8_t value)
{
	board->reset_port = value;
}
