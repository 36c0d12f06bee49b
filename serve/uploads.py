"""Requests in: multipart forms, raw audio and the JSON of the audio-classification task, read and checked by hand.

By hand, because a framework that reads the body before it asks who is calling lets strangers fill the memory, and
because every mistake shall be told as a problem of ours. Recordings come as bytes only: neither paths nor addresses
are ever opened.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from typing import TypeVar
from urllib.parse import unquote

from fastapi import Request
from pydantic import BaseModel, ValidationError
from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from serve.problems import ServiceError
from serve.schema import FieldError, TaskInput, TaskParameters

_MAX_FIELDS = 32
_MAX_FIELD_BYTES = 64 * 1024
_MAX_NAME = 64  # characters of a field's name that are told back
_CHARSETS = {"utf-8", "utf8", "us-ascii", "ascii", "iso-8859-1", "latin-1"}
_SPACE_AND_ALPHABET = str.maketrans({" ": None, "\t": None, "\r": None, "\n": None, "-": "+", "_": "/"})
_RAW_TYPES = ("application/octet-stream", "audio/", "video/")
Fields = TypeVar("Fields", bound=BaseModel)


@dataclass(frozen=True)
class Upload:
    """A recording as sent: its file name (None where it has none) and its bytes."""

    name: str | None
    data: bytes


def content_type(request: Request) -> str:
    """The media type alone, lower case; empty when none was sent."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def read_form(request: Request, model: type[Fields], max_files: int) -> tuple[list[Upload], Fields]:
    """The recordings in the parts ``file`` of a multipart form, one at least, and its other fields as a ``model``.

    Raises:
        ServiceError: another content type, a broken form, too many files, or a wrong field.
    """
    if content_type(request) != "multipart/form-data":
        raise ServiceError(
            "unsupported_media_type", "send the recording as multipart/form-data, in the field file (curl -F file=@...)"
        )
    await _check_form(request, max_files)
    try:
        # one file more than allowed is read, to tell too many from broken
        form = await request.form(max_files=max_files + 1, max_fields=_MAX_FIELDS, max_part_size=_MAX_FIELD_BYTES)
    except HTTPException as error:
        told = str(error.detail)
        if "Too many files" in told:
            raise _too_many(max_files) from None
        if "Too many fields" in told:
            raise invalid("body", f"a form may hold {_MAX_FIELDS} fields beside its recordings") from None
        if "maximum size" in told:
            size = f"a field may hold {_MAX_FIELD_BYTES // 1024} KiB of text; recordings need a file name in their part"
            raise invalid("body", size) from None
        raise ServiceError("bad_request", "the multipart form is broken; let a library or curl -F build it") from None
    try:
        fields: dict[str, str] = {}
        parts: list[UploadFile] = []
        for key, value in form.multi_items():
            if isinstance(value, str):
                if key in fields:
                    raise invalid(key, "given twice")
                fields[key] = value
            elif key == "file":
                parts.append(value)
            else:
                raise invalid(key, "a file in a field that takes none; recordings go into file")
        if len(parts) > max_files:
            raise _too_many(max_files)
        if "file" in fields:
            raise invalid("file", "text instead of a recording; send it as a file (curl -F file=@speech.wav)")
        if not parts:
            raise invalid("file", "missing; send one recording or more")
        options = validated(model, fields)
        return [Upload(part.filename or None, await part.read()) for part in parts], options
    finally:
        await form.close()


async def _check_form(request: Request, max_files: int) -> None:
    """Refuse forms that would take long to read, and the whole process with them: it reads them in one piece.

    They hold the parts' border again and again, in a recording, or name a character set that Python decodes slowly.
    """
    options = parse_options_header(request.headers["content-type"])[1]
    charset = options.get(b"charset", b"utf-8").decode("latin-1")
    if charset.lower() not in _CHARSETS:
        raise ServiceError("unsupported_media_type", "the form's charset must be utf-8; leave it out")
    border = b"\r\n--" + options.get(b"boundary", b"")
    if (await request.body()).count(border) > max_files + 1 + _MAX_FIELDS:
        detail = f"a form may hold {max_files} recordings and {_MAX_FIELDS} fields; this one has more parts"
        raise ServiceError("too_many_files", detail)


async def read_task(request: Request) -> tuple[Upload, TaskParameters]:
    """The recording and parameters of the audio-classification task: raw audio, or JSON with base64.

    Raises:
        ServiceError: another content type, broken JSON or base64, or a wrong field.
    """
    kind = content_type(request)
    if kind == "application/json":
        body = await request.body()
        if body.count(b",") >= _MAX_FIELDS:  # base64 has none; told before it is parsed into as many objects, or errors
            raise invalid(
                "body", "more fields than the task has: inputs, and parameters of top_k and function_to_apply"
            )
        try:
            task = TaskInput.model_validate_json(body)
        except ValidationError as error:
            raise _invalid_fields(error) from None
        try:
            return Upload(None, _decoded(task.inputs)), task.parameters or TaskParameters()
        except (binascii.Error, ValueError):
            raise invalid("inputs", "not base64, nor a data URL of it (data:audio/wav;base64,...)") from None
    if kind and not kind.startswith(_RAW_TYPES):
        raise ServiceError(
            "unsupported_media_type",
            "send the recording's bytes (application/octet-stream or audio/...), or JSON with base64 in inputs",
        )
    return Upload(None, await request.body()), TaskParameters()


def _decoded(text: str) -> bytes:
    """Base64 as people send it: in lines, in the alphabet for addresses, without its padding, or as a data URL.

    Raises:
        ValueError: it is none.
    """
    if text[:5].lower() == "data:":
        head, comma, text = text.partition(",")
        if not comma or not head.lower().rstrip().endswith(";base64"):
            raise ValueError("a data URL of something else")
        text = unquote(text)
    text = text.translate(_SPACE_AND_ALPHABET).rstrip("=")
    return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)


def check_query(request: Request) -> None:
    """Refuse parameters in the address that an endpoint does not have, for they would do nothing.

    Raises:
        ServiceError: there is one.
    """
    known = {parameter.alias for parameter in request.scope["route"].dependant.query_params}
    for name in request.query_params:
        if name not in known:
            where = "options go into the form" if request.method == "POST" else "leave it out"
            raise invalid(name, f"no parameter of this address; {where}")


def validated(model: type[Fields], fields: dict[str, str]) -> Fields:
    """Form fields as a ``model``.

    Raises:
        ServiceError: an unknown field or a value out of range.
    """
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        raise _invalid_fields(error) from None


def _invalid_fields(error: ValidationError) -> ServiceError:
    errors = [
        _field_error(".".join(part for part in map(str, item["loc"]) if part.isidentifier()) or "body", item["msg"])
        for item in error.errors(include_url=False, include_context=False, include_input=False)
    ]
    told = "; ".join(f"{item.field}: {item.message}" for item in errors[:3])
    return ServiceError("invalid_request", told, errors=errors)


def invalid(field: str, message: str) -> ServiceError:
    """The error of one field."""
    error = _field_error(field, message)
    return ServiceError("invalid_request", f"{error.field}: {message}", errors=[error])


def _field_error(field: str, message: str) -> FieldError:
    return FieldError(field=field if len(field) <= _MAX_NAME else field[: _MAX_NAME - 3] + "...", message=message)


def _too_many(max_files: int) -> ServiceError:
    return ServiceError("too_many_files", f"a request may hold {max_files} recordings; send the rest in another one")
