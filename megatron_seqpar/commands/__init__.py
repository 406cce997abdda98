# SPDX-License-Identifier: Apache-2.0
"""The commands of `megatron-seqpar`, one module each, with a function of the module's name.

A command module imports nothing heavy at its top, so that `--help` stays fast.
"""
