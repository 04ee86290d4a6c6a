/* SPDX-License-Identifier: MIT */
/* settings.h: what an environment asks of us. */
#include "check.h"

#include "settings.h"

enum { NOTHING = 0, OFF = 1, MADVISE = 2, VERBOSE = 4 };

static int read_one(const char *entry)
{
    char text[64];
    char *envp[] = {text, NULL};
    struct settings found;

    snprintf(text, sizeof text, "%s", entry);
    found = read_settings(envp);
    return (found.off ? OFF : 0) | (found.madvise ? MADVISE : 0) | (found.verbose ? VERBOSE : 0);
}

int main(void)
{
    static char home[] = "HOME=/", off[] = "KSM_PRELOAD=off", verbose[] = "KSM_PRELOAD_VERBOSE=1";
    char *nothing[] = {NULL}, *both[] = {home, verbose, home, off, NULL};
    struct settings found = read_settings(NULL);

    CHECK(!found.off && !found.madvise && !found.verbose);
    found = read_settings(nothing);
    CHECK(!found.off && !found.madvise && !found.verbose);
    found = read_settings(both);
    CHECK(found.off && !found.madvise && found.verbose);

    CHECK(read_one("KSM_PRELOAD=off") == OFF);
    CHECK(read_one("KSM_PRELOAD=madvise") == MADVISE);
    CHECK(read_one("KSM_PRELOAD_VERBOSE=1") == VERBOSE);

    CHECK(read_one("") == NOTHING);
    CHECK(read_one("K") == NOTHING);
    CHECK(read_one("KS") == NOTHING);
    CHECK(read_one("KSM_PRELOAD") == NOTHING);
    CHECK(read_one("KSM_PRELOAD=") == NOTHING);
    CHECK(read_one("KSM_PRELOAD=of") == NOTHING);
    CHECK(read_one("KSM_PRELOAD=off ") == NOTHING);
    CHECK(read_one("KSM_PRELOAD=OFF") == NOTHING);
    CHECK(read_one("XKSM_PRELOAD=off") == NOTHING);
    CHECK(read_one("KSM_PRELOAD_VERBOSE=") == NOTHING);
    CHECK(read_one("KSM_PRELOAD_VERBOSE=0") == NOTHING);
    CHECK(read_one("KSM_PRELOAD_VERBOSE=10") == NOTHING);
    CHECK(read_one("KSM_PRELOAD_VERBOSE=off") == NOTHING);
    return check_status();
}
