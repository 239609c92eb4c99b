/* VMGENID: see vmgenid.h. */
#include "machine/vmgenid.h"

#include <sys/random.h>

#include "machine/board_internal.h"

int vmgenid_create(struct vmgenid *g, struct error *err)
{
	if (getrandom(g->value, sizeof(g->value), 0) != sizeof(g->value))
		return error_errno(err, "VM generation ID: no random numbers");
	return 0;
}

int board_write_generation(struct board *board, struct error *err)
{
	if (!memory_write(board->config.memory, BOARD_GENERATION, board->vmgenid.value, GENERATION_BYTES))
		return error_set(err, ENOSPC, "VM generation ID: no guest memory at 0x%llx", BOARD_GENERATION);
	return 0;
}

int board_new_generation(struct board *board, struct error *err)
{
	int ret = vmgenid_create(&board->vmgenid, err);

	if (!ret)
		ret = board_write_generation(board, err);
	if (!ret)
		board_gpe(board, BOARD_GPE_GENERATION);
	return ret;
}
