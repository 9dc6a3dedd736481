#!/bin/sh
# Install the tools and run the checks that are no tests: all of them, or those that are named.
#
#   sh launch/check.sh [lint] [format] [types] [spelling] [docs]
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
venv=${VIRTUAL_ENV:-$root/.venv}
sh "$root/launch/install.sh" --venv "$venv" --extras dev
cd "$root"
[ $# -gt 0 ] || set -- lint format types spelling docs
# The theme announces the plans of its makers at every build.
export NO_MKDOCS_2_WARNING=true
failed=
for check in "$@"; do
    printf '== %s\n' "$check"
    case $check in
        lint) "$venv/bin/ruff" check . && "$venv/bin/hadolint" docker/*.Dockerfile ;;
        format) "$venv/bin/ruff" format --check . ;;
        types) "$venv/bin/mypy" ;;
        spelling) git ls-files -z | xargs -0 "$venv/bin/codespell" ;;
        docs) "$venv/bin/mkdocs" build --strict ;;
        *) echo "unknown check; known are lint, format, types, spelling and docs" >&2; false ;;
    esac || failed="$failed $check"
done
[ -z "$failed" ] || { echo "check: FAILED:$failed" >&2; exit 1; }
echo "check: passed"
