"""Fields that are nearly one of a request's: refused with the right name, by every API. What clients send is let through."""

import inspect
from typing import Any

import anthropic
import httpx
import ollama._types
import openai
import pytest
from anthropic import Anthropic
from anthropic.types import message_count_tokens_params, message_create_params
from anthropic.types.beta import message_create_params as beta_message_create_params
from openai import OpenAI
from openai.types import completion_create_params, embedding_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params

from engine import InvalidRequest
from server.embeddings import EmbeddingRequest
from server.messages_protocol import CountRequest, MessagesRequest
from server.misspelt import refuse_misspelt
from server.ollama_protocol import EmbeddingsRequest, EmbedRequest, GenerateRequest, OllamaChatRequest, ShowRequest
from server.protocol import Body, ChatRequest, CompletionRequest
from server.responses_protocol import ResponsesRequest
from server.tokenizing import DetokenizeRequest, TokenizeRequest
from tests.http.support import PATIENCE_S, ThreadServer

X: Any = [{"role": "user", "content": "x"}]
KINDS: tuple[type[Body], ...] = (
    ChatRequest, CompletionRequest, MessagesRequest, CountRequest, ResponsesRequest, EmbeddingRequest, OllamaChatRequest,
    GenerateRequest, EmbedRequest, EmbeddingsRequest, ShowRequest, TokenizeRequest, DetokenizeRequest,
)  # fmt: skip
# Of servers and clients that bring no table of their fields: vLLM and its bench, SGLang, llama.cpp, TGI, lm-eval, OpenRouter,
# LM Studio, Open WebUI.
OTHERS = """
add_generation_prompt add_special_tokens allowed_token_ids bad_words best_of cache_salt chat_template
chat_template_kwargs continue_final_message documents guided_backend guided_decoding_backend guided_whitespace_pattern
include_stop_str_in_output kv_transfer_params length_penalty logits_processors min_tokens mm_processor_kwargs priority
prompt_logprobs request_id return_token_ids return_tokens_as_token_ids spaces_between_special_tokens structural_tag
truncate_prompt_tokens truncation_side use_beam_search vllm_xargs media_io_kwargs repetition_detection rid lora_path
session_params no_stop_trim stop_regex min_new_tokens ebnf regex custom_logit_processor custom_params
return_hidden_states input_ids return_cached_tokens_details separate_reasoning stream_reasoning cache_prompt id_slot
n_keep n_discard n_probs min_keep n_predict samplers timings_per_token return_progress repeat_penalty repeat_last_n
penalize_nl dry_base dry_multiplier dry_allowed_length dry_penalty_last_n xtc_threshold dynatemp_exponent mirostat_tau
mirostat_eta image_data t_max_predict_ms post_sampling_probs response_fields reasoning_format with_pieces max_new_tokens
max_gen_toks max_length until do_sample num_beams decoder_input_details details return_full_text watermark models
provider transforms route plugins reasoning include_usage ttl draft_model fallbacks top_a smoothing_factor chat_id
session id features variables files tool_ids tool_servers background_tasks params verbose license num_ctx
"""
SENT = (
    (chat_create_params, "CompletionCreateParamsBase"), (completion_create_params, "CompletionCreateParamsBase"),
    (response_create_params, "ResponseCreateParamsBase"), (embedding_create_params, "EmbeddingCreateParams"),
    (message_create_params, "MessageCreateParamsBase"), (beta_message_create_params, "MessageCreateParamsBase"),
    (message_count_tokens_params, "MessageCountTokensParams"),
)  # fmt: skip


def fields_that_clients_send() -> set[str]:
    sent = set(OTHERS.split())
    for module, name in SENT:
        sent |= getattr(module, name).__annotations__.keys()
    for name, kind in inspect.getmembers(ollama._types, inspect.isclass):
        if name.endswith("Request") and hasattr(kind, "model_fields"):
            sent |= kind.model_fields.keys()
    assert len(sent) > 200
    return sent


@pytest.mark.parametrize("kind", KINDS)
def test_no_field_that_a_client_sends_is_taken_for_another(kind: type[Body]) -> None:
    for field in fields_that_clients_send():
        refuse_misspelt({field: 1}, kind.__struct_encode_fields__, kind.UNSUPPORTED)


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("temprature", "temperature"), ("tempreature", "temperature"), ("Temperature", "temperature"), ("top-p", "top_p"),
        ("topK", "top_k"), ("max_token", "max_tokens"), ("maxTokens", "max_tokens"), ("stops", "stop"),
        ("message", "messages"),
        ("max_completion_token", "max_completion_tokens"), ("frequence_penalty", "frequency_penalty"), ("tool", "tools"),
        ("repitition_penalty", "repetition_penalty"), ("respone_format", "response_format"), ("straem", "stream"),
        ("streem", "stream"),
    ],
)  # fmt: skip
def test_what_is_meant_is_named(said: str, meant: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^{said} is not a field of this request: did you mean {meant}\\?$") as caught:
        refuse_misspelt({"model": "x", said: 1}, ChatRequest.__struct_encode_fields__, ChatRequest.UNSUPPORTED)
    assert caught.value.field == said


@pytest.mark.parametrize("said", ["temp", "top_a", "top_n", "stopping", "x", "", "models", "seedling", "t" * 100, "n_"])
def test_what_is_far_from_all_fields_is_ignored(said: str) -> None:
    if said == "n_":                                     # but for separators it is n
        with pytest.raises(InvalidRequest, match="did you mean n"):
            refuse_misspelt({said: 1}, ("n", "stop"))
        return
    refuse_misspelt({said: 1}, ChatRequest.__struct_encode_fields__, ChatRequest.UNSUPPORTED)


def test_the_openai_client_hears_what_it_should_have_sent(steered: ThreadServer) -> None:
    with OpenAI(base_url=steered.url + "/v1", api_key="x", max_retries=0, timeout=PATIENCE_S) as client:
        with pytest.raises(openai.BadRequestError, match=r"temprature is not a field .* mean temperature") as bad:
            client.chat.completions.create(model="tiny", messages=X, extra_body={"temprature": 2})
        assert bad.value.param == "temprature"
        with pytest.raises(openai.BadRequestError, match="did you mean max_tokens"):
            client.completions.create(model="tiny", prompt="x", extra_body={"max_token": 5})
        with pytest.raises(openai.BadRequestError, match="system is not supported here: send it as the first of"):
            client.chat.completions.create(model="tiny", messages=X, extra_body={"system": "Be brief."})
        with pytest.raises(openai.BadRequestError, match="max_tokens is not supported here: send max_output_tokens"):
            client.responses.create(model="tiny", input="x", extra_body={"max_tokens": 5})
        with pytest.raises(openai.BadRequestError, match=r"send text\.format instead"):
            client.responses.create(model="tiny", input="x", extra_body={"response_format": {"type": "json_object"}})
        answer = client.chat.completions.create(
            model="tiny", messages=X, max_tokens=2, user="me", metadata={"a": "b"}, service_tier="auto",
            extra_body={"provider": {}, "models": ["x"], "num_ctx": 5},
        )  # fmt: skip
        assert answer.choices[0].message.content == "aa"


def test_the_others_hear_it_too(steered: ThreadServer) -> None:
    with Anthropic(base_url=steered.url, api_key="x", max_retries=0, timeout=PATIENCE_S) as client:
        with pytest.raises(anthropic.BadRequestError, match="did you mean temperature"):
            client.messages.create(model="tiny", max_tokens=5, messages=X, extra_body={"temprature": 2})
        client.messages.create(model="tiny", max_tokens=5, messages=X, metadata={"user_id": "x"}, extra_body={"speed": "x"})
    with httpx.Client(base_url=steered.url, timeout=PATIENCE_S) as client:
        for path, body in (
            ("/api/chat", {"messages": X, "optoins": {}}), ("/v1/embeddings", {"input": "x", "encodingFormat": "float"}),
            ("/tokenize", {"prompt": "x", "add_special_token": True}),
        ):  # fmt: skip
            answer = client.post(path, json=body)
            assert answer.status_code == 400, answer.text
            assert "did you mean" in answer.text


def test_many_unknown_fields_cost_little(steered: ThreadServer) -> None:
    body = {"prompt": "x", "max_tokens": 1, **{f"max_tok{at:05}": at for at in range(3000)}}
    assert httpx.post(steered.url + "/v1/completions", json=body, timeout=5).status_code == 200
