/* SPDX-License-Identifier: MIT */
/* The program that a command comes to: through PATH and the interpreters of scripts. */
#ifndef KSM_TARGET_H
#define KSM_TARGET_H

#include <stdbool.h>

/*
 * Returns NULL if the program of COMMAND can be given a layout, else why not, in static memory.  A command
 * that cannot be found or run at all has no obstacle here: exec says that better.
 */
const char *target_obstacle(const char *command);

/* Whether COMMAND is a file that this user may execute, so that a refusal has another reason. */
bool target_is_executable(const char *command);

/* Whether the loader runs before it, with LD_PRELOAD: it is dynamic and not privileged. */
bool target_loads_libraries(const char *command);

#endif
