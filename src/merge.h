/* SPDX-License-Identifier: MIT */
/* The kernel's per-process switch for KSM (Linux 6.4, d7597f59d1d3). */
#ifndef KSM_MERGE_H
#define KSM_MERGE_H

/* include/uapi/linux/prctl.h; bookworm's headers (6.1) do not have them. */
#define KSM_PR_SET_MEMORY_MERGE 67
#define KSM_PR_GET_MEMORY_MERGE 68

#endif
