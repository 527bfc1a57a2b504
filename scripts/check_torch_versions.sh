#!/usr/bin/env bash
# One binary, several torches: builds a wheel against the pinned torch of .venv and runs the op tests with it under every version named.
#   scripts/check_torch_versions.sh 2.10.0 2.11.0 2.13.0
# Each version gets a virtual environment under build/torch/ (several GB each for CUDA builds of torch); reruns reuse it.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
if [ $# -eq 0 ]; then
  set -- 2.10.0 2.11.0 2.13.0
fi
rm -rf build/torch/wheel
PATH="$root/.venv/bin:$PATH" .venv/bin/python -m pip wheel -q --no-cache-dir --no-build-isolation --no-deps -w build/torch/wheel .
for version in "$@"; do
  env=build/torch/$version
  if [ ! -x "$env/bin/python" ]; then
    .venv/bin/python -m venv "$env"
    "$env/bin/python" -m pip install -q --no-cache-dir "torch==$version" numpy pytest
  fi
  "$env/bin/python" -m pip install -q --no-cache-dir --no-deps --force-reinstall build/torch/wheel/mmfast-*.whl
  # From another folder, so that the installed wheel is tested and not the checkout.
  (cd build/torch && "$root/$env/bin/python" -c "import torch, mmfast; print('torch', torch.__version__, '-', mmfast.build_info())" &&
    "$root/$env/bin/python" -m pytest -q -p no:cacheprovider -c "$root/pyproject.toml" --rootdir "$root" \
    "$root/tests/ops/test_vq.py" "$root/tests/ops/test_attention.py" "$root/tests/test_abi.py")
done
