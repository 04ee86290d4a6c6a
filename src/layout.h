/* SPDX-License-Identifier: MIT */
/*
 * One secret layout for the processes of a group: where the kernel will put the libraries and
 * mappings, the program, its heap and its stack.
 *
 * The next exec of this process is watched by a helper through ptrace(2): before the program's first
 * instruction it moves what the kernel has mapped, corrects the kernel's record of it, and lets go.
 */
#ifndef KSM_LAYOUT_H
#define KSM_LAYOUT_H

#include "group.h"

#include <stdbool.h>

/* Distances in bytes; what they are taken from is the same for all programs of a machine. */
struct layout {
    uint64_t stack_limit; /* soft RLIMIT_STACK during exec: mappings begin so far below the top */
    uint64_t program;     /* up from where programs lie without randomization */
    uint64_t heap;        /* up from the end of the program */
    uint64_t stack;       /* down from the top; a multiple of 16 only */
};

/* Returns the layout that the secret means on a machine with pages of that many bytes. */
struct layout layout_of(const struct group_secret *secret, uint64_t page);

/* What the next exec of this process is to come to. */
struct layout_wish {
    struct layout layout;
    const char *name; /* of the program in messages; NULL: none is printed */
    const char *comm; /* in /proc/PID/comm; NULL: as the kernel does it, that of the file */
    bool required;    /* where the layout cannot be had, end with status 4; else run without */
};

/* Grants it. Returns NULL, else why it cannot be, in static memory, with nothing changed. */
const char *layout_begin(const struct layout_wish *wish);

/* Takes layout_begin() back, after an exec that failed: the helper lets go, nothing stays changed. */
void layout_cancel(void);

#endif
