"""Preference training against TRL: each loss and its gradient, on the same tokens of the same model.

TRL's trainers compute in float64, in PyTorch, with the first layers of SmolLM2 and LoRA adapters of random numbers.
"""

import itertools
import json
import os
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm import load

from nalora_mlx.adapters.attach import adapt
from nalora_mlx.core.config import NALoRAConfig, TrainingConfig
from nalora_mlx.data.batches import collate, collate_packs
from nalora_mlx.data.preference_tokenization import tokenize_preference_rows
from nalora_mlx.data.preferences import JOINED, SEPARATE, SHARED, laid_out
from nalora_mlx.models.loading import load_model, load_tokenizer
from nalora_mlx.training.distributed import ALONE
from nalora_mlx.training.loss import batch_arrays
from nalora_mlx.training.preferences import losses
from nalora_mlx.training.preferences.loss import PreferenceLoss
from nalora_mlx.training.preferences.reference import TRAIN, Reference
from nalora_mlx.training.step import TrainingStep
from nalora_mlx.training.trainer import train
from tests.interop.double_precision import F64, float64_in_mlx, float64_in_torch

torch = pytest.importorskip("torch", reason="needs PyTorch: see CONTRIBUTING.md")
peft = pytest.importorskip("peft", reason="needs PEFT: see CONTRIBUTING.md")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
trl = pytest.importorskip("trl", reason="needs TRL: see CONTRIBUTING.md")

MODEL = Path(__file__).parents[2] / "demo" / "model"
LAYERS = 2
RANK, SCALE = 4, 2.0
KEYS = tuple(f"self_attn.{name}_proj" for name in "qkvo") + tuple(
    f"mlp.{name}_proj" for name in ("gate", "up", "down")
)
SMOOTHING = 0.2
FLOAT64 = 1e-12  # relative error; measured up to 1e-14
# Log-probabilities of about -200 differ by a few units in the last place: losses by up to 1.1e-5, and gradients as a
# whole by 7e-6. In PyTorch, gradients in float32 and float64 differ by 2e-6.
FLOAT32 = 2e-5
PAIRS = [
    ("Name a colour of the sky.", "Blue, and red at dusk.", "Go away."),
    ("What is two plus three?", "Five.", "Six or seven, who would care to count that?"),
    ("Which animal says miaow, please?", "A cat.", "Dog!"),
    ("Greet the baker kindly.", "Good morning, dear baker!", "Bread. Now."),
    ("Is water wet?", "Yes.", "No, it is as dry as old toast."),
    ("Say when you come, in a few words.", "At nine o'clock on Friday.", "Later, maybe."),
]
# Name -> our settings, the trainer of TRL, and its settings.
CASES = {
    "dpo": ({"train_mode": "dpo"}, "dpo", {}),
    "dpo, hinge": (
        {"train_mode": "dpo", "dpo_loss": "hinge", "preference_beta": 0.6},
        "dpo",
        {"loss_type": ["hinge"], "beta": 0.6},
    ),
    "dpo, ipo": ({"train_mode": "dpo", "dpo_loss": "ipo"}, "dpo", {"loss_type": ["ipo"]}),
    "dpo, length-normalized": (
        {"train_mode": "dpo", "length_normalized": True, "preference_beta": 2.0},
        "dpo",
        {"loss_type": ["sigmoid_norm"], "beta": 2.0},
    ),
    # The conservative loss is 2 (1 - e) times the sigmoid loss minus (1 - 2 e) times the robust one, which TRL has.
    "dpo, smoothed": (
        {"train_mode": "dpo", "label_smoothing": SMOOTHING},
        "dpo",
        {
            "loss_type": ["sigmoid", "robust"],
            "loss_weights": [2 * (1 - SMOOTHING), 2 * SMOOTHING - 1],
            "label_smoothing": SMOOTHING,
        },
    ),
    "kto": (
        {"train_mode": "kto", "desirable_weight": 1.5, "undesirable_weight": 0.75},
        "kto",
        {"desirable_weight": 1.5, "undesirable_weight": 0.75},
    ),
    "kto, starting adapter": ({"train_mode": "kto"}, "kto", {}),
    "dpo, starting adapter": ({"train_mode": "dpo"}, "dpo", {}),
    "orpo": ({"train_mode": "orpo"}, "orpo", {}),
    "simpo": ({"train_mode": "simpo"}, "cpo", {"beta": 2.0, "simpo_gamma": 1.0}),
    "simpo, smoothed": (
        {"train_mode": "simpo", "simpo_margin": 0.4, "label_smoothing": SMOOTHING},
        "cpo",
        {"beta": 2.0, "simpo_gamma": 0.4, "label_smoothing": SMOOTHING},
    ),
}
PACKED = [[0, 2], [1]]  # the rows of each sequence of a batch
# The rows of a batch, and two layouts to compute it in.
BATCHES = [
    (slice(0, 3), [(SEPARATE, None), (SHARED, PACKED)]),
    (slice(3, 6), [(SHARED, None), (JOINED, PACKED)]),
]
LABELS = (True, False, True)


STARTING = "starting adapter"


def rows_of(settings, pairs):
    """Return rows of data: pairs, or for KTO one answer of each."""
    if settings["train_mode"] == "kto":
        return [
            {"prompt": prompt, "completion": (rejected, chosen)[label], "label": label}
            for (prompt, chosen, rejected), label in zip(pairs, itertools.cycle(LABELS), strict=False)
        ]
    return [{"prompt": prompt, "chosen": chosen, "rejected": rejected} for prompt, chosen, rejected in pairs]


# --- the model ------------------------------------------------------------------------------------------------------


class Base(NamedTuple):
    """The first layers of SmolLM2 with a sixteenth of its vocabulary.

    Attributes:
        directory: of the model, which mlx-lm and transformers read.
        kept: token ids that are left, ascending; a token's id is its index here.
    """

    directory: Path
    kept: np.ndarray


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    if not MODEL.exists():
        pytest.skip("no SmolLM2: scripts/test.sh and scripts/demo.sh download it")
    tokenizer = load_tokenizer(str(MODEL))
    config = TrainingConfig(train_mode="dpo")
    rows = tokenize_preference_rows(rows_of({"train_mode": "dpo"}, PAIRS), tokenizer, config, False, 512)
    used = [row.tokens for row in rows.sequences]
    kept = np.unique(np.concatenate([np.arange(0, len(tokenizer.vocab), 16), np.arange(16), *used]))
    directory = tmp_path_factory.mktemp("base") / "model"
    directory.mkdir()
    for file in MODEL.iterdir():
        if not file.name.startswith("model."):
            shutil.copy(file, directory)
    config = json.loads((MODEL / "config.json").read_text())
    config |= {"num_hidden_layers": LAYERS, "torch_dtype": "float32", "vocab_size": len(kept)}
    (directory / "config.json").write_text(json.dumps(config))
    weights = {
        name: array.astype(mx.float32)
        for name, array in mx.load(str(MODEL / "model.safetensors")).items()
        if not name.startswith("model.layers.") or int(name.split(".")[2]) < LAYERS
    }
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][mx.array(kept)]
    mx.save_safetensors(str(directory / "model.safetensors"), weights, metadata={"format": "pt"})
    return Base(directory, kept)


def their_base(base):
    """Return the model in transformers, in float64."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        base.directory, dtype=torch.float64, attn_implementation="eager"
    )
    config, rotary = model.config, model.model.rotary_emb
    theta, size = config.rope_parameters["rope_theta"], config.head_dim
    rotary.inv_freq = theta ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    return model


class Ours:
    """Our model with adapters."""

    def __init__(self, base):
        self.model, self.tokenizer, _ = load_model(str(base.directory))
        self.kept = base.kept
        adapt(self.model, NALoRAConfig(rank=RANK, scale=SCALE, num_layers=-1, keys=KEYS))
        self.before = dict(tree_flatten(self.model.trainable_parameters()))
        rng = np.random.default_rng(0)
        self.after = {
            name: mx.array(rng.normal(0, 0.05, array.shape).astype(np.float32))
            for name, array in self.before.items()
        }
        self.halfway = {name: array / 2 for name, array in self.after.items()}

    def parameters(self, case):
        """Return the parameters before training, of which the reference has its log-probabilities, and some later."""
        return (self.after, self.halfway) if STARTING in case else (self.before, self.after)

    def load(self, parameters):
        self.model.load_weights(list(parameters.items()), strict=False)


@pytest.fixture(scope="module")
def ours(base):
    return Ours(base)


@pytest.fixture(scope="module")
def double(base):
    model = Ours(base)
    model.model.set_dtype(F64)
    model.before, model.after, model.halfway = (
        {name: array.astype(F64) for name, array in parameters.items()}
        for parameters in (model.before, model.after, model.halfway)
    )
    model.load(model.before)
    return model


# --- TRL ------------------------------------------------------------------------------------------------------------


def make_trainer(base, directory, kind, settings, start=None):
    """Return a trainer of TRL for a model with adapters, new ones or those to start from.

    It never trains, so its data set only has to be valid.
    """
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    trainer, config = {
        "dpo": (trl.DPOTrainer, trl.DPOConfig),
        "kto": (trl.KTOTrainer, trl.KTOConfig),
        "orpo": (ORPOTrainer, ORPOConfig),
        "cpo": (CPOTrainer, CPOConfig),
    }[kind]
    if kind == "cpo":
        settings = {"loss_type": "simpo", "cpo_alpha": 0.0} | settings
    row = {"prompt": "one two", "chosen": " three", "rejected": " four"}
    if kind == "kto":
        row = {"prompt": "one two", "completion": " three", "label": True}
    model, lora = (
        their_base(base),
        peft.LoraConfig(r=RANK, lora_alpha=RANK * SCALE, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    if start is not None:
        model, lora = peft.get_peft_model(model, lora), None
        load_theirs(model, start)
    arguments = {"use_cpu": True, "bf16": False, "report_to": "none", "gradient_checkpointing": False}
    return trainer(
        model=model,
        args=config(output_dir=str(directory), **arguments, **settings),
        train_dataset=Dataset.from_list([row, row]),
        processing_class=AutoTokenizer.from_pretrained(base.directory),
        peft_config=lora,
    )


def their_parameters(model):
    """Return the parameters of the adapters by our names."""
    found = {}
    for name, parameter in model.named_parameters():
        if ".default." in name:
            path, matrix = (
                name.removeprefix("base_model.model.").removesuffix(".default.weight").rsplit(".", 1)
            )
            found[f"{path}.{matrix.lower()}"] = parameter
    return found


def load_theirs(model, parameters):
    theirs = their_parameters(model)
    assert theirs.keys() == parameters.keys()
    for name, parameter in theirs.items():
        parameter.data = torch.tensor(np.array(parameters[name], np.float64).T.copy())


def split(example):
    """Return the token ids of the prompt and of each answer."""
    starts = {int(answer.loss_mask.argmax()) for answer in example.answers}
    assert len(starts) == 1
    start = starts.pop()
    assert all(answer.loss_mask[start:].all() for answer in example.answers)
    tokens = [answer.tokens.tolist() for answer in example.answers]
    return tokens[0][:start], [answer[start:] for answer in tokens]


def their_batch(trainer, examples):
    """Return the batch that the trainer's collator makes of the tokens of our rows."""
    features = []
    parts = [split(example) for example in examples]
    for i, (example, (prompt, answers)) in enumerate(zip(examples, parts, strict=True)):
        if isinstance(trainer, trl.DPOTrainer):
            features.append({"prompt_ids": prompt, "chosen_ids": answers[0], "rejected_ids": answers[1]})
        elif isinstance(trainer, trl.KTOTrainer):
            # TRL's rotation of the answers within a batch
            features.append(
                {
                    "prompt_ids": prompt,
                    "completion_ids": answers[0],
                    "KL_completion_ids": parts[i - 1][1][0],
                    "label": example.desirable,
                }
            )
        else:
            feature = {}
            for name, answer in zip(("chosen", "rejected"), answers, strict=True):
                feature |= {
                    f"{name}_input_ids": prompt + answer,
                    f"{name}_attention_mask": [1] * len(prompt + answer),
                    f"{name}_labels": [-100] * len(prompt) + answer,
                }
            features.append(feature)
    return trainer.data_collator(features)


def their_loss(trainer, batch, model=None):
    model = trainer.model if model is None else model
    if hasattr(trainer, "get_batch_loss_metrics"):
        return trainer.get_batch_loss_metrics(model, batch)[0]
    return trainer.compute_loss(model, batch)


def their_gradient(trainer, batch):
    """Return the loss, and its gradient by our names."""
    trainer.model.zero_grad()
    loss = their_loss(trainer, batch)
    assert loss.dtype == torch.float64
    loss.backward()
    return float(loss), {name: p.grad.numpy().T for name, p in their_parameters(trainer.model).items()}


# --- ours -----------------------------------------------------------------------------------------------------------


def tokenized(ours, settings, pairs):
    config = TrainingConfig(batch_size=3, **settings)
    found = tokenize_preference_rows(rows_of(settings, pairs), ours.tokenizer, config, False, 512)
    assert len(found.sequences) == len(pairs)

    def cut(example):
        assert np.isin(example.tokens, ours.kept).all()
        return replace(example, tokens=np.searchsorted(ours.kept, example.tokens).astype(np.int32))

    return config, [
        replace(row, answers=tuple(map(cut, row.answers)), mismatched=row.mismatched and cut(row.mismatched))
        for row in found.sequences
    ]


def batch_of(examples, layout, packs):
    examples = laid_out(examples, layout)
    if packs is None:
        return collate(examples, range(len(examples)))
    length = max(sum(examples[row].inputs for row in pack) for pack in packs)
    return collate_packs(examples, packs, length + 5)


def our_gradient(ours, case, config, examples, layout, packs):
    """Return the mean loss of a training step and its gradient, after the reference was computed."""
    before, after = ours.parameters(case)
    ours.load(before)
    loss = PreferenceLoss(ours.model, config)
    reference = Reference(loss, config, ALONE)
    examples = laid_out(examples, layout)
    if config.has_reference:
        reference.prepare(examples, [], {}, None, lambda done, count: None)
        examples = reference.attached(examples, TRAIN)
    ours.load(after)
    batch = batch_of(examples, layout, packs)
    step = TrainingStep(ours.model, optim.SGD(0.0), loss=loss)
    more = reference.window_arrays([batch])[0]
    value, window = step(batch, batch.loss_counts, None, False, more=more)
    gradient = step.weights.stacks.unstack(window.gradients)
    return float(value) / len(examples), {name: np.array(a, np.float64) for name, a in gradient.items()}


def double_gradient(ours, case, config, examples, layout, packs):
    """Return what `our_gradient` returns, in float64."""
    loss = PreferenceLoss(ours.model, config)
    loss.compiled = False
    assert loss.has_tiles
    batch = batch_of(examples, layout, packs)
    parts = [batch] + ([batch.answers.mismatched] if batch.answers.mismatched else [])
    parts = [batch_arrays(part) for part in parts]

    def log_probabilities():
        return [loss.log_probabilities(arrays) for arrays in parts]

    before, after = ours.parameters(case)
    ours.load(before)
    reference = log_probabilities()
    ours.load(after)
    # Constants that meet an array of float32 would be rounded to it.
    arrays = {
        name: array if "int" in str(array.dtype) else array.astype(F64) for name, array in parts[0].items()
    }
    if config.has_reference:
        arrays["reference"] = reference[0]
    if len(parts) > 1:
        count = len(examples)
        arrays["baseline"] = mx.maximum(mx.mean((log_probabilities()[1] - reference[1])[:count]), 0)
    weights = mx.array([1 / count if count else 0 for count in batch.loss_counts], dtype=F64)

    def function():
        with loss.installed(arrays):
            return loss(arrays, weights)[0]

    value, gradient = nn.value_and_grad(ours.model, function)()
    assert value.dtype == F64
    return value.item(), {name: np.array(array) for name, array in tree_flatten(gradient)}


def error(actual, expected):
    """Return the relative error of the gradient as a whole."""
    assert actual.keys() == expected.keys()
    difference = sum(np.square(actual[name] - array).sum() for name, array in expected.items())
    return float(np.sqrt(difference / sum(np.square(array).sum() for array in expected.values())))


# --- tests ----------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _one_thread():
    # On a busy machine, several threads of PyTorch mostly wait for each other.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] * (case == "simpo")) for case in CASES]
)
def test_loss_and_gradient_of_the_model(base, ours, double, tmp_path, case):
    settings, kind, their_settings = CASES[case]
    before, after = ours.parameters(case)
    with float64_in_torch():
        trainer = make_trainer(base, tmp_path, kind, their_settings, before if STARTING in case else None)
        load_theirs(trainer.model, after)
    for rows, layouts in BATCHES:
        config, examples = tokenized(ours, settings, PAIRS[rows])
        with float64_in_torch():
            loss, gradient = their_gradient(trainer, their_batch(trainer, examples))
        for layout, packs in layouts:
            layout = SEPARATE if kind == "kto" else layout
            value, found = our_gradient(ours, case, config, examples, layout, packs)
            assert value == pytest.approx(loss, rel=FLOAT32)
            assert error(found, gradient) < FLOAT32
            with float64_in_mlx():
                value, found = double_gradient(double, case, config, examples, layout, packs)
            assert value == pytest.approx(loss, rel=FLOAT64)
            assert error(found, gradient) < FLOAT64
    if kind == "kto":
        divergences = trainer._metrics["train"]["kl"]
        assert all(z > 0 for z in divergences) if STARTING in case else divergences == [0, 0]


# Margins between the log-ratios of two answers, and numbers of tokens. All quotients are exact in float32.
MARGINS = (-512.0, -200.0, -20.0, -3.0, -0.5, 0.0, 0.25, 2.0, 30.0, 150.0, 512.0)
TOKENS = (8, 4)


class Scripted:
    """A model with given log-probabilities of tokens."""

    def __init__(self, *log_probs):
        self.log_probs = list(log_probs)

    def __call__(self, **_):
        log_probs = self.log_probs.pop(0)
        none = torch.zeros_like(log_probs).detach()
        return SimpleNamespace(log_probs=log_probs, entropy=none, mean_logits=none, is_top1=none > 0)


def their_loss_of_pair(trainer, ratios):
    """Return TRL's loss of a pair of log-ratios, and its gradient in them."""
    reference = -1024.0
    mask = torch.tensor([[0] + [0] * (8 - count) + [1] * count for count in TOKENS])
    per_token = torch.tensor([[(reference + r) / n] for r, n in zip(ratios, TOKENS, strict=True)])
    log_probs = (per_token.double() * mask[:, 1:]).requires_grad_()
    given = torch.tensor([reference]).double()
    batch = {"input_ids": mask, "attention_mask": mask, "completion_mask": mask}
    batch |= {"ref_chosen_logps": given, "ref_rejected_logps": given}
    loss = trainer.compute_loss(Scripted(log_probs), batch)
    loss.backward()
    return loss.item(), log_probs.grad[:, -1].numpy()


def their_loss_of_answer(trainer, ratio, desirable, baseline):
    """Return TRL's loss of an answer of KTO, and its gradient in the log-ratio."""
    tokens = torch.ones(1, 2, dtype=torch.long)
    log_probs = torch.tensor([[ratio - 1024.0]]).double().requires_grad_()
    given = torch.tensor([-1024.0]).double()
    batch = {f"{prefix}{name}": tokens for prefix in ("", "KL_") for name in ("input_ids", "attention_mask")}
    batch |= {"completion_mask": tokens, "KL_completion_mask": tokens, "label": torch.tensor([desirable])}
    batch |= {"ref_logps": given, "ref_KL_logps": given}
    model = Scripted(torch.tensor([[baseline - 1024.0]]).double(), log_probs)
    loss = trainer.compute_loss(model, batch)
    loss.backward()
    return loss.item(), log_probs.grad[0].numpy()


def their_loss_of_log_probabilities(trainer, chosen, rejected):
    """Return the loss of ORPO's or CPO's trainer for log-probabilities per token, and its gradient."""
    arguments = [torch.tensor([x]).double().requires_grad_() for x in (chosen, rejected)]
    if hasattr(trainer, "odds_ratio_loss"):
        loss = -trainer.odds_ratio_loss(*arguments)[0]
    else:
        loss = trainer.cpo_loss(*arguments)[0]
    loss.sum().backward()
    return loss.item(), np.concatenate([x.grad.numpy() for x in arguments])


def our_loss_of(function, *arguments):
    """Return a loss and its gradient, both in float32."""
    arrays = [mx.array([x], dtype=mx.float32) for x in arguments]
    loss, gradient = mx.value_and_grad(lambda arrays: mx.sum(function(*arrays)))(arrays)
    assert loss.dtype == mx.float32
    return loss.item(), np.concatenate([np.array(g) for g in gradient])


def same(ours, theirs, relative=1e-6, absolute=1e-12):
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, rtol=relative, atol=absolute)


@pytest.mark.parametrize("case", [case for case in CASES if STARTING not in case])
def test_loss_of_given_log_probabilities(base, tmp_path, case):
    settings, kind, their_settings = CASES[case]
    config = TrainingConfig(**settings)
    with float64_in_torch():
        trainer = make_trainer(base, tmp_path, kind, their_settings)
        if kind == "dpo":
            trainer.precompute_ref_logps = True
            tokens = np.array(TOKENS) if config.compares_per_token else np.ones(2)
            for margin in MARGINS:
                ratios = np.array([0.75, 0.75 - margin])
                loss, gradient = their_loss_of_pair(trainer, ratios)
                found = our_loss_of(partial(losses.dpo, config), *(ratios / tokens))
                same(found, (loss, gradient * tokens))
        elif kind == "kto":
            trainer.precompute_ref_logps = True
            for ratio, desirable, baseline in itertools.product(MARGINS, (True, False), (-4.0, 0.0, 3.0)):

                def function(r, desirable=desirable, baseline=baseline):
                    return losses.kto(config, r, mx.array([float(desirable)]), max(baseline, 0.0))

                same(
                    our_loss_of(function, ratio),
                    their_loss_of_answer(trainer, ratio, desirable, baseline),
                    absolute=1e-7,
                )
        else:
            function = {"orpo": losses.orpo, "cpo": losses.simpo}[kind]
            values = np.float32([-1e-6, -1e-3, -0.1, -0.5, -0.69, -0.7, -1, -4, -16, -30]).tolist()
            for chosen, rejected in itertools.product(values, values):
                same(
                    our_loss_of(partial(function, config), chosen, rejected),
                    their_loss_of_log_probabilities(trainer, chosen, rejected),
                    # A logarithm that is off by a rounding error makes odds off by more.
                    relative=2e-6,
                )


# --- the reference, and the start of a run --------------------------------------------------------------------------


def run(ours, settings, layout, parameters, output=None):
    """Train for a few iterations; return the first metrics of training and of validation."""
    ours.load(parameters)
    events = []
    settings = {"iters": 1, "steps_per_report": 1, "batch_size": 4, "train_mode": "dpo"} | settings
    _, examples = tokenized(ours, {"train_mode": settings["train_mode"]}, PAIRS)
    examples = laid_out(examples, layout)
    train(
        ours.model,
        examples,
        examples[1:4],
        TrainingConfig(**settings),
        optim.Adam(1e-3),
        output=output,
        listeners=[events.append],
    )
    metrics = [event for event in events if event["event"] == "metrics"]
    return examples, [
        next(event for event in metrics if event["split"] == name) for name in ("train", "valid")
    ]


def log_probability(logits, answer):
    """Return the log-probability of an answer's tokens in float64; logits [L, V]."""
    logits = np.asarray(logits, np.float64)
    highest = logits.max(axis=-1, keepdims=True)
    log_p = logits - highest - np.log(np.exp(logits - highest).sum(axis=-1, keepdims=True))
    return log_p[np.arange(len(log_p)), answer.tokens[1:]][answer.loss_mask[1:]].sum()


@pytest.mark.parametrize(("mode", "layout", "packing"), [("dpo", SHARED, True), ("kto", SEPARATE, False)])
def test_reference_is_the_base_model(base, ours, tmp_path, mode, layout, packing):
    examples, _ = run(ours, {"train_mode": mode, "packing": packing}, layout, ours.before, tmp_path / "run")
    (file,) = (tmp_path / "run" / "reference").glob("*.safetensors")
    found = {name: np.array(array) for name, array in mx.load(str(file)).items()}
    plain, _ = load(str(base.directory))
    theirs = their_base(base)
    for name, rows in (("train", examples), ("valid", examples[1:4])):
        for row, values in zip(rows, found[name], strict=True):
            answers = [*row.answers, *([row.mismatched] if mode == "kto" else [])]
            for answer, value in zip(answers, values, strict=True):
                tokens = answer.tokens[None, :-1]
                with float64_in_torch(), torch.no_grad():
                    expected = log_probability(theirs(torch.tensor(tokens).long()).logits[0], answer)
                same_base = log_probability(plain(mx.array(tokens))[0], answer)
                assert value == pytest.approx(expected, rel=1e-5)
                assert value == pytest.approx(same_base, rel=1e-6)


STARTS = {
    "one pair": ({"batch_size": 1}, SEPARATE),
    "three pairs": ({"batch_size": 3}, SEPARATE),
    "five pairs": ({"batch_size": 5}, SEPARATE),
    "gradient checkpointing": ({"grad_checkpoint": True}, SEPARATE),
    "accumulation": ({"grad_accumulation_steps": 2, "iters": 2}, SEPARATE),
    "shared prompts": ({}, SHARED),
    "shared prompts, gradient checkpointing": ({"batch_size": 3, "grad_checkpoint": True}, SHARED),
    "packed": ({"packing": True}, JOINED),
    "shared prompts, packed": ({"packing": True}, SHARED),
    "on the fly": ({"reference": "on-the-fly"}, SEPARATE),
    "on the fly, shared prompts, packed": ({"reference": "on-the-fly", "packing": True}, SHARED),
    "length-normalized": ({"length_normalized": True, "batch_size": 5}, SEPARATE),
    STARTING: ({"batch_size": 5}, SEPARATE),
    f"{STARTING}, shared prompts, packed": ({"packing": True, "grad_checkpoint": True}, SHARED),
    f"{STARTING}, on the fly": ({"reference": "on-the-fly"}, SHARED),
}


@pytest.mark.parametrize("start", STARTS)
def test_first_loss_of_dpo_is_log_2(ours, start):
    settings, layout = STARTS[start]
    _, metrics = run(ours, settings, layout, ours.after if STARTING in start else ours.before)
    for event in metrics:
        assert np.float32(event["loss"]) == np.float32(np.log(2))
        assert event["chosen_reward"] == event["rejected_reward"] == 0
