/* The keyboard controller. Every command is answered at once: a kernel that probes it waits half a second for an answer
 * that does not come. A20 is always open, as on machines of this century. */
#include "machine/i8042.h"

#include "base/cleanup.h"
#include "base/util.h"
#include "machine/board_internal.h"

/* Status, port 0x64 */
enum { OUTPUT_FULL = 1 << 0, SYSTEM = 1 << 2, WAS_COMMAND = 1 << 3, NOT_LOCKED = 1 << 4 };

enum command {
	READ_COMMAND_BYTE = 0x20,
	WRITE_COMMAND_BYTE = 0x60,
	DISABLE_AUX = 0xa7,
	ENABLE_AUX = 0xa8,
	TEST_AUX = 0xa9,
	SELF_TEST = 0xaa,
	TEST_KEYBOARD = 0xab,
	DISABLE_KEYBOARD = 0xad,
	ENABLE_KEYBOARD = 0xae,
	READ_OUTPUT_PORT = 0xd0,
	WRITE_OUTPUT_PORT = 0xd1,
	WRITE_KEYBOARD_BUFFER = 0xd2,
	WRITE_AUX_BUFFER = 0xd3,
	WRITE_AUX = 0xd4,
	PULSE = 0xf0, /* 0xf0 to 0xff: output lines whose bit is 0 go low for a moment; bit 0 is the reset line */
};

enum { COMMAND_KEYBOARD_OFF = 1 << 4, COMMAND_AUX_OFF = 1 << 5, COMMAND_SYSTEM = 1 << 2 };

/* Output port: bit 0 is the processor's reset (0: reset), bit 1 A20. */
#define OUTPUT_PORT 0x03

static void answer(struct i8042 *k, uint8_t value)
{
	k->output = value;
	k->status |= OUTPUT_FULL;
}

/* True: reset the machine. */
static bool run_command(struct i8042 *k, uint8_t command)
{
	k->expecting = 0;
	switch (command) {
	case READ_COMMAND_BYTE:
		answer(k, k->command);
		break;
	case WRITE_COMMAND_BYTE:
	case WRITE_OUTPUT_PORT:
	case WRITE_KEYBOARD_BUFFER:
	case WRITE_AUX_BUFFER:
	case WRITE_AUX:
		k->expecting = command;
		break;
	case DISABLE_AUX:
		k->command |= COMMAND_AUX_OFF;
		break;
	case ENABLE_AUX:
		k->command &= ~COMMAND_AUX_OFF;
		break;
	case DISABLE_KEYBOARD:
		k->command |= COMMAND_KEYBOARD_OFF;
		break;
	case ENABLE_KEYBOARD:
		k->command &= ~COMMAND_KEYBOARD_OFF;
		break;
	case SELF_TEST:
		k->status |= SYSTEM;
		answer(k, 0x55);
		break;
	case TEST_AUX:
	case TEST_KEYBOARD:
		answer(k, 0x01); /* clock line stuck low: nothing is plugged in */
		break;
	case READ_OUTPUT_PORT:
		answer(k, OUTPUT_PORT);
		break;
	default:
		return command >= PULSE && !(command & 1);
	}
	return false;
}

static bool write_data(struct i8042 *k, uint8_t value)
{
	uint8_t command = k->expecting;

	k->expecting = 0;
	switch (command) {
	case WRITE_COMMAND_BYTE:
		k->command = value & 0x7f;
		break;
	case WRITE_OUTPUT_PORT:
		return !(value & 1);
	case WRITE_KEYBOARD_BUFFER:
	/* Given back without the mark of the auxiliary port: this is how a kernel sees that there is none. */
	case WRITE_AUX_BUFFER:
		answer(k, value);
		break;
	}
	/* Bytes for the keyboard or the mouse go nowhere. */
	return false;
}

static uint64_t data_read(struct io_region *region, uint64_t offset, unsigned size)
{
	struct i8042 *k = container_of(region, struct i8042, data);
	scope_lock(&k->lock);

	k->status &= ~OUTPUT_FULL;
	return k->output;
}

static uint64_t control_read(struct io_region *region, uint64_t offset, unsigned size)
{
	struct i8042 *k = container_of(region, struct i8042, control);
	scope_lock(&k->lock);

	return k->status | NOT_LOCKED;
}

static void data_write(struct io_region *region, uint64_t offset, unsigned size, uint64_t value)
{
	struct i8042 *k = container_of(region, struct i8042, data);
	bool reset;

	{
		scope_lock(&k->lock);
		k->status &= ~WAS_COMMAND;
		reset = write_data(k, value);
	}
	if (reset)
		board_event(k->board, BOARD_EVENT_RESET);
}

static void control_write(struct io_region *region, uint64_t offset, unsigned size, uint64_t value)
{
	struct i8042 *k = container_of(region, struct i8042, control);
	bool reset;

	{
		scope_lock(&k->lock);
		k->status |= WAS_COMMAND;
		reset = run_command(k, value);
	}
	if (reset)
		board_event(k->board, BOARD_EVENT_RESET);
}

static uint64_t fast_read(struct io_region *region, uint64_t offset, unsigned size)
{
	struct i8042 *k = container_of(region, struct i8042, fast);
	scope_lock(&k->lock);

	return k->port92;
}

/* Port 0x92 (Intel ICH9 data sheet, section 13.7.3): bit 0 rising resets, bit 1 is A20. */
static void fast_write(struct io_region *region, uint64_t offset, unsigned size, uint64_t value)
{
	struct i8042 *k = container_of(region, struct i8042, fast);
	bool reset;

	{
		scope_lock(&k->lock);
		reset = value & ~k->port92 & 1;
		k->port92 = value & 3;
	}
	if (reset)
		board_event(k->board, BOARD_EVENT_RESET);
}

static const struct io_ops data_ops = {.read = data_read, .write = data_write};
static const struct io_ops control_ops = {.read = control_read, .write = control_write};
static const struct io_ops fast_ops = {.read = fast_read, .write = fast_write};

void i8042_reset(struct i8042 *k)
{
	scope_lock(&k->lock);
	/* As after the firmware's self-test, both ports off. */
	k->status = SYSTEM;
	k->command = COMMAND_SYSTEM | COMMAND_KEYBOARD_OFF | COMMAND_AUX_OFF;
	k->output = k->expecting = 0;
	k->port92 = 2;
}

int i8042_create(struct i8042 *k, struct board *board, struct error *err)
{
	int ret;

	k->board = board;
	pthread_mutex_init(&k->lock, NULL);
	ret = board_add_ports(board, &k->data, "i8042 data", &data_ops, 0x60, 1, err);
	if (!ret)
		ret = board_add_ports(board, &k->control, "i8042 command", &control_ops, 0x64, 1, err);
	if (!ret)
		ret = board_add_ports(board, &k->fast, "port 92", &fast_ops, 0x92, 1, err);
	return ret;
}

void i8042_destroy(struct i8042 *k)
{
	if (!k->board)
		return; /* never created */
	pthread_mutex_destroy(&k->lock);
}
