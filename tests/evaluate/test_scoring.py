"""Log-probabilities of texts and divergences of models, against softmax in float64."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import gemma2, llama, mamba2

from nalora_mlx.adapters.attach import adapt
from nalora_mlx.core.config import NALoRAConfig
from nalora_mlx.data.tokenization import Example
from nalora_mlx.evaluate import scoring
from nalora_mlx.evaluate.scoring import Scorer, SharedTexts
from nalora_mlx.ops.kl_divergence import tiled_kl_divergence
from tests.conftest import VOCABULARY, build_model, llama_args, random_adapters, set_sizes

MAMBA = {
    "model_type": "mamba2",
    "num_heads": 4,
    "head_dim": 16,
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "state_size": 8,
    "num_hidden_layers": 2,
    "layer_norm_epsilon": 1e-5,
    "conv_kernel": 4,
    "n_groups": 1,
    "use_bias": False,
    "use_conv_bias": True,
    "time_step_limit": (0.0, 100.0),
    "time_step_rank": 2,
    "tie_word_embeddings": True,
}
GEMMA = {
    "model_type": "gemma2",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-6,
    "vocab_size": VOCABULARY,
    "query_pre_attn_scalar": 8,
}
MODELS = {
    "llama": (llama, llama_args()),
    "untied": (llama, llama_args(tie_word_embeddings=False)),
    "mamba2": (mamba2, MAMBA),  # its state runs from branch to branch
    "gemma2": (gemma2, GEMMA),  # soft caps on its logits
}


def frozen(model):
    model.eval()
    model.freeze()
    return model


def build_groups(seed=0, groups=7, most=4):
    """Return prompts with one to `most` continuations each."""
    rng = np.random.default_rng(seed)
    found = []
    for g in range(groups):
        prompt = rng.integers(1, VOCABULARY, rng.integers(8, 40))
        group = []
        for c in range(1 + g % most):
            answer = rng.integers(1, VOCABULARY, rng.integers(1, 12))
            tokens = np.concatenate([prompt, answer]).astype(np.int32)
            group.append(Example(tokens, np.arange(len(tokens)) >= len(prompt), f"group {g}:{c}"))
        found.append(group)
    return found


def log_softmax(model, tokens):
    logits = np.array(model(mx.array(tokens)[None])[0].astype(mx.float32), np.float64)
    return (
        logits
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - logits.max(-1, keepdims=True)
    )


def truth(model, text):
    """Return log-probability, number of tokens, and whether each is the most likely one."""
    log_p = log_softmax(model, text.tokens)
    places = np.flatnonzero(text.loss_mask[1:])
    targets = text.tokens[1:][places]
    total = sum(log_p[place, target] for place, target in zip(places, targets, strict=True))
    greedy = all(log_p[place].argmax() == target for place, target in zip(places, targets, strict=True))
    return total, len(places), greedy


def assert_scores(model, groups, scores, greedy=True):
    for group, found in zip(groups, scores, strict=True):
        for text, score in zip(group, found, strict=True):
            total, tokens, most_likely = truth(model, text)
            assert score.log_probability == pytest.approx(total, rel=2e-5, abs=2e-5), text.source
            assert score.tokens == tokens
            assert score.greedy == (most_likely if greedy else None)


def with_greedy_answers(model, groups):
    """Replace the answers of the first group by the model's own."""
    for i, text in enumerate(groups[0]):
        tokens, mask = text.tokens.copy(), text.loss_mask
        for place in np.flatnonzero(mask):
            tokens[place] = log_softmax(model, tokens[:place])[-1].argmax()
        groups[0][i] = Example(tokens, mask, text.source)
    return groups


@pytest.mark.parametrize("name", MODELS)
def test_scores_are_log_probabilities(name):
    module, args = MODELS[name]
    model = frozen(build_model(module=module, args=args))
    groups = with_greedy_answers(model, build_groups())
    scores = Scorer(model).score(groups, greedy=True)
    assert_scores(model, groups, scores)
    assert scores[0][0].greedy
    assert not all(score.greedy for found in scores for score in found)


def test_continuations_share_their_prompt_only_where_that_is_exact():
    groups = build_groups(groups=8)
    shared = Scorer(frozen(build_model()))._laid_out(groups)
    assert sorted(len(item.texts) for item in shared) == [1, 1, 2, 2, 3, 3, 4, 4]
    module, args = MODELS["mamba2"]
    separate = Scorer(frozen(build_model(module=module, args=args)))._laid_out(groups)
    assert {len(item.texts) for item in separate} == {1}
    assert sorted(number for item in shared for number in item.numbers) == list(range(20))


def test_a_shared_prompt_is_computed_once():
    prompt = np.arange(1, 31)
    texts = tuple(
        Example(np.append(prompt, [40 + i, 50]).astype(np.int32), np.arange(32) >= 30, "x:1")
        for i in range(3)
    )
    item = SharedTexts(texts, (0, 1, 2))
    # 29 inputs of the prompt, and for each text its last token and the first of the answer.
    assert item.inputs == 29 + 3 * 2
    assert item.supervised_tokens == 6
    assert item.lanes[0].positions.tolist() == [*range(29), 29, 30, 29, 30, 29, 30]


def test_texts_that_share_nothing_stay_apart():
    texts = [
        Example(np.array([1 + i, 9, 8, 7], np.int32), np.array([False, True, True, True]), f"x:{i}")
        for i in range(2)
    ]
    model = frozen(build_model())
    scorer = Scorer(model)
    assert [len(item.texts) for item in scorer._laid_out([texts])] == [1, 1]
    assert_scores(model, [texts], scorer.score([texts]), greedy=False)


def test_only_equal_beginnings_are_shared():
    """Tokenizers may merge the end of a prompt with the beginning of an answer."""
    rng = np.random.default_rng(4)
    prompt = rng.integers(1, VOCABULARY, 30, dtype=np.int32)
    texts = []
    for i in range(3):
        tokens = np.concatenate([prompt, rng.integers(1, VOCABULARY, 4 + i, dtype=np.int32)])
        tokens[25 - i] = tokens[25 - i] % 31 + 1  # before the answer
        texts.append(Example(tokens, np.arange(len(tokens)) >= 30, f"x:{i}"))
    item = SharedTexts(tuple(texts), (0, 1, 2))
    assert item.shared == 22
    model = frozen(build_model())
    scorer = Scorer(model)
    assert [len(item.texts) for item in scorer._laid_out([texts])] == [3]
    assert_scores(model, [texts], scorer.score([texts], greedy=True))


def test_masks_with_gaps_and_long_texts():
    rng = np.random.default_rng(1)
    texts = [
        Example(rng.integers(1, VOCABULARY, n, dtype=np.int32), rng.random(n) < 0.4, f"x:{n}")
        for n in (9, 70, 260)
    ]
    for text in texts:
        text.loss_mask[0] = False
    model = frozen(build_model())
    groups = [[text] for text in texts]
    assert_scores(model, groups, Scorer(model, batch_size=2).score(groups, greedy=True))


def test_batches_are_small_enough(monkeypatch):
    monkeypatch.setitem(scoring.BATCH_TOKENS, "cpu", 100)
    model = frozen(build_model())
    scorer, groups = Scorer(model), build_groups()
    sizes = [batch.inputs.shape for batch, _ in scorer._batches(scorer._laid_out(groups), 1, None)]
    assert all(rows == 1 or rows * length <= 130 for rows, length in sizes)
    assert sum(rows for rows, _ in sizes) == 7
    seen = []
    assert_scores(model, groups, scorer.score(groups, True, lambda *progress: seen.append(progress)))
    count = sum(map(len, groups))
    assert seen[-1] == (count, count)
    assert len(seen) == len(sizes)


def test_tiles_of_the_vocabulary_give_the_same(monkeypatch):
    set_sizes(monkeypatch, head_rows=8, head_columns=128)
    args = llama_args(vocab_size=700)
    model = frozen(build_model(args=args))
    groups = with_greedy_answers(model, build_groups())
    assert_scores(model, groups, Scorer(model).score(groups, greedy=True))


def test_no_texts():
    assert Scorer(frozen(build_model())).score([]) == []
    assert Scorer(frozen(build_model())).score([[], []]) == [[], []]


def test_equal_models_give_equal_bits_and_no_divergence():
    base, same = frozen(build_model()), build_model()
    adapt(same, NALoRAConfig(num_layers=2))  # lora_b is zero
    frozen(same)
    texts = [group[0] for group in build_groups()]
    scorers = Scorer(base), Scorer(same)
    one, other = (scorer.score([[text] for text in texts]) for scorer in scorers)
    assert one == other
    assert not scorers[0].divergences(scorers[1], texts).any()


@pytest.mark.parametrize("changed", ["adapter", "head"])
def test_divergences_are_those_of_whole_distributions(changed):
    args = llama_args(tie_word_embeddings=False)
    base, tuned = build_model(args=args), build_model(args=args)
    if changed == "adapter":
        adapt(tuned, NALoRAConfig(num_layers=2))
        random_adapters(tuned)
    else:
        tuned.lm_head.weight = tuned.lm_head.weight + 0.1 * mx.random.normal(
            (VOCABULARY, 32), key=mx.random.key(3)
        )
    frozen(base)
    frozen(tuned)
    texts = [group[-1] for group in build_groups()]
    found = Scorer(base).divergences(Scorer(tuned), texts)
    for text, value in zip(texts, found, strict=True):
        p, q = log_softmax(base, text.tokens), log_softmax(tuned, text.tokens)
        kl = (np.exp(p) * (p - q)).sum(-1)[:-1][text.loss_mask[1:]].sum()
        assert value == pytest.approx(kl, rel=1e-3, abs=1e-5)
    assert found.min() > 1e-4


def test_a_head_for_each_model():
    """tiled_kl_divergence with two heads equals that of whole distributions."""
    rng = np.random.default_rng(0)
    hidden, other = (rng.normal(size=(5, 6)).astype(np.float32) for _ in range(2))
    weights = [rng.normal(size=(300, 6)).astype(np.float32) for _ in range(2)]
    heads = [mx.array(weight) for weight in weights]
    found = tiled_kl_divergence(
        lambda h, entries: h @ heads[0][entries].T,
        300,
        mx.array(hidden),
        mx.array(other),
        lambda h, entries: h @ heads[1][entries].T,
    )
    logits = [
        h.astype(np.float64) @ w.T.astype(np.float64) for h, w in zip((hidden, other), weights, strict=True)
    ]
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in logits)
    assert np.allclose(np.array(found), (np.exp(p) * (p - q)).sum(-1), rtol=1e-4)
