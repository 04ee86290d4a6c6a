/* SPDX-License-Identifier: MIT */
/* What is done with text where there is no libc. */
#ifndef KSM_TEXT_H
#define KSM_TEXT_H

#include <stdbool.h>
#include <stddef.h>

static inline bool same_text(const char *a, const char *b)
{
    while (*a != '\0' && *a == *b) {
        a++;
        b++;
    }
    return *a == *b;
}

static inline bool same_bytes(const char *a, const char *b, size_t size)
{
    for (size_t i = 0; i < size; i++)
        if (a[i] != b[i])
            return false;
    return true;
}

/* Forwards: `to` may begin before `from` in the same text. */
static inline void copy_bytes(char *to, const char *from, size_t size)
{
    for (size_t i = 0; i < size; i++)
        to[i] = from[i];
}

static inline size_t text_length(const char *text)
{
    size_t length = 0;

    while (text[length] != '\0')
        length++;
    return length;
}

#endif
