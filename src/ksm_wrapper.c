/* SPDX-License-Identifier: MIT */
/*
 * ksm-wrapper CMD [ARG...]: opts in, then becomes the program: same PID, parent, descriptors, signals.
 *
 * The kernel's flag is set here, and on Linux >= 6.10 survives the exec, also into static programs.
 * The library goes into LD_PRELOAD for the rest: kernels that drop the flag on exec (6.4 - 6.6), kernels
 * without it, and to let KSM_PRELOAD=off work in every program started further down.
 */
#define _GNU_SOURCE
#include "config.h"
#include "follow.h"
#include "group.h"
#include "layout.h"
#include "members.h"
#include "merge.h"
#include "preload_list.h"
#include "seed.h"
#include "target.h"

#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <limits.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <unistd.h>

#ifndef MADV_MERGEABLE
#define MADV_MERGEABLE 12 /* linux/mman.h; musl has it only under _BSD_SOURCE */
#endif

/* As ksmtool's (python/ksmtool/errors.py), and the shell's for a program that does not start. */
enum { FAILED = 1, USAGE = 2, UNSUPPORTED = 4, CANNOT_EXEC = 126, NOT_FOUND = 127 };

enum method { AUTO, PRCTL, MADVISE };

static const char usage[] =
    "Usage: ksm-wrapper [OPTION...] [--] CMD [ARG...]\n"
    "Run CMD with its memory open to KSM, the kernel's merging of equal pages.\n"
    "\n"
    "  --method auto|prctl|madvise  how to opt in (auto: prctl where the kernel has it)\n"
    "  --no-preload                 leave LD_PRELOAD alone: the kernel's flag only\n"
    "  --group NAME                 give CMD the secret memory layout of a group, and its hash\n"
    "                               seeds: programs that do the same have equal pages then\n"
    "  --group-required             do not run CMD if that cannot be done\n"
    "  --no-hash-seed               leave hash seeds alone\n"
    "  --follow                     also what CMD starts joins the group\n"
    "  --members                    print the PIDs of the members of the group, run nothing\n"
    "  --groups                     print the files of this user's groups, run nothing\n"
    "  --show                       print the method, LD_PRELOAD and what a group sets, run nothing\n"
    "  --probe                      print what this kernel can, run nothing\n"
    "  --help, --version\n"
    "\n"
    "Environment: KSM_PRELOAD=off leaves CMD out, KSM_PRELOAD_VERBOSE=1 makes the library\n"
    "say one line on stderr. Exit status: that of CMD; 126 CMD cannot be run, 127 not found;\n"
    "1 failed, 2 wrong usage, 4 not supported by this kernel.\n"
    "Memory is merged with that of every other opted-in process: use it inside one security\n"
    "domain only.\n";

__attribute__((noreturn, format(printf, 2, 3))) static void die(int status, const char *format, ...)
{
    va_list args;

    fputs("ksm-wrapper: ", stderr);
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fputc('\n', stderr);
    exit(status);
}

static int written(void)
{
    return fflush(stdout) == 0 && !ferror(stdout) ? 0 : FAILED;
}

static int set_flag(unsigned long value)
{
    return prctl(KSM_PR_SET_MEMORY_MERGE, value, 0UL, 0UL, 0UL);
}

static int get_flag(void)
{
    return prctl(KSM_PR_GET_MEMORY_MERGE, 0UL, 0UL, 0UL, 0UL);
}

/* EINVAL here means a kernel without CONFIG_KSM: the only sure sign (facts: mm/madvise.c). */
static bool madvise_works(void)
{
    size_t size = (size_t)sysconf(_SC_PAGESIZE);
    void *page = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    bool works = page != MAP_FAILED && madvise(page, size, MADV_MERGEABLE) == 0;

    if (page != MAP_FAILED)
        munmap(page, size);
    return works;
}

/* Prints `NAME yes|no`; the second half runs in the program that the first half execs. */
static void probe(void)
{
    static char name[] = "ksm-wrapper", rest[] = "--probe-exec";
    char *argv[] = {name, rest, NULL};
    bool has_flag = set_flag(1) == 0;

    printf("prctl %s\nmadvise %s\n", has_flag ? "yes" : "no", madvise_works() ? "yes" : "no");
    fflush(stdout);
    if (has_flag) {
        execv("/proc/self/exe", argv);
        execv((const char *)getauxval(AT_EXECFN), argv); /* no /proc */
    }
    puts("inherit no");
}

/*
 * Whether the loader's cache lists this very file, so that the bare NAME finds it in any program.
 * The path there may differ: where /lib is a link to /usr/lib, ldconfig takes the shorter one.
 */
static bool in_loader_cache(const char *name, const char *path)
{
    int cache = open("/etc/ld.so.cache", O_RDONLY | O_CLOEXEC);
    struct stat info, ours, listed;
    bool found = false;

    if (cache < 0)
        return false;
    if (fstat(cache, &info) == 0 && info.st_size > 0 && stat(path, &ours) == 0) {
        size_t size = (size_t)info.st_size, length = strlen(name) + 1;
        const char *text = mmap(NULL, size, PROT_READ, MAP_PRIVATE, cache, 0), *at = text;

        /* Its string table holds NUL-terminated names and paths. */
        while (text != MAP_FAILED && !found &&
               (at = memmem(at, size - (size_t)(at - text), name, length)) != NULL) {
            const char *start = at;

            while (start > text && start[-1] != '\0')
                start--;
            found = *start == '/' && at[-1] == '/' && stat(start, &listed) == 0 &&
                    listed.st_dev == ours.st_dev && listed.st_ino == ours.st_ino;
            at += length;
        }
        if (text != MAP_FAILED)
            munmap((void *)(uintptr_t)text, size);
    }
    close(cache);
    return found;
}

/* Where this program lies, without the name.  Without /proc, by the name it was started with. */
static void own_directory(char directory[PATH_MAX])
{
    const char *started_as = (const char *)getauxval(AT_EXECFN);
    char *slash;

    if (realpath("/proc/self/exe", directory) == NULL &&
        (started_as == NULL || realpath(started_as, directory) == NULL)) {
        strcpy(directory, KSM_BINDIR);
        return;
    }
    slash = strrchr(directory, '/');
    if (slash != NULL)
        *slash = '\0';
}

/* The library NAME as LD_PRELOAD should spell it: bare if the loader finds it so, else its path. */
static const char *library_entry(const char *name, char path[PATH_MAX])
{
    static const char *const places[] = {KSM_LIBDIR_FROM_BINDIR, "."}; /* ".": not installed */
    char directory[PATH_MAX], wanted[2 * PATH_MAX + 64];

    own_directory(directory);
    for (size_t i = 0; i < sizeof places / sizeof *places; i++) {
        snprintf(wanted, sizeof wanted, "%s/%s/%s", places[i][0] == '/' ? "" : directory, places[i],
                 name);
        if (realpath(wanted, path) == NULL || access(path, R_OK) != 0)
            continue;
        if (in_loader_cache(name, path))
            return name;
        if (!preload_list_can_hold(path))
            die(FAILED, "LD_PRELOAD cannot name %s: the loader takes space, colon and $ in a path "
                        "apart\nhint: install ksm-preload elsewhere, or use --no-preload", path);
        return path;
    }
    die(FAILED, "%s is neither in %s/%s nor beside this program\n"
                "hint: install ksm-preload again, or use --no-preload",
        name, directory, KSM_LIBDIR_FROM_BINDIR);
}

/* Sets or clears the kernel's flag for CMD and returns the method it will be opted in by. */
static enum method opt_in(enum method asked)
{
    if (asked != MADVISE) {
        if (set_flag(1) == 0)
            return PRCTL;
        if (asked == PRCTL)
            die(UNSUPPORTED, "this kernel does not take PR_SET_MEMORY_MERGE: %s\n"
                             "hint: Linux 6.4 or newer has it; --method madvise works on any",
                strerror(errno));
        return MADVISE;
    }
    if (!madvise_works())
        die(UNSUPPORTED, "this kernel has no KSM\nhint: it was built without CONFIG_KSM");
    /* An inherited flag would merge what the library is told to choose; without the prctl there is
     * none to clear, and on a process this small ENOMEM cannot be. */
    (void)set_flag(0);
    return MADVISE;
}

struct group {
    const char *name;  /* NULL: none */
    const char *fault; /* why its secret cannot be had; NULL if it can */
    bool seeds, follow;
    struct layout_wish wish;
};

static void tell_seed(const char *name)
{
    printf("seed %s\n", name);
}

/* Reads the group's layout and sets its seeds; returns the command as it is to be run. */
static char **join(struct group *group, char **argv, void (*told)(const char *name))
{
    struct group_secret secret;

    group->fault = group_open(group->name, &secret);
    if (group->fault != NULL)
        return argv;
    group->wish.layout = layout_of(&secret, (uint64_t)sysconf(_SC_PAGESIZE));
    if (group->seeds && argv[0] != NULL) {
        argv = seed_set(&secret, argv, told);
        if (argv == NULL)
            die(FAILED, "cannot set the hash seeds: %s", strerror(errno));
    }
    explicit_bzero(&secret, sizeof secret);
    return argv;
}

/* Sets out for the layout; returns NULL, else why not. */
static const char *begin(const struct group *group, const char *command)
{
    const char *why = group->fault != NULL ? group->fault : target_obstacle(command);

    return why != NULL ? why : layout_begin(&group->wish);
}

static void ordinary(const struct group *group, const char *command, const char *why)
{
    if (group->wish.required)
        die(UNSUPPORTED, "%s cannot have the layout of group %s: %s", command, group->name, why);
    fprintf(stderr, "ksm-wrapper: %s runs with an ordinary layout: %s\n", command, why);
}

/* Becomes the program. */
__attribute__((noreturn)) static void become(char **argv, const struct group *group)
{
    if (group->name != NULL) {
        const char *why = begin(group, argv[0]);
        int error = 0;

        if (why != NULL) {
            ordinary(group, argv[0], why);
        } else {
            execvp(argv[0], argv);
            error = errno;
            layout_cancel();
            /* Some security modules forbid an exec because it is traced. */
            if ((error == EPERM || error == EACCES) && target_is_executable(argv[0]))
                ordinary(group, argv[0], strerror(error));
        }
    }
    execvp(argv[0], argv);
    die(errno == ENOENT ? NOT_FOUND : CANNOT_EXEC, "cannot run %s: %s", argv[0], strerror(errno));
}

/* Has libksm_preload_follow.so bring what the command starts into the group. */
static void set_follow(const struct group *group, const char *command)
{
    char own[PATH_MAX], path[PATH_MAX], *state, *list;
    /* In a program that loads no library nobody takes the mark away again, so none is set. */
    int placed = command != NULL && target_loads_libraries(command) ? (int)getpid() : 0;

    if (realpath("/proc/self/exe", own) == NULL)
        die(FAILED, "cannot find this program: %s", strerror(errno));
    list = preload_list_with(getenv("LD_PRELOAD"), library_entry("libksm_preload_follow.so", path));
    if (list == NULL || setenv("LD_PRELOAD", list, 1) != 0 ||
        asprintf(&state, "%010d:" FOLLOW_NO_COMM ":%c:%u/%s:%s", placed, group->seeds ? 's' : '-',
                 (unsigned)geteuid(), group->name, own) < 0 ||
        setenv(FOLLOW_VARIABLE, state, 1) != 0)
        die(FAILED, "cannot set LD_PRELOAD: %s", strerror(errno));
    free(state);
    free(list);
}

/*
 * Continues what libksm_preload_follow.so began: gives the program behind a descriptor the group's layout.
 * It ran without us when it was stopped, so it goes on whatever fails, and nothing is said.
 */
__attribute__((noreturn)) static void resume(char *state, char **argv)
{
    struct group group = {.seeds = state[FOLLOW_SEEDS] == 's'};
    char link[64], path[PATH_MAX] = "", comm[FOLLOW_COMM_SIZE + 1], name[PATH_MAX], pid[16];
    struct stat wanted, found;
    unsigned user = 0;
    int file = atoi(state + FOLLOW_MARK + 1), length = 0;

    if (sscanf(state + FOLLOW_GROUP, "%u/%n", &user, &length) != 1)
        user = UINT_MAX;
    snprintf(name, sizeof name, "%.*s", (int)strcspn(state + FOLLOW_GROUP + length, ":"),
             state + FOLLOW_GROUP + length);
    snprintf(comm, sizeof comm, "%.*s", (int)strcspn(state + FOLLOW_COMM, "/"), state + FOLLOW_COMM);
    snprintf(pid, sizeof pid, "%010d", (int)getpid());
    memcpy(state + FOLLOW_MARK, pid, FOLLOW_MARK_SIZE);
    memcpy(state + FOLLOW_COMM, FOLLOW_NO_COMM, FOLLOW_COMM_SIZE);
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    if (fcntl(file, F_SETFD, FD_CLOEXEC) != 0 || readlink(link, path, sizeof path - 1) <= 0 ||
        fstat(file, &wanted) != 0 || stat(path, &found) != 0 || wanted.st_dev != found.st_dev ||
        wanted.st_ino != found.st_ino)
        strcpy(path, link); /* replaced or removed since */

    if (user == geteuid() && group_name_is_valid(name)) {
        group.name = name;
        group.wish.comm = comm;
        argv = join(&group, argv, NULL);
        if (begin(&group, path) == NULL) {
            execv(path, argv);
            layout_cancel();
        }
    }
    execv(path, argv);
    die(CANNOT_EXEC, "cannot run %s: %s", path, strerror(errno));
}

/* Looks at the group from inside: becomes this program once more, as a member. */
__attribute__((noreturn)) static void print_members(struct group *group)
{
    static char name[] = "ksm-wrapper", rest[] = "--members-here", self[] = "/proc/self/exe";
    char *argv[] = {name, rest, NULL};
    const char *why;

    group->seeds = false;
    join(group, argv, NULL);
    if (group->fault != NULL)
        die(FAILED, "cannot use group %s: %s", group->name, group->fault);
    unsetenv("LD_PRELOAD");
    group->wish.name = name;
    group->wish.required = true;
    why = layout_begin(&group->wish);
    if (why != NULL)
        die(UNSUPPORTED, "no program can have the layout of group %s: %s", group->name, why);
    execv(self, argv);
    die(FAILED, "cannot run %s: %s", self, strerror(errno));
}

int main(int argc, char **argv)
{
    enum {
        METHOD = 256, NO_PRELOAD, GROUP, GROUP_REQUIRED, NO_HASH_SEED, FOLLOW, MEMBERS, MEMBERS_HERE, GROUPS,
        SHOW, PROBE, PROBE_EXEC, HELP, VERSION,
    };
    static const struct option options[] = {
        {"method", required_argument, NULL, METHOD},
        {"no-preload", no_argument, NULL, NO_PRELOAD},
        {"group", required_argument, NULL, GROUP},
        {"group-required", no_argument, NULL, GROUP_REQUIRED},
        {"no-hash-seed", no_argument, NULL, NO_HASH_SEED},
        {"follow", no_argument, NULL, FOLLOW},
        {"members", no_argument, NULL, MEMBERS},
        {"members-here", no_argument, NULL, MEMBERS_HERE},
        {"groups", no_argument, NULL, GROUPS},
        {"show", no_argument, NULL, SHOW},
        {"probe", no_argument, NULL, PROBE},
        {"probe-exec", no_argument, NULL, PROBE_EXEC},
        {"help", no_argument, NULL, HELP},
        {"version", no_argument, NULL, VERSION},
        {NULL, 0, NULL, 0},
    };
    enum method method = AUTO;
    struct group group = {.seeds = true};
    bool preload = true, show = false, off = false, members = false, groups = false;
    const char *fault;
    char *state = getenv(FOLLOW_VARIABLE);
    const char *settings = getenv("KSM_PRELOAD");
    char path[PATH_MAX];
    int option;

    if (state != NULL && state[0] == 'R' && strlen(state) > FOLLOW_GROUP)
        resume(state, argv);
    opterr = 0;
    while ((option = getopt_long(argc, argv, "+", options, NULL)) != -1) {
        switch (option) {
        case METHOD:
            if (strcmp(optarg, "prctl") == 0)
                method = PRCTL;
            else if (strcmp(optarg, "madvise") == 0)
                method = MADVISE;
            else if (strcmp(optarg, "auto") != 0)
                die(USAGE, "no method '%s'\nhint: auto, prctl or madvise", optarg);
            break;
        case NO_PRELOAD:
            preload = false;
            break;
        case GROUP:
            if (!group_name_is_valid(optarg))
                die(USAGE, "no group can be called '%s'\nhint: at most 64 letters, digits and . _ @ + -, "
                           "the first a letter or digit", optarg);
            group.name = optarg;
            break;
        case GROUP_REQUIRED:
            group.wish.required = true;
            break;
        case NO_HASH_SEED:
            group.seeds = false;
            break;
        case FOLLOW:
            group.follow = true;
            break;
        case MEMBERS:
            members = true;
            break;
        case MEMBERS_HERE:
            if (members_print(stdout) != 0)
                die(FAILED, "cannot read /proc: %s", strerror(errno));
            return written();
        case GROUPS:
            groups = true;
            break;
        case SHOW:
            show = true;
            break;
        case PROBE:
            probe();
            return written();
        case PROBE_EXEC:
            printf("inherit %s\n", get_flag() == 1 ? "yes" : "no");
            return written();
        case HELP:
            fputs(usage, stdout);
            return written();
        case VERSION:
            puts("ksm-wrapper " KSM_VERSION);
            return written();
        default:
            if (optopt > 0 && optopt < METHOD) /* one letter, maybe of several */
                die(USAGE, "no option '-%c'\nhint: try ksm-wrapper --help", optopt);
            die(USAGE, "wrong or incomplete option '%s'\nhint: try ksm-wrapper --help",
                argv[optind - 1]);
        }
    }
    if (group.name == NULL && (group.wish.required || group.follow || members || !group.seeds))
        die(USAGE, "an option that is about a group without --group NAME\nhint: try ksm-wrapper --help");
    if (group.follow && !preload)
        die(USAGE, "--follow works through a library, which --no-preload forbids");
    if ((members || groups) && optind < argc)
        die(USAGE, "%s runs no command, so '%s' means nothing", members ? "--members" : "--groups", argv[optind]);
    if (groups) {
        fault = group_list(stdout);
        if (fault != NULL)
            die(FAILED, "%s", fault);
        return written();
    }
    if (members)
        print_members(&group);
    if (optind >= argc && !show)
        die(USAGE, "no command given\nhint: try ksm-wrapper --help");

    if (settings != NULL && strcmp(settings, "off") == 0)
        off = true;
    else if (settings != NULL && strcmp(settings, "madvise") == 0 && method == AUTO)
        method = MADVISE;

    if (off) {
        (void)set_flag(0);
        if (group.wish.required)
            die(UNSUPPORTED, "KSM_PRELOAD=off leaves %s out, so it cannot be in a group",
                argv[optind] != NULL ? argv[optind] : "it");
        group.name = NULL;
    } else {
        bool forced = method == MADVISE;

        method = opt_in(method);
        if (method == MADVISE && !preload)
            die(UNSUPPORTED, "the madvise method works through the library only\n"
                             "hint: leave --no-preload away");
        /* The library reads what the option asks for; an option wins over the environment. */
        if (forced && setenv("KSM_PRELOAD", "madvise", 1) != 0)
            die(FAILED, "cannot set KSM_PRELOAD: %s", strerror(errno));
        if (method == PRCTL && settings != NULL && strcmp(settings, "madvise") == 0)
            unsetenv("KSM_PRELOAD");
        if (preload) {
            const char *entry = library_entry(
                method == PRCTL ? "libksm_preload_prctl.so" : "libksm_preload.so", path);
            char *list = preload_list_with(getenv("LD_PRELOAD"), entry);

            if (list == NULL || setenv("LD_PRELOAD", list, 1) != 0)
                die(FAILED, "cannot set LD_PRELOAD: %s", strerror(errno));
            free(list);
        }
    }
    argv += optind;
    if (group.name != NULL)
        argv = join(&group, argv, show ? tell_seed : NULL);
    group.wish.name = argv[0];
    if (group.name != NULL && group.follow)
        set_follow(&group, argv[0]);
    if (show && group.name != NULL && argv[0] != NULL) {
        fault = begin(&group, argv[0]); /* tried out, up to the exec */
        layout_cancel();
        printf("group %s%s%s\n", group.name, fault != NULL ? " no " : "", fault != NULL ? fault : "");
    }
    if (show) {
        const char *list = getenv("LD_PRELOAD");

        printf("method %s\nLD_PRELOAD %s\n",
               off ? "off" : method == PRCTL ? "prctl" : "madvise", list != NULL ? list : "");
        return written();
    }

    become(argv, &group);
}
