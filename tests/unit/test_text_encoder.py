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
    export_prompt_embeds,
    load_prompt_embeds,
    prompt_length,
    prompt_states,
    select_positions,
    select_prompt_embeds,
)
from pidecode.errors import DownloadError, FileError, PidecodeError, SettingError
from tiny_models import save_gemma

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


def test_texts_are_shipped_byte_for_byte():
    digests = {name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in
               {"chi": prompts.instruction(), "negative": prompts.default_negative_prompt()}.items()}  # fmt: skip
    assert digests == {"chi": "62b9ab89eebb0ac5", "negative": "3fbcee537cdf9114"}
    assert prompts.instruction().endswith("User Prompt: ")


@pytest.fixture(scope="session")
def gemma_folder(tmp_path_factory):
    return save_gemma(tmp_path_factory.mktemp("gemma"), WIDTH, CAP)


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


@pytest.mark.parametrize("prompt", ["a cat", "", "a very long prompt that is cut"])
def test_states_do_not_depend_on_the_librarys_defaults(gemma_folder, prompt):
    """Fails when attention, soft-capping, the mask or padding changes under us in a new transformers."""
    encoder = TextEncoder(options_for(gemma_folder))
    got = encoder.encode(prompt)
    n_instruction = 1 + len("Enhance: ")
    total = n_instruction + 12 - 2
    ids = character_ids("Enhance: " + prompt)[:total]
    padded = ids + [0] * (total - len(ids))
    expected = reference_states(gemma_folder, padded, len(ids), None)
    other = reference_states(gemma_folder, padded, len(ids), CAP)
    kept = [0, *range(total - 11, total)]
    assert got.shape == (1, 12, WIDTH)
    torch.testing.assert_close(got[0], expected[kept], atol=2e-4, rtol=1e-4)
    assert (got[0] - other[kept]).abs().max() > 0.05  # the choice is visible, so the check above can tell


def test_released_networks_read_300_rows_in_bfloat16():
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
    assert again._model is None
    assert first._model is not None
    first.unload()
    assert first._model is None
    assert torch.equal(first.encode("a cat")[0], computed[0])
    assert not list((tmp_path / "cache").glob("*.part"))


@pytest.mark.parametrize("change", [{"instruction": "Paint: "}, {"length": 11}, {"dtype": "bfloat16"}])
def test_other_options_are_other_entries(gemma_folder, tmp_path, change):
    states = PromptEmbedsCache(tmp_path)
    base, other = options_for(gemma_folder), options_for(gemma_folder, **change)
    states.put("a cat", base.identity(), torch.zeros(12, WIDTH))
    assert states.get("a cat", other.identity()) is None
    assert states.get("a dog", base.identity()) is None
    assert states.get("a cat", base.identity()) is not None


def test_a_hub_model_is_named_by_id_and_revision():
    assert TextOptions().identity() == TextOptions().identity()
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


def filled(folder, length=12, width=WIDTH):
    """A cache that has three prompts of the default encoder, and an encoder that could not load its model."""
    cache = PromptEmbedsCache(folder)
    encoder = TextEncoder(TextOptions(model="nobody/has-this"), states=cache)
    for seed, prompt in enumerate(["a cat", "ein Kätzchen", ""]):
        states = torch.full((length, width), float(seed)).bfloat16()
        cache.put(prompt, encoder.options.identity(), states)
    return cache, encoder


def test_states_travel_as_files(tmp_path):
    _, encoder = filled(tmp_path / "here")
    there, identity = PromptEmbedsCache(tmp_path / "there"), encoder.options.identity()
    every = ["a cat", "ein Kätzchen", "", "a cat"]
    assert export_prompt_embeds(tmp_path / "all.safetensors", every, encoder) == 3
    assert export_prompt_embeds(tmp_path / "one.safetensors", ["ein Kätzchen"], encoder) == 1
    assert there.import_from(tmp_path / "all.safetensors") == 3
    assert torch.equal(there.get("ein Kätzchen", identity), torch.full((12, WIDTH), 1.0).bfloat16())
    own = TextOptions().identity()
    assert there.get("", own) is None
    there.import_from(tmp_path / "all.safetensors", own)
    assert there.get("", own) is not None
    assert load_prompt_embeds(tmp_path / "one.safetensors", length=12, width=WIDTH).shape == (1, 12, WIDTH)
    with pytest.raises(FileError, match="exists"):
        export_prompt_embeds(tmp_path / "all.safetensors", every, encoder)
    with pytest.raises(FileError, match=r"must end in \.safetensors"):
        export_prompt_embeds(tmp_path / "all.pt", every, encoder)
    with pytest.raises(SettingError, match="A prompt must be a text"):
        export_prompt_embeds(tmp_path / "none.safetensors", [], encoder)
    with pytest.raises(DownloadError, match="captions export"):
        export_prompt_embeds(tmp_path / "none.safetensors", ["a dog"], encoder)


def test_a_file_gives_each_image_the_states_of_its_prompt(tmp_path):
    _, encoder = filled(tmp_path / "here")
    file, single, plain = (tmp_path / f"{name}.safetensors" for name in ("all", "one", "plain"))
    export_prompt_embeds(file, ["a cat", "ein Kätzchen", ""], encoder)
    export_prompt_embeds(single, ["a cat"], encoder)
    save_file({"x": torch.stack([torch.zeros(12, WIDTH), torch.ones(12, WIDTH)])}, plain)
    shape = {"length": 12, "width": WIDTH}

    def chosen(path, prompts):
        states, names = select_prompt_embeds(path, prompts, **shape)
        return states[:, 0, 0].tolist(), names

    assert chosen(file, ["ein Kätzchen", None]) == ([1.0, 2.0], ("ein Kätzchen", ""))
    assert chosen(single, ["a dog", None]) == ([0.0, 0.0], ("a cat", "a cat"))
    assert chosen(plain, ["a dog", None]) == ([0.0, 1.0], None)
    with pytest.raises(SettingError, match="no states of the prompt 'a dog'; it holds 'a cat', 'ein Kätzchen', ''"):
        chosen(file, ["a dog"])
    with pytest.raises(SettingError, match="states for 2 images, and there are 3"):
        chosen(plain, [None] * 3)
    # A teacher's negative prompt is taken from the file if it is there by name, and encoded otherwise.
    found = prompt_states(encoder, [""], file, exact=True, need="", **shape)
    assert found[0, 0, 0] == 2.0
    assert prompt_states(encoder, ["ein Kätzchen"], single, exact=True, need="", **shape)[0, 0, 0] == 1.0


def comfyui_file(folder, path, *, fp8=False, tokenizer=True):
    """The folder's model as one file, named as ComfyUI names it, with a SentencePiece model of its characters."""
    import sentencepiece
    from safetensors.torch import load_file

    weights = dict(load_file(folder / "model.safetensors"))
    if fp8:
        for name in [name for name in weights if name.endswith("_proj.weight")]:
            scale = weights[name].abs().amax() / 448
            weights[name] = (weights[name] / scale).to(torch.float8_e4m3fn)
            weights[name.removesuffix("weight") + "scale_weight"] = scale
        weights["scaled_fp8"] = torch.zeros(2).to(torch.float8_e4m3fn)
    if tokenizer:
        stem = path.with_suffix("")
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(["a b", *map(chr, range(33, 127))]), model_prefix=str(stem), model_type="char",
            vocab_size=100, character_coverage=1.0, pad_id=0, eos_id=1, bos_id=2, unk_id=3, add_dummy_prefix=False,
            normalization_rule_name="identity", remove_extra_whitespaces=False, hard_vocab_limit=False,
            minloglevel=2,
        )  # fmt: skip
        weights["spiece_model"] = torch.tensor(list(stem.with_suffix(".model").read_bytes()), dtype=torch.uint8)
    save_file(weights, path)
    return path


@pytest.fixture(scope="module")
def gemma_2b_folder(tmp_path_factory, gemma_folder):
    """Heads as the 2b model has them: eight, four of keys and values."""
    import shutil

    from transformers import Gemma2Config, Gemma2ForCausalLM

    folder = tmp_path_factory.mktemp("gemma2b")
    shutil.copytree(gemma_folder, folder, dirs_exist_ok=True)
    config = Gemma2Config.from_pretrained(gemma_folder)
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 8, 4, 4
    config.query_pre_attn_scalar, config.attn_logit_softcapping = 4, 50.0
    torch.manual_seed(0)
    Gemma2ForCausalLM(config).save_pretrained(folder)
    return folder


def test_a_single_file_of_comfyui(tmp_path, gemma_2b_folder):
    def states(model, **changes):
        return TextEncoder(options_for(model, **changes)).encode("cat, dog")

    for name in ("tokenizer.json", "tokenizer_config.json"):  # beside the file, where it has none inside
        (tmp_path / name).write_bytes((gemma_2b_folder / name).read_bytes())
    file = comfyui_file(gemma_2b_folder, tmp_path / "gemma.safetensors", tokenizer=False)
    wanted = states(gemma_2b_folder)
    assert torch.equal(states(file), wanted)
    assert torch.equal(states(file, dtype="bfloat16"), states(gemma_2b_folder, dtype="bfloat16"))
    rounded = states(comfyui_file(gemma_2b_folder, tmp_path / "fp8.safetensors", fp8=True, tokenizer=False))
    assert 0.001 < float((rounded - wanted).norm() / wanted.norm()) < 0.05
    identities = [options_for(model).identity()["model"] for model in (file, gemma_2b_folder)]
    assert identities[0].startswith("file:") and identities[0] != identities[1]


def test_the_tokenizer_inside_a_file(tmp_path, gemma_2b_folder):
    file = comfyui_file(gemma_2b_folder, tmp_path / "gemma.safetensors")
    encoder = TextEncoder(options_for(file))
    assert encoder.encode("cat, dog").shape == (1, 12, WIDTH)
    ids, mask = encoder._tokenize("ab")
    pieces = encoder._tokenizer._pieces
    assert [pieces.id_to_piece(int(one)) for one in ids[0, :12]] == ["<s>", *"Enhance:", "▁", *"ab"]
    assert (ids[0, 12:] == 0).all() and mask.sum() == 12


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layers.0.mlp.up_proj.comfy_quant": torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)}, "NVFP4"),
        ({"model.layers.0.mlp.up_proj.weight": torch.zeros(48, WIDTH, dtype=torch.int8)}, "int8"),
        ({"model.layers.1.mlp.up_proj.weight": torch.zeros(3, WIDTH)}, "is no Gemma-2-2b: layers.1.mlp.up_proj.weight"),
        ({"model.embed_tokens.weight": torch.zeros(3)}, "it has none of its layers"),
    ],
)
def test_files_that_are_no_readable_gemma(tmp_path, gemma_2b_folder, change, words):
    from safetensors.torch import load_file

    path = tmp_path / "gemma.safetensors"
    save_file(load_file(gemma_2b_folder / "model.safetensors") | change, path)
    with pytest.raises(PidecodeError, match=words):
        TextEncoder(options_for(path)).encode("a")


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
    for entries in ([], [{}], [{"prompt": "a", "identity": 3}], [{"prompt": ["a"], "identity": {}}], 7):
        about = {"pidecode_prompts": json.dumps({"entries": entries})}
        save_file({"states.0": torch.zeros(4, 8)}, tmp_path / "odd.safetensors", metadata=about)
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
    with pytest.raises(DownloadError, match="hf download nobody/has-this"):
        TextEncoder(TextOptions(model="nobody/has-this")).encode("a cat")
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
