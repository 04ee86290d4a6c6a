/* SPDX-License-Identifier: MIT */
/*
 * A group of processes that trust each other, as the file that holds its secret: the only reader
 * and writer of such files.
 *
 *   root          /run/ksm-preload/groups/NAME
 *   anybody else  $XDG_RUNTIME_DIR/ksm-preload/groups/NAME; where that variable names no private
 *                 folder of the user's, below /run/user/UID, else /tmp/ksm-preload-UID/groups/NAME
 */
#ifndef KSM_GROUP_H
#define KSM_GROUP_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

/* What a word of the secret decides. A new use takes a new word, at the end: words never change
 * meaning, so that processes started by the last version and by this one agree. */
enum group_word {
    GROUP_MMAP,
    GROUP_PROGRAM,
    GROUP_HEAP,
    GROUP_STACK,
    GROUP_PYTHON,
    GROUP_PERL,
    GROUP_NODE,
    GROUP_WORDS = 16, /* the rest is for later versions: a group may outlive an upgrade */
};

struct group_secret {
    uint64_t words[GROUP_WORDS];
};

/* Letters, digits and . _ @ + -, at most 64 of them, the first a letter or digit. */
bool group_name_is_valid(const char *name);

/*
 * Reads the secret of the group NAME, drawing it first if the group is new; processes that start at once
 * agree. Returns NULL, else in static memory what is wrong, as the end of a sentence.
 */
const char *group_open(const char *name, struct group_secret *secret);

/* Prints the path of every group's file, one to a line. Returns as group_open(). */
const char *group_list(FILE *output);

#endif
