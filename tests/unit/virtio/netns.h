/* A network namespace of the test's own: the kernel's network stack plays the guest, or the other end of a tap.
 * Descriptors made between enter and leave stay in it. */
#pragma once

#include <stdbool.h>
#include <stdint.h>

/* false: not allowed here (the test is skipped). */
bool netns_create(void);
void netns_enter(void);
void netns_leave(void);
void netns_destroy(void);

/* In the namespace: a tap. With vnet_header it is the test's end, each frame behind 12 bytes of virtio header,
 * checksums and segmentation left to us; its descriptor is returned. Otherwise it is made persistent, for
 * net_open("tap=NAME"), and 0 returned. address: IPv4 with /24, or NULL. */
int netns_tap(const char *name, bool vnet_header, const char *address, unsigned mtu, const uint8_t *mac);
/* In the namespace: a packet socket bound to the device. */
int netns_packet_socket(const char *name);
