/* SPDX-License-Identifier: MIT */
/*
 * broken, with -shared -fPIC: a library that kills every program that loads it. By a fault: a signal that
 * is only sent does not kill the system's first program.
 */
#include <stddef.h>

__attribute__((constructor)) static void die(void)
{
    volatile int *volatile nowhere = NULL; /* else GCC removes what it sees to fault */

    *nowhere = 0;
}
