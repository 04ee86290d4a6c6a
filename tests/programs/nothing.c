/* SPDX-License-Identifier: MIT */
/* A library that does nothing. */
int nothing;
