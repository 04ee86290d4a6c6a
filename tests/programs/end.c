/* SPDX-License-Identifier: MIT */
/* end exit|signal N: exits with status N, or dies of signal N. */
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>

int main(int argc, char **argv)
{
    struct rlimit no_core = {0, 0};

    if (argc != 3)
        return 2;
    if (strcmp(argv[1], "signal") == 0) {
        setrlimit(RLIMIT_CORE, &no_core);
        signal(atoi(argv[2]), SIG_DFL);
        raise(atoi(argv[2]));
    }
    return atoi(argv[2]);
}
