# SPDX-License-Identifier: Apache-2.0
"""The quickstart: one small model trained with and without the axis, and what each way cost.

__main__.py   the command
machine.py    what this machine has, and what Megatron needs to be told about it
plan.py       the runs to compare, each as arguments of `megatron-seqpar run`
runs.py       run one, showing its steps; reuse a finished one
compare.py    the table and the picture
"""
