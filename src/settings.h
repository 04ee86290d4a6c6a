/* SPDX-License-Identifier: MIT */
/*
 * What a program's environment asks of us: the only reader of it in C.
 *
 *   KSM_PRELOAD=off         leave this program out
 *   KSM_PRELOAD=madvise     opt in by madvise only, which an exec never inherits
 *   KSM_PRELOAD_VERBOSE=1   say on stderr, in one line, what was done
 *
 * Freestanding: no libc is called.  Callers under AT_SECURE must not call it at all: there the
 * environment is an attacker's.
 */
#ifndef KSM_SETTINGS_H
#define KSM_SETTINGS_H

#include "text.h"

#include <stdbool.h>
#include <stddef.h>

struct settings {
    bool off;
    bool madvise;
    bool verbose;
};

/* What main() gets, as a constructor sees it.  Without glibc, which passes it, the arguments are whatever the
 * registers held: believed only if they fit. */
static inline bool is_called_by_glibc(int argc, char **argv, char **envp)
{
    return argc >= 0 && argv != NULL && envp == argv + argc + 1;
}

static inline struct settings read_settings(char *const *envp)
{
    struct settings found = {false, false, false};

    if (envp == NULL)
        return found;
    for (; *envp != NULL; envp++) {
        const char *entry = *envp;

        /* One compare rules out nearly every entry: a desktop session has over a hundred. */
        if (entry[0] != 'K' || entry[1] != 'S')
            continue;
        if (same_text(entry, "KSM_PRELOAD=off"))
            found.off = true;
        else if (same_text(entry, "KSM_PRELOAD=madvise"))
            found.madvise = true;
        else if (same_text(entry, "KSM_PRELOAD_VERBOSE=1"))
            found.verbose = true;
    }
    return found;
}

#endif
