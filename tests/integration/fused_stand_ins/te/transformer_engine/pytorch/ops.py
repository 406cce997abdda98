# SPDX-License-Identifier: Apache-2.0
"""Fused operations, by name; none is made unless asked for."""
