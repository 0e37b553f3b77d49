"""The real openai client, chatting with the demo model behind a real hypercorn."""

import math
from typing import Any

import openai
import pytest
from openai import OpenAI

HELLO: Any = [{"role": "user", "content": "Say hello to me."}]


def ask(client: OpenAI, **more: Any) -> Any:
    usual = {"model": "org/demo", "messages": HELLO, "temperature": 0, "max_tokens": 8}
    return client.chat.completions.create(**usual | more)


def test_an_answer_has_text_usage_and_the_names_that_clients_read(client: OpenAI) -> None:
    answer = ask(client)
    assert answer.id.startswith("chatcmpl-")
    assert answer.object == "chat.completion"
    assert answer.model == "org/demo"
    assert answer.system_fingerprint.startswith("rillet-")
    assert 1_600_000_000 < answer.created < 10_000_000_000, "seconds"
    choice = answer.choices[0]
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert choice.finish_reason == "length"
    assert answer.usage.completion_tokens == 8
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 8


def test_a_stream_says_the_same_as_a_whole_answer(client: OpenAI) -> None:
    whole = ask(client)
    chunks = list(ask(client, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks[-2:]] == [None, "length"]
    assert chunks[-1].choices[0].delta.content is None
    assert len({(chunk.id, chunk.created) for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks)


def test_usage_comes_in_one_chunk_of_its_own(client: OpenAI) -> None:
    *chunks, last = ask(client, stream=True, stream_options={"include_usage": True})
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)
    assert last.choices == []
    assert last.usage.completion_tokens == 8


def test_a_second_turn_finds_its_prefix_in_the_cache(client: OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "Tell me about rivers and lakes. " * 12}]
    first = ask(client, messages=messages)
    assert ask(client, messages=messages).usage.prompt_tokens_details.cached_tokens > 0
    assert first.usage.prompt_tokens > 100


def test_n_choices_come_apart_by_index_each_with_one_role_and_one_end(client: OpenAI) -> None:
    chunks = list(ask(client, n=3, temperature=1.0, seed=5, stream=True))
    choices = [chunk.choices[0] for chunk in chunks]
    for index in range(3):
        mine = [choice for choice in choices if choice.index == index]
        assert [choice.delta.role for choice in mine].count("assistant") == 1
        assert [choice.finish_reason for choice in mine if choice.finish_reason] == ["length"]
    whole = ask(client, n=3, temperature=1.0, seed=5)
    texts = [choice.message.content for choice in whole.choices]
    assert len(set(texts)) > 1
    assert ["".join(c.delta.content or "" for c in choices if c.index == index) for index in range(3)] == texts


def test_a_seed_gives_the_same_answer_again_and_another_seed_another_one(client: OpenAI) -> None:
    def text(seed: int) -> str:
        return str(ask(client, temperature=2.0, seed=seed).choices[0].message.content)

    assert text(7) == text(7)
    assert text(7) != text(8)


def test_a_stop_string_ends_the_answer_and_is_not_part_of_it(client: OpenAI) -> None:
    sea: Any = [{"role": "user", "content": "Write one long sentence about the sea."}]
    content = ask(client, messages=sea, max_tokens=12).choices[0].message.content
    word = content.split()[3]
    kept = content[: content.index(word)]
    answer = ask(client, messages=sea, max_tokens=12, stop=[word, "never said"])
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].message.content == kept
    assert answer.choices[0].stop_reason == word
    chunks = list(ask(client, messages=sea, max_tokens=12, stop=word, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == kept
    assert chunks[-1].choices[0].stop_reason == word


def test_logprobs_have_tokens_bytes_and_alternatives(client: OpenAI) -> None:
    choice = ask(client, logprobs=True, top_logprobs=3).choices[0]
    scores = choice.logprobs.content
    assert len(scores) == 8
    assert b"".join(bytes(score.bytes) for score in scores).decode("utf-8", "replace") == choice.message.content
    for score in scores:
        assert len(score.top_logprobs) == 3
        assert score.logprob == score.top_logprobs[0].logprob, "greedy takes the best"
        assert score.token == score.top_logprobs[0].token
        assert sum(math.exp(top.logprob) for top in score.top_logprobs) <= 1.001
    chunks = list(ask(client, logprobs=True, top_logprobs=0, stream=True))
    streamed = [s for chunk in chunks if chunk.choices[0].logprobs for s in chunk.choices[0].logprobs.content]
    assert [score.logprob for score in streamed] == [score.logprob for score in scores]
    assert all(score.top_logprobs == [] for score in streamed)


def test_a_bias_changes_the_answer(client: OpenAI) -> None:
    the = {"504": 100}                                   # "The" in the demo model's vocabulary
    assert ask(client, logit_bias=the, max_tokens=3).choices[0].message.content == "TheTheThe"


def test_extra_fields_of_the_body_reach_the_sampler(client: OpenAI) -> None:
    greedy = ask(client).choices[0].message.content
    extra = {"top_k": 1, "min_p": 0.1, "repetition_penalty": 1.0, "session_id": "s", "cache_salt": "t", "ignore_eos": True}
    assert ask(client, temperature=1.0, extra_body=extra).choices[0].message.content == greedy


def test_roles_and_parts_of_content_are_understood(client: OpenAI) -> None:
    parts: Any = [{"role": "user", "content": [{"type": "text", "text": "Say hello "}, {"type": "text", "text": "to me."}]}]
    assert ask(client, messages=parts).choices[0].message.content == ask(client).choices[0].message.content
    system: Any = [{"role": "system", "content": "Be brief."}, *HELLO]
    developer: Any = [{"role": "developer", "content": "Be brief."}, *HELLO]
    assert ask(client, messages=system).choices[0].message == ask(client, messages=developer).choices[0].message


def test_fields_that_change_nothing_are_let_through(client: OpenAI) -> None:
    answer = ask(
        client, user="me", store=False, metadata={"a": "b"}, service_tier="auto", parallel_tool_calls=True,
        tool_choice="none", response_format={"type": "text"}, max_completion_tokens=8,
    )  # fmt: skip
    assert answer.usage.completion_tokens == 8


@pytest.mark.parametrize("name", ["org/demo", "demo", "default"])
def test_the_model_has_its_id_its_last_part_and_default_as_names(client: OpenAI, name: str) -> None:
    assert ask(client, model=name).model == "org/demo"
    assert client.models.retrieve(name).id == "org/demo"
    assert [model.id for model in client.models.list()] == ["org/demo"]


@pytest.mark.parametrize("name", ["gpt-4", "../../etc/passwd", "x" * 1000])
def test_another_model_is_not_found_and_the_known_ones_are_told(client: OpenAI, name: str) -> None:
    with pytest.raises(openai.NotFoundError, match="default") as caught:
        ask(client, model=name)
    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"


def test_a_prompt_beyond_the_context_is_refused_with_both_numbers(client: OpenAI) -> None:
    long: Any = [{"role": "user", "content": "river " * 3000}]
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match=r"1,024.*shorten") as caught:
            ask(client, messages=long, stream=stream)
        assert caught.value.code == "context_length_exceeded"
        assert caught.value.param == "messages"
