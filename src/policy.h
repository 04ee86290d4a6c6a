/* SPDX-License-Identifier: MIT */
/*
 * The policy: which programs are left out of KSM.  The only reader of it in C; the one in Python is
 * python/ksmtool/policy.py, and tests/policy_cases.py is the table that both are held to.
 *
 *   # a comment      deny PATTERN      allow PATTERN      default allow      default deny
 *
 * A pattern with a `/` in it is matched against the whole path of the executable, one without against
 * its base name: `*` any bytes, also `/`; `?` one byte; `[abc]`, `[a-z]`, `[!abc]`.  The first rule
 * that matches decides, over all files in their order; where none does, the first `default`; else
 * the program is allowed.  What is malformed is skipped: no line can make a program fail.
 *
 * Files: policy.d/(name).conf in the byte order of their names, then `policy`, or where there is none
 * the defaults (data/policy) that are compiled in.  A file or folder that somebody else than root
 * could have written is as good as not there.  Where it cannot be known what root wants (no name
 * of the program, a file that it may not read, a failing read) the program is left out.
 *
 * Freestanding, like rawsys.h.  The upper half makes no system call: tests/fuzz.
 */
#ifndef KSM_POLICY_H
#define KSM_POLICY_H

#include "policy_defaults.h" /* made of data/policy */
#include "rawsys.h"

#include <asm/errno.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* ---- The rules -------------------------------------------------------------------------------- */

enum { POLICY_LONGEST_LINE = 511 };

enum policy_verdict { POLICY_UNDECIDED, POLICY_ALLOW, POLICY_DENY };

struct policy {
    const char *path, *base; /* of the executable: whole or NULL, and from behind the last `/` */
    size_t path_length, base_length;
    char first;                    /* of the path: if that is not known, `/` */
    bool wants_path;               /* a rule may match the whole path, which is not known */
    enum policy_verdict decided;   /* by the first rule that matched */
    enum policy_verdict otherwise; /* the first `default` */
    unsigned kept;                 /* bytes in `line`; one more than fit a line: it is too long */
    char line[POLICY_LONGEST_LINE + 1]; /* one that began in an earlier piece of the text */
};

static inline bool policy_is_blank(char c)
{
    return c == ' ' || c == '\t' || c == '\r';
}

/*
 * Whether `c` is in the set that begins at `at`, behind its `[`; `at` is then moved behind its
 * `]`.
 */
static inline bool policy_in_set(const char *pattern, size_t length, size_t *at, unsigned char c)
{
    size_t i = *at;
    bool other = i < length && pattern[i] == '!', found = false;

    if (other)
        i++;
    for (size_t first = i; i < length; i++) {
        unsigned char low = (unsigned char)pattern[i], high = low;

        if (low == ']' && i > first) {
            *at = i + 1;
            return found != other;
        }
        if (i + 2 < length && pattern[i + 1] == '-' && pattern[i + 2] != ']') {
            high = (unsigned char)pattern[i + 2];
            i += 2;
        }
        found |= low <= c && c <= high;
    }
    return false; /* never closed: malformed, so nothing may match it */
}

/*
 * Of the stars only the last one seen is ever tried again: what an earlier one could take instead,
 * the last one can take, too.  So this ends after pattern x text steps at most.
 */
static inline bool policy_matches(const char *pattern, size_t pattern_length, const char *text,
                                  size_t text_length)
{
    size_t p = 0, t = 0, behind_star = SIZE_MAX, star_ends = 0;

    while (t < text_length) {
        size_t next = p + 1;

        if (p < pattern_length && pattern[p] == '*') {
            behind_star = ++p;
            star_ends = t;
            continue;
        }
        if (p < pattern_length &&
            (pattern[p] == '?' ||
             (pattern[p] == '['
                  ? policy_in_set(pattern, pattern_length, &next, (unsigned char)text[t])
                  : pattern[p] == text[t]))) {
            p = next;
            t++;
            continue;
        }
        if (behind_star == SIZE_MAX)
            return false;
        p = behind_star;
        t = ++star_ends;
    }
    while (p < pattern_length && pattern[p] == '*')
        p++;
    return p == pattern_length;
}

/* Takes `word` and what is blank behind it, at least one byte, off the front of the line. */
static inline bool policy_take(const char **line, size_t *length, const char *word)
{
    size_t i = 0, end;

    for (; word[i] != '\0'; i++)
        if (i == *length || (*line)[i] != word[i])
            return false;
    end = i;
    while (end < *length && policy_is_blank((*line)[end]))
        end++;
    if (end == i)
        return false;
    *line += end;
    *length -= end;
    return true;
}

static inline bool policy_is(const char *text, size_t length, const char *word)
{
    while (length > 0 && *word != '\0' && *text == *word) {
        text++;
        word++;
        length--;
    }
    return length == 0 && *word == '\0';
}

/* Whether a pattern with a `/` in it may match a path of that base name. */
static inline bool policy_may_end_in(const char *pattern, size_t length, const char *base,
                                     size_t base_length)
{
    for (;;) {
        char c = pattern[--length];

        if (c == '*' || c == '?' || c == ']')
            return true;
        if (c == '/' || base_length == 0)
            return c == '/' && base_length == 0;
        if (c != base[--base_length])
            return false;
    }
}

static inline void policy_read_line(struct policy *policy, const char *line, size_t length)
{
    enum policy_verdict verdict = POLICY_DENY;
    bool whole = false;

    if (length > POLICY_LONGEST_LINE)
        return;
    while (length > 0 && policy_is_blank(line[length - 1]))
        length--;
    while (length > 0 && policy_is_blank(*line)) {
        line++;
        length--;
    }
    if (policy_take(&line, &length, "default")) {
        if (policy->otherwise == POLICY_UNDECIDED)
            policy->otherwise = policy_is(line, length, "allow")  ? POLICY_ALLOW
                                : policy_is(line, length, "deny") ? POLICY_DENY
                                                                  : POLICY_UNDECIDED;
        return;
    }
    if (!policy_take(&line, &length, "deny")) {
        if (!policy_take(&line, &length, "allow"))
            return;
        verdict = POLICY_ALLOW;
    }
    for (size_t i = 0; i < length; i++) {
        if (line[i] == '\0')
            return;
        whole |= line[i] == '/';
    }
    if (whole && policy->path == NULL)
        policy->wants_path = policy_may_end_in(line, length, policy->base, policy->base_length);
    else if (whole ? policy_matches(line, length, policy->path, policy->path_length)
                   : policy_matches(line, length, policy->base, policy->base_length))
        policy->decided = verdict;
}

/*
 * For nearly every line of a long list: a comment, or a rule whose pattern begins with another
 * byte than the names do.
 */
static inline bool policy_cannot_match(const struct policy *policy, const char *line, size_t length)
{
    return (length > 0 && line[0] == '#') ||
           (length > 5 && line[0] == 'd' && line[1] == 'e' && line[2] == 'n' && line[3] == 'y' &&
           line[4] == ' ' && line[5] != policy->base[0] && line[5] != policy->first &&
           line[5] != '*' && line[5] != '?' && line[5] != '[' && !policy_is_blank(line[5]));
}

static inline bool policy_is_done(const struct policy *policy)
{
    return policy->decided != POLICY_UNDECIDED || policy->wants_path;
}

/*
 * Where the first newline is from `at` on, or `length`.  A word at a time: half of the reading's
 * cost is here.
 */
static inline size_t policy_line_end(const char *text, size_t at, size_t length)
{
    const uintptr_t ones = UINTPTR_MAX / 0xff;
    uintptr_t word;

    for (; at + sizeof word <= length; at += sizeof word) {
        __builtin_memcpy(&word, text + at, sizeof word); /* one load */
        word ^= ones * '\n';
        if (((word - ones) & ~word & (ones << 7)) != 0)
            break; /* one of the bytes has become zero */
    }
    while (at < length && text[at] != '\n')
        at++;
    return at;
}

static inline void policy_keep(struct policy *policy, const char *text, size_t length)
{
    for (size_t i = 0; i < length && policy->kept <= POLICY_LONGEST_LINE; i++) {
        policy->line[policy->kept++] = text[i];
        __asm__ volatile("" ::: "memory"); /* else the compiler makes it a call of memcpy */
    }
}

/* The text may come in pieces, cut anywhere.  True when no more has to come. */
static inline bool policy_read(struct policy *policy, const char *text, size_t length)
{
    for (size_t at = 0; at < length && !policy_is_done(policy);) {
        size_t start = at;

        at = policy_line_end(text, at, length);
        if (at == length || policy->kept > 0) {
            policy_keep(policy, text + start, at - start);
            if (at == length)
                break;
            policy_read_line(policy, policy->line, policy->kept);
            policy->kept = 0;
        } else if (!policy_cannot_match(policy, text + start, at - start)) {
            policy_read_line(policy, text + start, at - start);
        }
        at++;
    }
    return policy_is_done(policy);
}

/* At the end of each text, whose last line may lack its newline. */
static inline bool policy_end(struct policy *policy)
{
    if (policy->kept > 0 && !policy_is_done(policy))
        policy_read_line(policy, policy->line, policy->kept);
    policy->kept = 0;
    return policy_is_done(policy);
}

/* Sorted by the first byte of their patterns, which is no wildcard: src/policy_defaults.py. */
static inline void policy_read_defaults(struct policy *policy)
{
    unsigned char first = (unsigned char)policy->base[0];

    if (first < sizeof policy_defaults_from / sizeof *policy_defaults_from - 1)
        policy_read(policy, policy_defaults + policy_defaults_from[first],
                    (size_t)(policy_defaults_from[first + 1] - policy_defaults_from[first]));
}

/*
 * `path` is what /proc/self/exe says, not empty, and a NUL behind it; or if not `whole`, has at
 * least its base name.
 */
static inline void policy_begin(struct policy *policy, const char *path, size_t length, bool whole)
{
    static const char deleted[] = " (deleted)"; /* fs/d_path.c: since the start it was replaced */
    const size_t tail = sizeof deleted - 1;

    if (length > tail && policy_is(path + length - tail, tail, deleted))
        length -= tail;
    policy->path = whole ? path : NULL;
    policy->path_length = length;
    policy->first = whole ? path[0] : '/';
    policy->base = path;
    for (size_t i = 0; i < length; i++)
        if (path[i] == '/')
            policy->base = path + i + 1;
    policy->base_length = (size_t)(path + length - policy->base);
    policy->decided = policy->otherwise = POLICY_UNDECIDED;
    policy->wants_path = false;
    policy->kept = 0;
}

static inline bool policy_denies(const struct policy *policy)
{
    return policy->decided == POLICY_DENY ||
           (policy->decided == POLICY_UNDECIDED && policy->otherwise == POLICY_DENY);
}

/* ---- The files -------------------------------------------------------------------------------- */

/* Each with a buffer of its own, which is to take stack only while it is used. */
#define POLICY_CALLED __attribute__((noinline, unused))

#define POLICY_FOLDER "/etc/ksm-preload"
#define POLICY_KILL_SWITCH "/run/ksm-preload.disabled"

enum {
    POLICY_HERE = -100, /* AT_FDCWD; <fcntl.h> would bring a libc's names along */
    /* O_CLOEXEC; O_NONBLOCK, or a FIFO would keep every program waiting; O_LARGEFILE, which 64-bit
     * kernels give their own programs. */
    POLICY_OPEN = 02000000 | 04000 | (sizeof(long) == 4 ? 0100000 : 0),
    POLICY_OPEN_PATH = 010000000 | 02000000, /* O_PATH | O_CLOEXEC */
    POLICY_FILE = 0100000,
    POLICY_DIRECTORY = 0040000,
    POLICY_LONGEST_NAME = 255,
    POLICY_LONGEST_PATH = 4096,
};

/* What becomes of a program. */
enum policy_answer {
    POLICY_LETS_IN,
    POLICY_LEAVES_OUT,
    POLICY_IS_OFF,
    POLICY_UNREADABLE,
    POLICY_NO_NAME,
    POLICY_WANTS_PATH, /* never given to a caller */
};

enum policy_source { POLICY_SOURCE_READ, POLICY_SOURCE_ABSENT, POLICY_SOURCE_FAILED };

/*
 * What open(2) says where there is nothing that could be trusted.  Not EACCES and EPERM (mode 0600,
 * AppArmor), ENOMEM, EMFILE and such: there may well be a file then, and what is in it counts.
 */
static inline bool policy_is_absent(long error)
{
    return error == -ENOENT || error == -ENOTDIR || error == -ELOOP || error == -ENXIO ||
           error == -ENODEV;
}

/* A descriptor, or -1 with `source` saying which of the two it is. */
static inline long policy_open(long folder, const char *name, unsigned type,
                               enum policy_source *source)
{
    struct raw_stat found;
    long file = raw_syscall5(RAW_openat, folder, (long)name, POLICY_OPEN, 0, 0);

    *source = POLICY_SOURCE_READ;
    if (file < 0) {
        *source = policy_is_absent(file) ? POLICY_SOURCE_ABSENT : POLICY_SOURCE_FAILED;
        return -1;
    }
    if (raw_syscall5(RAW_fstat, file, (long)&found, 0, 0, 0) != 0)
        *source = POLICY_SOURCE_FAILED;
    else if ((found.mode & 0170000) != type || found.uid != 0 || (found.mode & 0022) != 0)
        *source = POLICY_SOURCE_ABSENT;
    if (*source == POLICY_SOURCE_READ)
        return file;
    raw_syscall5(RAW_close, file, 0, 0, 0, 0);
    return -1;
}

/* read(2), and not mmap: who shortens a mapped file gives every program that reads it a SIGBUS. */
static POLICY_CALLED enum policy_source policy_read_file(struct policy *policy, long folder,
                                                         const char *name)
{
    enum policy_source source;
    char text[4096];
    long file = policy_open(folder, name, POLICY_FILE, &source), got;

    if (file < 0)
        return source;
    while ((got = raw_syscall5(RAW_read, file, (long)text, sizeof text, 0, 0)) > 0)
        if (policy_read(policy, text, (size_t)got))
            break;
    raw_syscall5(RAW_close, file, 0, 0, 0, 0);
    if (got < 0)
        return POLICY_SOURCE_FAILED;
    policy_end(policy);
    return POLICY_SOURCE_READ;
}

static inline int policy_compare(const char *a, const char *b)
{
    while (*a != '\0' && *a == *b) {
        a++;
        b++;
    }
    return (unsigned char)*a - (unsigned char)*b;
}

/* The length of the name of a drop-in, 0 if it is none: (something).conf, not hidden. */
static inline size_t policy_drop_in(const char *name)
{
    size_t length = 0;

    while (name[length] != '\0')
        length++;
    return length > 5 && length <= POLICY_LONGEST_NAME && name[0] != '.' &&
                   policy_is(name + length - 5, 5, ".conf")
               ? length
               : 0;
}

/*
 * The drop-ins in their order without a place to keep them all: each time the smallest name is
 * taken that is greater than the last.
 */
static POLICY_CALLED enum policy_source policy_read_folder(struct policy *policy, long parent)
{
    /* struct linux_dirent64: inode, offset (8 bytes each), length of the record (2), type (1), name */
    enum { RECORD_LENGTH = 16, NAME = 19 };
    _Alignas(8) char entries[1024];
    char names[2][POLICY_LONGEST_NAME + 1];
    unsigned short record;
    unsigned last = 0, pieces = 0;
    bool all = false; /* of the folder is in `entries`: it need not be read again */
    enum policy_source source;
    long folder = policy_open(parent, "policy.d", POLICY_DIRECTORY, &source), got = 0, length = 0;

    if (folder < 0)
        return source;
    names[last][0] = '\0';
    do {
        char *next = names[1 - last];

        next[0] = '\0';
        for (;;) {
            if (!all) {
                got = raw_syscall5(RAW_getdents64, folder, (long)entries, sizeof entries, 0, 0);
                if (got <= 0)
                    break;
                length = got;
            }
            for (long at = 0; at < length; at += record) {
                const char *name = entries + at + NAME;
                size_t size = policy_drop_in(name);

                __builtin_memcpy(&record, entries + at + RECORD_LENGTH, sizeof record);
                if (size == 0 || policy_compare(name, names[last]) <= 0 ||
                    (next[0] != '\0' && policy_compare(name, next) >= 0))
                    continue;
                for (size_t i = 0; i <= size; i++) {
                    next[i] = name[i];
                    __asm__ volatile("" ::: "memory"); /* not memcpy */
                }
            }
            if (all)
                break;
            pieces++;
        }
        if (got < 0) {
            source = POLICY_SOURCE_FAILED;
        } else if (next[0] == '\0') {
            break;
        } else {
            all = pieces == 1;
            /* One that is not to be trusted, or gone since, is as good as not there. */
            if (policy_read_file(policy, folder, next) == POLICY_SOURCE_FAILED ||
                (!all && raw_syscall5(RAW_lseek, folder, 0, 0, 0, 0) != 0))
                source = POLICY_SOURCE_FAILED;
            last = 1 - last;
        }
    } while (source == POLICY_SOURCE_READ && !policy_is_done(policy));
    raw_syscall5(RAW_close, folder, 0, 0, 0, 0);
    return source;
}

/* POLICY_WANTS_PATH: only where `whole` is false. */
static POLICY_CALLED enum policy_answer policy_of(long folder, const char *path, size_t length,
                                                  bool whole)
{
    struct policy policy;
    enum policy_source source = POLICY_SOURCE_ABSENT;

    policy_begin(&policy, path, length, whole);
    if (folder >= 0) {
        source = policy_read_folder(&policy, folder);
        if (source != POLICY_SOURCE_FAILED && !policy_is_done(&policy))
            source = policy_read_file(&policy, folder, "policy");
    }
    if (source == POLICY_SOURCE_FAILED)
        return POLICY_UNREADABLE;
    if (source == POLICY_SOURCE_ABSENT && !policy_is_done(&policy))
        policy_read_defaults(&policy);
    return policy.wants_path       ? POLICY_WANTS_PATH
           : policy_denies(&policy) ? POLICY_LEAVES_OUT
                                    : POLICY_LETS_IN;
}

/*
 * The program's base name without /proc, which would cost more than all else here: for a process that
 * looks at /proc/self the kernel makes its folder there and takes it down again, in the time of 0.75
 * empty libraries.
 *
 * AT_EXECFN is what exec was called with.  Its base name is that of /proc/self/exe, unless it is a
 * symlink, or a script (or what binfmt_misc knows): then exec put it behind the interpreter into argv
 * (fs/binfmt_script.c), five times at most, each time with up to one argument.
 *
 * It lies above the environment's texts, which lie above argv's, 6 MB in all at most (fs/exec.c,
 * bprm_set_stack_limits).  If not, it is not the kernel's: valgrind's programs have a stack of their
 * own, and a loader called by hand puts one of its arguments there (glibc's elf/rtld.c).
 */
static inline size_t policy_quick_name(const char *name, char **argv, char **envp)
{
    size_t length = 0;
    char byte;

    if (name == NULL || argv == NULL || argv[0] == NULL || envp[0] == NULL ||
        (uintptr_t)name - (uintptr_t)envp[0] > 6 * 1024 * 1024 || name[0] != '/')
        return 0;
    for (int i = 1; i <= 10 && argv[i] != NULL; i++)
        if (policy_compare(argv[i], name) == 0)
            return 0;
    if (raw_syscall5(RAW_readlinkat, POLICY_HERE, (long)name, (long)&byte, 1, 0) != -EINVAL)
        return 0;
    while (name[length] != '\0')
        length++;
    return length;
}

/*
 * By the whole path.  A path of the buffer's length may be cut; longer ones the kernel has none
 * (fs/d_path.c).
 */
static POLICY_CALLED enum policy_answer policy_of_path(long folder)
{
    char path[POLICY_LONGEST_PATH];
    long length = raw_syscall5(RAW_readlinkat, POLICY_HERE, (long)"/proc/self/exe", (long)path,
                               sizeof path, 0);

    if (length <= 0 || length >= (long)sizeof path)
        return POLICY_NO_NAME;
    path[length] = '\0';
    return policy_of(folder, path, (size_t)length, true);
}

/*
 * For a program whose privileges are known to be ordinary ones.  `name` is its AT_EXECFN, `argv`
 * and `envp` what main() gets; where they are not known, NULL.
 */
static POLICY_CALLED enum policy_answer ask_policy(const char *name, char **argv, char **envp)
{
    enum policy_answer answer = POLICY_WANTS_PATH;
    size_t length;
    long folder = raw_syscall5(RAW_faccessat, POLICY_HERE, (long)POLICY_KILL_SWITCH, 0, 0, 0);

    if (folder != -ENOENT && folder != -ENOTDIR)
        return POLICY_IS_OFF; /* it is there, or nobody can tell */
    folder = raw_syscall5(RAW_openat, POLICY_HERE, (long)POLICY_FOLDER, POLICY_OPEN_PATH, 0, 0);
    if (folder < 0 && !policy_is_absent(folder))
        return POLICY_UNREADABLE;
    length = policy_quick_name(name, argv, envp);
    if (length > 0)
        answer = policy_of(folder, name, length, false);
    if (answer == POLICY_WANTS_PATH)
        answer = policy_of_path(folder);
    if (folder >= 0)
        raw_syscall5(RAW_close, folder, 0, 0, 0, 0);
    return answer;
}

/*
 * For KSM_PRELOAD_VERBOSE=1; empty for who is let in.  No array of pointers: each would be a
 * relocation.
 */
static inline const char *policy_reason(enum policy_answer answer)
{
    return answer == POLICY_LEAVES_OUT    ? "ksm_preload: left out: the policy\n"
           : answer == POLICY_IS_OFF      ? "ksm_preload: left out: " POLICY_KILL_SWITCH "\n"
           : answer == POLICY_UNREADABLE  ? "ksm_preload: left out: the policy cannot be read\n"
           : answer == POLICY_NO_NAME     ? "ksm_preload: left out: /proc/self/exe cannot be read\n"
                                          : "";
}

#endif
