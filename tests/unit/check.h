/* SPDX-License-Identifier: MIT */
/* CHECK(condition) says where it failed and goes on; main() ends with `return check_status()`. */
#ifndef KSM_CHECK_H
#define KSM_CHECK_H

#include <stdio.h>
#include <string.h>

static int failed_checks;

#define CHECK(condition) check(condition, __FILE__, __LINE__, #condition)
#define CHECK_TEXT(found, expected) check_text(found, expected, __FILE__, __LINE__, #found)

static inline void check(int holds, const char *file, int line, const char *text)
{
    if (!holds) {
        fprintf(stderr, "%s:%d: not so: %s\n", file, line, text);
        failed_checks++;
    }
}

static inline void check_text(const char *found, const char *expected, const char *file, int line,
                              const char *text)
{
    if (found == NULL || strcmp(found, expected) != 0) {
        fprintf(stderr, "%s:%d: %s is '%s', not '%s'\n", file, line, text,
                found != NULL ? found : "NULL", expected);
        failed_checks++;
    }
}

static inline int check_status(void)
{
    return failed_checks == 0 ? 0 : 1;
}

#endif
