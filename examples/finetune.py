"""Fine-tune a model on rows of your own, compare answers before and after, and write a merged model.

python examples/finetune.py [MODEL] [OUTPUT] [ITERATIONS]
"""

import csv
import sys
from pathlib import Path

import nalora_mlx

arguments = dict(enumerate(sys.argv))
model = arguments.get(1, "HuggingFaceTB/SmolLM2-135M-Instruct")
output = arguments.get(2, "adapters/tickets")

# 1. Rows are dicts, from wherever you have them. Part of them is held out for validation.
with open(Path(__file__).parent / "tickets" / "tickets.csv", newline="") as file:
    rows = [{"prompt": ticket["message"], "completion": ticket["reply"]} for ticket in csv.DictReader(file)]

# 2. Train on the completions. The settings are those of `nalora lora`: docs/api.md lists them.
result = nalora_mlx.finetune(
    model=model,
    data=rows,
    output=output,
    mask_prompt=True,
    iters=int(arguments.get(3, 40)),
    preset="quick",
)
print(result)

# 3. Compare answers to held-out rows, and ask something new.
for sample in result.samples:
    print(f"\n> {sample['prompt']}\nbefore: {sample['before']}\nafter:  {sample['after']}")
print("\n" + result.generate("The foot of my desk lamp is broken. Order 4471. Thanks, Wanda"))

# 4. Merge the adapter into the weights, for any program that runs models of mlx-lm.
print(result.fuse(f"{output}-merged", "--overwrite"))
