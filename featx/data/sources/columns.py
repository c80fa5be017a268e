"""The columns of a table: which has the images, which their paths, and which their classes."""

import json
import re
from contextlib import suppress
from typing import Any

from featx.errors import BadValueError, did_you_mean, either

# Columns that name images, the first of them that there is, after the ``path`` beside an image's bytes.
NAMES = ("path", "image_path", "file_path", "filepath", "file_name", "filename", "image_name",
         "__key__", "key", "image_id", "id")  # fmt: skip
LABELS = ("label", "labels", "class", "class_name", "category")  # that name classes, where the schema says nothing

Column = tuple[str, ...]  # its name, and that of a field in it


def image_column(schema: Any, where: str, column: str | None) -> str:
    """Return the column of images."""
    import pyarrow as pa

    def is_bytes(kind: Any) -> bool:
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        return any(getattr(pa.types, f"is_{name}", bool)(kind) for name in ("binary", "large_binary", "binary_view"))

    def can_be_images(name: str) -> bool:
        kind = kinds[name]
        inside = kind.get_field_index("bytes") if pa.types.is_struct(kind) else -1
        return is_bytes(kind) or (inside >= 0 and is_bytes(kind.field(inside).type))

    kinds = _kinds(schema)
    known = ", ".join(f"{field.name} ({field.type})" for field in schema)
    expected = "Expected a column of bytes, or of structs with bytes and path."
    if column is not None:
        if column not in kinds:
            near = did_you_mean(column, kinds)
            raise BadValueError(f"--data.column {column}: {where} has no such column.{near}\nIt has: {known}.")
        if not can_be_images(column):
            raise BadValueError(f"--data.column {column}: {kinds[column]}, not images. {expected}")
        return column
    found = list(filter(can_be_images, kinds))
    as_images = [name for name in found if features_of(schema).get(name, {}).get("_type") == "Image"]
    if len(found := as_images or found) == 1:
        return str(found[0])
    if found:
        raise BadValueError(
            f"--data.dir {where}: several columns can be images. Expected --data.column {either(found)}."
        )
    outside = " Files that a column only names are not read." if any(map(_is_text, kinds.values())) else ""
    raise BadValueError(f"--data.dir {where}: no column of images. {expected}{outside}\nIt has: {known}.")


def label_column(schema: Any) -> Column | None:
    """Return the column whose labels are classes: named as one of ``LABELS``, else the only one of Hugging Face's."""
    import pyarrow as pa

    features, kinds = features_of(schema), _kinds(schema)
    named = [name for name in kinds if features.get(name, {}).get("_type") == "ClassLabel"]
    usual = [name for name in LABELS if name in kinds]
    for name in [*usual, *(named if len(named) == 1 else [])]:
        kind = kinds[name]
        if _is_text(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind):
            return (name,)
    return None


def features_of(schema: Any) -> dict[str, Any]:
    """Return Hugging Face's types of the columns."""
    with suppress(ValueError, KeyError, TypeError, AttributeError):
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: about for name, about in features.items() if isinstance(about, dict)}
    return {}


def _kinds(schema: Any) -> dict[str, Any]:
    """Return the types of the columns whose names are theirs alone."""
    return {field.name: field.type for field in schema if schema.names.count(field.name) == 1}


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return any(getattr(pa.types, f"is_{name}", bool)(kind) for name in ("string", "large_string", "string_view"))


def values_of(batch: Any, column: Column) -> Any:
    """Return a column of a record batch, or a field of one."""
    values = batch.column(column[0])
    return values.field(column[1]) if column[1:] else values


def as_texts(values: Any) -> list[str | None]:
    """Return the values of a column as text; what is not UTF-8 has surrogates, as file names in Python do."""
    import pyarrow as pa

    found = values.cast(pa.large_string()).cast(pa.large_binary()).to_pylist()  # as bytes: they may not be UTF-8
    return [None if text is None else text.decode("utf-8", "surrogateescape") for text in found]


def clean(path: str | None) -> str:
    """Return a path as one below a folder: without a URL's scheme, the root, and dots."""
    path = re.sub(r"^[a-z][a-z0-9+.-]+:/+", "", (path or "").replace("\0", ""))
    return "/".join(part for part in path.split("/") if part not in ("", ".", ".."))


def path_columns(schema: Any, images: str) -> list[Column]:
    """Return the columns that may name images, the first choice first, for the column of images."""
    import pyarrow as pa

    kinds = _kinds(schema)
    kind = kinds[images]
    inside = pa.types.is_struct(kind) and kind.get_field_index("path") >= 0
    found: list[Column] = [(images, "path")] if inside else []
    return found + [
        (name,) for name in NAMES if name in kinds and (_is_text(kinds[name]) or pa.types.is_integer(kinds[name]))
    ]
