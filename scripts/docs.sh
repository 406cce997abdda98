#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Build the documentation as a site.
#
#   bash scripts/docs.sh            into site/; stops at dead links and at parts that are out of date
#   bash scripts/docs.sh serve      and show it at http://127.0.0.1:8000, built again at every change

set -euo pipefail
# shellcheck source=scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

case "${1:-build}" in
build | serve) ;;
*)
    sed -n '4,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 2
    ;;
esac

seqpar_setup docs
cd "$SEQPAR_REPO"
export NO_MKDOCS_2_WARNING=1 # the theme's advertisement
"$SEQPAR_VENV/bin/python" scripts/make_docs.py --check
if [[ "${1:-build}" == serve ]]; then
    exec "$SEQPAR_VENV/bin/python" -m mkdocs serve
fi
seqpar_say "documentation"
"$SEQPAR_VENV/bin/python" -m mkdocs build --strict --clean # not --quiet: it would hide dead links
seqpar_say "documentation: $SEQPAR_REPO/site/index.html"
