/* SPDX-License-Identifier: MIT */
/*
 * ksm-rescue: the only writer of /etc/ld.so.preload.  By itself it takes our entry out.
 *
 * It is static and has no libc, so it works where every other program of the machine fails to start: from
 * a shell that is still alive, from another system (--root /mnt), and as the first program of the machine
 * (init=/usr/sbin/ksm-rescue on the kernel's command line: it takes the entry out and becomes /sbin/init).
 *
 * At each moment the file is the old one or the new one, complete: the new text goes to a file of another name
 * in /etc, which gets the old one's owner, mode and extended attributes and is brought to the disk before it is renamed.
 */
#include "preload_file.h"
#include "rawsys.h"
#include "text.h"

#include <asm/stat.h>
#include <asm/statfs.h>
#include <asm/unistd.h>
#include <linux/errno.h>
#include <linux/fcntl.h>
#include <linux/poll.h>
#include <linux/signal.h>
#include <stdbool.h>
#include <stddef.h>

#define FILE_NAME "ld.so.preload"
#define BACKUP_NAME FILE_NAME ".YYYYMMDDThhmmssZ"
#define NEW_NAME ".ld.so.preload.ksm-new"
#define MS_REMOUNT 32
#define MS_RDONLY 1
#define MS_KEPT 0xe /* nosuid, nodev, noexec: the same bits in statfs(2) */
#define LOCK_EX_NB 6
#define W_OK 2
#define CONFIRM_SECONDS 300
#define LOCK_SECONDS 10

enum { DONE, FAILED, USAGE };

#define call(name, ...) CALL_(__NR_##name, ##__VA_ARGS__, 0, 0, 0, 0, 0)
#define CALL_(number, a, b, c, d, e, ...)                                                          \
    raw_syscall5(number, (long)(a), (long)(b), (long)(c), (long)(d), (long)(e))

#if defined(__i386__)
typedef struct stat64 file_status;
#define __NR_file_status __NR_fstat64
#define __NR_named_status __NR_fstatat64
#else
typedef struct stat file_status;
#define __NR_file_status __NR_fstat
#define __NR_named_status __NR_newfstatat
#endif

struct seconds {
    long seconds, nanoseconds;
};

void start(long *stack) __attribute__((noreturn));

/* ---- Words ------------------------------------------------------------------------------------- */

/* Returns 0 or -errno. */
static long put(int file, const char *text, size_t size)
{
    while (size > 0) {
        long written = call(write, file, text, size);

        if (written == -EINTR)
            continue;
        if (written <= 0)
            return written < 0 ? written : -ENOSPC;
        text += written;
        size -= (size_t)written;
    }
    return 0;
}

static long say(int file, const char *text)
{
    return put(file, text, text_length(text));
}

/* Writes VALUE with at least DIGITS digits before END; returns where it begins. */
static char *number(char *end, unsigned long value, unsigned digits)
{
    char *at = end;

    for (; value > 0 || end - at < (long)digits; value /= 10)
        *--at = (char)('0' + value % 10);
    return at;
}

static const char *reason(long error)
{
    static char text[] = "error          ";

    switch (-error) {
    case EPERM: return "Operation not permitted (is it immutable? `lsattr` shows that)";
    case ENOENT: return "No such file or directory";
    case EINTR: return "Interrupted";
    case EIO: return "Input/output error";
    case EAGAIN: return "Somebody else has been editing it for 10 seconds";
    case EACCES: return "Permission denied";
    case ENOTDIR: return "Not a directory";
    case ENOSPC: return "No space left on device";
    case EDQUOT: return "Disk quota exceeded";
    case EROFS: return "Read-only file system (try --remount, if it is /)";
    case ELOOP: return "It is a symbolic link; edit what it names by hand";
    default: break;
    }
    {
        char *digits = number(text + sizeof text - 1, (unsigned long)-error, 1);

        copy_bytes(text + 6, digits, (size_t)(text + sizeof text - digits));
    }
    return text;
}

static int fail(const char *what, long error)
{
    say(2, "ksm-rescue: ");
    say(2, what);
    if (error < 0) {
        say(2, ": ");
        say(2, reason(error));
    }
    say(2, ".\n");
    return FAILED;
}

/* ---- The file ---------------------------------------------------------------------------------- */

struct file {
    char text[PRELOAD_FILE_MAX];
    size_t size;
    bool exists;
    int open; /* for its attributes; -1 if there is none */
    file_status status;
};

static char scratch[2 * PRELOAD_FILE_MAX];

/* Returns 0 or -errno; -EFBIG for what is too long to be one. A file that is not there is empty. */
static long read_file(int etc, struct file *file)
{
    long got;

    file->size = 0;
    file->exists = false;
    file->open = (int)call(openat, etc, FILE_NAME, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
    if (file->open == -ENOENT)
        return 0;
    if (file->open < 0)
        return file->open;
    file->exists = true;
    got = call(file_status, file->open, &file->status);
    if (got < 0)
        return got;
    if ((file->status.st_mode & 0170000) != 0100000)
        return -EINVAL;
    do {
        got = call(read, file->open, file->text + file->size, PRELOAD_FILE_MAX - file->size);
        if (got > 0)
            file->size += (size_t)got;
    } while ((got > 0 && file->size < PRELOAD_FILE_MAX) || got == -EINTR);
    if (got < 0)
        return got;
    return file->size < PRELOAD_FILE_MAX ? 0 : -EFBIG;
}

/* SELinux labels, ACLs and whatever else hangs on the old file. */
static long copy_attributes(int from, int to)
{
    static char names[4096], value[4096];
    long size = call(flistxattr, from, names, sizeof names);

    if (size == -EOPNOTSUPP || size == -ENOSYS)
        return 0;
    if (size < 0)
        return size;
    for (const char *name = names; name < names + size; name += text_length(name) + 1) {
        long length = call(fgetxattr, from, name, value, sizeof value);
        long error = length < 0 ? length : call(fsetxattr, to, name, value, length, 0);

        if (error < 0)
            return error;
    }
    return 0;
}

/* The file of NEW_NAME, empty and locked by us, or why there is none. */
static long new_file = -ENOENT;

/* Whether NEW_NAME is our new file: 0, or 1 if it is another's, or -errno. */
static long check_name(int etc)
{
    file_status opened, named;
    long error = call(file_status, new_file, &opened);

    if (error == 0)
        error = call(named_status, etc, NEW_NAME, &named, AT_SYMLINK_NOFOLLOW);
    return error < 0 ? error : opened.st_ino != named.st_ino || opened.st_dev != named.st_dev;
}

static void unlock(int etc)
{
    if (new_file >= 0) {
        if (check_name(etc) <= 0)
            call(unlinkat, etc, NEW_NAME, 0);
        call(close, new_file);
    }
    new_file = -ENOENT;
}

/*
 * The new file is the lock as well: only root can open it while it is written, anybody could hold one on the folder
 * for ever.
 * What a killed run left behind is not locked, and goes; so does what others put there: a link to a file of theirs.
 */
static void lock(int etc)
{
    struct seconds tenth = {0, 100 * 1000 * 1000};
    bool broken = false;

    for (int tenths = LOCK_SECONDS * 10; tenths > 0; tenths--) {
        file_status opened;
        long error, status;

        new_file = call(openat, etc, NEW_NAME, O_WRONLY | O_CREAT | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC, 0600);
        if (new_file < 0)
            return;
        error = call(flock, new_file, LOCK_EX_NB);
        status = call(file_status, new_file, &opened);
        if (error == 0)
            error = status;
        if (error == -EAGAIN || error == -EINTR) {
            call(nanosleep, &tenth);
            /*
             * An editor's file has such a mode for a moment before the rename; what was killed then, any user
             * can open and hold for ever.  An editor that is only slow sees that its file has lost its name.
             */
            if (tenths == 1 && !broken && status == 0 && (opened.st_mode & 077)) {
                if (check_name(etc) == 0)
                    call(unlinkat, etc, NEW_NAME, 0);
                broken = true;
                tenths = LOCK_SECONDS * 10 + 1; /* another that waits may have been first */
            }
        } else if (error < 0) { /* no locks here, so it is nobody's */
            unlock(etc);
            new_file = error;
            return;
        } else if (check_name(etc) == 0) {
            if (opened.st_size == 0 && opened.st_nlink == 1)
                return;
            call(unlinkat, etc, NEW_NAME, 0);
        } /* else who had it has renamed it meanwhile, and it is not ours to write to */
        call(close, new_file);
        new_file = -EAGAIN;
    }
}

static unsigned mode_of(const struct file *file)
{
    return file->exists ? file->status.st_mode & 0777 : 0644;
}

/* Says nothing while the file is open: where stdout was closed, it may be that. */
static long write_new(const char *text, size_t size, const struct file *old, unsigned mode)
{
    long error = put((int)new_file, text, size);

    if (error == 0 && old->exists) {
        error = call(fchown, new_file, old->status.st_uid, old->status.st_gid);
        if (error == 0)
            error = copy_attributes(old->open, (int)new_file);
    }
    /* After the ACL, which would bring its own mode. */
    if (error == 0)
        error = call(fchmod, new_file, mode);
    return error == 0 ? call(fsync, new_file) : error;
}

/* Keeps what is not only ours under a name with the time, such as ld.so.preload.20261126T091500Z. */
static long back_up(int etc, char *name)
{
    char *at = name + sizeof FILE_NAME;
    struct seconds now = {0, 0};
    unsigned long days, era, of_era, year, of_year, month, seconds;

    call(gettimeofday, &now, 0);
    seconds = (unsigned long)now.seconds;
    /* Civil date of a day count, with years that begin in March: leap days come last. */
    days = seconds / 86400 + 719468;
    era = days / 146097;
    of_era = days % 146097;
    year = (of_era - of_era / 1460 + of_era / 36524 - of_era / 146096) / 365;
    of_year = of_era - (365 * year + year / 4 - year / 100);
    month = (5 * of_year + 2) / 153;
    number(at + 8, of_year - (153 * month + 2) / 5 + 1, 2);
    number(at + 6, month < 10 ? month + 3 : month - 9, 2);
    number(at + 4, year + era * 400 + (month >= 10), 4);
    seconds %= 86400;
    number(at + 11, seconds / 3600, 2);
    number(at + 13, seconds / 60 % 60, 2);
    number(at + 15, seconds % 60, 2);
    return call(linkat, etc, FILE_NAME, etc, name, 0);
}

/* Puts TEXT in the place of the OLD file; no file if TEXT is empty.  Returns 0 or -errno. */
static long replace(int etc, const char *text, size_t size, const struct file *old, unsigned mode)
{
    long error;

    if (size == 0) {
        error = call(unlinkat, etc, FILE_NAME, 0);
    } else {
        error = write_new(text, size, old, mode);
        if (error == 0 && check_name(etc) > 0)
            error = -EAGAIN;
        if (error == 0)
            error = call(renameat, etc, NEW_NAME, etc, FILE_NAME);
        if (error == 0) {
            call(close, new_file);
            new_file = -ENOENT;
        }
    }
    /* Of what is done already there is nothing to take back. */
    if (error == 0 && call(fsync, etc) < 0)
        say(2, "ksm-rescue: A loss of power now might bring the old /etc/" FILE_NAME " back.\n");
    return error;
}

/* ---- What is asked for --------------------------------------------------------------------------- */

static struct file now, then;

struct request {
    const char *root;  /* NULL for / */
    const char *entry; /* to add; NULL to take out */
    bool list, dry_run, confirm, force, remount;
};

static int usage(void)
{
    say(2, "usage: ksm-rescue [--root DIR] [--dry-run] [--remount]\n"
           "       ksm-rescue [--root DIR] [--dry-run] [--force] [--confirm] --add ENTRY\n"
           "       ksm-rescue [--root DIR] --list\n"
           "Takes ksm-preload's entry out of /etc/ld.so.preload; needs no other file.\n"
           "  --root DIR   the system below DIR\n"
           "  --remount    make / writable for it\n"
           "  --dry-run    print the new file instead\n"
           "  --list       print what the loader reads: ours or other, entry or comment, name\n"
           "  --add ENTRY  put it in (ksmtool global-enable, which tries it first)\n"
           "  --confirm    take it out again unless a line `keep` is read within 5 minutes\n"
           "  --force      also if users cannot read the file: they can afterwards\n");
    return USAGE;
}

static int list(const char *text, size_t size)
{
    struct preload_names names;
    struct preload_name name;
    long error = 0;

    copy_bytes(scratch, text, size);
    preload_names_begin(&names, scratch, size);
    while (error == 0 && preload_names_next(&names, &name)) {
        error = say(1, preload_name_is_ours(text + name.start, name.length) ? "ours\t" : "other\t");
        if (error == 0)
            error = say(1, preload_name_in_comment(text, name) ? "comment\t" : "entry\t");
        if (error == 0)
            error = put(1, text + name.start, name.length);
        if (error == 0)
            error = say(1, "\n");
    }
    return error == 0 ? DONE : fail("Cannot write the list", error);
}

/*
 * Whether the line `keep` comes on stdin in time; its end, a timeout, an error, or a signal that would have ended us
 * means no: a machine that is shut down meanwhile does not start with an entry that nobody has confirmed.
 */
static bool is_confirmed(void)
{
    unsigned long ending[8 / sizeof(long)] = {1 << (SIGHUP - 1) | 1 << (SIGINT - 1) | 1 << (SIGTERM - 1)};
    int signals = (int)call(signalfd4, -1, ending, 8, O_CLOEXEC);
    char line[5];
    size_t size = 0;

    for (;;) {
        struct pollfd inputs[] = {{0, POLLIN, 0}, {signals, POLLIN, 0}};
        struct seconds limit = {CONFIRM_SECONDS, 0};
        long got = call(ppoll, inputs, 2, &limit, 0, 0);

        if (got == -EINTR)
            continue;
        if (got <= 0 || inputs[1].revents != 0)
            return false;
        got = call(read, 0, line + size, sizeof line - size);
        if (got == -EINTR)
            continue;
        if (got <= 0)
            return false;
        size += (size_t)got;
        if (size == sizeof line)
            return line[0] == 'k' && line[1] == 'e' && line[2] == 'e' && line[3] == 'p' &&
                   line[4] == '\n';
    }
}

/*
 * Brings the file of `then` back, if nobody has edited ours meanwhile, and its BACKUP is not needed; else only takes
 * our entry out.
 */
static int take_back(int etc, size_t added, const char *backup)
{
    long error;
    size_t size;

    copy_bytes(scratch, now.text, added);
    lock(etc);
    error = new_file < 0 ? new_file : read_file(etc, &now);
    if (error == 0 && now.exists && now.size == added && same_bytes(scratch, now.text, added)) {
        error = replace(etc, then.text, then.size, &then, mode_of(&then));
        if (error == 0 && backup != NULL)
            call(unlinkat, etc, backup, 0);
    } else if (error == 0) {
        copy_bytes(then.text, now.text, now.size);
        size = preload_file_remove(now.text, now.size, scratch);
        if (size != now.size || !same_bytes(now.text, then.text, size))
            error = replace(etc, now.text, size, &now, mode_of(&now));
    }
    if (error < 0)
        return fail("Not confirmed, but the entry cannot be taken out of /etc/" FILE_NAME, error);
    return fail("Not confirmed, so the entry is out of /etc/" FILE_NAME " again", 0);
}

static int edit(int etc, const struct request *request)
{
    char backup[] = BACKUP_NAME;
    bool backed_up = false;
    long error = read_file(etc, &then);
    unsigned mode = mode_of(&then);
    size_t size, others;

    if (error == -EINVAL || error == -EFBIG)
        return fail("/etc/" FILE_NAME " is no file with a list of libraries", 0);
    if (error < 0)
        return fail("Cannot read /etc/" FILE_NAME, error);
    if (request->list)
        return list(then.text, then.size);
    if (request->entry != NULL && then.exists && !(then.status.st_mode & 4) && !request->force)
        return fail("/etc/" FILE_NAME " cannot be read by users, so it is for root's programs only", 0);

    copy_bytes(now.text, then.text, then.size);
    now.size = others = preload_file_remove(now.text, then.size, scratch);
    if (request->entry != NULL) {
        copy_bytes(now.text, then.text, then.size);
        now.size = preload_file_add(now.text, then.size, request->entry, scratch);
        if (now.size == PRELOAD_FILE_IMPOSSIBLE)
            return fail("Whatever is added to /etc/" FILE_NAME " makes it too long, or changes what the"
                        " loader takes from its comments; remove them first", 0);
        /* For other users' programs it is not there unless they can read it: access(2) in elf/rtld.c. */
        mode |= 0444;
    }
    size = now.size;
    if (request->dry_run)
        return (error = put(1, now.text, size)) == 0 ? DONE : fail("Cannot write the new file", error);
    if (size == then.size && same_bytes(now.text, then.text, size)) {
        say(1, request->entry != NULL ? "/etc/" FILE_NAME " has it already\n"
                                      : "/etc/" FILE_NAME " has no entry of ksm-preload\n");
        return DONE;
    }
    /* To delete it takes no space; and where there is none, nobody else has a new file either. */
    if (new_file < 0 && (size > 0 || (new_file != -ENOSPC && new_file != -EDQUOT)))
        return fail("Cannot write /etc/" FILE_NAME, new_file);
    if (request->entry != NULL && others > 0) {
        error = back_up(etc, backup);
        if (error < 0 && error != -EEXIST)
            return fail("Cannot keep a copy of /etc/" FILE_NAME, error);
        backed_up = error == 0;
    }
    error = replace(etc, now.text, size, &then, mode);
    if (error < 0) {
        if (backed_up)
            call(unlinkat, etc, backup, 0);
        return fail("Cannot write /etc/" FILE_NAME, error);
    }
    say(1, request->entry == NULL ? "/etc/" FILE_NAME ": entry of ksm-preload removed\n"
                                  : "/etc/" FILE_NAME ": entry of ksm-preload added\n");
    /* The lock went with the rename: nobody has to wait for the answer. */
    if (request->confirm && !is_confirmed())
        return take_back(etc, size, backed_up ? backup : NULL);
    return DONE;
}

static int run(const struct request *request)
{
    /* Whoever sends one waits for a moment. */
    unsigned long all[8 / sizeof(long)];
    bool remounted = false;
    unsigned long flags = 0;
    struct statfs mounted;
    long root = AT_FDCWD, etc, error;
    int status;

    for (unsigned i = 0; i < sizeof all / sizeof *all; i++)
        all[i] = ~0UL;
    call(rt_sigprocmask, 2, all, 0, 8);
    now.open = then.open = -1;
    if (request->root != NULL) {
        root = call(openat, AT_FDCWD, request->root, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
        if (root < 0)
            return fail("Cannot open the folder of --root", root);
        etc = call(openat, root, "etc", O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    } else {
        etc = call(openat, root, "/etc", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    }
    if (etc < 0)
        return fail("Cannot open the folder etc", etc);
    if (!request->list && !request->dry_run) {
        if (request->remount && request->root == NULL && call(faccessat, etc, ".", W_OK) == -EROFS &&
            call(statfs, "/", &mounted) == 0 && (mounted.f_flags & MS_RDONLY)) {
            flags = (unsigned long)mounted.f_flags & MS_KEPT;
            remounted = call(mount, "", "/", 0, MS_REMOUNT | flags, 0) == 0;
        }
        lock((int)etc);
    }
    status = edit((int)etc, request);
    unlock((int)etc);
    if (remounted) {
        /* A deleted file that is open would keep it from being read-only. */
        call(close, then.open);
        call(close, now.open);
        call(sync);
        error = call(mount, "", "/", 0, MS_REMOUNT | MS_RDONLY | flags, 0);
        if (error < 0)
            fail("/ stays writable", error);
    }
    return status;
}

/* As the kernel's first program: whatever comes of it, the machine goes on with the real one. */
static int boot(char **argv, char **envp)
{
    static const struct request take_out = {.remount = true};
    static char inits[][sizeof "/sbin/init"] = {"/sbin/init", "/etc/init", "/bin/init", "/bin/sh"};
    long error = 0;

    say(2, "ksm-rescue: started by the kernel, will go on with /sbin/init\n");
    (void)run(&take_out);
    {
        unsigned long none[8 / sizeof(long)] = {0};

        call(rt_sigprocmask, 2, none, 0, 8);
    }
    /* Those that the kernel tries. */
    for (unsigned i = 0; i < sizeof inits / sizeof *inits; i++) {
        argv[0] = inits[i];
        error = call(execve, inits[i], argv, envp);
    }
    return fail("Cannot run /sbin/init", error);
}

static int main_(int argc, char **argv, char **envp)
{
    struct request request = {0};
    /* The kernel gives its first program those words of its command line that it does not know: not ours. */
    bool is_first = call(getpid) == 1;

    if (is_first && argc < 2)
        return boot(argv, envp);
    for (int i = 1; i < argc; i++) {
        if (same_text(argv[i], "--root") && i + 1 < argc)
            request.root = argv[++i];
        else if (same_text(argv[i], "--add") && i + 1 < argc)
            request.entry = argv[++i];
        else if (same_text(argv[i], "--list"))
            request.list = true;
        else if (same_text(argv[i], "--dry-run"))
            request.dry_run = true;
        else if (same_text(argv[i], "--confirm"))
            request.confirm = true;
        else if (same_text(argv[i], "--force"))
            request.force = true;
        else if (same_text(argv[i], "--remount"))
            request.remount = true;
        else
            return is_first ? boot(argv, envp) : usage();
    }
    if ((request.entry == NULL && (request.confirm || request.force)) ||
        (request.list && (request.entry != NULL || request.dry_run)) ||
        (request.confirm && request.dry_run))
        return usage();
    if (request.entry != NULL) {
        size_t length = text_length(request.entry);

        for (size_t i = 0; i < length; i++)
            if ((unsigned char)request.entry[i] <= ' ' || request.entry[i] == ':' || request.entry[i] == '#')
                return fail("The loader cannot read such an ENTRY: it holds a separator or #", 0), USAGE;
        if (!preload_name_is_ours(request.entry, length))
            return fail("ENTRY is not a library of ksm-preload", 0), USAGE;
    }
    return run(&request);
}

void start(long *stack)
{
    int argc = (int)stack[0];
    char **argv = (char **)(stack + 1);

    call(exit_group, main_(argc, argv, argv + argc + 1));
    __builtin_unreachable();
}
