#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# From a bare machine to a trained model and a comparison, in one command.
#
#   bash scripts/quickstart.sh                        defaults: Python's own library as the text
#   bash scripts/quickstart.sh --input my.jsonl       your text, one {"text": ...} a line
#   bash scripts/quickstart.sh --steps 50 --nproc 4   longer, and on more ranks
#   bash scripts/quickstart.sh --help                 every option
#
# Sets up .venv, builds the corpus, trains, compares. Run again, it reuses what is there.

set -euo pipefail
# shellcheck source=scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

seqpar_setup "${SEQPAR_EXTRAS:-plot}"
cd "$SEQPAR_REPO"
exec "$SEQPAR_VENV/bin/python" -m megatron_seqpar.quickstart "$@"
