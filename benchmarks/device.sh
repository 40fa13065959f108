#!/usr/bin/env bash
# The GPU's work in two calls of less than 300 s each: device.sh A --out DIR, then device.sh B.
#
#   benchmarks/device.sh A|B [--out DIR] [--seconds N]
#   benchmarks/device.sh --dry-run [A|B] [--out DIR]    the whole host side, small, without a GPU
#
# Nothing is installed or fetched. Results are in DIR/<part>-<commit>.json after every row, what the
# processes printed in the .log beside it. PYTHON names another Python, CURVFAST_COMMIT the commit
# where there is no git.
set -u
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
seconds=285
parts=() given=() dry_run=
while [ $# -gt 0 ]; do
  case $1 in
    A | B) parts+=("$1") ;;
    --dry-run) dry_run=1 given+=("$1") ;;
    --seconds) seconds=${2:?"--seconds needs a number"} && shift ;;
    --out) given+=("$1" "${2:?"--out needs a folder"}") && shift ;;
    *) echo "device.sh: what is '$1'? Usage: device.sh [--dry-run] A|B [--out DIR] [--seconds N]" >&2 && exit 2 ;;
  esac
  shift
done
if [ ${#parts[@]} -eq 0 ]; then
  [ -n "$dry_run" ] || { echo "device.sh: say which part, A or B" >&2 && exit 2; }
  parts=(A B)
fi

# A checkout holds the kernels where setuptools finds them; imported from it, they are linked.
if [ ! -e curvfast/kernels ] && ln -s ../kernels/src curvfast/kernels; then
  trap 'rm -f curvfast/kernels' EXIT
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
status=0
for part in "${parts[@]}"; do
  # The run ends itself at its seconds; this ends it if it does not, and with it all it started.
  timeout --kill-after=3 "$((seconds + 7))" "$python" benchmarks/device.py "$part" \
    --seconds "$seconds" ${given[@]+"${given[@]}"}
  ended=$?
  [ "$ended" -eq 0 ] || status=$ended
done
exit "$status"
