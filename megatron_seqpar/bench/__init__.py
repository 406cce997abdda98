# SPDX-License-Identifier: Apache-2.0
"""What the `bench` commands measure: attention, collectives, training steps, memory.

    options.py      options that several commands share, and how their texts are read
    result.py       what a result says of where it was measured; rows written whole
    rounds.py       ways measured in turn, medians and ratios within rounds
    place.py        where ranks run: device, backend, how many
    ranks.py        ranks as processes, what they measured and why they failed
    watch.py        seconds of the slowest rank
    drawing.py      what all pictures share
    attention.py    distributed attention against one rank
    collectives.py  messages and collectives over the ranks, and fits of links
    training.py     one training run through the launcher, and what came of it
    memory_rank.py  the training script under a memory limit or an account of the allocator
    cells.py        ways of one training in turn, and their rows
    prepare.py      from options to what is trained
    layers.py       how many layers of a large model fit
    step.py         training steps of one model, every way
    memory.py       peak memory and time of every way to spend memory

Of attention, attention_cells.py says what is measured and attention_rank.py what a rank does.
Files called *_report.py hold a benchmark's table and picture. Every result is `rows`, one a way and
setting, each with a status; a way that needs too much memory is a row. Pairs are measured in turn
within rounds and a ratio is the median of the rounds' ratios.
"""
