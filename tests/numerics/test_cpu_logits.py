"""The demo model's logits as it is served, against the float32 oracle on the same weights."""

import numpy as np

from backends.cpu.runner import CpuBackend


def logits(backend: CpuBackend, make_step) -> np.ndarray:
    tokens = np.random.default_rng(3).integers(100, 20_000, 70).tolist()
    step, session = make_step([(tokens, 0, [4, 1, 2])]), backend.session
    assert session is not None

    def run() -> np.ndarray:
        states = session.model.forward(step.tokens, session.model.shapes(step), session.cache)
        return session.model.logits(session.model.final_states(states, np.arange(len(tokens)))).copy()

    return backend.compute.submit(run).result()


def test_logits_are_those_of_the_float32_oracle(lanes_backend: CpuBackend, oracle_backend: CpuBackend, make_step) -> None:
    exact = logits(oracle_backend, make_step)
    error = np.abs(logits(lanes_backend, make_step) - exact).max(1) / np.abs(exact).max(1)
    assert error.max() < 1e-5
