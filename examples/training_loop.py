"""Do the steps of `finetune` one by one: load, tokenize, adapt, train with a listener, fuse and generate.

python examples/training_loop.py [MODEL] [DATA] [ITERATIONS]
"""

import sys
from pathlib import Path

import mlx.optimizers as optim
from mlx_lm import generate, load

from nalora_mlx import NALoRAConfig, TrainingConfig, adapt, fuse_model, train
from nalora_mlx.data import Features, load_local, tokenize_split

arguments = dict(enumerate(sys.argv))
directory = Path(arguments.get(2, "examples/bakery"))

# 1. Load a base model with mlx-lm.
model, tokenizer = load(arguments.get(1, "HuggingFaceTB/SmolLM2-135M-Instruct"))

# 2. Tokenize the rows. A mask marks the tokens to train on.
rows = load_local(directory, ["train", "valid"])
training, validation = (
    tokenize_split(rows[name], tokenizer, Features(mask_prompt=True)).sequences for name in ("train", "valid")
)

# 3. Attach adapters. This does not change the model's outputs. The result lists the gated MLPs that NA-LoRA acts on,
# and the modules that stay plain LoRA, with the reason.
adapted = adapt(model, NALoRAConfig(rank=16, scale=4.0, num_layers=12))
for mlp in adapted.gated:
    print(f"{mlp.path}: {mlp.activation}")
for skipped in adapted.skipped:
    print(f"{skipped.path}: {skipped.reason}")


# 4. Train. A listener is called with every event of the run. This one prints the losses.
def print_loss(event):
    if event["event"] == "metrics":
        print(f"{event['split']:>5} {event['step']:>4}: loss {event['loss']:.4f}")


config = TrainingConfig(iters=int(arguments.get(3, 48)), batch_size=4, steps_per_report=8, steps_per_eval=24)
optimizer = optim.Adam(learning_rate=1e-3, bias_correction=True)
result = train(model, training, validation, config, optimizer, listeners=[print_loss])
print(f"validation loss {result.first_valid_loss:.3f} -> {result.valid_loss:.3f}")

# 5. Merge the adapters into the weights. The model has its original modules again, with new weights.
fuse_model(model)
model.eval()
question = rows["valid"][0][1]["prompt"]
prompt = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)
print(f"{question}\n-> {generate(model, tokenizer, prompt, max_tokens=60)}")
