/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "merge.h"
#include "settings.h"
#include <sys/auxv.h>
#include <sys/prctl.h>
#include <unistd.h>
__attribute__((constructor)) static void opt_in(void)
{
    if (getauxval(AT_SECURE) != 0) { prctl(KSM_PR_SET_MEMORY_MERGE, 0UL, 0UL, 0UL, 0UL); return; }
    if (read_settings(environ).off) return;
    prctl(KSM_PR_SET_MEMORY_MERGE, 1UL, 0UL, 0UL, 0UL);
}
