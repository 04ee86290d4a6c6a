# SPDX-License-Identifier: MIT
"""Run as `python3 -m ksmtool`."""

from ksmtool.cli import main

if __name__ == "__main__":
    main()
