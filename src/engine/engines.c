/* Which engines there are. */
#include "engine/engine.h"

const struct engine *const engines[] = {&engine_kvm, &engine_bt, NULL};
