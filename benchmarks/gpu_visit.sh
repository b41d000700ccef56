#!/usr/bin/env bash
# One visit to a GPU machine that has Python, PyTorch and pytest but no package index:
#
#   bash benchmarks/gpu_visit.sh --visit kernels --out-dir OUT [--limit-s 500]      (arguments of benchmarks.gpu_report)
#
# DALI and PyAV come as parts of one packed folder, .bundle/part.0 and part.1 (a tar of a site-packages folder, xz, split).
# A visit may bring one part: it is kept in $AVSF_BUNDLE (/tmp/bundle) until the other comes. Without both, the parts of the
# report that need them are left out. AVSF_COMMIT names the commit of a copy without .git; PYTHON another interpreter.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
bundle=${AVSF_BUNDLE:-/tmp/bundle}
wanted=${AVSF_BUNDLE_PARTS:-2}
mkdir -p "$bundle/site"
for part in .bundle/part.*; do
  [ -f "$part" ] && cp -u "$part" "$bundle/"
done
have=$(find "$bundle" -maxdepth 1 -name 'part.*' | wc -l)
if [ ! -e "$bundle/ready" ] && [ "$have" -ge "$wanted" ]; then
  cat "$bundle"/part.* | xz -dc -T0 | tar -x -C "$bundle/site" && touch "$bundle/ready"
fi
if [ -e "$bundle/ready" ]; then
  libraries=$("$python" -c "import glob, os, torch; print(':'.join(glob.glob(os.path.join(os.path.dirname(os.path.dirname(torch.__file__)), 'nvidia', '*', 'lib'))))")
  export PYTHONPATH="$bundle/site:.${PYTHONPATH:+:$PYTHONPATH}" LD_LIBRARY_PATH="$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
  echo "packed folder: unpacked in $bundle/site"
else
  echo "packed folder: $have of $wanted parts; DALI and PyAV are not here"
fi
export MLFLOW_DISABLE_TELEMETRY=true
exec "$python" -m benchmarks.gpu_report "$@"
