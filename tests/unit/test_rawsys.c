/* SPDX-License-Identifier: MIT */
/* rawsys.h: arguments arrive in order, the kernel's answer comes back, errno is never touched. */
#include "check.h"

#include "rawsys.h"

#include <errno.h>
#include <sys/prctl.h>
#include <unistd.h>

int main(void)
{
    static const char text[] = "four";
    char name[16] = "", got[sizeof text] = "";
    int ends[2];

    errno = ENOTTY;
    CHECK(raw_syscall5(RAW_write, -1, (long)text, 4, 0, 0) == -EBADF);
    CHECK(raw_syscall5(RAW_prctl, -1, 0, 0, 0, 0) == -EINVAL);
    CHECK(raw_syscall5(RAW_prctl, PR_SET_NAME, (long)"unit", 0, 0, 0) == 0);
    /* Arguments three to five are looked at here, and have to be 0. */
    CHECK(raw_syscall5(RAW_prctl, PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) == 0);
    CHECK(raw_syscall5(RAW_prctl, PR_GET_NO_NEW_PRIVS, 1, 0, 0, 0) == -EINVAL);
    CHECK(raw_syscall5(RAW_prctl, PR_GET_NO_NEW_PRIVS, 0, 1, 0, 0) == -EINVAL);
    CHECK(raw_syscall5(RAW_prctl, PR_GET_NO_NEW_PRIVS, 0, 0, 1, 0) == -EINVAL);
    CHECK(raw_syscall5(RAW_prctl, PR_GET_NO_NEW_PRIVS, 0, 0, 0, 1) == -EINVAL);
    CHECK(errno == ENOTTY);

    CHECK(prctl(PR_GET_NAME, name) == 0);
    CHECK_TEXT(name, "unit");

    CHECK(pipe(ends) == 0);
    CHECK(raw_syscall5(RAW_write, ends[1], (long)text, sizeof text, 0, 0) == (long)sizeof text);
    CHECK(read(ends[0], got, sizeof got) == (ssize_t)sizeof got);
    CHECK_TEXT(got, text);
    return check_status();
}
