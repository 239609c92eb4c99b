/* Between the two files of the jail. */
#pragma once

#include "base/error.h"

/* In the VM's process, as it begins: the descriptors that it was started with are closed by jail_enter(), when those
 * that are of use have been opened anew or duplicated. */
int jail_note_inherited(struct error *err);
