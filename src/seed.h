/* SPDX-License-Identifier: MIT */
/*
 * The seeds of hash tables: equal data has equal bytes only where they are equal. The only list of
 * the runtimes that let somebody else choose theirs.
 */
#ifndef KSM_SEED_H
#define KSM_SEED_H

#include "group.h"

/*
 * Puts the seeds of SECRET into the environment, and into ARGV where the runtime argv[0] takes an
 * option only; what the user has set stays. TOLD (may be NULL) hears the name of each one set.
 * Returns ARGV, or a longer copy of it in new memory; NULL when there is no memory.
 */
char **seed_set(const struct group_secret *secret, char **argv, void (*told)(const char *name));

#endif
