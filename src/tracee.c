/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "tracee.h"

#if defined(__x86_64__) || defined(__aarch64__)

#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#ifdef KSM_FAULTS
/* For tests only: the step of that number fails, or kills the helper, or the program gets signals: KSM_SIGNALS
 * is STEP:SIGNAL,... */
pid_t tracee_faulted;

static bool is_step(const char *variable, int step)
{
    const char *wanted = getenv(variable);

    return wanted != NULL && atoi(wanted) == step;
}

bool tracee_fault(void)
{
    static int steps;
    const char *signals = getenv("KSM_SIGNALS");
    int step, number;

    steps++;
    if (is_step("KSM_DIE_AT", steps))
        raise(SIGKILL);
    while (tracee_faulted != 0 && signals != NULL && sscanf(signals, "%d:%d", &step, &number) == 2) {
        if (step == steps)
            kill(tracee_faulted, number);
        signals = strchr(signals, ',');
        if (signals != NULL)
            signals++;
    }
    errno = EIO;
    return is_step("KSM_FAIL_AT", steps);
}
#endif

enum { ERESTARTSYS = 512 }; /* the kernel's own; only a tracer sees it */

#if defined(__x86_64__)
static const unsigned char syscall_code[] = {0x0f, 0x05}; /* syscall */
enum { SYSCALL_ALIGNMENT = 1 };

uint64_t *tracee_stack_pointer(struct user_regs_struct *regs)
{
    return (uint64_t *)&regs->rsp;
}

uint64_t *tracee_instruction_pointer(struct user_regs_struct *regs)
{
    return (uint64_t *)&regs->rip;
}

void tracee_set_call(struct user_regs_struct *regs, long number, const uint64_t args[5])
{
    regs->rax = (unsigned long)number;
    regs->rdi = args[0];
    regs->rsi = args[1];
    regs->rdx = args[2];
    regs->r10 = args[3];
    regs->r8 = args[4];
    regs->orig_rax = ~0UL; /* not within a call: nothing to restart */
}

static long call_result(const struct user_regs_struct *regs)
{
    return (long)regs->rax;
}
#else
static const unsigned char syscall_code[] = {0x01, 0x00, 0x00, 0xd4}; /* svc #0 */
enum { SYSCALL_ALIGNMENT = sizeof syscall_code };

uint64_t *tracee_stack_pointer(struct user_regs_struct *regs)
{
    return (uint64_t *)&regs->sp;
}

uint64_t *tracee_instruction_pointer(struct user_regs_struct *regs)
{
    return (uint64_t *)&regs->pc;
}

void tracee_set_call(struct user_regs_struct *regs, long number, const uint64_t args[5])
{
    regs->regs[8] = (unsigned long)number;
    for (int i = 0; i < 5; i++)
        regs->regs[i] = args[i];
}

static long call_result(const struct user_regs_struct *regs)
{
    return (long)regs->regs[0];
}
#endif

bool tracee_get_registers(const struct tracee *t, struct user_regs_struct *regs)
{
    struct iovec part = {regs, sizeof *regs};

    return ptrace(PTRACE_GETREGSET, t->pid, NT_PRSTATUS, &part) == 0;
}

bool tracee_set_registers(const struct tracee *t, struct user_regs_struct *regs)
{
    struct iovec part = {regs, sizeof *regs};

    return ptrace(PTRACE_SETREGSET, t->pid, NT_PRSTATUS, &part) == 0;
}

bool tracee_is_gone(struct tracee *t)
{
    struct user_regs_struct regs;

    if (!tracee_get_registers(t, &regs) && errno == ESRCH)
        t->gone = true;
    return t->gone;
}

bool tracee_next_stop(struct tracee *t, int event)
{
    for (;;) {
        int status;

        if (ptrace(PTRACE_SYSCALL, t->pid, 0, 0) != 0 && errno != ESRCH)
            return false;
        /* ESRCH: it is being killed. */
        if (waitpid(t->pid, &status, __WALL) != t->pid || !WIFSTOPPED(status)) {
            t->gone = true;
            errno = ESRCH;
            return false;
        }
        if (status >> 8 == (SIGTRAP | 0x80) && event == 0)
            return true;
        if (event != 0 && status >> 8 == (SIGTRAP | event << 8))
            return true;
        if (status >> 8 == (SIGTRAP | 0x80)) { /* an exec that returns instead */
            errno = ENOEXEC;
            return false;
        }
        if (WSTOPSIG(status) == SIGSTOP)
            t->stopped = true;
    }
}

int64_t tracee_call(struct tracee *t, long number, uint64_t a, uint64_t b, uint64_t c, uint64_t d, uint64_t e)
{
    return tracee_fault() ? -1 : tracee_try(t, number, a, b, c, d, e);
}

int64_t tracee_try(struct tracee *t, long number, uint64_t a, uint64_t b, uint64_t c, uint64_t d, uint64_t e)
{
    struct user_regs_struct regs;
    long result;

    /* mremap() of what is open to KSM returns at once if a SIGSTOP has come (mm/ksm.c, unmerge_ksm_pages). */
    do {
        regs = t->entry;
        tracee_set_call(&regs, number, (const uint64_t[]){a, b, c, d, e});
        *tracee_instruction_pointer(&regs) = t->syscall;
        if (!tracee_set_registers(t, &regs) || !tracee_next_stop(t, 0) || !tracee_next_stop(t, 0) ||
            !tracee_get_registers(t, &regs))
            return -1;
        result = call_result(&regs);
    } while (result == -ERESTARTSYS);
    if (result < 0 && result > -4096) {
        errno = (int)-result;
        return -1;
    }
    return result;
}

bool tracee_read(const struct tracee *t, uint64_t address, void *data, size_t size)
{
    ssize_t done = tracee_fault() ? -1 : pread(t->memory, data, size, (off_t)address);

    if (done >= 0 && done != (ssize_t)size)
        errno = EIO;
    return done == (ssize_t)size;
}

bool tracee_write(const struct tracee *t, uint64_t address, const void *data, size_t size)
{
    ssize_t done = tracee_fault() ? -1 : pwrite(t->memory, data, size, (off_t)address);

    if (done >= 0 && done != (ssize_t)size)
        errno = EIO;
    return done == (ssize_t)size;
}

FILE *tracee_open(const struct tracee *t, const char *name)
{
    int file = tracee_fault() ? -1 : openat(t->proc, name, O_RDONLY | O_CLOEXEC);
    FILE *stream = file >= 0 ? fdopen(file, "r") : NULL;

    if (stream == NULL && file >= 0)
        close(file);
    return stream;
}

bool tracee_find_syscall(struct tracee *t)
{
    FILE *file = tracee_open(t, "auxv");
    uint64_t entry[2], vdso = 0;
    char code[16384 + sizeof syscall_code] = "";
    size_t size = 0, at = 0;

    if (file == NULL)
        return false;
    while (vdso == 0 && fread(entry, sizeof entry, 1, file) == 1)
        vdso = entry[0] == AT_SYSINFO_EHDR ? entry[1] : 0;
    fclose(file);
    errno = ENOSYS;
    if (vdso == 0)
        return false;
    while (size + 4096 <= sizeof code && pread(t->memory, code + size, 4096, (off_t)(vdso + size)) == 4096)
        size += 4096;
    while (at < size && memcmp(code + at, syscall_code, sizeof syscall_code) != 0)
        at += SYSCALL_ALIGNMENT;
    if (at >= size || tracee_fault())
        return false;
    t->syscall = vdso + at;
    return true;
}

#endif
