# SPDX-License-Identifier: Apache-2.0
"""`python -m megatron_seqpar`, also what torchrun starts in each process."""

from megatron_seqpar.cli import main

if __name__ == "__main__":
    main()
