/* Between the table of options.c and those of its parsers that are elsewhere. */
#pragma once

#include "vmm/options.h"

/* Takes the next comma-separated part off *text into a string of its own; two commas stand for one that belongs to the
 * part. NULL when there is none left. */
char *options_next_part(const char **text);

/* options_devices.c */
int options_parse_balloon(struct vmm_config *config, const char *value, struct error *err);
int options_parse_vsock(struct vmm_config *config, const char *value, struct error *err);
int options_parse_virtio_console(struct vmm_config *config, const char *value, struct error *err);
int options_parse_name(struct vmm_config *config, const char *value, struct error *err);
int options_parse_uuid(struct vmm_config *config, const char *value, struct error *err);
int options_parse_debug_exit(struct vmm_config *config, const char *value, struct error *err);
int options_parse_module(struct vmm_config *config, const char *value, struct error *err);
/* serial=TEXT of a disk */
int options_parse_disk_serial(struct vmm_disk *disk, const char *text, const char *value, struct error *err);
