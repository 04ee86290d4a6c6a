/* SPDX-License-Identifier: MIT */
/*
 * System calls without a libc: for code that runs before the libc is ready, or beside a libc we
 * did not choose (the same file is loaded by glibc and musl).  Returns the kernel's own value,
 * -errno on failure; errno itself is never touched.
 */
#ifndef KSM_RAWSYS_H
#define KSM_RAWSYS_H

#include <asm/unistd.h>

enum {
    RAW_close = __NR_close,
    RAW_execve = __NR_execve,
    RAW_faccessat = __NR_faccessat,
    RAW_getdents64 = __NR_getdents64,
    RAW_getpid = __NR_getpid,
    RAW_lseek = __NR_lseek,
    RAW_openat = __NR_openat,
    RAW_prctl = __NR_prctl,
    RAW_read = __NR_read,
    RAW_readlinkat = __NR_readlinkat,
    RAW_write = __NR_write,
#ifdef __NR_fstat64
    RAW_fstat = __NR_fstat64, /* where there is one, the other has 16 bits for a user */
#else
    RAW_fstat = __NR_fstat,
#endif
};

#if defined(__x86_64__) && !defined(__ILP32__)

/*
 * What RAW_fstat fills, as far as we read it.  <asm/stat.h> has it whole, but under the name of
 * <sys/stat.h>'s struct; arch/x86/include/uapi/asm/stat.h, include/uapi/asm-generic/stat.h.
 */
struct raw_stat {
    unsigned long before[3];
    unsigned mode, uid;
    unsigned long after[14];
};
_Static_assert(sizeof(struct raw_stat) == 144, "not the kernel's struct stat");

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

struct raw_stat {
    unsigned before[4];
    unsigned mode, links, uid;
    unsigned after[17];
};
_Static_assert(sizeof(struct raw_stat) == 96, "not the kernel's struct stat64");

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

struct raw_stat {
    unsigned long before[2];
    unsigned mode, links, uid, gid;
    unsigned long after[12];
};
_Static_assert(sizeof(struct raw_stat) == 128, "not the kernel's struct stat");

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
