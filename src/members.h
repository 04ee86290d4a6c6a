/* SPDX-License-Identifier: MIT */
/* The processes that have the layout of this process: forks of it, and other members of its group. */
#ifndef KSM_MEMBERS_H
#define KSM_MEMBERS_H

#include <stdio.h>

/*
 * Prints the PID of each other process whose mappings end where this one's do, or less than 64 KiB below, one
 * to a line; of ordinary processes one pair in 2^24 is so near.  Processes that may not be looked at are left
 * out.  Returns 0, or -1 and errno.
 */
int members_print(FILE *output);

#endif
