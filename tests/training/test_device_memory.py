"""The allocator's cache between steps, and the memory that Metal keeps resident."""

import mlx.core as mx
import mlx.optimizers as optim
import pytest

from nalora_mlx.core.config import RunConfig, TrainingConfig, load_run_config
from nalora_mlx.core.errors import InputError
from nalora_mlx.training import device_memory
from nalora_mlx.training.device_memory import trim_cache, wired_memory
from nalora_mlx.training.trainer import train
from tests.training.test_faults import adapted, rows

GB = 10**9


@pytest.fixture
def device(monkeypatch):
    """Return a function that makes this device look like another kind, with 10 GB."""

    def pretend(kind, **memory):
        monkeypatch.setattr(device_memory, "device_kind", lambda: kind)
        info = {"max_recommended_working_set_size": 10 * GB} if kind == "metal" else {}
        monkeypatch.setattr(mx, "device_info", lambda *_: info)
        for name, size in memory.items():
            monkeypatch.setattr(mx, f"get_{name}", lambda size=size: size)

    return pretend


@pytest.fixture
def wired(monkeypatch):
    """Return the wired limits that were set."""
    limits = [7]

    def set_limit(limit):
        limits.append(limit)
        return limits[-2]

    monkeypatch.setattr(mx, "set_wired_limit", set_limit)
    return limits


# --- the cache --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "threshold", "active", "cache", "limit", "cleared"),
    [
        ("cpu", None, 1, 1, 10, True),
        ("cpu", None, 1, 0, 10, False),
        ("metal", None, 4, 4.4, 15, False),
        ("metal", None, 4, 4.6, 15, True),  # 85% of the recommended 10 GB
        ("metal", None, 3, 4, 8, True),  # --memory-budget 8GB
        ("metal", None, 9, 0.1, 15, True),
        ("cuda", None, 4, 8, 15, False),
        ("cuda", None, 4, 9, 15, True),
        ("cpu", 2 * GB, 9, 1, 10, False),
        ("metal", 2 * GB, 9, 1, 10, False),
        ("metal", 2 * GB, 0, 3, 10, True),
        ("metal", 0, 0, 0.1, 10, True),
    ],
)
def test_when_the_cache_is_cleared(kind, threshold, active, cache, limit, cleared, device, monkeypatch):
    calls = []
    monkeypatch.setattr(mx, "clear_cache", lambda: calls.append(1))
    device(kind, active_memory=active * GB, cache_memory=cache * GB, memory_limit=limit * GB)
    trim_cache(threshold)
    assert bool(calls) is cleared


@pytest.mark.parametrize(("threshold", "keeps"), [(None, False), (0, False), (10**12, True)])
def test_the_cache_between_the_steps_of_a_run(threshold, keeps):
    cached = {"step": [], "validating": []}

    def listen(event):
        if event["event"] in cached:
            cached[event["event"]].append(mx.get_cache_memory())

    config = TrainingConfig(iters=8, batch_size=3, steps_per_report=1, clear_cache_threshold=threshold)
    mx.clear_cache()
    train(adapted(), rows(), rows(6), config, optim.Adam(1e-2), listeners=[listen])
    mx.clear_cache()
    assert (len(cached["step"]), len(cached["validating"])) == (8, 4)
    for sizes in cached.values():
        assert max(sizes) > 10**5 if keeps else max(sizes) < 10**4


def test_a_gpu_keeps_the_cache_between_steps(device, monkeypatch):
    calls = []
    monkeypatch.setattr(mx, "clear_cache", lambda: calls.append(1))
    device("metal", active_memory=GB, cache_memory=GB, memory_limit=15 * GB)
    config = TrainingConfig(iters=3, batch_size=3)
    train(adapted(), rows(), rows(6), config, optim.Adam(1e-2), peak_bytes=GB)
    assert calls == []
    device("metal", active_memory=GB, cache_memory=8 * GB, memory_limit=15 * GB)
    train(adapted(), rows(), rows(6), config, optim.Adam(1e-2), peak_bytes=GB)
    assert len(calls) >= 3 + 2 * 2  # after each step, and each batch of two validations


# --- wired memory -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "peak", "expected"),
    [
        (None, 5 * GB, 6 * GB),
        (None, 9 * GB, 10 * GB),
        (None, float("inf"), 10 * GB),
        (3 * GB, 5 * GB, 3 * GB),
        (20 * GB, 5 * GB, 10 * GB),
        (0, 5 * GB, 0),
    ],
)
def test_the_planned_peak_is_wired(limit, peak, expected, device, wired):
    device("metal")
    with wired_memory(limit, lambda: peak):
        assert wired == [7, expected]
    assert wired == [7, expected, 7]


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_other_devices_wire_nothing(kind, device, wired):
    device(kind)
    with wired_memory(None, lambda: pytest.fail("no plan is needed")):
        pass
    assert wired == [7]


def test_a_run_wires_its_memory_until_it_ends(device, wired):
    """Before anything runs, and also if it fails. Without a plan, as much as the run needs at most."""
    device("metal")
    config = TrainingConfig(iters=2, batch_size=3)
    events = []

    def listen(event):
        events.append((event["event"], wired[-1]))

    train(adapted(), rows(), (), config, optim.Adam(1e-2), listeners=[listen], peak_bytes=GB)
    assert wired == [7, 1.2 * GB, 7]
    assert {limit for _, limit in events} == {1.2 * GB}
    mx.reset_peak_memory()
    train(adapted(), rows(), (), config, optim.Adam(1e-2))
    assert mx.get_peak_memory() < wired[-2] < 10 * GB
    with pytest.raises(FloatingPointError):
        train(adapted(poisoned=True), rows(poisoned=range(12)), (), TrainingConfig(batch_size=3))
    assert wired[-1] == 7


def test_settings_of_memory(tmp_path):
    (tmp_path / "c.yaml").write_text("train: true\nwired_limit: 8GB\n")
    assert load_run_config(tmp_path / "c.yaml", {}).wired_limit == 8 * GB
    assert load_run_config(tmp_path / "c.yaml", {"wired_limit": "0"}).wired_limit == 0
    assert RunConfig().clear_cache_threshold is None
    with pytest.raises(InputError, match="clear_cache_threshold is -1; it must be at least 0; wired_limit"):
        RunConfig(train=True, clear_cache_threshold=-1, wired_limit=-1).check()
