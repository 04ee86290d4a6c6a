/* SPDX-License-Identifier: MIT */
/* What exec has made of a program, before its first instruction: moved to a layout, or run as it should have been. */
#ifndef KSM_IMAGE_H
#define KSM_IMAGE_H

#include "layout.h"
#include "tracee.h"

#include <sys/resource.h>

/* What the exec needed changed, as it was. */
struct exec_settings {
    unsigned long personality;
    struct rlimit stack;
};

/*
 * Moves the program, whose `entry` is set, and puts the settings back. COMM is its name for /proc/PID/comm, or NULL.
 * False with errno and `step` set.
 */
bool image_move(struct tracee *t, const struct layout *layout, const char *comm, const struct exec_settings *old);

/*
 * Execs the program once more, from inside, with ordinary settings: what was moved is gone then. The
 * arguments are the kernel's from the first time, so a script's interpreter is given the script. False, errno.
 */
bool image_exec_again(struct tracee *t, const struct exec_settings *old);

/* Ends a program that can neither be moved nor be run as it is. */
void image_end(struct tracee *t, int status);

#endif
