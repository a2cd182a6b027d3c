import os
import random

import numpy as np
import pytest
import torch

from utils.seed import derived_seed, rng_state, seed_everything, seed_worker, set_rng_state


def draw(generator=None):
    """One number from every generator; two from those that keep a second normal one in reserve."""
    own = [] if generator is None else torch.rand(2, generator=generator).tolist()
    return [random.random(), random.gauss(0, 1), float(np.random.rand()), float(np.random.randn()),
            *torch.rand(2).tolist(), *torch.randn(1).tolist(), *own]


@pytest.fixture(autouse=True)
def settings_as_before():
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False


# -- seeding -------------------------------------------------------------------


def test_the_same_seed_repeats_and_another_differs():
    draws = []
    for seed in (3, 4, 3):
        seed_everything(seed)
        draws.append(draw())
    assert draws[0] == draws[2]
    assert all(a != b for a, b in zip(draws[0], draws[1], strict=True))


def test_the_whole_range_of_seeds():
    draws = []
    for seed in (0, 2**32 - 1, 2**32 + 5, 2**63 - 1, np.int64(5)):
        seed_everything(seed)
        draws.append(draw())
    assert all(a[0] != b[0] for i, a in enumerate(draws) for b in draws[:i])


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_out_of_range(seed):
    with pytest.raises(ValueError, match=f"seed: expected an integer from 0 to .*, got {seed}"):
        seed_everything(seed)


def test_deterministic_sets_and_resets_the_flags(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    seed_everything(0, deterministic=True)
    assert torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.benchmark
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    seed_everything(0)
    assert not torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.deterministic


# -- state ---------------------------------------------------------------------


@pytest.mark.parametrize("through_file", [False, True])
def test_a_restored_state_continues_as_the_first_time(tmp_path, through_file):
    generator = torch.Generator().manual_seed(1)
    seed_everything(7)
    draw(generator)                                            # leaves half a pair of normal numbers in reserve
    state = rng_state(generator)
    first = draw(generator)
    if through_file:
        torch.save(state, tmp_path / "state.pt")
        state = torch.load(tmp_path / "state.pt", weights_only=True)       # plain types only
    seed_everything(99)
    generator.manual_seed(99)
    draw(generator)
    set_rng_state(state, generator)
    assert draw(generator) == first


def test_the_state_is_a_copy():
    state = rng_state()
    before = state["torch"].clone(), state["numpy"]["keys"].clone()
    for _ in range(700):                                       # NumPy fills its 624 words anew
        draw()
    assert torch.equal(state["torch"], before[0]) and torch.equal(state["numpy"]["keys"], before[1])


def test_lists_for_tuples_are_accepted():
    state = rng_state()
    state["python"] = [state["python"][0], list(state["python"][1]), state["python"][2]]
    first = draw()
    set_rng_state(state)
    assert draw() == first


def test_a_generator_may_be_left_out_when_restoring():
    set_rng_state(rng_state(torch.Generator()))


def test_cuda_states_are_left_alone_on_a_machine_without():
    state = rng_state()
    state["cuda"] = [torch.zeros(16, dtype=torch.uint8)] * (torch.cuda.device_count() + 1)
    if not torch.cuda.is_available():
        set_rng_state(state)


def test_errors_of_set_rng_state():
    with pytest.raises(ValueError, match="random state has none for the loader's generator"):
        set_rng_state(rng_state(), torch.Generator())
    with pytest.raises(ValueError, match="random state lacks python, numpy, cuda, generator"):
        set_rng_state({"torch": torch.get_rng_state()})


@pytest.mark.gpu
def test_cuda_state_continues():
    seed_everything(3)
    torch.rand(5, device="cuda")
    state = rng_state()
    first = torch.rand(5, device="cuda")
    assert len(state["cuda"]) == torch.cuda.device_count()
    seed_everything(4)
    set_rng_state({key: [s.cuda() for s in value] if key == "cuda" else value for key, value in state.items()})
    assert torch.equal(torch.rand(5, device="cuda"), first)


# -- derived seeds -------------------------------------------------------------


def test_derived_seeds_are_the_same_everywhere():
    # printf 1,2,3 | b2sum -l 64, read as a little-endian number and halved
    assert derived_seed(0) == 4246866556266386882
    assert derived_seed(1, 2, 3) == derived_seed(np.int64(1), torch.tensor(2), 3) == 1517167407554927345


def test_derived_seeds_differ_by_order_and_grouping_and_fit():
    cases = ((1, 23), (12, 3), (23, 1), (123,), (1, 2, 3), (-1, 23), (1, 23, 0))
    assert len({derived_seed(*integers) for integers in cases}) == len(cases)
    many = [derived_seed(0, epoch, index) for epoch in range(20) for index in range(500)]
    assert len(set(many)) == len(many) and all(0 <= seed < 2**63 for seed in many)
    bits = np.array([[seed >> bit & 1 for bit in range(63)] for seed in many]).mean(axis=0)
    assert np.abs(bits - 0.5).max() < 0.03                     # 6 standard deviations of 10,000 fair coins
    torch.Generator().manual_seed(max(many))


def test_derived_seed_takes_integers_only():
    with pytest.raises(TypeError):
        derived_seed(1.0)
    with pytest.raises(TypeError):
        derived_seed("1")
    with pytest.raises(ValueError, match="at least one"):
        derived_seed()


# -- workers -------------------------------------------------------------------


class Draws(torch.utils.data.Dataset):
    """Item i: numbers of the worker's generators, its torch seed and its number of threads."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        info = torch.utils.data.get_worker_info()
        return random.random(), np.random.rand(), info.id, info.seed, torch.get_num_threads()


def worker_draws(seed):
    loader = torch.utils.data.DataLoader(Draws(), batch_size=None, num_workers=2, worker_init_fn=seed_worker,
                                         generator=torch.Generator().manual_seed(seed))
    return [tuple(float(value) for value in item) for item in loader]


def test_workers_repeat_with_the_loader_and_differ_from_each_other():
    first, second, other = worker_draws(5), worker_draws(5), worker_draws(6)
    assert first == second and first != other
    assert len({item[0] for item in first}) == 4 and len({item[1] for item in first}) == 4
    assert {item[4] for item in first} == {1}


def test_seed_worker_seeds_python_and_numpy_from_torch(monkeypatch):
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    torch.manual_seed(2**40 + 7)
    random.seed(0)
    np.random.seed(0)
    seed_worker(0)
    assert threads == [1]
    assert random.random() == random.Random(2**40 + 7).random()
    assert np.random.rand() == np.random.RandomState(7).rand()
