#!/usr/bin/env bash
# The core tests with the oldest torch that pyproject.toml admits, in an environment of their own.
# Not part of .ci/run: the packages for that version are those for CUDA, several GB.
# Another Python: tests/oldest_torch.sh .venv-3.13 python3.13
set -euo pipefail
cd "$(dirname "$0")/.."

oldest=$(sed -n 's/.*"torch>=\([0-9.]*\)".*/\1/p' pyproject.toml | head -n 1)
folder=${1:-.venv-oldest}
"${2:-python3}" -m venv "$folder"
"$folder/bin/pip" install --quiet "torch==$oldest.*" numpy "pytest==9.*" "expecttest==0.3.*" "schedulefree==1.4.*"
"$folder/bin/python" -c 'import platform, torch; print("torch", torch.__version__, "Python", platform.python_version())'
OMP_NUM_THREADS=1 "$folder/bin/python" -m pytest -q -p no:cacheprovider \
    tests/arithmetic tests/checkpoint/test_{carry,checkpoint,kill,moved_state,state,strip}.py \
    tests/doors/test_{followed,model,model_checkpoint,model_swap,non_interference}.py \
    tests/doors/test_{optimizer,parameters,schedules,torch_contract}.py \
    tests/shadow/test_{buffers,memory,movement,names,report,storage,swap}.py tests/engines/test_offload.py
