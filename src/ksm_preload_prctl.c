/* SPDX-License-Identifier: MIT */
/*
 * libksm_preload_prctl.so: opts the process it is loaded into in to KSM, and does nothing else.
 *
 * Everything this file does happens once, in its constructor, before main(): it learns whether the
 * program is privileged, asks the policy, and switches the kernel's flag.  It needs no libc, exports
 * no symbol, allocates nothing, opens nothing but the policy, leaves errno alone.  Every failure means
 * that the program runs and is not opted in.
 */
#include "merge.h"
#include "policy.h"
#include "rawsys.h"
#include "settings.h"

#include <elf.h>

/* Linux 6.4, as is PR_SET_MEMORY_MERGE: where this is missing there is nothing to do either. */
#define PR_GET_AUXV 0x41555856

/* musl calls constructors without arguments, but has set __environ by then (ldso/dynlink.c). glibc
 * passes argc, argv and envp (elf/dl-init.c), but may set __environ later. */
extern char **__environ __attribute__((weak));

static long process_control(long option, long a, long b)
{
    /* All five arguments are checked by the kernel; systemd 254 passed two and got EINVAL. */
    return raw_syscall5(RAW_prctl, option, a, b, 0, 0);
}

/*
 * 1 under AT_SECURE (set-uid, set-gid, file capabilities, an LSM's word), 0 if not, -1 unknown.
 * `name` becomes AT_EXECFN, if there is one.
 *
 * The kernel's copy is asked and not the stack behind envp: for a privileged program glibc has
 * removed variables from envp by then, and the gap it leaves reads as an empty vector.
 */
static int is_privileged(const char **name)
{
    /* AT_VECTOR_SIZE is about 50 words on x86_64 6.18; of a longer one the kernel gives the start,
     * where AT_SECURE is (fs/binfmt_elf.c, create_elf_tables). */
    unsigned long auxv[2 * 40];
    long size;
    int privileged = -1;

    /* For valgrind, which does not know that the kernel fills this (3.19).  The barrier keeps the
     * compiler from making it a call of memset, which is in the libc. */
    for (unsigned i = 0; i < sizeof auxv / sizeof *auxv; i++) {
        auxv[i] = AT_NULL;
        __asm__ volatile("" ::: "memory");
    }
    size = process_control(PR_GET_AUXV, (long)auxv, sizeof auxv);
    if (size < 0)
        return -1;
    if (size > (long)sizeof auxv)
        size = sizeof auxv;
    for (unsigned i = 0; (long)((i + 2) * sizeof auxv[0]) <= size; i += 2) {
        if (auxv[i] == AT_SECURE)
            privileged = auxv[i + 1] != 0;
        else if (auxv[i] == AT_EXECFN)
            *name = (const char *)auxv[i + 1];
        else if (auxv[i] == AT_NULL)
            break;
    }
    return privileged;
}

static char *const *environment(int argc, char **argv, char **envp)
{
    if (is_called_by_glibc(argc, argv, envp))
        return envp;
    return &__environ != NULL ? __environ : NULL;
}

static void say(const char *text)
{
    raw_syscall5(RAW_write, 2, (long)text, (long)text_length(text), 0, 0);
}

/*
 * Clearing costs nothing where nothing was set, and cannot fail on a process that is just starting:
 * ENOMEM comes from splitting merged pages, of which it has none yet.  What was set is taken back
 * page address by page address (mm/ksm.c, break_ksm, 6.18): 2 us for an ordinary program, hours for one
 * with the 20 TB shadow of AddressSanitizer.
 */
static void leave_out(void)
{
    process_control(KSM_PR_SET_MEMORY_MERGE, 0, 0);
}

__attribute__((constructor)) static void opt_in(int argc, char **argv, char **envp)
{
    struct settings settings;
    enum policy_answer answer;
    const char *name = NULL;
    long error;

    switch (is_privileged(&name)) {
    case 0:
        break;
    case 1:
        /* The flag survives a set-uid exec, so an unprivileged parent may have given it to us. */
        leave_out();
        return;
    default:
        /* A kernel before 6.4, or one that took over the one prctl and not the other: what is not
         * known to be unprivileged is not opted in, and what it asks for is not listened to. */
        return;
    }

    settings = read_settings(environment(argc, argv, envp));
    if (settings.off || settings.madvise) {
        leave_out();
        if (settings.verbose)
            say(settings.off ? "ksm_preload: left out: KSM_PRELOAD=off\n"
                             : "ksm_preload: left to libksm_preload.so: KSM_PRELOAD=madvise\n");
        return;
    }

    answer = ask_policy(name, is_called_by_glibc(argc, argv, envp) ? argv : NULL, envp);
    if (answer != POLICY_LETS_IN) {
        leave_out();
        if (settings.verbose)
            say(policy_reason(answer));
        return;
    }

    error = process_control(KSM_PR_SET_MEMORY_MERGE, 1, 0);
    if (settings.verbose)
        say(error == 0 ? "ksm_preload: opted in (prctl)\n"
                       : "ksm_preload: not opted in: the kernel refused the prctl\n");
}
