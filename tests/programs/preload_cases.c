/* SPDX-License-Identifier: MIT */
/*
 * Usage: preload_cases ROOT COMMAND...
 *
 * In ROOT, with a file system of its own on ROOT/etc: for each case on stdin, writes /etc/ld.so.preload and
 * runs the commands one after the other, ENTRY in them being the case's.  A case is two blobs, the entry and the
 * file; a blob is a 32 bit length and the bytes.  Each command gives three on stdout: its wait status, what it
 * printed, the file; before that comes one for the file as written.  A length of 0xffffffff: no file.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <err.h>
#include <fcntl.h>
#include <sched.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/wait.h>
#include <unistd.h>

#define FILE_NAME "/etc/ld.so.preload"
#define NONE UINT32_MAX

static char buffer[1 << 20];

static void put(const void *bytes, uint32_t size)
{
    if (fwrite(&size, sizeof size, 1, stdout) != 1 || (size != NONE && fwrite(bytes, 1, size, stdout) != size))
        err(1, "stdout");
}

static bool get(char *bytes, uint32_t *size)
{
    if (fread(size, sizeof *size, 1, stdin) != 1)
        return false;
    if (*size >= sizeof buffer || fread(bytes, 1, *size, stdin) != *size)
        errx(1, "a case is cut off");
    bytes[*size] = '\0';
    return true;
}

static uint32_t all_of(int file)
{
    size_t size = 0;
    ssize_t got;

    while ((got = read(file, buffer + size, sizeof buffer - size)) > 0)
        size += (size_t)got;
    close(file);
    return (uint32_t)size;
}

static void put_file(void)
{
    int file = open(FILE_NAME, O_RDONLY);

    if (file < 0)
        put(NULL, NONE);
    else
        put(buffer, all_of(file));
}

static void run(const char *command, char *entry)
{
    char words[256], *argv[8] = {NULL};
    int count = 0, ends[2], status;
    pid_t child;

    snprintf(words, sizeof words, "%s", command);
    for (char *word = strtok(words, " "); word != NULL && count < 7; word = strtok(NULL, " "))
        argv[count++] = strcmp(word, "ENTRY") == 0 ? entry : word;
    if (pipe(ends) < 0 || (child = fork()) < 0)
        err(1, "fork");
    if (child == 0) {
        close(ends[0]);
        dup2(ends[1], 1);
        dup2(ends[1], 2);
        close(ends[1]);
        execv(argv[0], argv);
        err(127, "%s", argv[0]);
    }
    close(ends[1]);
    {
        uint32_t size = all_of(ends[0]);

        if (waitpid(child, &status, 0) < 0)
            err(1, "waitpid");
        put(&status, sizeof status);
        put(buffer, size);
    }
}

static void empty_etc(void)
{
    DIR *etc = opendir("/etc");
    struct dirent *entry;

    if (etc == NULL)
        err(1, "/etc");
    while ((entry = readdir(etc)) != NULL)
        if (strcmp(entry->d_name, ".") != 0 && strcmp(entry->d_name, "..") != 0)
            unlinkat(dirfd(etc), entry->d_name, 0);
    closedir(etc);
}

int main(int argc, char **argv)
{
    static char text[sizeof buffer], entry[sizeof buffer];
    uint32_t size, entry_size;

    if (argc < 3 || unshare(CLONE_NEWNS) < 0 || mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL) < 0 ||
        chroot(argv[1]) < 0 || mount("none", "/etc", "tmpfs", 0, NULL) < 0 || chdir("/void") < 0)
        err(1, "%s", argc < 2 ? "ROOT" : argv[1]);
    while (get(entry, &entry_size) && get(text, &size)) {
        FILE *file = fopen(FILE_NAME, "w");

        if (file == NULL || fwrite(text, 1, size, file) != size || fclose(file) != 0)
            err(1, FILE_NAME);
        put_file();
        for (int i = 2; i < argc; i++) {
            run(argv[i], entry);
            put_file();
        }
        empty_etc();
    }
    return 0;
}
