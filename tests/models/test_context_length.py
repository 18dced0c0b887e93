"""The number of positions a config states, and the notice of rows that are longer."""

import numpy as np
import pytest

from nalora_mlx.data.tokenization import Example, Split
from nalora_mlx.models.context_length import context_length, context_notices

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"max_position_embeddings": 2048}, 2048),
        ({"n_positions": 1024}, 1024),  # GPT-2
        ({"text_config": {"max_position_embeddings": 512}, "max_position_embeddings": 99}, 512),
        ({"text_config": {}, "max_position_embeddings": 99}, 99),
        # Llama 3.1 states the length with scaling, Qwen 2.5 with YaRN and linear scaling the one without.
        ({"max_position_embeddings": 131072, "rope_scaling": LLAMA3}, 131072),
        ({"max_position_embeddings": 32768, "rope_scaling": {"factor": 4.0, "type": "yarn"}}, 131072),
        (
            {
                "max_position_embeddings": 4096,
                "rope_scaling": {"factor": 40, "original_max_position_embeddings": 4096},
            },
            163840,
        ),
        ({"max_position_embeddings": 2048, "rope_scaling": None}, 2048),
        ({"max_position_embeddings": 2048, "rope_parameters": {"rope_theta": 1e4}}, 2048),
        ({"max_position_embeddings": 2048, "rope_parameters": {"factor": 2}}, 4096),
        ({"hidden_size": 3}, None),  # Mamba
        ({"max_position_embeddings": None}, None),
        ({"max_position_embeddings": "many"}, None),
    ],
)
def test_context_length(config, expected):
    assert context_length(config) == expected


def split(*lengths):
    return Split([Example(np.ones(n, np.int32), np.ones(n, bool), f"a.jsonl:{n}") for n in lengths])


def test_rows_beyond_the_context_are_a_notice():
    config = {"max_position_embeddings": 8}
    splits = {"train": split(3, 8, 9, 12), "valid": split(8), "test": split(10)}
    assert context_notices(splits, config) == [
        "train: 2 rows are longer than the 8 tokens that the model was made for, the longest has 12: a.jsonl:9, :12; "
        "--max-seq-length 8 truncates them",
        "test: 1 row is longer than the 8 tokens that the model was made for, the longest has 10: a.jsonl:10; "
        "--max-seq-length 8 truncates them",
    ]
    assert context_notices(splits, {}) == []
