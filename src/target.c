/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "target.h"

#include <elf.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/xattr.h>
#include <unistd.h>

#if defined(__x86_64__)
enum { OUR_MACHINE = EM_X86_64 };
#elif defined(__aarch64__)
enum { OUR_MACHINE = EM_AARCH64 };
#else
enum { OUR_MACHINE = EM_NONE };
#endif

/* A script may name a script: the kernel follows five times (fs/exec.c, exec_binprm). */
enum { INTERPRETERS = 5, HEAD = 256 /* BINPRM_BUF_SIZE, since 5.1 */ };

/* How a file begins: as a script does, or as a program. */
union head {
    char text[HEAD + 1];
    Elf64_Ehdr elf;
};

/* Finds COMMAND as execvp would. */
static bool find(const char *command, char path[PATH_MAX])
{
    const char *folders = getenv("PATH");
    struct stat info;

    if (strchr(command, '/') != NULL) {
        snprintf(path, PATH_MAX, "%s", command);
        return true;
    }
    if (folders == NULL)
        folders = "/bin:/usr/bin"; /* glibc's and musl's default */
    for (;;) {
        size_t length = strcspn(folders, ":");

        snprintf(path, PATH_MAX, "%.*s%s%s", (int)length, folders, length > 0 ? "/" : "", command);
        if (stat(path, &info) == 0 && S_ISREG(info.st_mode) && access(path, X_OK) == 0)
            return true;
        if (folders[length] == '\0')
            return false;
        folders += length + 1;
    }
}

bool target_is_executable(const char *command)
{
    char path[PATH_MAX];
    struct stat info;

    return find(command, path) && stat(path, &info) == 0 && S_ISREG(info.st_mode) && access(path, X_OK) == 0;
}

/* Takes the interpreter out of a script's first line; false if it has none. */
static bool interpreter(const char head[HEAD + 1], char path[PATH_MAX])
{
    const char *start = head + 2 + strspn(head + 2, " \t");
    size_t length = strcspn(start, " \t\n");

    snprintf(path, PATH_MAX, "%.*s", (int)length, start);
    return length > 0;
}

static bool loads_interpreter(int file, const Elf64_Ehdr *elf)
{
    for (unsigned i = 0; i < elf->e_phnum; i++) {
        Elf64_Phdr part;

        if (pread(file, &part, sizeof part, (off_t)(elf->e_phoff + i * sizeof part)) != sizeof part)
            return false;
        if (part.p_type == PT_INTERP)
            return true;
    }
    return false;
}

static const char *obstacle(int file, const Elf64_Ehdr *elf)
{
    struct stat info;

    if (fstat(file, &info) == 0 && (info.st_mode & (S_ISUID | S_ISGID)) != 0)
        return "it is set-uid or set-gid";
    if (fgetxattr(file, "security.capability", NULL, 0) > 0)
        return "it has file capabilities";
    if (memcmp(elf->e_ident, ELFMAG, SELFMAG) != 0)
        return NULL; /* some other format: known when it runs */
    if (elf->e_ident[EI_CLASS] != ELFCLASS64 || elf->e_machine != OUR_MACHINE)
        return "it is of another architecture";
    if (elf->e_type == ET_EXEC && !loads_interpreter(file, elf))
        return "it is static and not position-independent";
    return NULL;
}

/* Opens the program that a command comes to and reads how it begins; -1 with *FAULT set or not. */
static int open_program(const char *command, union head *head, const char **fault)
{
    char path[PATH_MAX];

    *fault = NULL;
    if (!find(command, path))
        return -1;
    for (int i = 0; i <= INTERPRETERS; i++) {
        int file = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);

        if (file < 0) { /* what cannot be read cannot be traced either (fs/exec.c, would_dump) */
            if (access(path, X_OK) == 0)
                *fault = "its file cannot be read";
            return -1;
        }
        memset(head, 0, sizeof *head);
        if (read(file, head->text, HEAD) < 0)
            head->text[0] = '\0';
        if (memcmp(head->text, "#!", 2) != 0)
            return file;
        close(file);
        if (!interpreter(head->text, path))
            return -1;
    }
    return -1;
}

const char *target_obstacle(const char *command)
{
    union head head;
    const char *found;
    int file;

    if (OUR_MACHINE == EM_NONE)
        return "groups exist on x86_64 and aarch64 only";
    file = open_program(command, &head, &found);
    if (file >= 0) {
        found = obstacle(file, &head.elf);
        close(file);
    }
    return found;
}

bool target_loads_libraries(const char *command)
{
    union head head;
    const char *fault;
    int file = open_program(command, &head, &fault);
    bool loads = file >= 0 && obstacle(file, &head.elf) == NULL && loads_interpreter(file, &head.elf);

    if (file >= 0)
        close(file);
    return loads;
}
