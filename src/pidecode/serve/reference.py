# SPDX-License-Identifier: Apache-2.0
"""The server's own description as one page of plain HTML, made from its OpenAPI document and nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

Table = Mapping[str, Any]


def reference_page(document: Table) -> str:
    """Every operation with its parameters, body and answers, in the order they are defined."""
    info = document["info"]
    schemas = document.get("components", {}).get("schemas", {})
    operations = [
        _operation(method, path, operation, schemas)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    title = f"{escape(info['title'])} {escape(info['version'])}"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{title}</title></head><body><h1>{title}</h1><p>{escape(info.get('summary', ''))} "
        'The same for programs: <a href="openapi.json">openapi.json</a>.</p>' + "".join(operations) + "</body></html>"
    )


def _operation(method: str, path: str, operation: Table, schemas: Table) -> str:
    parts = [
        f"<hr><h2><code>{method.upper()} {escape(path)}</code></h2>",
        f"<p><strong>{escape(operation.get('summary', ''))}.</strong> {escape(operation.get('description', ''))}</p>",
    ]
    rows = [
        (entry["name"], _kind(entry["schema"]), entry.get("description", ""))
        for entry in operation.get("parameters", [])
    ]
    if rows:
        parts.append(_rows("Parameters, in the address", rows))
    body = operation.get("requestBody")
    if body:
        for kind, content in body["content"].items():
            fields = _resolve(content.get("schema", {}), schemas).get("properties", {})
            parts.append(f"<p>Body: <code>{escape(kind)}</code> {escape(body.get('description', ''))}</p>")
            if fields:
                parts.append(
                    _rows(
                        "Fields", [(name, _kind(field), field.get("description", "")) for name, field in fields.items()]
                    )
                )
    answers = [
        (status, ", ".join(answer.get("content", {})), answer.get("description", ""))
        for status, answer in operation["responses"].items()
    ]
    parts.append(_rows("Answers", answers))
    return "".join(parts)


def _rows(title: str, rows: list[tuple[str, str, str]]) -> str:
    cells = "".join(
        f"<tr><td><code>{escape(name)}</code></td><td>{escape(kind)}</td><td>{escape(words)}</td></tr>"
        for name, kind, words in rows
    )
    return f"<details><summary>{escape(title)}</summary><table>{cells}</table></details>"


def _resolve(schema: Table, schemas: Table) -> Table:
    reference = schema.get("$ref")
    found: Table = schemas.get(reference.rsplit("/", 1)[1], {}) if reference else schema
    return found


def _kind(schema: Table) -> str:
    """A schema in a few words: integer, 0 to 10; one of sde, ode."""
    for choice in schema.get("anyOf", ()):
        if choice.get("type") != "null":
            return _kind({**choice, "default": schema.get("default")})
    words = [
        f"one of {', '.join(str(value) for value in schema['enum'])}"
        if "enum" in schema
        else str(schema.get("type", "any"))
    ]
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is not None or high is not None:
        words.append(f"{'' if low is None else low} to {'' if high is None else high}".strip())
    if schema.get("default") is not None:
        words.append(f"{schema['default']} if left out")
    return ", ".join(words)
