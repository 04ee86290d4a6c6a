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
 * Where the kernel began to map: the end of the first thing it mapped, the loader or a static PIE, which is
 * the last mapping below the stack. With WANTED, whether some mapping ends there.
 */
static uint64_t mappings_end(const char *process, uint64_t wanted)
{
    char path[NAME_MAX + 16], line[PATH_MAX + 128];
    uint64_t start, end, last = 0;
    FILE *file;

    snprintf(path, sizeof path, "/proc/%s/maps", process);
    file = fopen(path, "re");
    if (file == NULL)
        return 0;
    while (fgets(line, sizeof line, file) != NULL && (wanted == 0 || last != wanted)) {
        if (sscanf(line, "%" SCNx64 "-%" SCNx64, &start, &end) != 2)
            continue;
        if (wanted == 0 && strstr(line, "[stack]") != NULL)
            break;
        last = end;
    }
    fclose(file);
    return wanted == 0 || last == wanted ? last : 0;
}

int members_print(FILE *output)
{
    uint64_t ours = mappings_end("self", 0);
    DIR *processes = ours != 0 ? opendir("/proc") : NULL;
    struct dirent *entry;

    if (processes == NULL)
        return -1;
    while ((entry = readdir(processes)) != NULL)
        if (isdigit((unsigned char)entry->d_name[0]) && atoi(entry->d_name) != getpid() &&
            mappings_end(entry->d_name, ours) != 0)
            fprintf(output, "%s\n", entry->d_name);
    closedir(processes);
    return 0;
}
