/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "group.h"

#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

enum { NAME_LENGTH = 64 };

static char reason[PATH_MAX + 160];

__attribute__((format(printf, 1, 2))) static const char *because(const char *format, ...)
{
    va_list args;

    va_start(args, format);
    vsnprintf(reason, sizeof reason, format, args);
    va_end(args);
    return reason;
}

bool group_name_is_valid(const char *name)
{
    size_t length = strlen(name);

    if (length == 0 || length > NAME_LENGTH || !isalnum((unsigned char)name[0]))
        return false;
    for (size_t i = 0; i < length; i++)
        if (!isalnum((unsigned char)name[i]) && strchr("._@+-", name[i]) == NULL)
            return false;
    return true;
}

/* Whether the open file is this user's, and others may not do what MASK says. */
static bool is_private(int fd, mode_t type, mode_t mask)
{
    struct stat info;

    return fstat(fd, &info) == 0 && (info.st_mode & S_IFMT) == type && info.st_uid == geteuid() &&
           (info.st_mode & mask) == 0;
}

/* Opens the folder NAME below PARENT, of MODE; if it is missing and MAKE, makes it. -1 and errno. */
static int enter(int parent, const char *name, mode_t mode, bool make)
{
    mode_t before = umask(0); /* may be one that takes from the owner, too */
    int made = make ? mkdirat(parent, name, mode) : 0, folder;

    (void)umask(before);
    if (made != 0 && errno != EEXIST)
        return -1;
    folder = openat(parent, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (folder >= 0 && !is_private(folder, S_IFDIR, ~mode & 077)) {
        close(folder);
        errno = EPERM;
        return -1;
    }
    return folder;
}

/* Opens the folder of all groups and says in PATH where it is; -1 and errno, PATH then being what failed. */
static int open_folder(char path[PATH_MAX], bool make)
{
    const char *given = getenv("XDG_RUNTIME_DIR");
    char by_user[32];
    bool root = geteuid() == 0;
    const char *const places[] = {root ? "/run" : given, root ? NULL : by_user, root ? NULL : "/tmp"};
    int base = -1, ours = -1, groups = -1;

    snprintf(by_user, sizeof by_user, "/run/user/%u", (unsigned)geteuid());
    for (int i = 0; i < 3 && base < 0; i++) {
        if (places[i] == NULL || places[i][0] != '/' || strlen(places[i]) > PATH_MAX / 2)
            continue;
        base = open(places[i], O_RDONLY | O_DIRECTORY | O_CLOEXEC);
        snprintf(path, PATH_MAX, "%s", places[i]);
        /* /tmp is everybody's: there the name has the user in it. Else only a folder of our own counts. */
        if (base >= 0 && i < 2 && !is_private(base, S_IFDIR, 022)) {
            close(base);
            base = -1;
            errno = EPERM;
        }
        if (base >= 0) {
            char name[64] = "ksm-preload";
            size_t length = strlen(path);

            if (i == 2)
                snprintf(name, sizeof name, "ksm-preload-%u", (unsigned)geteuid());
            snprintf(path + length, PATH_MAX - length, "/%s", name);
            ours = enter(base, name, root ? 0755 : 0700, make);
        }
    }
    if (base >= 0)
        close(base);
    if (ours >= 0) {
        size_t length = strlen(path);

        snprintf(path + length, PATH_MAX - length, "/groups");
        groups = enter(ours, "groups", 0700, make);
        close(ours);
    }
    return groups;
}

static const char *folder_fault(const char *path)
{
    if (errno == EPERM || errno == ENOTDIR || errno == ELOOP)
        return because("%s is not this user's own, or open to others", path);
    return because("cannot make %s: %s", path, strerror(errno));
}

/*
 * Makes a file that has no name yet, or where the file system cannot do that, one whose name begins with a dot, which no
 * group's does. Not the PID: containers that share the folder have the same ones.
 */
static int make_file(int folder, char name[32])
{
    mode_t before = umask(0); /* may be one that takes from the owner, too */
    int file = -1;
    uint64_t number;

    name[0] = '\0';
    if (access("/proc/self/fd", X_OK) == 0) /* by which it gets its name */
        file = openat(folder, ".", O_WRONLY | O_TMPFILE | O_CLOEXEC, 0600);
    if (file < 0 && getrandom(&number, sizeof number, 0) == (ssize_t)sizeof number) {
        snprintf(name, 32, ".new-%016" PRIx64, number);
        file = openat(folder, name, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
    }
    (void)umask(before);
    return file;
}

/* Draws a secret and gives it the name, unless another process was quicker: both have an answer then. */
static const char *draw(int folder, const char *path, const char *name)
{
    struct group_secret secret;
    char unfinished[32], link[64];
    const char *fault = NULL;
    struct rlimit most;
    ssize_t written = -1;
    int file;

    if (getrandom(&secret, sizeof secret, 0) != (ssize_t)sizeof secret)
        return because("cannot draw a secret: %s", strerror(errno));
    if (getrlimit(RLIMIT_FSIZE, &most) == 0 && most.rlim_cur < sizeof secret)
        return because("cannot write %s/%s: the limit on the size of files is too low (ulimit -f)", path, name);
    /* A whole file appears at once: nobody ever reads half a secret. */
    file = make_file(folder, unfinished);
    if (file >= 0)
        written = write(file, &secret, sizeof secret);
    if (written >= 0 && written < (ssize_t)sizeof secret)
        errno = ENOSPC;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    if (written != (ssize_t)sizeof secret ||
        ((unfinished[0] != '\0' ? linkat(folder, unfinished, folder, name, 0)
                                : linkat(AT_FDCWD, link, folder, name, AT_SYMLINK_FOLLOW)) != 0 &&
         errno != EEXIST))
        fault = because("cannot write %s/%s: %s", path, name, strerror(errno));
    if (file >= 0)
        close(file);
    if (file >= 0 && unfinished[0] != '\0')
        (void)unlinkat(folder, unfinished, 0);
    explicit_bzero(&secret, sizeof secret);
    return fault;
}

const char *group_open(const char *name, struct group_secret *secret)
{
    char path[PATH_MAX];
    const char *fault = NULL;
    int folder = open_folder(path, true), file;

    if (folder < 0)
        return folder_fault(path);
    file = openat(folder, name, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
    if (file < 0 && errno == ENOENT) {
        fault = draw(folder, path, name);
        if (fault == NULL)
            file = openat(folder, name, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
    }
    if (fault == NULL && file < 0)
        fault = because("cannot read %s/%s: %s", path, name, strerror(errno));
    else if (fault == NULL && !is_private(file, S_IFREG, 077))
        fault = because("%s/%s is not this user's own, or open to others", path, name);
    else if (fault == NULL && read(file, secret, sizeof *secret) != (ssize_t)sizeof *secret)
        fault = because("%s/%s is too short to be a group's secret", path, name);
    if (file >= 0)
        close(file);
    close(folder);
    return fault;
}

const char *group_list(FILE *output)
{
    char path[PATH_MAX];
    int folder = open_folder(path, false);
    DIR *entries;

    if (folder < 0)
        return errno == ENOENT ? NULL : folder_fault(path); /* nobody has made a group yet */
    entries = fdopendir(folder);
    if (entries == NULL)
        return because("cannot list %s: %s", path, strerror(errno));
    for (struct dirent *entry; (entry = readdir(entries)) != NULL;)
        if (group_name_is_valid(entry->d_name))
            fprintf(output, "%s/%s\n", path, entry->d_name);
    closedir(entries);
    return NULL;
}
