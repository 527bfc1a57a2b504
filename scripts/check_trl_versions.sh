#!/usr/bin/env bash
# mmfast.integrations.trl under several versions of TRL: its tests with every version named, on torch, transformers and datasets of .venv.
#   scripts/check_trl_versions.sh 0.29.0 1.14.0 1.16.0
# Each version goes into a folder under build/trl/ (some 7 MB); reruns reuse it. 1.15 needs Triton to run without mmfast, so not here.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
if [ $# -eq 0 ]; then
  set -- 0.29.0 1.14.0 1.16.0
fi
for version in "$@"; do
  folder=$root/build/trl/$version
  if [ ! -e "$folder/.installed" ]; then
    .venv/bin/python -m pip install -q --no-cache-dir --no-deps --upgrade --target "$folder" "trl==$version"
    touch "$folder/.installed"
  fi
  PYTHONPATH=$folder .venv/bin/python -c "import trl, transformers; print('trl', trl.__version__, '- transformers', transformers.__version__)"
  PYTHONPATH=$folder HF_HUB_OFFLINE=1 .venv/bin/python -m pytest -q -p no:cacheprovider tests/integrations/test_trl.py
done
