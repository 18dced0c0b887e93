"""Fine-tune a model from Python, fuse the adapter and generate an answer.

python examples/finetune.py MODEL [DATA] [ITERATIONS]
"""

import sys
from pathlib import Path

import mlx.optimizers as optim
from mlx_lm import generate, load

from nalora_mlx import NALoRAConfig, TrainingConfig, adapt, fuse_model, train
from nalora_mlx.data import Features, load_local, tokenize_split

model_name = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"
directory = Path(sys.argv[2] if len(sys.argv) > 2 else "examples/bakery")
iterations = int(sys.argv[3]) if len(sys.argv) > 3 else 48

# 1. Load a base model with mlx-lm.
model, tokenizer = load(model_name)

# 2. Tokenize the rows. A mask marks the tokens to train on.
rows = load_local(directory, ["train", "valid"])
features = Features(mask_prompt=True)
training = tokenize_split(rows["train"], tokenizer, features, max_seq_length=512).sequences
validation = tokenize_split(rows["valid"], tokenizer, features, max_seq_length=512).sequences

# 3. Attach adapters. This does not change the model's outputs. The result lists the gated MLPs that NA-LoRA is applied
# to, and the modules that it is not applied to, with the reason.
report = adapt(model, NALoRAConfig(rank=16, scale=4.0, num_layers=12))
for mlp in report.gated:
    print(f"{mlp.path}: {mlp.activation}")
for skipped in report.skipped:
    print(f"{skipped.path}: {skipped.reason}")


# 4. Train. A listener is called with every event of the run. This one prints the losses.
def print_loss(event):
    if event["event"] == "metrics":
        print(f"{event['split']:>5} {event['step']:>4}: loss {event['loss']:.4f}")


config = TrainingConfig(iters=iterations, batch_size=4, steps_per_report=8, steps_per_eval=24)
optimizer = optim.Adam(learning_rate=1e-3, bias_correction=True)
result = train(model, training, validation, config, optimizer, listeners=[print_loss])
print(f"validation loss {result.first_valid_loss:.3f} -> {result.valid_loss:.3f}")

# 5. Merge the adapters into the weights. The model has its original modules again, with new weights.
fuse_model(model)
model.eval()
question = rows["valid"][0][1]["prompt"]
prompt = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)
print(f"{question}\n-> {generate(model, tokenizer, prompt, max_tokens=60)}")
