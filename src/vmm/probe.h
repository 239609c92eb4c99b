/* Which engine a VM gets on this host. */
#pragma once

#include <stdbool.h>
#include <stdio.h>

#include "base/error.h"

struct engine;

/* The first engine that can run a stock kernel here; why one before it cannot is told to the user. NULL and err: none. */
const struct engine *vmm_choose_engine(char *note, size_t size, struct error *err);

/* Asks all of them and prints the choice, each one's verdict and the reason of a refusal. False: none can run. */
bool vmm_probe(FILE *to, bool json);
