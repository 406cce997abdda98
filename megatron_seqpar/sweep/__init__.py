# SPDX-License-Identifier: Apache-2.0
"""`megatron-seqpar sweep`: many parallel layouts as real runs, one row of a CSV each.

space.py    the file: a grid or a list of layouts
columns.py  the CSV: what the planner calibrates from
slurm.py    rows as sbatch jobs
report.py   best layout and effects, for the terminal
plot.py     effects and scaling as a picture
run.py      from the file to the CSV
"""
