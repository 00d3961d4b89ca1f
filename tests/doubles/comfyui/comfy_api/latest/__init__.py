# SPDX-License-Identifier: Apache-2.0
"""Schema, inputs and outputs of the node API, checking what the real ones check."""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import SimpleNamespace
from typing import Any


class _Field:
    def __init__(self, kind: str, id: str | None = None, **settings: Any) -> None:
        self.io_type, self.id, self.settings = kind, id, settings
        self.optional = bool(settings.get("optional"))


# Keywords of each kind of input beyond id, display_name, optional, tooltip and lazy.
_WIDGET = {"default", "socketless", "force_input"}
_KINDS = {
    "INT": _WIDGET | {"min", "max", "step", "control_after_generate", "display_mode"},
    "FLOAT": _WIDGET | {"min", "max", "step", "round", "display_mode"},
    "STRING": _WIDGET | {"multiline", "placeholder", "dynamic_prompts"},
    "COMBO": _WIDGET | {"options", "control_after_generate", "upload", "image_folder", "remote"},
}


def _type(kind: str) -> Any:
    allowed = _KINDS.get(kind, set()) | {"display_name", "optional", "tooltip", "lazy", "extra_dict"}

    def make_input(id: str, **settings: Any) -> _Field:
        unknown = set(settings) - allowed
        if unknown:
            raise TypeError(f"{kind} input {id}: unexpected {unknown}")
        return _Field(kind, id, **settings)

    def make_output(id: str | None = None, display_name: str | None = None, **settings: Any) -> _Field:
        return _Field(kind, id, display_name=display_name, **settings)

    return SimpleNamespace(io_type=kind, Input=make_input, Output=make_output)


class Schema:
    """A node's schema; ids must be unique."""

    def __init__(
        self,
        node_id: str,
        display_name: str | None = None,
        category: str = "sd",
        inputs: list[_Field] | None = None,
        outputs: list[_Field] | None = None,
        description: str = "",
        is_output_node: bool = False,
    ) -> None:
        self.node_id, self.display_name, self.category, self.description = node_id, display_name, category, description
        self.inputs, self.outputs, self.is_output_node = inputs or [], outputs or [], is_output_node
        ids = [field.id for field in self.inputs] + [field.id for field in self.outputs if field.id]
        if len(set(ids)) != len(ids):
            raise ValueError(f"Ids must be unique: {ids}")


class NodeOutput:
    """What a node returns."""

    def __init__(self, *args: Any, ui: Any = None) -> None:
        self.args, self.ui = args, ui

    @property
    def result(self) -> tuple[Any, ...] | None:
        return self.args or None


class ComfyNode(ABC):
    """Base of all nodes."""

    @classmethod
    @abstractmethod
    def define_schema(cls) -> Schema: ...

    @classmethod
    def GET_SCHEMA(cls) -> Schema:  # noqa: N802 - its published name
        return cls.define_schema()


class ComfyExtension(ABC):
    """Base of all extensions."""

    @abstractmethod
    async def get_node_list(self) -> list[type[ComfyNode]]: ...


io = SimpleNamespace(
    ComfyNode=ComfyNode, NodeOutput=NodeOutput, Schema=Schema, Custom=_type, Int=_type("INT"), Float=_type("FLOAT"),
    String=_type("STRING"), Combo=_type("COMBO"), Image=_type("IMAGE"), Latent=_type("LATENT"), Model=_type("MODEL"),
    Conditioning=_type("CONDITIONING"), Sigmas=_type("SIGMAS"), Vae=_type("VAE"), Mask=_type("MASK"),
)  # fmt: skip
