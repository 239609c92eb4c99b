/* Configuration as JSON (docs/control.md): the members of an object are the options of the command line, by their
 * names; so the one table of options.c serves both. */
#pragma once

#include <jansson.h>

#include "base/error.h"
#include "vmm/options.h"

/* --config FILE: applies every member of the object in the file, in its order. */
int vmm_config_load(struct vmm_config *config, const char *path, struct error *err);

/* Applies one: a text or whole number as the command line has it, true for an option without a value (false leaves it
 * out), an object for a value of several parts ({"path": "a.img", "readonly": true} is "a.img,readonly"), or an array
 * of those to repeat the option. */
int vmm_config_set(struct vmm_config *config, const char *option, const json_t *value, struct error *err);
