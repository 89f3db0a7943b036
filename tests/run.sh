#!/usr/bin/env bash
# Set up .venv, then lint, check types and test, the real models too. `--all` adds the slow tests.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

case ${1-} in
  "") marks="not gpu and not slow" ;;
  --all) marks="not gpu" ;;
  *)
    echo "usage: tests/run.sh [--all]" >&2
    exit 2
    ;;
esac

source .ci/environment.sh
environment examples,test

set -x
ruff check
ruff format --check
pyright
pytest -m "$marks" --numprocesses auto --maxprocesses 8 --dist worksteal
