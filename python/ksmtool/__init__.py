# SPDX-License-Identifier: MIT
"""Opt programs into KSM, measure what that saves, undo it."""
