# SPDX-License-Identifier: Apache-2.0
"""`megatron-seqpar compare`: the same training, laid out over the ranks in every way there is.

config.py   the file: what is trained, and which ways
ways.py     the ways of a number of ranks, and what a TP user must do to the heads
result.py   rows to one result: differences, MFU, ratios
table.py    for the terminal
plot.py     the picture
"""
