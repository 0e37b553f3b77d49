"""The async facade and the loop under it, on asyncio and trio, over the toy backend: what is drawn is compared with a naive
recompute of each sequence alone."""

import gc
import threading
from collections.abc import Callable

import anyio
import anyio.lowlevel
import numpy as np
import pytest

from engine import (
    ContextTooLong,
    Engine,
    EngineClosed,
    EngineConfig,
    InvalidRequest,
    Message,
    Overloaded,
    RilletError,
    SamplingParams,
    StepFailed,
    Stream,
    UnknownModel,
)
from engine.step import StepOutput
from engine.weights.checkpoint import Checkpoint
from tests.support.toy import ToyBackend, ToyTicket, naive, toy_hash, toy_logprob

pytestmark = pytest.mark.anyio
Opener = Callable[..., Engine]


@pytest.fixture
def toy(tiny_checkpoint: Callable[[], Checkpoint]) -> Opener:
    def make(backend: ToyBackend | None = None, **config: object) -> Engine:
        return Engine(EngineConfig(**config), backend=backend or ToyBackend(), checkpoint=tiny_checkpoint())

    return make


def expected(engine: Engine, prompt: list[int], choice: int = 0, **keywords: object) -> list[int]:
    params = SamplingParams(**keywords)
    limit = engine.context_length if params.max_tokens is None else len(prompt) + params.max_tokens
    return naive(
        prompt, params, seed=params.seed or 0, choice=choice, limit=min(limit, engine.context_length),
        end_ids=engine.tokenizer.end_ids, vocabulary=engine.spec.vocabulary_size,
    )  # fmt: skip


class HeldBackend(ToyBackend):
    """Waits for `release` in every wait()."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.release = threading.Event()
        self.waiting = threading.Event()

    def wait(self, ticket: ToyTicket) -> StepOutput:
        self.waiting.set()
        assert self.release.wait(20)
        return super().wait(ticket)


async def test_a_stream_gives_what_a_naive_recompute_gives(toy: Opener) -> None:
    async with toy() as engine:
        stream = await engine.stream([5, 6, 7], max_tokens=9, temperature=0, ignore_eos=True)
        deltas = [delta async for delta in stream]
        ids = [token for delta in deltas for token in delta.token_ids]
        assert ids == expected(engine, [5, 6, 7], max_tokens=9, temperature=0, ignore_eos=True)
        assert deltas[-1].finish_reason == "length"
        assert all(delta.finish_reason is None for delta in deltas[:-1])
        usage = deltas[-1].usage
        assert usage is not None
        assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (3, 9, 12)
        assert "".join(delta.text for delta in deltas) == engine.tokenizer.decode(ids)


@pytest.mark.parametrize("company", [1, 2, 5, 17])
async def test_company_changes_nothing(toy: Opener, company: int) -> None:
    """Greedy and seeded, with penalties, in batches of 1 to 17, more than run at once."""
    async with toy(ToyBackend(pages=50, max_num_seqs=6)) as engine:
        wishes = [
            {
                "max_tokens": 6 + i % 5, "temperature": float(i % 2), "seed": i, "frequency_penalty": 0.5 * (i % 3),
                "ignore_eos": True,
            }
            for i in range(company)
        ]
        results: dict[int, list[int]] = {}

        async def ask(i: int) -> None:
            results[i] = (await engine.generate([1 + i, 2, 3 * i], **wishes[i])).token_ids

        async with anyio.create_task_group() as group:
            for i in range(company):
                group.start_soon(ask, i)
        for i in range(company):
            assert results[i] == expected(engine, [1 + i, 2, 3 * i], **wishes[i])


async def test_long_prompts_are_cut_into_chunks(toy: Opener) -> None:
    backend = ToyBackend(max_batch_tokens=8, pages=100)
    async with toy(backend) as engine:
        prompt = [i % 50 for i in range(101)]
        result = await engine.generate(prompt, max_tokens=5, temperature=0, ignore_eos=True)
        assert result.token_ids == expected(engine, prompt, max_tokens=5, temperature=0, ignore_eos=True)
        assert engine.metrics.steps_total >= 13


async def test_lookahead_changes_nothing(toy: Opener) -> None:
    seen = []
    for lookahead in (True, False):
        backend = HeldBackend()
        backend.release.set()
        async with toy(backend, lookahead=lookahead) as engine:
            result = await engine.generate([3, 1, 4], n=3, max_tokens=9, seed=1, presence_penalty=1, ignore_eos=True)
            seen.append([choice.token_ids for choice in result.choices])
    assert seen[0] == seen[1]


async def test_preempted_sequences_go_on_where_they_were(toy: Opener) -> None:
    """Five sequences of 50 tokens in a pool of 80: they take turns, and none loses or repeats a token."""
    async with toy(ToyBackend(pages=20, page_tokens=4), seed=1) as engine:
        results: dict[int, list[int]] = {}

        async def ask(i: int) -> None:
            results[i] = (await engine.generate([i + 1, 9], max_tokens=48, seed=i, ignore_eos=True)).token_ids

        async with anyio.create_task_group() as group:
            for i in range(5):
                group.start_soon(ask, i)
        assert engine.metrics.num_preemptions > 0
        for i in range(5):
            assert results[i] == expected(engine, [i + 1, 9], max_tokens=48, seed=i, ignore_eos=True)
        assert engine.metrics.audit_failures == 0


async def test_choices_share_the_prompt_and_differ(toy: Opener) -> None:
    backend = ToyBackend(max_num_seqs=4)
    async with toy(backend) as engine:
        result = await engine.generate([4, 5, 6, 7, 8, 9], n=7, max_tokens=6, seed=3, ignore_eos=True)
        assert len({tuple(choice.token_ids) for choice in result.choices}) == 7
        for choice in result.choices:
            wanted = expected(engine, [4, 5, 6, 7, 8, 9], choice.index, max_tokens=6, seed=3, ignore_eos=True)
            assert choice.token_ids == wanted
        assert result.usage.completion_tokens == 42


async def test_the_same_seed_gives_the_same_and_another_another(toy: Opener) -> None:
    async with toy() as engine:
        texts = [(await engine.generate([1, 2], max_tokens=8, seed=s, ignore_eos=True)).token_ids for s in (5, 5, 6)]
        assert texts[0] == texts[1] != texts[2]


async def test_an_engine_seed_makes_runs_repeatable(toy: Opener) -> None:
    seen = []
    for _ in range(2):
        async with toy(seed=42) as engine:
            seen.append([(await engine.generate([1, 2], max_tokens=8)).token_ids for _ in range(3)])
    assert seen[0] == seen[1]
    assert seen[0][0] != seen[0][1]


async def test_a_prefix_is_found_again_and_reported(toy: Opener) -> None:
    async with toy() as engine:
        prompt = list(range(22))
        first = await engine.generate(prompt, max_tokens=3, temperature=0, ignore_eos=True)
        again = await engine.generate(prompt, max_tokens=3, temperature=0, ignore_eos=True)
        salted = await engine.generate(prompt, max_tokens=3, temperature=0, ignore_eos=True, cache_salt="mine")
        assert first.usage.cached_tokens == salted.usage.cached_tokens == 0
        assert again.usage.cached_tokens == 20                  # five full pages of four; the last token always runs
        assert first.token_ids == again.token_ids == salted.token_ids


async def test_the_prefix_cache_can_be_off(toy: Opener) -> None:
    async with toy(prefix_cache=False) as engine:
        for _ in range(2):
            assert (await engine.generate(list(range(22)), max_tokens=2)).usage.cached_tokens == 0


async def test_a_whole_prompt_in_the_cache_still_runs_its_last_token(toy: Opener) -> None:
    async with toy() as engine:
        prompt = list(range(20))                                 # exactly five pages
        first = await engine.generate(prompt, max_tokens=3, temperature=0, ignore_eos=True)
        again = await engine.generate(prompt, max_tokens=3, temperature=0, ignore_eos=True)
        assert again.usage.cached_tokens == 16
        assert first.token_ids == again.token_ids


async def test_a_session_outlives_eviction_by_others(toy: Opener) -> None:
    async with toy(ToyBackend(pages=24)) as engine:
        await engine.generate(list(range(30)), max_tokens=2, session_id="talk", ignore_eos=True)
        for i in range(6):                                       # each fills most of what is left
            await engine.generate([100 + i] * 50, max_tokens=2)
        assert engine.statistics().cache_sessions == 1
        kept = await engine.generate(list(range(30)), max_tokens=2, session_id="talk", ignore_eos=True)
        assert kept.usage.cached_tokens == 28


async def test_logprobs_of_prompt_and_answer(toy: Opener) -> None:
    async with toy(ToyBackend(max_places=5, max_num_seqs=4, page_tokens=4)) as engine:
        prompt = list(range(17))
        for _ in range(2):                                       # the prefix cache must not shorten them
            result = await engine.generate(
                prompt, max_tokens=3, temperature=0, logprobs=2, prompt_logprobs=1, ignore_eos=True
            )
            assert result.usage.cached_tokens == 0
            assert result.prompt_logprobs is not None
            assert [(p.token_id, p.logprob, len(p.top)) for p in result.prompt_logprobs] == [
                (prompt[at], toy_logprob(prompt[:at], prompt[at]), 1) for at in range(1, 17)
            ]
            logprobs = result.choices[0].logprobs
            assert logprobs is not None
            context = [*prompt]
            for token, found in zip(result.token_ids, logprobs, strict=True):
                assert found.logprob == toy_logprob(context, token)
                assert [top.logprob for top in found.top] == [toy_logprob(context, t) for t in (0, 1)]
                context.append(token)


async def test_max_tokens_0_scores_a_prompt_alone(toy: Opener) -> None:
    async with toy() as engine:
        result = await engine.generate([3, 4, 5], max_tokens=0, prompt_logprobs=0)
        assert result.token_ids == []
        assert result.finish_reason == "length"
        assert result.prompt_logprobs is not None
        assert [p.token_id for p in result.prompt_logprobs] == [4, 5]


@pytest.mark.parametrize("pooling", ["mean", "last"])
async def test_embeddings_pool_states_over_chunks(toy: Opener, pooling: str) -> None:
    async with toy(ToyBackend(max_batch_tokens=8)) as engine:
        prompt = [i * 3 % 50 for i in range(21)]
        states = np.array([[toy_hash(prompt[: at + 1], d) % 97 for d in range(4)] for at in range(21)], np.float32)
        found = await engine.embed(prompt, pooling=pooling)
        assert found.prompt_tokens == 21
        np.testing.assert_allclose(found.vector, states.mean(0) if pooling == "mean" else states[-1], rtol=1e-6)


async def test_a_stop_id_ends_and_is_named(toy: Opener) -> None:
    async with toy() as engine:
        free = expected(engine, [8, 8], max_tokens=10, temperature=0, ignore_eos=True)
        result = await engine.generate([8, 8], max_tokens=10, temperature=0, ignore_eos=True, stop_token_ids=[free[4]])
        assert result.token_ids == free[: free.index(free[4]) + 1]
        assert (result.finish_reason, result.choices[0].stop_reason) == ("stop", free[4])


async def test_a_stop_string_ends_and_is_not_shown(toy: Opener) -> None:
    async with toy() as engine:
        free = await engine.generate([8, 8], max_tokens=24, temperature=0, ignore_eos=True)
        shown = free.text.replace("\ufffd", "")
        stop = next(c for c in shown[2:] if c.isprintable())
        result = await engine.generate([8, 8], max_tokens=24, temperature=0, ignore_eos=True, stop=stop)
        assert result.text == free.text[: free.text.index(stop)]
        assert (result.finish_reason, result.choices[0].stop_reason) == ("stop", stop)


async def test_messages_go_through_the_template(toy: Opener) -> None:
    async with toy() as engine:
        text = await engine.apply_chat_template([Message("user", "hello")])
        assert text == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
        by_messages = await engine.generate([{"role": "user", "content": "hello"}], max_tokens=4, temperature=0)
        by_text = await engine.generate(text, max_tokens=4, temperature=0)
        assert by_messages.token_ids == by_text.token_ids


@pytest.mark.parametrize(
    ("prompt", "keywords", "field"),
    [
        ("", {}, "prompt"),
        (5, {}, "prompt"),
        ([], {}, "prompt"),
        ([-1], {}, "prompt"),
        ([10**6], {}, "prompt"),
        ([True], {}, None),
        (["a"], {}, None),
        ([{"content": "no role"}], {}, "messages[0]"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], {}, "messages[0].content[0]"),
        ("x", {"n": 10**9}, "n"),
        ("x", {"n": 0}, "n"),
        ("x", {"temperature": float("nan")}, "temperature"),
        ("x", {"temperature": -1}, "temperature"),
        ("x", {"top_p": 0.0}, "top_p"),
        ("x", {"top_p": "high"}, "top_p"),
        ("x", {"max_tokens": -1}, "max_tokens"),
        ("x", {"max_tokens": 1.5}, "max_tokens"),
        ("x", {"stop": ["a"] * 17}, "stop"),
        ("x", {"stop": ""}, "stop"),
        ("x", {"logit_bias": {10**6: 1.0}}, "logit_bias"),
        ("x", {"logit_bias": {1: float("inf")}}, "logit_bias"),
        ("x", {"stop_token_ids": [10**6]}, "stop_token_ids"),
        ("x", {"logprobs": 21}, "logprobs"),
        ("x", {"seed": "x"}, "seed"),
        ("x", {"temperature": 10**400}, "temperature"),
        ("x", {"logit_bias": {1: 10**400}}, "logit_bias"),
        ("x", {"stop": 5}, "stop"),
        ("x", {"stop_token_ids": 5}, "stop_token_ids"),
        ("x", {"ignore_eos": "yes"}, "ignore_eos"),
        ("x", {"wings": 2}, "wings"),
    ],
)
async def test_bad_wishes_are_refused_by_field_before_anything_flows(
    toy: Opener, prompt: object, keywords: dict[str, object], field: str | None
) -> None:
    async with toy() as engine:
        with pytest.raises(InvalidRequest) as caught:
            await engine.stream(prompt, **keywords)
        if field is not None:
            assert caught.value.field == field
        assert engine.statistics().pages_held == 0
        assert (await engine.generate("x", max_tokens=2, ignore_eos=True)).usage.completion_tokens == 2


async def test_a_prompt_over_the_context_length_is_refused(toy: Opener) -> None:
    async with toy(ToyBackend(pages=8, page_tokens=4)) as engine:
        assert engine.context_length == 32                       # the pool is smaller than the model's
        with pytest.raises(ContextTooLong, match=r"32 tokens, the context length is 32.*more memory"):
            await engine.stream([1] * 32)
        with pytest.raises(ContextTooLong):
            await engine.stream("x" * 10**6)
        result = await engine.generate([1] * 31, ignore_eos=True)
        assert result.usage.completion_tokens == 1
        assert result.finish_reason == "length"


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (b"hi", "not of type bytes"),
        (["hi", "ho"], r"messages\[0\] must have a role and a content, and is of type str \(one prompt per call\)"),
        ([{"content": "hi"}], r"messages\[0\] must have a role and a content$"),
    ],
)
async def test_what_is_no_prompt_is_refused_by_what_it_is(prompt: object, words: str, toy: Opener) -> None:
    async with toy(ToyBackend()) as engine:
        with pytest.raises(InvalidRequest, match=words):
            await engine.stream(prompt)


async def test_limits_on_waiting_and_running(toy: Opener) -> None:
    backend = HeldBackend()
    async with toy(backend, max_waiting=5) as engine:
        streams = [await engine.stream([i], max_tokens=2) for i in range(3)]
        with pytest.raises(Overloaded) as caught:
            await engine.stream([9], n=3)
        assert 1 <= caught.value.retry_after_s <= 60
        streams.append(await engine.stream([9], n=2, max_tokens=2))
        backend.release.set()
        for stream in streams:
            await stream.collect()
        await (await engine.stream([9], n=5, max_tokens=2)).collect()


async def test_leaving_the_block_frees_the_pages_within_one_step(toy: Opener) -> None:
    backend = HeldBackend()
    async with toy(backend) as engine:
        async with await engine.stream([1] * 30, max_tokens=50) as stream:
            await anyio.to_thread.run_sync(backend.waiting.wait)
            assert engine.statistics().pages_held > 0
        backend.release.set()
        await engine.generate([2], max_tokens=1)
        assert engine.statistics().pages_held == 0
        assert stream.request.sequences[0].finish_reason == "abort"


async def test_a_cancelled_task_leaves_nothing_behind(toy: Opener) -> None:
    backend = HeldBackend()
    async with toy(backend) as engine:
        async with anyio.create_task_group() as group:
            group.start_soon(engine.generate, [1] * 20)
            await anyio.to_thread.run_sync(backend.waiting.wait)
            group.cancel_scope.cancel()
        backend.release.set()
        await engine.generate([2], max_tokens=1)
        assert engine.statistics().pages_held == 0


async def test_a_dropped_stream_warns_and_frees(toy: Opener) -> None:
    async with toy() as engine:
        async def drop() -> None:
            stream: Stream = await engine.stream([1, 2], ignore_eos=True)
            assert stream is not None

        with pytest.warns(ResourceWarning, match="dropped before its end"):
            await drop()
            while engine.statistics().num_requests_running or engine.statistics().num_requests_waiting:
                await engine.generate([3], max_tokens=1)
                gc.collect()
        assert engine.statistics().pages_held == 0


async def test_a_slow_reader_gets_everything_joined(toy: Opener) -> None:
    async with toy() as engine:
        slow = await engine.stream([4], max_tokens=20, temperature=0, ignore_eos=True)
        await engine.generate([5], max_tokens=40, ignore_eos=True)              # while nobody reads
        deltas = [delta async for delta in slow]
        assert len(deltas) == 1
        assert deltas[0].token_ids == expected(engine, [4], max_tokens=20, temperature=0, ignore_eos=True)


async def test_a_failing_step_ends_every_stream_and_refuses_the_next(toy: Opener) -> None:
    async with toy(ToyBackend(fail_at=4)) as engine:
        streams = [await engine.stream([i], max_tokens=50, ignore_eos=True) for i in range(3)]
        for stream in streams:
            with pytest.raises(StepFailed, match="the device burned"):
                await stream.collect()
        assert isinstance(engine.failure, StepFailed)
        with pytest.raises(EngineClosed, match="the device burned"):
            await engine.stream([1])


async def test_drain_lets_what_runs_finish_and_refuses_what_is_new(toy: Opener) -> None:
    backend = HeldBackend()
    async with toy(backend) as engine:
        stream = await engine.stream([1], max_tokens=3, ignore_eos=True)
        async with anyio.create_task_group() as group:
            group.start_soon(engine.drain, 20)
            await anyio.to_thread.run_sync(backend.waiting.wait)
            with pytest.raises(EngineClosed):
                await engine.stream([2])
            backend.release.set()
        result = await stream.collect()
        assert result.finish_reason == "length"


async def test_closing_ends_streams_with_abort(toy: Opener) -> None:
    engine = toy()
    async with engine:
        stream = await engine.stream([1], ignore_eos=True, max_tokens=400)
    reasons = [delta.finish_reason async for delta in stream]
    assert reasons[-1] == "abort"
    with pytest.raises(EngineClosed):
        await engine.stream([1])
    await engine.close()


async def test_a_backend_that_cannot_load_leaves_no_thread(toy: Opener) -> None:
    class Broken(ToyBackend):
        def load(self, *arguments: object) -> None:
            raise MemoryError("no room")

    before = threading.active_count()
    backend = Broken()
    with pytest.raises(MemoryError):
        async with toy(backend):
            pass
    for thread in threading.enumerate():
        if thread.name == "rillet-device":
            thread.join(20)
    assert backend.closed
    assert threading.active_count() <= before + 1                # a worker thread of the event loop may live on


async def test_closing_inside_the_block_does_not_cancel_the_caller(toy: Opener) -> None:
    async with toy() as engine:
        await engine.generate([1], max_tokens=1)
        await engine.close()
        await anyio.lowlevel.checkpoint()
        with pytest.raises(EngineClosed):
            await engine.stream([1])


async def test_two_readers_of_one_stream_are_told(toy: Opener) -> None:
    backend = HeldBackend()
    async with toy(backend) as engine:
        stream = await engine.stream([1], max_tokens=1, ignore_eos=True)
        async with anyio.create_task_group() as group:
            group.start_soon(stream.collect)
            await anyio.to_thread.run_sync(backend.waiting.wait)
            with pytest.raises(RilletError, match="two tasks"):
                await anext(stream)
            backend.release.set()


async def test_another_event_loop_is_refused(toy: Opener) -> None:
    async with toy() as engine:
        caught: list[Exception] = []

        def elsewhere() -> None:
            async def ask() -> None:
                await engine.stream([1])

            try:
                anyio.run(ask)
            except EngineClosed as error:
                caught.append(error)

        await anyio.to_thread.run_sync(elsewhere)
        assert "another event loop" in str(caught[0])


@pytest.mark.parametrize("wishes", [{"temperature": 1e-39}, {"temperature": 1.0, "top_p": 1e-50}])
async def test_numbers_too_small_for_the_device_are_not_passed_on(toy: Opener, wishes: dict[str, float]) -> None:
    backend = HeldBackend()
    async with toy(backend) as engine:
        stream = await engine.stream([1], max_tokens=1, **wishes)
        await anyio.to_thread.run_sync(backend.waiting.wait)
        step = backend.steps[0]
        assert step.temperature[0] in (0.0, 1.0)
        assert step.top_p[0] >= 1e-7
        backend.release.set()
        await stream.collect()


async def test_model_names(toy: Opener) -> None:
    async with toy(served_model_name="me", model_id="org/name") as engine:
        for name in ("me", "org/name", "name", "default", None):
            engine.check_model(name)
        with pytest.raises(UnknownModel, match="org/name"):
            engine.check_model("../../etc/passwd")


async def test_a_thousand_requests_with_random_ends_leave_nothing(toy: Opener) -> None:
    """Aborted while waiting, while the prompt runs, while decoding, or never."""
    rng = np.random.default_rng(0)
    async with toy(ToyBackend(pages=40, max_num_seqs=8), max_waiting=2000) as engine:
        async def ask(after: int, prompt: list[int], choices: int) -> None:
            async with await engine.stream(prompt, max_tokens=12, n=choices, seed=1, ignore_eos=True) as stream:
                async for delta in stream:
                    after -= len(delta.token_ids)
                    if after < 0:
                        break

        async with anyio.create_task_group() as group:
            for _ in range(1000):
                prompt = rng.integers(0, 40, rng.integers(1, 40)).tolist()
                group.start_soon(ask, int(rng.integers(0, 20)), prompt, int(rng.integers(1, 4)))
        await engine.generate([1], max_tokens=1)
        statistics = engine.statistics()
        assert statistics.pages_held == 0
        assert statistics.num_requests_running == statistics.num_requests_waiting == 0
        assert statistics.metrics.audit_failures == 0
        assert sum(statistics.metrics.request_success.values()) == 1001
