# SPDX-License-Identifier: Apache-2.0
"""Gemma-2 text encoder: prompt to text states, kept in a disk cache or a file of one's own.

The networks read 300 rows, padding included (docs/architecture.md, Text): every detail here, the instruction in front,
the length padded to, the rows kept, plain attention, is part of the released models' input format.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pidecode.devices import empty_cache
from pidecode.errors import DownloadError, FileError, MissingDependencyError, PidecodeError, SettingError
from pidecode.files import cache_folder, check_writable
from pidecode.registry.checkpoints import TEXT_ENCODER
from pidecode.strict_json import parse_json
from pidecode.weights.read import dequantized
from pidecode.weights.safetensors import read_safetensors, write_safetensors


def instruction() -> str:
    """The fixed text every prompt is appended to, from PixelDiT and Sana (Apache-2.0); ends in a space."""
    return _asset("chi_prompt.txt")


def default_negative_prompt() -> str:
    """The undistilled networks' prompt for what an image should not be, from PixelDiT (Apache-2.0)."""
    return _asset("negative_prompt.txt")


def _asset(name: str) -> str:
    return (resources.files("pidecode") / "assets" / name).read_bytes().decode("utf-8")


def prompt_length(n_instruction: int, model_max_length: int = 300) -> int:
    """Tokens that instruction (0 for none, else counted with its BOS) and prompt together are cut or padded to.

    The two missing ones: BOS is counted in both, and the instruction's last space joins the prompt's first word.
    """
    return n_instruction + model_max_length - 2 if n_instruction else model_max_length


def select_positions(n_instruction: int, model_max_length: int = 300) -> list[int]:
    """Positions of the padded prompt whose states are kept: the first (BOS) and the last `model_max_length - 1`."""
    total = prompt_length(n_instruction, model_max_length)
    return [0, *range(total - model_max_length + 1, total)]


@dataclass(frozen=True, slots=True, kw_only=True)
class TextOptions:
    """How prompts become states; a different value anywhere gives different states, and other cache entries."""

    # A hub id, a local folder with a Gemma-2 and its tokenizer, or a single .safetensors file of ComfyUI's
    model: str = TEXT_ENCODER
    instruction: str = field(default_factory=instruction)
    length: int = 300  # rows of the result
    dtype: str = "bfloat16"  # number format the encoder runs in: bfloat16, float16 or float32

    def __post_init__(self) -> None:
        if self.dtype not in ("bfloat16", "float16", "float32"):
            raise SettingError(f"dtype is {self.dtype!r}; the text encoder runs in bfloat16, float16 or float32.")
        if self.length < 2:
            raise SettingError(f"length is {self.length}; at least BOS and one more row are kept.")

    def identity(self) -> dict[str, Any]:
        """Everything that decides the states besides the prompt, as plain values.

        A hub model is named by its id, a local folder or file by a fingerprint, so that a copy elsewhere finds the same
        cache entries.
        """
        values = {**asdict(self), "revision": None, "soft_capping": False}  # as in the entries of earlier versions
        values["instruction"] = hashlib.sha256(self.instruction.encode()).hexdigest()
        place = Path(os.path.expanduser(self.model))
        if os.path.exists(place):
            whole, names = os.path.isdir(place), (".json", ".safetensors", ".model", ".bin")
            found = [path for path in sorted(place.iterdir()) if path.suffix in names] if whole else [place]
            files = [path for path in found if os.path.isfile(path)]
            digest = hashlib.sha256()  # of the small files' content, and the weights' names and sizes and first bytes
            for path in files:
                size = path.stat().st_size
                digest.update(f"{path.name if len(files) > 1 else ''}\0{size}\0".encode())
                with open(path, "rb") as file:
                    digest.update(file.read(None if size < 1 << 26 else 1 << 22))
            values["model"] = f"{'folder' if whole else 'file'}:{digest.hexdigest()}"
        return values


class TextEncoder:
    """Gemma-2 as the networks' text encoder (docs/architecture.md, Text), loaded when first needed.

    Nothing is downloaded here: `pidecode pull` does that, after showing the license.

    Args:
        options: Which model, and how it is run.
        device: Where it runs; results are returned there.
        states: Cache on disk; a prompt found in it needs no model. None computes every time.
    """

    def __init__(
        self,
        options: TextOptions | None = None,
        *,
        device: torch.device | str = "cpu",
        states: PromptEmbedsCache | None = None,
    ) -> None:
        self.options = options or TextOptions()
        self.device = torch.device(device)
        self.states = states
        self._model: Any = None
        self._tokenizer: Any = None
        self._n_instruction = 0  # tokens of the instruction with its BOS
        self._identity: dict[str, Any] | None = None

    def unload(self) -> None:
        """Give the model's memory back; the next unknown prompt loads it again."""
        self._model = self._tokenizer = None
        gc.collect()
        empty_cache(self.device)

    def encode(self, prompts: str | Sequence[str]) -> Tensor:
        """States `[batch, length, width]` of one prompt or several, in the encoder's number format.

        The empty prompt is one like any other. Each is run alone, so that its states do not depend on its neighbors.

        Raises:
            SettingError: It is not text.
            DownloadError: The model is not on this machine.
            MissingDependencyError: transformers is not installed.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        if not isinstance(prompts, Sequence) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise SettingError(f"A prompt must be a text (an empty one is), or several in a list; {prompts!r} came.")
        return torch.stack([self._states_of(prompt) for prompt in prompts])

    def encode_and_unload(self, prompts: str | Sequence[str], device: torch.device | None = None) -> Tensor:
        """States as of `encode`, on the CPU, by a model that is in memory only while it runs.

        Args:
            prompts: One or several.
            device: Where it runs; by default its own.
        """
        own = self.device
        if device is not None and device != own:
            self.unload()
            self.device = device
        try:
            return self.encode(prompts).cpu()
        finally:
            self.unload()
            self.device = own

    def _states_of(self, prompt: str) -> Tensor:
        if self.states is None:
            return self._compute(prompt)
        self._identity = self._identity or self.options.identity()
        found = self.states.get(prompt, self._identity)
        if found is None:
            found = self._compute(prompt)
            self.states.put(prompt, self._identity, found)
        return found.to(self.device)

    @torch.no_grad()
    def _compute(self, prompt: str) -> Tensor:
        if self._model is None:
            self._load()
        ids, mask = self._tokenize(prompt)
        states = self._model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[0]
        positions = select_positions(self._n_instruction, self.options.length)
        kept: Tensor = states[torch.tensor(positions, device=states.device)]
        if not torch.isfinite(kept).all():
            raise PidecodeError(
                f"The text encoder gave NaN or infinite states in {self.options.dtype} on {self.device}; "
                "use another number format (float32 always works)."
            )
        return kept

    def _tokenize(self, prompt: str) -> tuple[Tensor, Tensor]:
        """Token ids and mask `[1, n]` of instruction and prompt, cut and padded on the right."""
        total = prompt_length(self._n_instruction, self.options.length)
        ids = list(self._tokenizer(self.options.instruction + prompt)["input_ids"])[:total]
        if not ids or ids[0] != self._tokenizer.bos_token_id:
            raise FileError(f"The tokenizer of {self.options.model} does not begin with BOS; it is not Gemma-2's.")
        missing = total - len(ids)  # padded here, since the tokenizer may be shared by users of its other padding side
        padded = [ids + [self._tokenizer.pad_token_id] * missing]
        mask = [[1] * len(ids) + [0] * missing]
        return torch.tensor(padded, device=self.device), torch.tensor(mask, device=self.device)

    def _load(self) -> None:
        try:
            from transformers import AutoConfig, AutoTokenizer, Gemma2Model
        except ImportError as fault:
            raise MissingDependencyError(
                "Prompts need the text encoder's library (transformers); install it with "
                '`pip install "pidecode[text]"`, or pass ready-made prompt states.'
            ) from fault
        options, place = self.options, Path(os.path.expanduser(self.options.model))
        source = str(place) if os.path.exists(place) else options.model
        where: dict[str, Any] = {"revision": "main", "local_files_only": True}
        try:
            if os.path.isfile(place):
                model, tokenizer = _from_file(place, options)
            else:
                if os.path.isdir(place) and not os.path.isfile(place / "config.json"):  # else its name is looked at
                    raise DownloadError(f"{source} is no complete Gemma-2 folder: it has no config.json.")
                config = AutoConfig.from_pretrained(source, **where)
                if config.model_type != "gemma2":
                    raise FileError(
                        f"{options.model} is a {config.model_type!r} model; the networks take Gemma-2's states."
                    )
                # The official environment's attention left it out, and the released networks are used with that;
                # transformers from 5.23 on caps by default.
                config.attn_logit_softcapping = None
                tokenizer = AutoTokenizer.from_pretrained(source, **where)
                model = Gemma2Model.from_pretrained(
                    source, config=config, attn_implementation="eager", dtype=getattr(torch, options.dtype), **where
                )
        except (OSError, ValueError) as fault:  # the library raises both for what it cannot find or read
            first = (str(fault).splitlines() or [""])[0]
            if os.path.isdir(source):
                raise DownloadError(f"{source} is no complete Gemma-2 folder: {first[:200]}") from None
            raise DownloadError(
                f"The text encoder {source} is not on this machine. Fetch it with `hf download {source}` (`pidecode "
                "pull` does so too), or use ready-made states: `pidecode captions export` writes them where it is, "
                "and prompt_embeds= reads them."
            ) from None
        if tokenizer.pad_token_id is None or tokenizer.bos_token_id is None:
            raise FileError(f"The tokenizer of {options.model} has no BOS or padding token; it is not Gemma-2's.")
        # The library's defaults have changed before; what was asked for must be what runs.
        caps = {layer.self_attn.attn_logit_softcapping for layer in model.layers}
        chosen = model.config._attn_implementation
        if chosen != "eager" or caps != {None}:
            raise PidecodeError(
                f"This version of transformers runs Gemma-2 with {chosen!r} attention and soft-capping {caps}, "
                "not as asked; install a version that pidecode was tested with (4.57 or 5.x)."
            )
        self._model = model.to(self.device).requires_grad_(False).eval()
        self._tokenizer = tokenizer
        self._n_instruction = len(tokenizer(options.instruction)["input_ids"]) if options.instruction else 0


def _from_file(path: Path, options: TextOptions) -> tuple[Any, Any]:
    """Gemma-2-2b and its tokenizer from one .safetensors file as ComfyUI uses it, in bf16, fp16 or fp8."""
    from transformers import AutoTokenizer, Gemma2Config, Gemma2Model

    _, tensors = read_safetensors(path)
    pieces = tensors.pop("spiece_model", None)
    dtype = getattr(torch, options.dtype)
    weights = {name.removeprefix("model."): value for name, value in dequantized(tensors, dtype, path).items()}
    weights.pop("lm_head.weight", None)
    try:
        (vocabulary, width), first = weights["embed_tokens.weight"].shape, "layers.0."
        queries, inner = (weights[f"{first}{name}.weight"].shape[0] for name in ("self_attn.q_proj", "mlp.gate_proj"))
    except (KeyError, ValueError):
        raise FileError(
            f"{path} is no Gemma-2 text encoder: it has none of its layers. Give the file that ComfyUI loads with the "
            "CLIP type lumina2 or pixeldit."
        ) from None
    head = queries // 8  # the 2b model has 8 heads
    config = Gemma2Config(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=inner, num_attention_heads=8, head_dim=head,
        num_key_value_heads=4, query_pre_attn_scalar=head,
        num_hidden_layers=1 + max(int(name.split(".")[1]) for name in weights if name.startswith("layers.")),
    )  # fmt: skip
    config.attn_logit_softcapping = None
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Gemma2Model(config).state_dict().items()}
    wrong = [name for name in {**shapes, **weights} if shapes.get(name) != getattr(weights.get(name), "shape", None)]
    if wrong:
        raise FileError(f"{path} is no Gemma-2-2b: {wrong[0]} is missing, unknown or of another shape.")
    model = Gemma2Model.from_pretrained(
        None, config=config, state_dict=weights, attn_implementation="eager", dtype=dtype
    )
    if pieces is not None:
        return model, _SentencePieceTokenizer(bytes(pieces.tolist()), path)
    names = ("tokenizer.json", "tokenizer.model")
    beside = path.parent if any(os.path.isfile(path.parent / name) for name in names) else TEXT_ENCODER
    return model, AutoTokenizer.from_pretrained(str(beside), local_files_only=True)


class _SentencePieceTokenizer:
    """The tokenizer that lies in ComfyUI's file as bytes of a SentencePiece model."""

    def __init__(self, model: bytes, path: Path) -> None:
        try:
            import sentencepiece
        except ImportError as fault:
            raise MissingDependencyError(
                "Reading the tokenizer inside a text encoder's file needs sentencepiece; install it with "
                '`pip install "pidecode[text]"`.'
            ) from fault
        self._pieces = sentencepiece.SentencePieceProcessor()
        try:
            self._pieces.LoadFromSerializedProto(model)
        except RuntimeError:
            raise FileError(f"The tokenizer inside {path} is damaged; fetch the file again.") from None
        self.bos_token_id, self.pad_token_id = self._pieces.bos_id(), max(self._pieces.pad_id(), 0)

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [self.bos_token_id, *self._pieces.encode(text)]}


def load_prompt_embeds(source: Tensor | str | os.PathLike[str], *, length: int = 300, width: int = 2304) -> Tensor:
    """Ready-made prompt states as `[batch, length, width]`, from a tensor of that shape or of one prompt, or a file.

    A file is .safetensors: one written by `export_prompt_embeds`, or any with a single such tensor.

    Raises:
        SettingError: The shape or the values do not fit.
        FileError: The file cannot be read.
    """
    states = source if isinstance(source, Tensor) else torch.stack([entry.states for entry in _read_entries(source)])
    states = states[None] if states.ndim == 2 else states.flatten(0, 1) if states.ndim == 4 else states
    if states.ndim != 3 or tuple(states.shape[1:]) != (length, width) or not states.is_floating_point():
        raise SettingError(
            f"Prompt states of shape {tuple(states.shape)} and type {states.dtype} came; [batch, {length}, {width}] "
            "of floating-point values are expected. Rows at padding positions count: never trim them."
        )
    if not torch.isfinite(states).all():
        raise SettingError("The prompt states hold NaN or infinite values; compute them again.")
    return states


def select_prompt_embeds(
    path: str | os.PathLike[str], prompts: Sequence[str | None], *, length: int = 300, width: int = 2304
) -> tuple[Tensor, tuple[str, ...] | None]:
    """From a file, the states `[len(prompts), length, width]` of prompts; and the file's own names of these, or None.

    None is the empty prompt. A file with the states of one prompt gives those to all, whatever the prompts; one that
    does not name its prompts must have one for each image.

    Raises:
        SettingError: The file has no states of a prompt, or they do not fit.
        FileError: The file cannot be read.
    """
    entries = _read_entries(path)
    states = load_prompt_embeds(path, length=length, width=width)
    names = [entry.prompt for entry in entries]
    named = len(names) == len(states) and None not in names
    if len(states) == 1:
        chosen = [0] * len(prompts)
    elif named:
        missing = [prompt or "" for prompt in prompts if (prompt or "") not in names]
        if missing:
            held = ", ".join(f"{name!r:.40}" for name in names[:5]) + (", ..." if len(names) > 5 else "")
            raise SettingError(
                f"{path} has no states of the prompt {missing[0]!r:.60}; it holds {held}. Write them with `pidecode "
                "captions export`, or name one of these as the prompt."
            )
        chosen = [names.index(prompt or "") for prompt in prompts]
    elif len(states) == len(prompts):
        chosen = list(range(len(prompts)))
    else:
        raise SettingError(f"{path} has states for {len(states)} images, and there are {len(prompts)}.")
    return states[chosen], tuple(names[index] or "" for index in chosen) if named else None


def prompt_states(
    encoder: TextEncoder | None,
    prompts: Sequence[str | None],
    given: Tensor | str | os.PathLike[str] | None,
    *,
    need: str,
    exact: bool = False,
    length: int = 300,
    width: int = 2304,
) -> Tensor:
    """The states `[len(prompts), length, width]` of prompts: ready-made ones, else those of the text encoder.

    Ready-made are states for all images or for each, or a file of some (`select_prompt_embeds`), of which `exact` takes
    only those that it names by the very prompt. `need` begins the error where there are neither states nor encoder.

    Raises:
        SettingError: There are no states, or they do not fit.
        FileError: The file cannot be read.
    """
    if isinstance(given, Tensor):
        states = load_prompt_embeds(given, length=length, width=width)
        if len(states) not in (1, len(prompts)):
            raise SettingError(f"There are prompt_embeds for {len(states)} images, and {len(prompts)} latents.")
        return states.expand(len(prompts), -1, -1)
    if given is not None and (not exact or prompts[0] in [entry.prompt for entry in _read_entries(given)]):
        return select_prompt_embeds(given, prompts, length=length, width=width)[0]
    if encoder is None:
        raise SettingError(
            f"{need}.", python="Or pass text= to PixelDecoder(), or prompt_embeds=.",
            cli="Or give ready-made states: prompt_embeds=FILE.",
        )  # fmt: skip
    return encoder.encode([prompt or "" for prompt in prompts])


def export_prompt_embeds(
    path: str | os.PathLike[str], prompts: Sequence[str], encoder: TextEncoder, *, overwrite: bool = False
) -> int:
    """Write the states of prompts, each once, to one .safetensors file, and return how many there are.

    Raises:
        FileError: The file exists, has another suffix or cannot be written.
        SettingError: There is no prompt.
        DownloadError: The text encoder is not on this machine.
    """
    path = Path(path)
    if path.suffix.lower() != ".safetensors":
        raise FileError(f"{path} must end in .safetensors, the format that prompt states are written in.")
    check_writable(path, overwrite=overwrite)
    once = list(dict.fromkeys(prompts))
    states, identity = encoder.encode(once).cpu(), encoder.options.identity()
    _write_entries(path, [_Entry(one, prompt, identity) for one, prompt in zip(states, once, strict=True)])
    return len(once)


@dataclass(frozen=True, slots=True)
class _Entry:
    """States `[length, width]` of one prompt; other programs' files name neither prompt nor encoder."""

    states: Tensor
    prompt: str | None = None
    identity: Mapping[str, Any] | None = None


class PromptEmbedsCache:
    """Prompt states on disk: one .safetensors per prompt and encoder, in `folder`.

    The files hold the prompt as text. They may be copied between machines; several processes may share a folder.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = cache_folder() / "prompts" if folder is None else Path(os.path.expanduser(folder))

    def get(self, prompt: str, identity: Mapping[str, Any]) -> Tensor | None:
        """States of a prompt by the encoder of that identity, or None; a damaged entry counts as none."""
        path = self._path(prompt, identity)
        if not os.path.isfile(path):
            return None
        try:
            (entry,) = _read_entries(path)
        except (FileError, ValueError):
            return None
        return entry.states if (entry.prompt, entry.identity) == (prompt, identity) else None

    def put(self, prompt: str, identity: Mapping[str, Any], states: Tensor) -> Path:
        """Keep states `[length, width]`; a FileError says that the folder cannot be written."""
        path = self._path(prompt, identity)
        _write_entries(path, [_Entry(states, prompt, dict(identity))])
        return path

    def import_from(self, path: str | Path, identity: Mapping[str, Any] | None = None) -> int:
        """Take over the entries of an exported file, by default for the encoder that made them; returns their number.

        Raises:
            FileError: The file is damaged or was not written by `export_prompt_embeds`.
        """
        entries = _read_entries(path)
        for entry in entries:
            if entry.prompt is None or entry.identity is None:
                raise FileError(f"{path} does not say which prompt its states are of; export it from a cache.")
            if entry.states.ndim != 2 or not torch.isfinite(entry.states).all():
                raise FileError(f"{path} holds damaged states for {entry.prompt!r}; export it again.")
        for entry in entries:
            self.put(entry.prompt or "", identity or entry.identity or {}, entry.states)
        return len(entries)

    def _path(self, prompt: str, identity: Mapping[str, Any]) -> Path:
        key = json.dumps([prompt, dict(identity)], sort_keys=True, ensure_ascii=True)
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"


def _write_entries(path: Path, entries: Sequence[_Entry]) -> None:
    named = {f"states.{index}": entry.states for index, entry in enumerate(entries)}
    about = [{"prompt": entry.prompt, "identity": entry.identity} for entry in entries]
    metadata = {"format": "pt", "pidecode_prompts": json.dumps({"format": 1, "entries": about})}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        raise FileError(f"{path} could not be written: {fault}.") from fault
    write_safetensors(path, named, metadata, overwrite=True)


def _read_entries(path: str | os.PathLike[str]) -> list[_Entry]:
    header, tensors = read_safetensors(path)
    metadata = header.metadata
    if "pidecode_prompts" not in metadata:
        if len(tensors) != 1:
            raise FileError(f"{path} holds {len(tensors)} tensors; one, of prompt states, was expected.")
        return [_Entry(next(iter(tensors.values())))]
    try:
        about = parse_json(metadata["pidecode_prompts"])["entries"]
        found = [_Entry(tensors[f"states.{i}"], item["prompt"], item["identity"]) for i, item in enumerate(about)]
    except (ValueError, KeyError, TypeError):
        found = []
    if not found or not all(isinstance(one.prompt, str) and isinstance(one.identity, dict) for one in found):
        raise FileError(f"{path} describes its prompt states wrongly; export it again.")
    return found
