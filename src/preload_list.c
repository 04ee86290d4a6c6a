/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "preload_list.h"

#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* What glibc splits LD_PRELOAD at.  A tab is part of a name there, so it has to stay one here. */
static const char separators[] = " :";

static const char *base_name(const char *path)
{
    const char *slash = strrchr(path, '/');

    return slash != NULL ? slash + 1 : path;
}

/* A path to a copy that is gone does not load us.  A bare name or a $LIB is for the loader to find. */
static bool is_copy_of(const char *entry, const char *ours)
{
    if (strcmp(base_name(entry), base_name(ours)) != 0)
        return false;
    return strchr(entry, '/') == NULL || strchr(entry, '$') != NULL || access(entry, R_OK) == 0;
}

char *preload_list_with(const char *given, const char *ours)
{
    size_t given_length = given != NULL ? strlen(given) : 0;
    char *copy = malloc(given_length + 1);
    char *list = malloc(given_length + strlen(ours) + 2);
    char *end = list, *rest = copy, *entry;
    bool have_ours = false;

    if (copy == NULL || list == NULL) {
        free(copy);
        free(list);
        return NULL;
    }
    memcpy(copy, given != NULL ? given : "", given_length + 1);
    *end = '\0';

    while ((entry = strsep(&rest, separators)) != NULL) {
        bool is_ours = *entry != '\0' && is_copy_of(entry, ours);

        if (*entry == '\0' || (is_ours && have_ours))
            continue;
        have_ours |= is_ours;
        if (end != list)
            *end++ = ':';
        end = stpcpy(end, entry);
    }
    if (!have_ours) {
        if (end != list)
            *end++ = ':';
        strcpy(end, ours);
    }
    free(copy);
    return list;
}

bool preload_list_can_hold(const char *path)
{
    return path[strcspn(path, " :\t\n\v\f\r$")] == '\0';
}
