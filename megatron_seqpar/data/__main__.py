# SPDX-License-Identifier: Apache-2.0
"""`python -m megatron_seqpar.data`: the same as `megatron-seqpar prepare-data`."""

import typer

from megatron_seqpar.commands.prepare_data import prepare_data

if __name__ == "__main__":
    typer.run(prepare_data)
