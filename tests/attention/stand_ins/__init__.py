# SPDX-License-Identifier: Apache-2.0
"""Kernel packages that are not installed here: functions with their exact signatures.

Each does the arithmetic with the fp64 reference, so a test sees whether every argument arrived in
its place, and refuses what the real one would read wrongly (an LSE that is not dense, say).
"""
