/* SPDX-License-Identifier: MIT
 * A process that goes on without its first thread, until its input ends. */
#include <pthread.h>
#include <stdio.h>
#include <unistd.h>

static void *wait_for_the_end(void *none)
{
    char end;

    (void)none;
    puts("ready");
    fflush(stdout);
    if (read(0, &end, 1) < 0)
        _exit(1);
    _exit(0);
}

int main(void)
{
    pthread_t thread;

    if (pthread_create(&thread, NULL, wait_for_the_end, NULL))
        return 1;
    pthread_exit(NULL);
}
