/* SPDX-License-Identifier: MIT */
/*
 * The text of /etc/ld.so.preload: what the loader takes from it, and how our entry gets in and out. From
 * text to text: no system call, no allocation, no libc.
 *
 * The grammar is that of glibc's elf/rtld.c (do_preload's caller, 2.31 to 2.41), with what it does beyond intention: a second
 * comment can be read as names, and a name that is commented out can be loaded.
 */
#ifndef KSM_PRELOAD_FILE_H
#define KSM_PRELOAD_FILE_H

#include <stdbool.h>
#include <stddef.h>

/* This much or more is no list of libraries; the buffers of whoever edits it have this size. */
#define PRELOAD_FILE_MAX ((size_t)64 * 1024)

struct preload_name {
    size_t start, length; /* bytes of the file */
};

/* An iteration over the names that the loader would try to load, in its order. */
struct preload_names {
    char *text; /* a copy, altered as the loader alters its own */
    size_t at, size, last;
};

/* Begins with COPY, the SIZE bytes of the file, which are altered. */
void preload_names_begin(struct preload_names *names, char *copy, size_t size);
bool preload_names_next(struct preload_names *names, struct preload_name *name);

/* Whether the name at TEXT is one of our libraries: by its base name, whatever the path. */
bool preload_name_is_ours(const char *text, size_t length);

/* Whether a person reading TEXT would take NAME for a part of a comment. */
bool preload_name_in_comment(const char *text, struct preload_name name);

/*
 * Both edit TEXT of SIZE bytes in place and return the new size.  TEXT has room for PRELOAD_FILE_MAX bytes, SCRATCH for twice
 * as many.  They change no byte of what is not ours, and each result has been read again as the loader would: all
 * other names are the same and in the same order.
 *
 * preload_file_remove takes out every name that is ours: its line if nothing else is on it, else the name and what
 * separates it; where that would change the meaning of a comment, it is overwritten with blanks.
 *
 * preload_file_add has ENTRY as the only name that is ours, in a line of its own at the end, or else at the start; an old
 * last line without a newline stays one without, so that removing gives the old bytes. It returns
 * PRELOAD_FILE_IMPOSSIBLE if both would change what the loader takes from a comment, or there is no room.
 */
#define PRELOAD_FILE_IMPOSSIBLE ((size_t)-1)
size_t preload_file_remove(char *text, size_t size, char *scratch);
size_t preload_file_add(char *text, size_t size, const char *entry, char *scratch);

#endif
