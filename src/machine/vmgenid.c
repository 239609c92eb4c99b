/* VMGENID: see vmgenid.h. */
#include "machine/vmgenid.h"

#include <sys/random.h>

#include "machine/aml.h"
#include "machine/board_internal.h"

#define NOTIFY_CHANGED 0x80

int vmgenid_create(struct vmgenid *g, struct error *err)
{
	if (getrandom(g->value, sizeof(g->value), 0) != sizeof(g->value))
		return error_errno(err, "VM generation ID: no random numbers");
	return 0;
}

int vmgenid_write(struct board *board, struct error *err)
{
	if (!memory_write(board->config.memory, BOARD_GENERATION, board->vmgenid.value, GENERATION_BYTES))
		return error_set(err, ENOSPC, "VM generation ID: no guest memory at 0x%llx", BOARD_GENERATION);
	return 0;
}

int board_new_generation(struct board *board, struct error *err)
{
	int ret = vmgenid_create(&board->vmgenid, err);

	if (!ret)
		ret = vmgenid_write(board, err);
	if (!ret)
		board_gpe(board, BOARD_GPE_GENERATION);
	return ret;
}

void vmgenid_describe(struct aml *aml)
{
	size_t device = aml_begin_device(aml, "VGEN");

	aml_name_string(aml, "_HID", "HSTL0001");
	aml_name_string(aml, "_CID", "VM_Gen_Counter");
	aml_name_string(aml, "_DDN", "VM_Gen_Counter");
	aml_name_integer(aml, "_STA", 0xf);
	aml_name(aml, "ADDR");
	size_t address = aml_begin_package(aml, 2);
	aml_integer(aml, (uint32_t)BOARD_GENERATION);
	aml_integer(aml, BOARD_GENERATION >> 32);
	aml_end(aml, address);
	aml_end(aml, device);
}

void vmgenid_describe_event(struct aml *aml)
{
	size_t method = aml_begin_method(aml, "_E04", 0);

	aml_operator(aml, AML_NOTIFY);
	aml_path(aml, "\\\x2e_SB_VGEN");
	aml_integer(aml, NOTIFY_CHANGED);
	aml_end(aml, method);
}
