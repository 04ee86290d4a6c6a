/* SPDX-License-Identifier: MIT */
/* The LD_PRELOAD variable as a list: the only place that composes it. */
#ifndef KSM_PRELOAD_LIST_H
#define KSM_PRELOAD_LIST_H

#include <stdbool.h>

/*
 * Returns GIVEN (may be NULL) with the library OURS in it exactly once, in new memory for free();
 * NULL when there is no memory.
 *
 * Every entry of GIVEN is kept, in order and by its own spelling; OURS goes last, unless a readable copy of
 * it (any path, or the bare name) is there already.  Entries are separated by one colon, and none is empty.
 */
char *preload_list_with(const char *given, const char *ours);

/* Whether the loader can read PATH as one entry: glibc splits at space and colon and expands
 * $ORIGIN, $LIB, $PLATFORM (elf/rtld.c, elf/dl-load.c); musl splits at any white space. */
bool preload_list_can_hold(const char *path);

#endif
