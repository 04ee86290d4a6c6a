/* SPDX-License-Identifier: MIT */
/*
 * A program stopped under ptrace(2) right after its exec: its registers and memory, and system calls made in its
 * place. x86_64 and aarch64; everything else here is in image.c.
 */
#ifndef KSM_TRACEE_H
#define KSM_TRACEE_H

#include <linux/prctl.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/types.h>
#include <sys/user.h>

struct mapping {
    uint64_t start, end;
    bool is_text;
};

struct tracee {
    pid_t pid;
    int proc, memory;                 /* /proc/PID, its mem */
    struct user_regs_struct entry;    /* the registers with which the program will start */
    uint64_t syscall;                 /* the address of an instruction that makes a system call */
    const char *step;                 /* what is being done, for a message */
    bool stopped;                     /* by a SIGSTOP, which cannot be blocked: sent again at the end */
    bool gone;                        /* killed from outside: its PID may be another's */
    uint64_t page;
    struct prctl_mm_map record;       /* the kernel's */
    struct mapping program, parts[64], stack; /* where it lies, in which mappings; its stack */
    size_t part_count;
    uint64_t alignment;               /* of the program, by its file */
    bool fixed, loads_interpreter;
    uint64_t stack_moved;             /* down by so much, for now */
    char *content; /* of the stack, as the kernel made it: content_size bytes from entry's stack pointer on */
    size_t content_size;
    size_t auxv, auxv_size; /* where in content, in words */
};

/* Where in REGS the stack pointer and the address of the next instruction are. */
uint64_t *tracee_stack_pointer(struct user_regs_struct *regs);
uint64_t *tracee_instruction_pointer(struct user_regs_struct *regs);

/* Puts a system call into REGS: what remains is to go to an instruction that makes it. */
void tracee_set_call(struct user_regs_struct *regs, long number, const uint64_t args[5]);

/* These return false, and errno. */
bool tracee_get_registers(const struct tracee *t, struct user_regs_struct *regs);
bool tracee_set_registers(const struct tracee *t, struct user_regs_struct *regs);
bool tracee_read(const struct tracee *t, uint64_t address, void *data, size_t size);
bool tracee_write(const struct tracee *t, uint64_t address, const void *data, size_t size);

/* Opens a file of its /proc/PID for reading; NULL and errno. */
FILE *tracee_open(const struct tracee *t, const char *name);

/* Finds an instruction in the vdso that makes a system call, for `syscall`; false and errno. */
bool tracee_find_syscall(struct tracee *t);

/*
 * Has the program make a system call. Returns what that did; -1 and errno on any failure. The second is for a call
 * that may well fail.
 */
int64_t tracee_call(struct tracee *t, long number, uint64_t a, uint64_t b, uint64_t c, uint64_t d, uint64_t e);
int64_t tracee_try(struct tracee *t, long number, uint64_t a, uint64_t b, uint64_t c, uint64_t d, uint64_t e);

/*
 * Lets the program go on to the next stop of a system call, or if EVENT is not 0, to that PTRACE_EVENT. False and
 * errno: ESRCH if it was killed, ENOEXEC if an exec returned.
 */
bool tracee_next_stop(struct tracee *t, int event);

/* Whether it has been killed from outside: nothing else takes a stopped program away from its tracer. */
bool tracee_is_gone(struct tracee *t);

/* Whether this step is to fail, in a build for tests (-DKSM_FAULTS); false in any other. */
#ifdef KSM_FAULTS
extern pid_t tracee_faulted;
bool tracee_fault(void);
#else
static inline bool tracee_fault(void)
{
    return false;
}
#endif

#endif
