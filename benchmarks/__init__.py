# SPDX-License-Identifier: MIT
"""One folder per question; each prints ratios measured side by side in one run.

Run from the checkout, after `script/bootstrap bench`: .venv/bin/python -m benchmarks.exec --help
"""
