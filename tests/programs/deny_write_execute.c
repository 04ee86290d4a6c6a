/* SPDX-License-Identifier: MIT */
/* deny_write_execute CMD [ARG...]: runs CMD where no memory may become executable (PR_SET_MDWE, Linux 6.3). */
#include <stdio.h>
#include <sys/prctl.h>
#include <unistd.h>

enum { PR_SET_MDWE_ = 65, REFUSE_EXEC_GAIN = 1 };

int main(int argc, char **argv)
{
    if (argc < 2 || prctl(PR_SET_MDWE_, (unsigned long)REFUSE_EXEC_GAIN, 0UL, 0UL, 0UL) != 0) {
        perror("deny_write_execute");
        return 99;
    }
    execvp(argv[1], argv + 1);
    return 98;
}
