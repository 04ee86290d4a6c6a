/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "members.h"

#include <ctype.h>
#include <dirent.h>
#include <inttypes.h>
#include <limits.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/*
 * Since Linux 6.10 a static PIE lies where its file's alignment allows, below the limit.  The vdso comes next
 * and fills what it leaves, unless that is less than the vdso's 3 to 8 pages.
 */
enum { LARGEST_GAP = 64 << 10 };

/*
 * The end of the last of a process's mappings below LIMIT, or below its stack: of the first thing that the
 * kernel mapped, the loader or a static PIE. 0 if there is none, or it may not be read.
 */
static uint64_t mappings_end(const char *process, uint64_t limit)
{
    char path[NAME_MAX + 16], line[PATH_MAX + 128];
    uint64_t start, end, last = 0;
    FILE *file;

    snprintf(path, sizeof path, "/proc/%s/maps", process);
    file = fopen(path, "re");
    if (file == NULL)
        return 0;
    while (fgets(line, sizeof line, file) != NULL) {
        if (sscanf(line, "%" SCNx64 "-%" SCNx64, &start, &end) != 2)
            continue;
        if (start >= limit || (limit == UINT64_MAX && strstr(line, "[stack]") != NULL))
            break;
        last = end;
    }
    fclose(file);
    return last;
}

static bool is_member(const char *process, uint64_t ours)
{
    uint64_t end = mappings_end(process, ours);

    return end <= ours && ours - end < LARGEST_GAP;
}

int members_print(FILE *output)
{
    uint64_t ours = mappings_end("self", UINT64_MAX);
    DIR *processes = ours != 0 ? opendir("/proc") : NULL;
    struct dirent *entry;

    if (processes == NULL)
        return -1;
    while ((entry = readdir(processes)) != NULL)
        if (isdigit((unsigned char)entry->d_name[0]) && atoi(entry->d_name) != getpid() &&
            is_member(entry->d_name, ours))
            fprintf(output, "%s\n", entry->d_name);
    closedir(processes);
    return 0;
}
