/* 16550A UART (National Semiconductor PC16550D data sheet) at a port base. */
#pragma once

#include <stddef.h>
#include <stdint.h>

struct serial;

/* Where transmitted bytes go, in chunks. output() says how many it took and does not block; it is called on the loop's
 * thread and on vCPU threads, by one at a time. What it did not take waits in the port: serial_flush() offers it again, and
 * a vCPU that transmits while the port's own buffer is full calls wait(), which returns when the sink may have room. */
void serial_set_output(struct serial *serial, size_t (*output)(void *opaque, const uint8_t *bytes, size_t n),
	void (*wait)(void *opaque), void *opaque);
/* Offers received bytes; returns how many were taken (the receive FIFO has room for few); call again when room() runs.
 */
size_t serial_input(struct serial *serial, const uint8_t *bytes, size_t n);
/* Called when the guest has read input and there is room again. */
void serial_set_room(struct serial *serial, void (*room)(void *opaque), void *opaque);
/* Gives out transmitted bytes that still wait; the board does it before power-off and reset. From any thread. */
void serial_flush(struct serial *serial);
