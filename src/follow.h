/* SPDX-License-Identifier: MIT */
/*
 * The variable by which `ksm-wrapper --follow` and libksm_preload_follow.so speak to each other:
 *
 *   KSM_PRELOAD_FOLLOW=MARK:COMM:SEEDS:UID/GROUP:WRAPPER
 *
 * MARK is ten characters, rewritten in place: all '0', or the PID of the program that has the layout
 * already, or 'R' and the number of a descriptor when the wrapper is to put that file's program into the
 * group.  COMM is the name of that program in /proc/PID/comm, filled up with '/', which it cannot contain.
 * SEEDS is 's', or '-' for --no-hash-seed.  UID is whose group it is: what another user runs stays out.  WRAPPER is a
 * path.
 */
#ifndef KSM_FOLLOW_H
#define KSM_FOLLOW_H

#define FOLLOW_VARIABLE "KSM_PRELOAD_FOLLOW"
#define FOLLOW_NOBODY "0000000000"
#define FOLLOW_NO_COMM "///////////////"

enum {
    FOLLOW_MARK = 0,
    FOLLOW_MARK_SIZE = sizeof FOLLOW_NOBODY - 1,
    FOLLOW_COMM = FOLLOW_MARK + FOLLOW_MARK_SIZE + 1,
    FOLLOW_COMM_SIZE = sizeof FOLLOW_NO_COMM - 1,
    FOLLOW_SEEDS = FOLLOW_COMM + FOLLOW_COMM_SIZE + 1,
    FOLLOW_GROUP = FOLLOW_SEEDS + 2,
};

#endif
