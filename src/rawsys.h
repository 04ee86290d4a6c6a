/* SPDX-License-Identifier: MIT */
/*
 * System calls without a libc: for code that runs before the libc is ready, or beside a libc we
 * did not choose (the same file is loaded by glibc and musl).  Returns the kernel's own value,
 * -errno on failure; errno itself is never touched.
 *
 * Numbers: arch/x86/entry/syscalls/syscall_{64,32}.tbl and include/uapi/asm-generic/unistd.h.
 */
#ifndef KSM_RAWSYS_H
#define KSM_RAWSYS_H

#if defined(__x86_64__) && !defined(__ILP32__)

enum {
    RAW_read = 0, RAW_write = 1, RAW_close = 3, RAW_getpid = 39, RAW_execve = 59, RAW_prctl = 157,
    RAW_openat = 257,
};

static inline long raw_syscall5(long nr, long a, long b, long c, long d, long e)
{
    long ret;
    register long r10 __asm__("r10") = d;
    register long r8 __asm__("r8") = e;

    __asm__ volatile("syscall"
                     : "=a"(ret)
                     : "a"(nr), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8)
                     : "rcx", "r11", "memory");
    return ret;
}

#elif defined(__i386__)

enum { RAW_write = 4, RAW_prctl = 172 };

static inline long raw_syscall5(long nr, long a, long b, long c, long d, long e)
{
    long ret;

    __asm__ volatile("int $0x80"
                     : "=a"(ret)
                     : "a"(nr), "b"(a), "c"(b), "d"(c), "S"(d), "D"(e)
                     : "memory");
    return ret;
}

#elif defined(__aarch64__)

enum {
    RAW_openat = 56, RAW_close = 57, RAW_read = 63, RAW_write = 64, RAW_prctl = 167, RAW_getpid = 172,
    RAW_execve = 221,
};

static inline long raw_syscall5(long nr, long a, long b, long c, long d, long e)
{
    register long x8 __asm__("x8") = nr;
    register long x0 __asm__("x0") = a;
    register long x1 __asm__("x1") = b;
    register long x2 __asm__("x2") = c;
    register long x3 __asm__("x3") = d;
    register long x4 __asm__("x4") = e;

    __asm__ volatile("svc #0"
                     : "+r"(x0)
                     : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4)
                     : "memory", "cc");
    return x0;
}

#else
#error "ksm-preload: no system call stub for this architecture yet (src/rawsys.h)"
#endif

#endif
