# SPDX-License-Identifier: Apache-2.0
"""Prompts to states: the prompt's layout, the encoder's exact maths, and the cache that makes it needed once."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from pidecode.encoders import text as prompts
from pidecode.encoders.text import (
    PromptEmbedsCache,
    TextEncoder,
    TextOptions,
    load_prompt_embeds,
    prompt_length,
    select_positions,
)
from pidecode.errors import DownloadError, FileError, SettingError

GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "text_select.safetensors"
CAP = 2.0
WIDTH = 32


def golden_cases():
    with safe_open(GOLDEN, "pt") as file:
        for block in json.loads(file.metadata()["config"])["blocks"]:
            for case in block["args"]["cases"]:
                stem = f"outputs.{block['name']}.{case['name']}"
                yield case, file.get_tensor(f"{stem}.indices"), file.get_tensor(f"{stem}.mask")


@pytest.mark.parametrize(
    ("case", "indices", "mask"), list(golden_cases()), ids=lambda v: v["name"] if isinstance(v, dict) else ""
)
def test_kept_positions_are_the_reference_ones(case, indices, mask):
    positions = select_positions(case["num_chi_tokens"], case["model_max_length"])
    assert positions == indices.tolist()
    total = prompt_length(case["num_chi_tokens"], case["model_max_length"])
    for row, tokens in zip(mask, case["total_tokens"], strict=True):
        assert [int(p < min(tokens, total)) for p in positions] == row.tolist()


@pytest.mark.parametrize("bad", [(-1, 300), (5, 0)])
def test_impossible_prompts_are_refused(bad):
    with pytest.raises(SettingError):
        select_positions(*bad)


def test_texts_are_shipped_byte_for_byte():
    digests = {name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in
               {"chi": prompts.instruction(), "negative": prompts.default_negative_prompt()}.items()}  # fmt: skip
    assert digests == {"chi": "62b9ab89eebb0ac5", "negative": "3fbcee537cdf9114"}
    assert prompts.instruction().endswith("User Prompt: ")


@pytest.fixture(scope="session")
def gemma_folder(tmp_path_factory):
    """A random Gemma-2 of the real class, 2 layers deep, with a character tokenizer built on the spot."""
    from tokenizers import Tokenizer, decoders, models, processors
    from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("gemma")
    vocab = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3}
    for code in range(32, 127):
        vocab[chr(code)] = len(vocab)
    vocab["\n"] = len(vocab)
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    backend.decoder = decoders.Fuse()
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side="left",
    ).save_pretrained(folder)
    config = Gemma2Config(
        vocab_size=len(vocab), hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8, sliding_window=4096,
        max_position_embeddings=8192, attn_logit_softcapping=CAP,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.4)  # strong enough for soft-capping to show
    model.save_pretrained(folder)
    return folder


def options_for(folder, **changes):
    return replace(TextOptions(model=str(folder), instruction="Enhance: ", length=12, dtype="float32"), **changes)


def reference_states(folder, ids, n_real, cap):
    """Gemma-2's decoder written out once more: what the encoder must compute whatever the library's version."""
    from safetensors.torch import load_file

    w = {name.removeprefix("model."): value for name, value in load_file(folder / "model.safetensors").items()}
    heads, groups, dim, n = 4, 2, 8, len(ids)

    def norm(x, weight):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + weight)

    def rotate(x):
        angle = torch.arange(n)[:, None] * (10000.0 ** (-torch.arange(0, dim, 2) / dim))[None]
        cos, sin = (torch.cat([f(angle)] * 2, -1) for f in (torch.cos, torch.sin))
        return x * cos + torch.cat([-x[..., dim // 2 :], x[..., : dim // 2]], -1) * sin

    allowed = torch.ones(n, n).tril().bool() & (torch.arange(n) < n_real)[None]
    x = w["embed_tokens.weight"][torch.tensor(ids)] * WIDTH**0.5
    for i in range(2):
        p = f"layers.{i}."
        h = norm(x, w[p + "input_layernorm.weight"])
        q, k, v = ((h @ w[f"{p}self_attn.{c}_proj.weight"].T).view(n, -1, dim).transpose(0, 1) for c in "qkv")
        k, v = (t.repeat_interleave(heads // groups, 0) for t in (rotate(k), v))
        logits = rotate(q) @ k.transpose(1, 2) / dim**0.5
        if cap:
            logits = cap * torch.tanh(logits / cap)
        attended = logits.masked_fill(~allowed, float("-inf")).softmax(-1) @ v
        h = attended.transpose(0, 1).reshape(n, -1) @ w[p + "self_attn.o_proj.weight"].T
        x = x + norm(h, w[p + "post_attention_layernorm.weight"])
        h = norm(x, w[p + "pre_feedforward_layernorm.weight"])
        gate = torch.nn.functional.gelu(h @ w[p + "mlp.gate_proj.weight"].T, approximate="tanh")
        h = (gate * (h @ w[p + "mlp.up_proj.weight"].T)) @ w[p + "mlp.down_proj.weight"].T
        x = x + norm(h, w[p + "post_feedforward_layernorm.weight"])
    return norm(x, w["norm.weight"])


def character_ids(text):
    return [2, *(ord(c) - 32 + 4 for c in text)]


@pytest.mark.parametrize("soft_capping", [False, True])
@pytest.mark.parametrize("prompt", ["a cat", "", "a very long prompt that is cut"])
def test_states_do_not_depend_on_the_librarys_defaults(gemma_folder, prompt, soft_capping):
    """Fails when attention, soft-capping, the mask or padding changes under us in a new transformers."""
    encoder = TextEncoder(options_for(gemma_folder, soft_capping=soft_capping))
    got = encoder.encode(prompt)
    n_instruction = 1 + len("Enhance: ")
    total = n_instruction + 12 - 2
    ids = character_ids("Enhance: " + prompt)[:total]
    padded = ids + [0] * (total - len(ids))
    expected = reference_states(gemma_folder, padded, len(ids), CAP if soft_capping else None)
    other = reference_states(gemma_folder, padded, len(ids), None if soft_capping else CAP)
    kept = [0, *range(total - 11, total)]
    assert got.shape == (1, 12, WIDTH)
    torch.testing.assert_close(got[0], expected[kept], atol=2e-4, rtol=1e-4)
    assert (got[0] - other[kept]).abs().max() > 0.05  # the choice is visible, so the check above can tell


def test_capping_is_off_by_default():
    assert TextOptions().soft_capping is False
    assert TextOptions().dtype == "bfloat16"
    assert TextOptions().length == 300


def test_tokenizer_keeps_its_padding_side(gemma_folder):
    encoder = TextEncoder(options_for(gemma_folder))
    encoder.encode("a cat")
    assert encoder._tokenizer.padding_side == "left"


def test_without_instruction(gemma_folder):
    encoder = TextEncoder(options_for(gemma_folder, instruction=""))
    ids = character_ids("a cat")
    expected = reference_states(gemma_folder, ids + [0] * (12 - len(ids)), len(ids), None)
    torch.testing.assert_close(encoder.encode("a cat")[0], expected, atol=2e-4, rtol=1e-4)


def test_a_batch_is_its_prompts_one_by_one(gemma_folder):
    encoder = TextEncoder(options_for(gemma_folder, dtype="bfloat16"))
    both = encoder.encode(["a cat", "two dogs"])
    assert both.dtype == torch.bfloat16
    assert torch.equal(both[1:], encoder.encode("two dogs"))


def test_the_encoder_is_needed_once(gemma_folder, tmp_path):
    states = PromptEmbedsCache(tmp_path / "cache")
    first = TextEncoder(options_for(gemma_folder), states=states)
    computed = first.encode(["a cat", ""])
    again = TextEncoder(options_for(gemma_folder), states=PromptEmbedsCache(tmp_path / "cache"))
    assert torch.equal(again.encode(["a cat", ""]), computed)
    assert not again.loaded
    assert first.loaded
    first.unload()
    assert not first.loaded
    assert torch.equal(first.encode("a cat")[0], computed[0])
    assert not list((tmp_path / "cache").glob("*.part"))


@pytest.mark.parametrize(
    "change", [{"instruction": "Paint: "}, {"soft_capping": True}, {"length": 11}, {"dtype": "bfloat16"}]
)
def test_other_options_are_other_entries(gemma_folder, tmp_path, change):
    states = PromptEmbedsCache(tmp_path)
    base, other = options_for(gemma_folder), options_for(gemma_folder, **change)
    states.put("a cat", base.identity(), torch.zeros(12, WIDTH))
    assert states.get("a cat", other.identity()) is None
    assert states.get("a dog", base.identity()) is None
    assert states.get("a cat", base.identity()) is not None


def test_a_hub_model_is_named_by_id_and_revision():
    assert TextOptions().identity() == TextOptions().identity()
    assert TextOptions(revision="abc").identity() != TextOptions().identity()
    assert TextOptions(model="google/gemma-2-2b-it").identity() != TextOptions().identity()


def test_a_changed_or_copied_folder(gemma_folder, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in gemma_folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert options_for(copy).identity() == options_for(gemma_folder).identity()
    tokenizer = copy / "tokenizer_config.json"
    tokenizer.write_text(tokenizer.read_text() + " ")
    assert options_for(copy).identity() != options_for(gemma_folder).identity()


def test_cache_entries_travel_as_files(tmp_path):
    identity = TextOptions().identity()
    here, there = PromptEmbedsCache(tmp_path / "here"), PromptEmbedsCache(tmp_path / "there")
    for seed, prompt in enumerate(["a cat", "ein Kätzchen", ""]):
        here.put(prompt, identity, torch.full((4, 8), float(seed)).bfloat16())
    assert here.export_to(tmp_path / "all.safetensors") == 3
    assert here.export_to(tmp_path / "one.safetensors", ["ein Kätzchen"]) == 1
    assert there.import_from(tmp_path / "all.safetensors") == 3
    found = there.get("ein Kätzchen", identity)
    assert torch.equal(found, torch.full((4, 8), 1.0).bfloat16())
    assert load_prompt_embeds(tmp_path / "one.safetensors", length=4, width=8).shape == (1, 4, 8)
    with pytest.raises(FileError, match="exists"):
        here.export_to(tmp_path / "all.safetensors")
    with pytest.raises(SettingError, match="'a dog'"):
        here.export_to(tmp_path / "none.safetensors", ["a dog"])
    with pytest.raises(SettingError, match="encode some first"):
        PromptEmbedsCache(tmp_path / "empty").export_to(tmp_path / "none.safetensors")


def test_damaged_entries(tmp_path):
    identity = TextOptions().identity()
    states = PromptEmbedsCache(tmp_path / "cache")
    path = states.put("a cat", identity, torch.zeros(4, 8))
    path.write_bytes(path.read_bytes()[:-3])
    assert states.get("a cat", identity) is None
    with pytest.raises(FileError, match="truncated"):
        states.import_from(path)
    save_file({"x": torch.zeros(4, 8)}, tmp_path / "plain.safetensors")
    with pytest.raises(FileError, match="does not say which prompt"):
        states.import_from(tmp_path / "plain.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "odd.safetensors", metadata={"pidecode_prompts": '{"entries": [{}]}'})
    with pytest.raises(FileError, match="wrongly"):
        states.import_from(tmp_path / "odd.safetensors")
    states.put("a cat", identity, torch.zeros(4, 8))
    assert states.get("a cat", identity) is not None


def test_cache_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FileError, match="could not be written"):
        PromptEmbedsCache(tmp_path / "file" / "cache").put("a", {}, torch.zeros(1, 1))


def test_default_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("PIDECODE_CACHE", str(tmp_path))
    assert PromptEmbedsCache().folder == tmp_path / "prompts"
    monkeypatch.delenv("PIDECODE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert PromptEmbedsCache().folder == tmp_path / "x" / "pidecode" / "prompts"


def test_ready_made_states(tmp_path):
    good = torch.randn(2, 300, 2304).bfloat16()
    assert load_prompt_embeds(good) is good
    assert load_prompt_embeds(good[0]).shape == (1, 300, 2304)
    save_file({"anything": good}, tmp_path / "states.safetensors")
    assert torch.equal(load_prompt_embeds(tmp_path / "states.safetensors"), good)
    with pytest.raises(SettingError, match="never trim"):
        load_prompt_embeds(good[:, :12])
    with pytest.raises(SettingError, match="never trim"):
        load_prompt_embeds(torch.zeros(1, 300, 2304, dtype=torch.int64))
    with pytest.raises(SettingError, match="NaN"):
        load_prompt_embeds(torch.full((1, 300, 2304), float("nan")))
    save_file({"a": good, "b": good.clone()}, tmp_path / "two.safetensors")
    with pytest.raises(FileError, match="holds 2 tensors"):
        load_prompt_embeds(tmp_path / "two.safetensors")
    with pytest.raises(FileError, match="does not exist"):
        load_prompt_embeds(tmp_path / "missing.safetensors")


def test_missing_model_names_the_command(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DownloadError, match="hf download nobody/has-this --revision v1"):
        TextEncoder(TextOptions(model="nobody/has-this", revision="v1")).encode("a cat")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DownloadError, match="no complete Gemma-2 folder"):
        TextEncoder(TextOptions(model=str(tmp_path / "empty"))).encode("a cat")


def test_another_kind_of_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(FileError, match="'bert'"):
        TextEncoder(TextOptions(model=str(tmp_path))).encode("a cat")


@pytest.mark.parametrize("prompt", [3, None, ["a", 3], []])
def test_prompts_must_be_text(prompt):
    with pytest.raises(SettingError):
        TextEncoder().encode(prompt)


@pytest.mark.parametrize("change", [{"dtype": "int8"}, {"length": 1}])
def test_options_are_checked(change):
    with pytest.raises(SettingError):
        TextOptions(**change)
