"""Generation: every way the host generates gives what a plain loop over full forward passes gives."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import ContinuousBatchingConfig, GenerationConfig, pipeline

from tests.families import VOCAB, dense_model, mixture, tiny_tokenizer, token_ids

# Rotary, learnt, ALiBi and windowed positions; FFNs in modules, loose in the layer, with the residual inside.
GENERATING = ("llama", "gpt2", "bloom", "opt", "gemma2", "falcon")
NEW = 8


@pytest.fixture
def model() -> Any:
    return mixture()


def greedy(model: nn.Module, ids: Tensor, steps: int = NEW) -> Tensor:
    """Greedy decoding by full forward passes, without a cache: the reference."""
    for _ in range(steps):
        with torch.no_grad():
            following = model(ids, use_cache=False).logits[:, -1].argmax(-1)
        ids = torch.cat([ids, following[:, None]], dim=1)
    return ids


def generate(model: Any, ids: Tensor, **options: Any) -> Tensor:
    return model.generate(ids, **{"do_sample": False, "max_new_tokens": NEW, "eos_token_id": None, **options})


def skip_what_the_host_cannot(family: str, options: dict[str, Any]) -> None:
    """Older versions of the host fail with a static cache on their own dense Bloom."""
    if family == "bloom" and options.get("cache_implementation") == "static":
        try:
            generate(dense_model(family), token_ids(1, 4), **options)
        except ValueError as error:
            pytest.skip(f"the dense model of this Transformers cannot: {error}")


def score(model: nn.Module, sequences: Tensor, prompt: int) -> Tensor:
    """Sum of the log-probabilities of what follows the prompt: float32 [B]."""
    with torch.no_grad():
        log_p = model(sequences).logits.log_softmax(-1)
    return log_p[:, prompt - 1 : -1].gather(-1, sequences[:, prompt:, None])[..., 0].sum(-1)


@pytest.mark.parametrize("family", GENERATING)
@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"cache_implementation": "static"}], ids=str)
def test_greedy_equals_full_forward_passes(family: str, options: dict[str, Any]) -> None:
    # Tied embeddings would make random models repeat the last token, whatever came before.
    model = mixture(family, tie_word_embeddings=False)
    ids = token_ids(2, 6)
    skip_what_the_host_cannot(family, options)
    expected = greedy(model, ids)
    assert len(expected[:, 6:].unique()) > 2
    assert torch.equal(generate(model, ids, **options), expected)


@pytest.mark.parametrize("name", ["eager", "grouped_mm", "batched_mm"])
def test_every_experts_implementation_generates_the_same(model: Any, name: str) -> None:
    ids = token_ids(2, 6)
    expected = greedy(model, ids)
    model.set_experts_implementation(name)
    assert torch.equal(generate(model, ids), expected)
    assert model.config._experts_implementation == name


@pytest.mark.parametrize("family", GENERATING)
def test_batched_left_padding_equals_single_prompts(family: str) -> None:
    model = mixture(family, tie_word_embeddings=False)
    prompts = [token_ids(1, length, seed=length) for length in (3, 5, 9)]
    ids = torch.cat([nn.functional.pad(prompt, (9 - prompt.shape[1], 0)) for prompt in prompts])
    together = generate(model, ids, attention_mask=(ids != 0).long())
    for row, prompt in zip(together, prompts, strict=True):
        assert torch.equal(row[9:], greedy(model, prompt)[0, prompt.shape[1] :])


def test_beam_search_scores_what_it_returns(model: Any) -> None:
    ids = token_ids(2, 6)
    output = generate(model, ids, num_beams=4, num_return_sequences=4, return_dict_in_generate=True, output_scores=True)
    scores = output.sequences_scores.view(2, 4)
    torch.testing.assert_close(scores.flatten() * NEW, score(model, output.sequences, 6), rtol=1e-4, atol=1e-4)
    assert (scores.diff(dim=1) <= 1e-6).all()
    uncached = generate(model, ids, num_beams=4, num_return_sequences=4, use_cache=False)
    assert torch.equal(output.sequences, uncached)
    assert (output.sequences.view(2, 4, -1)[:, 0] != output.sequences.view(2, 4, -1)[:, 1]).any()
    best = score(model, output.sequences, 6).view(2, 4)[:, 0]
    assert (best >= score(model, greedy(model, ids), 6) - 1e-4).all()


def test_sampling_follows_its_seed(model: Any) -> None:
    ids = token_ids(2, 6)
    drawn = []
    for seed, options in ((3, {}), (3, {}), (4, {}), (3, {"use_cache": False})):
        torch.manual_seed(seed)
        drawn.append(generate(model, ids, do_sample=True, top_k=0, temperature=1.3, **options))
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[3])
    assert not torch.equal(drawn[0], drawn[2])


def test_prompt_lookup_equals_greedy(model: Any) -> None:
    ids = token_ids(1, 4).repeat(1, 4)
    expected = greedy(model, ids, steps=12)
    actual = generate(model, ids, prompt_lookup_num_tokens=3, max_new_tokens=12)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("assistant", ["itself", "another mixture"])
def test_assisted_decoding_equals_greedy(model: Any, assistant: str) -> None:
    guesser = mixture() if assistant == "itself" else mixture(seed=7, num_hidden_layers=1)
    ids = token_ids(1, 6)
    calls: list[int] = []
    hook = model.register_forward_hook(lambda *_: calls.append(1))
    actual = generate(model, ids, assistant_model=guesser, max_new_tokens=12)
    hook.remove()
    assert torch.equal(actual, greedy(model, ids, steps=12))
    # A right guess saves a pass of the model itself.
    assert len(calls) < 12 if assistant == "itself" else len(calls) <= 13


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_continuous_batching_equals_greedy(model: Any, attention: str) -> None:
    model.set_attn_implementation(attention)
    prompts = [token_ids(1, length, seed=length)[0].tolist() for length in (3, 7, 5)]
    config = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0)
    small = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=32)
    results = model.generate_batch(
        prompts, generation_config=config, continuous_batching_config=small, progress_bar=False
    )
    assert len(results) == 3
    by_prompt = {tuple(result.prompt_ids): result.generated_tokens for result in results.values()}
    model.set_attn_implementation(attention)
    for prompt in prompts:
        expected = greedy(model, torch.tensor([prompt]))[0, len(prompt) :]
        assert by_prompt[tuple(prompt)] == expected.tolist()


def test_the_text_pipeline_generates_what_the_model_does(model: Any) -> None:
    tokenizer = tiny_tokenizer()
    assert len(tokenizer) <= VOCAB
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    texts = ["the quick fox", "and the lazy dog sleeps"]
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
    results = generator(texts, batch_size=2, return_full_text=False, **options)
    for text, [result] in zip(texts, results, strict=True):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        expected = greedy(model, ids)[0, ids.shape[1] :]
        assert result["generated_text"] == tokenizer.decode(expected, skip_special_tokens=True)


def test_generation_returns_scores_and_hidden_states(model: Any) -> None:
    ids = token_ids(2, 6)
    output = generate(
        model, ids, return_dict_in_generate=True, output_logits=True, output_hidden_states=True, max_new_tokens=3
    )
    with torch.no_grad():
        full = model(output.sequences).logits
    for step, logits in enumerate(output.logits):
        torch.testing.assert_close(logits, full[:, 5 + step], rtol=1e-4, atol=1e-5)
    assert len(output.hidden_states) == 3
    assert [states[-1].shape[1] for states in output.hidden_states] == [6, 1, 1]


def test_generation_with_router_logits_switched_on(model: Any) -> None:
    ids = token_ids(2, 6)
    expected = greedy(model, ids)
    model.config.output_router_logits = True
    assert torch.equal(generate(model, ids), expected)


def test_generating_in_training_mode_keeps_the_mode(model: Any) -> None:
    expected = greedy(model, token_ids())
    model.train()
    assert torch.equal(generate(model, token_ids()), expected)
    assert model.training


def test_inputs_embeds_can_prompt(model: Any) -> None:
    ids = token_ids(2, 6)
    embeds = model.get_input_embeddings()(ids)
    actual = model.generate(inputs_embeds=embeds, do_sample=False, max_new_tokens=NEW, eos_token_id=None)
    assert torch.equal(actual, greedy(model, ids)[:, 6:])


def test_generation_stops_at_the_end_token(model: Any) -> None:
    ids = token_ids(1, 6)
    expected = greedy(model, ids)[0, 6:].tolist()
    stop = expected[3]
    actual = generate(model, ids, eos_token_id=stop)[0, 6:].tolist()
    assert actual == expected[: expected.index(stop) + 1]
