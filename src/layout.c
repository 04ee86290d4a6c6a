/* SPDX-License-Identifier: MIT */
/* The helper: who watches over an exec, and how it gets there and away again. What it does then is in image.c. */
#define _GNU_SOURCE
#include "layout.h"

#include "image.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/personality.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

struct layout layout_of(const struct group_secret *secret, uint64_t page)
{
    /* As many bits as the kernel draws by itself on x86_64, or more: 28 for mappings and program
     * (CONFIG_ARCH_MMAP_RND_BITS), 18 for the heap (arch_randomize_brk, since 6.9; 13 before), for the
     * stack 22 for pages and 9 within two pages (STACK_RND_MASK, arch_align_stack). Not more, since
     * sanitizers expect things where the kernel usually puts them. */
    enum { MMAP_BITS = 28, PROGRAM_BITS = 28, HEAP_BITS = 18, STACK_BITS = 22, WITHIN_BITS = 9 };
    enum { STACK_LEAST = 8 << 20 };
    const uint64_t *words = secret->words, one = 1;
    uint64_t stack_span = page << STACK_BITS, program_unit = page;
    struct layout layout;

    /* The stack may grow by as much as the span of its own places before it meets a mapping. */
    layout.stack_limit = 2 * stack_span + (words[GROUP_MMAP] % (one << MMAP_BITS)) * page;
#if defined(__aarch64__)
    program_unit = 1 << 16; /* files are aligned for the largest pages: with less, bits would be lost */
#endif
    /* Farther than any program is long: where it goes is free. */
    layout.program = stack_span + (words[GROUP_PROGRAM] % (one << PROGRAM_BITS)) * program_unit;
    layout.heap = (1 + words[GROUP_HEAP] % (one << HEAP_BITS)) * page;
    /* Farther than any stack is long that exec has made: arguments and environment are 6 MB at most
     * (fs/exec.c, bprm_stack_limits). */
    layout.stack = STACK_LEAST + (words[GROUP_STACK] % (one << STACK_BITS)) * page +
                   (words[GROUP_STACK] >> 48) % (one << WITHIN_BITS) * 16;
    return layout;
}

#if defined(__x86_64__) || defined(__aarch64__)

enum { UNSUPPORTED = 4, CANNOT_EXEC = 126 };

/* Whether the program itself has sent the signal that it stops with. */
static bool is_its_own(pid_t pid)
{
    siginfo_t info;

    return ptrace(PTRACE_GETSIGINFO, pid, 0, &info) == 0 && info.si_code == SI_TKILL && info.si_pid == pid;
}

/* Waits for the exec; false if the program ended instead, or asks to be let go (layout_cancel). */
static bool wait_for_exec(pid_t pid)
{
    for (;;) {
        int status, number = 0;
        bool stays = false;

        if (waitpid(pid, &status, __WALL) != pid || !WIFSTOPPED(status))
            return false;
        if (status >> 8 == (SIGTRAP | PTRACE_EVENT_EXEC << 8))
            return true;
        if (status >> 16 == PTRACE_EVENT_STOP)
            stays = WSTOPSIG(status) != SIGTRAP;
        else if (status >> 16 == 0)
            number = WSTOPSIG(status);
        if (number == SIGTRAP && is_its_own(pid)) {
            (void)ptrace(PTRACE_DETACH, pid, 0, 0);
            return false;
        }
        if ((stays ? ptrace(PTRACE_LISTEN, pid, 0, 0) : ptrace(PTRACE_CONT, pid, 0, number)) != 0)
            return false;
    }
}

static void say(const struct layout_wish *wish, const char *what, const char *step, int error)
{
    if (wish->name != NULL)
        fprintf(stderr, "ksm-wrapper: %s %s: %s failed: %s\n", wish->name, what, step, strerror(error));
}

/* Whether a SIGCONT waits, which has come after any SIGSTOP then: each clears away the other. */
static bool continued(const struct tracee *t)
{
    FILE *file = tracee_open(t, "status");
    char line[256];
    unsigned long long pending, all = 0;

    while (file != NULL && fgets(line, sizeof line, file) != NULL)
        if (sscanf(line, "SigPnd: %llx", &pending) == 1 || sscanf(line, "ShdPnd: %llx", &pending) == 1)
            all |= pending;
    if (file != NULL)
        fclose(file);
    return (all >> (SIGCONT - 1) & 1) != 0;
}

/* What is done about a program that could not be moved, errno saying why; false if it does not run. */
static bool run_unmoved(struct tracee *t, const struct layout_wish *wish, const struct exec_settings *old)
{
    int error = errno;
    const char *step = t->step;

    if (!wish->required && image_exec_again(t, old)) {
        say(wish, "runs with an ordinary layout", step, error);
        return true;
    }
    if (!tracee_is_gone(t)) {
        say(wish, "is not run", step, error);
        image_end(t, wish->required ? UNSUPPORTED : CANNOT_EXEC);
    }
    return false;
}

/* Watches over one exec of PID, whose settings will be OLD again after it. */
static void watch(pid_t pid, int proc, const struct layout_wish *wish, const struct exec_settings *old)
{
    struct tracee t = {.pid = pid, .proc = proc, .memory = -1, .page = (uint64_t)sysconf(_SC_PAGESIZE)};
    uint64_t blocked = UINT64_MAX, mask = 0;
    bool masked;

    if (!wait_for_exec(pid))
        return;
    /* A signal now would run its handler, or end the program, in the middle: it has to wait. */
    masked = ptrace(PTRACE_GETSIGMASK, pid, sizeof mask, &mask) == 0 &&
             ptrace(PTRACE_SETSIGMASK, pid, sizeof blocked, &blocked) == 0;
    t.step = "starting to trace";
    t.memory = openat(proc, "mem", O_RDWR | O_CLOEXEC);
    if (!(masked && t.memory >= 0 && tracee_next_stop(&t, 0) && tracee_get_registers(&t, &t.entry) &&
          image_move(&t, &wish->layout, wish->comm, old)) &&
        !run_unmoved(&t, wish, old))
        return;
    t.stopped = t.stopped && !continued(&t);
    (void)ptrace(PTRACE_SETSIGMASK, pid, sizeof mask, &mask);
    if (t.stopped)
        (void)kill(pid, SIGSTOP); /* before it is let go: then its PID is still its own */
    (void)ptrace(PTRACE_DETACH, pid, 0, 0);
}

static struct {
    bool active;
    struct exec_settings old;
} begun;

static char reason[256];

/* Changes what exec needs changed; NULL, or the reason with all as it was. */
static const char *change_settings(const struct layout *layout, struct exec_settings *old)
{
    struct rlimit limit;
    int now = personality(UINT32_MAX);
    unsigned size = 0;

    if (now < 0)
        return "personality(2) is forbidden here (a container's seccomp filter?)";
    old->personality = (unsigned long)now;
    if (now & ADDR_COMPAT_LAYOUT)
        return "it is to run with the legacy memory layout (personality ADDR_COMPAT_LAYOUT)";
    /* What will be needed in the program is tried out before. */
    if (prctl(PR_SET_MM, PR_SET_MM_MAP_SIZE, &size, 0UL, 0UL) != 0 || size != sizeof(struct prctl_mm_map))
        return "this kernel has no PR_SET_MM_MAP (CONFIG_CHECKPOINT_RESTORE)";
    if (personality((unsigned long)now | ADDR_NO_RANDOMIZE) < 0 || personality((unsigned long)now) < 0)
        return "personality(2) is forbidden here (LockPersonality= of the unit, or a container's seccomp filter)";
    if (getrlimit(RLIMIT_STACK, &old->stack) != 0)
        return "the stack limit cannot be read";
    limit = old->stack;
    limit.rlim_cur = layout->stack_limit;
    if (limit.rlim_max < limit.rlim_cur)
        limit.rlim_max = limit.rlim_cur; /* with CAP_SYS_RESOURCE */
    if (setrlimit(RLIMIT_STACK, &limit) != 0) {
        snprintf(reason, sizeof reason, "the hard limit on the stack is %llu bytes (ulimit -Hs): it has to be unlimited",
                 (unsigned long long)old->stack.rlim_max);
        return reason;
    }
    (void)personality((unsigned long)now | ADDR_NO_RANDOMIZE);
    return NULL;
}

static void restore_own_settings(void)
{
    (void)personality(begun.old.personality);
    (void)setrlimit(RLIMIT_STACK, &begun.old.stack);
}

/* Whether somebody traces this process. */
static bool is_traced(void)
{
    FILE *file = fopen("/proc/self/status", "re");
    char line[256];
    int tracer = 0;

    while (file != NULL && tracer == 0 && fgets(line, sizeof line, file) != NULL)
        (void)sscanf(line, "TracerPid: %d", &tracer);
    if (file != NULL)
        fclose(file);
    return tracer != 0;
}

/* Like fork(), but the child's end sends no SIGCHLD, which might stay pending over the exec. */
static pid_t fork_quietly(void)
{
    return (pid_t)syscall(SYS_clone, 0UL, 0UL, 0UL, 0UL, 0UL);
}

/* The helper's life. Its parent has told it to speak over the two pipes, and PROC is /proc/PID. */
__attribute__((noreturn)) static void help(int from, int to, int proc, const struct layout_wish *wish)
{
    pid_t self = getpid(), pid;
    sigset_t all;
    int answer = 0;

    sigfillset(&all);
    sigprocmask(SIG_SETMASK, &all, NULL);
    (void)setrlimit(RLIMIT_CORE, &(struct rlimit){0, 0}); /* a filter may kill it */
    /* Nobody should wait for the end of a pipe because of the helper; its own last word goes to stderr. */
    for (int i = 0; i < 2; i++)
        if (i != from && i != to && i != proc)
            (void)close(i);
    if (write(to, &self, sizeof self) != sizeof self || read(from, &pid, sizeof pid) != sizeof pid)
        _exit(1);
#ifdef KSM_FAULTS
    tracee_faulted = pid;
#endif
    if (tracee_fault() || ptrace(PTRACE_SEIZE, pid, 0,
                          PTRACE_O_TRACEEXEC | PTRACE_O_TRACESYSGOOD | PTRACE_O_EXITKILL) != 0)
        answer = errno;
    if (write(to, &answer, sizeof answer) == sizeof answer && answer == 0) {
        close(from);
        close(to);
        watch(pid, proc, wish, &begun.old);
    }
    _exit(0);
}

/* Starts the helper and has it trace this process. Returns 0, else an error number. */
static int start_helper(const int to_helper[2], int from_helper[2], int proc, const struct layout_wish *wish)
{
    pid_t self = getpid(), helper, middle = tracee_fault() ? -1 : fork_quietly();
    int answer, status = 0;

    if (middle < 0)
        return errno;
    if (middle == 0) {
        (void)setsid(); /* a SIGSTOP to the caller's process group is not for the helper */
        helper = fork_quietly();
        if (helper == 0) {
            (void)close(to_helper[1]);
            (void)close(from_helper[0]);
            help(to_helper[0], from_helper[1], proc, wish);
        }
        _exit(helper < 0 ? errno : 0);
    }
    close(from_helper[1]);
    from_helper[1] = -1;
    while (waitpid(middle, &status, WUNTRACED | __WALL) == middle && WIFSTOPPED(status))
        (void)kill(middle, SIGCONT);
    if (read(from_helper[0], &helper, sizeof helper) != sizeof helper)
        return WIFEXITED(status) && WEXITSTATUS(status) != 0 ? WEXITSTATUS(status) : ECHILD;
    /* For Yama's ptrace_scope 1; EINVAL without Yama. */
    (void)prctl(PR_SET_PTRACER, (unsigned long)helper, 0UL, 0UL, 0UL);
    if (write(to_helper[1], &self, sizeof self) != sizeof self ||
        read(from_helper[0], &answer, sizeof answer) != sizeof answer)
        return ECHILD;
    return answer;
}

const char *layout_begin(const struct layout_wish *wish)
{
    int to_helper[2] = {-1, -1}, from_helper[2] = {-1, -1}, answer, legacy = 0, subreaper = 0, proc;
    const char *why;
    FILE *file = fopen("/proc/sys/vm/legacy_va_layout", "re");

    if (file != NULL) {
        if (fscanf(file, "%d", &legacy) != 1)
            legacy = 0;
        fclose(file);
    }
    if (legacy != 0)
        return "the kernel is told to use the legacy memory layout (sysctl vm.legacy_va_layout)";
    /* RLIMIT_STACK chooses no place there: it is cut to five sixths of the address space (mm/util.c). */
    if ((uint64_t)(uintptr_t)&legacy >> 46 == 0)
        return "the stack is not where 47 bits of addresses end (valgrind, an emulator, CONFIG_ARM64_VA_BITS)";
    if (getauxval(AT_SYSINFO_EHDR) == 0)
        return "this kernel gives programs no vdso (boot option vdso=0)";
    if (getpid() == 1)
        return "it would be PID 1 and get a child that it does not know: start it below an init such as tini";
    /* Not by number: a PID namespace may have its parent's /proc. */
    proc = tracee_fault() ? -1 : open("/proc/self", O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (proc < 0) {
        snprintf(reason, sizeof reason, "/proc/self cannot be opened: %s", strerror(errno));
        return reason;
    }
    why = change_settings(&wish->layout, &begun.old);
    if (why != NULL) {
        close(proc);
        return why;
    }

    /* The helper is to be init's child, or that of the next subreaper above us. */
    (void)prctl(PR_GET_CHILD_SUBREAPER, &subreaper, 0UL, 0UL, 0UL);
    if (subreaper != 0)
        (void)prctl(PR_SET_CHILD_SUBREAPER, 0UL, 0UL, 0UL, 0UL);
    if (tracee_fault() || pipe2(to_helper, O_CLOEXEC) != 0 || pipe2(from_helper, O_CLOEXEC) != 0)
        answer = errno;
    else
        answer = start_helper(to_helper, from_helper, proc, wish);
    close(proc);
    for (int i = 0; i < 2; i++) {
        if (to_helper[i] >= 0)
            close(to_helper[i]);
        if (from_helper[i] >= 0)
            close(from_helper[i]);
    }
    if (subreaper != 0)
        (void)prctl(PR_SET_CHILD_SUBREAPER, 1UL, 0UL, 0UL, 0UL);
    begun.active = answer == 0;
    if (begun.active)
        return NULL;
    restore_own_settings();
    (void)prctl(PR_SET_PTRACER, 0UL, 0UL, 0UL, 0UL);
    if (answer == EPERM && is_traced())
        return "it is traced already (by a debugger, or strace -f)";
    snprintf(reason, sizeof reason, "a helper cannot trace it: %s%s",
             answer == ECHILD ? "it was killed" : strerror(answer),
             answer == EPERM ? " (kernel.yama.ptrace_scope, or a seccomp filter)"
             : answer == ECHILD ? " (a seccomp filter?)"
                                : "");
    return reason;
}

void layout_cancel(void)
{
    struct sigaction usual = {.sa_handler = SIG_DFL}, old;
    sigset_t trap, mask;

    if (!begun.active)
        return;
    begun.active = false;
    sigemptyset(&trap);
    sigaddset(&trap, SIGTRAP);
    sigprocmask(SIG_UNBLOCK, &trap, &mask);
    sigaction(SIGTRAP, &usual, &old);
    raise(SIGTRAP); /* the helper takes it for itself, and lets go */
    sigaction(SIGTRAP, &old, NULL);
    sigprocmask(SIG_SETMASK, &mask, NULL);
    restore_own_settings();
}

#else

const char *layout_begin(const struct layout_wish *wish)
{
    (void)wish;
    return "groups exist on x86_64 and aarch64 only";
}

void layout_cancel(void)
{
}

#endif
