#!/usr/bin/env bash
# The trainers' tests with the oldest trainers that pyproject.toml admits and with transformers 4.57,
# each in an environment of its own. Not part of .ci/run, whose environment has the newest ones.
set -euo pipefail
cd "$(dirname "$0")/.."

oldest() { sed -n "s/^[a-z]* = \[.*\"$1>=\([0-9.]*\)\".*/\1/p" pyproject.toml; }
rows=("$(oldest transformers) $(oldest accelerate) $(oldest lightning)" "4.57 1.10 $(oldest lightning)")
folder=${1:-.venv-oldest-trainers}
for row in "${rows[@]}"; do
    read -r transformers accelerate lightning <<<"$row"
    environment=$folder/$transformers
    python3 -m venv "$environment"
    "$environment/bin/pip" install --quiet "torch==2.13.*" "transformers==$transformers.*" \
        "accelerate==$accelerate.*" "lightning==$lightning.*" "peft==0.17.*" "tensorboard>=2.18" \
        "pytest==9.*" "expecttest==0.3.*" "schedulefree==1.4.*"
    "$environment/bin/pip" list 2>/dev/null | grep -E "^(torch|transformers|accelerate|lightning|peft) "
    # What only old lines warn of: PEFT of an adapter's base without a file, transformers 4 of its
    # own use of an old autocast and of checkpoints that were written within one tick of the clock.
    PYTHONPATH=$PWD OMP_NUM_THREADS=1 "$environment/bin/python" -m pytest -q -p no:cacheprovider \
        -W "ignore:mtime may not be reliable" -W "ignore:Could not find a config file in" \
        -W 'ignore:`torch.cpu.amp.autocast' \
        tests/integrations
done
