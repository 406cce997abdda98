# SPDX-License-Identifier: Apache-2.0
"""Checks and measurements on one GPU; `scripts/gpu_check.sh` runs them."""
