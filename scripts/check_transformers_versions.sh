#!/usr/bin/env bash
# mmfast.apply under several transformers: the integration tests with every version named, on the torch of .venv.
#   scripts/check_transformers_versions.sh 5.2.0 5.23.0
# Each version goes into a folder under build/transformers/ (some 250 MB with what it depends on; torch is not among that); reruns reuse it.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
if [ $# -eq 0 ]; then
  set -- 5.2.0 5.23.0
fi
for version in "$@"; do
  folder=$root/build/transformers/$version
  if [ ! -e "$folder/.installed" ]; then
    .venv/bin/python -m pip install -q --no-cache-dir --upgrade --target "$folder" "transformers==$version"
    touch "$folder/.installed"
  fi
  PYTHONPATH=$folder .venv/bin/python -c "import torch, transformers; print('transformers', transformers.__version__, '- torch', torch.__version__)"
  PYTHONPATH=$folder .venv/bin/python -m pytest -q -p no:cacheprovider tests/integrations/test_transformers.py tests/nn/test_qformer.py
done
