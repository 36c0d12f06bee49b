"""Reading and checking of uploads: multipart forms, raw audio, and the JSON of the audio-classification task.

FastAPI's own form parameters are not used, for two reasons. They would read a body before the key is checked, so that
strangers could fill the memory. And every error must be a problem document. Recordings are bytes in the request: no
path or URL is ever opened.
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

from serve.problems import ServiceError, invalid_fields
from serve.schema import TaskInput, TaskParameters

_MAX_FIELDS = 32
_MAX_FIELD_BYTES = 64 * 1024
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
    """The media type of the header Content-Type in lower case, without parameters; empty where it is missing."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def read_form(request: Request, model: type[Fields], max_files: int) -> tuple[list[Upload], Fields]:
    """The recordings (at least one) in the parts ``file`` of a multipart form, and its other fields as a ``model``.

    Refuses other content types, broken forms, too many files, and wrong fields.
    """
    if content_type(request) != "multipart/form-data":
        raise ServiceError(
            "unsupported_media_type", "send the recording as multipart/form-data, in the field file (curl -F file=@...)"
        )
    await _check_form(request, max_files)
    try:
        # one file more than allowed may be read, to distinguish too many files from a broken form
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
                    raise invalid(key, "given twice; send it once")
                fields[key] = value
            elif key == "file":
                parts.append(value)
            else:
                raise invalid(key, "this field takes no file; send recordings in the field file")
        if len(parts) > max_files:
            raise _too_many(max_files)
        if "file" in fields:
            raise invalid("file", "got text; send the recording as a file (curl -F file=@speech.wav)")
        if not parts:
            raise invalid("file", "missing; send one or more recordings")
        options = validated(model, fields)
        return [Upload(part.filename or None, await part.read()) for part in parts], options
    finally:
        await form.close()


async def _check_form(request: Request, max_files: int) -> None:
    """Refuse forms whose parsing would block the process for long.

    Such forms contain the boundary between parts very often, or name a character set that Python decodes slowly.
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
    """The recording and the parameters of the audio-classification task, from raw audio or JSON with base64.

    Refuses other content types, broken JSON or base64, and wrong fields.
    """
    kind = content_type(request)
    if kind == "application/json":
        body = await request.body()
        if body.count(b",") >= _MAX_FIELDS:  # base64 has no commas; checked before parsing makes as many objects
            raise invalid("body", "too many fields; send inputs, and parameters with top_k and function_to_apply")
        try:
            task = TaskInput.model_validate_json(body)
        except ValidationError as error:
            raise _invalid_fields(error) from None
        try:
            return Upload(None, _decoded(task.inputs)), task.parameters or TaskParameters()
        except (binascii.Error, ValueError):
            raise invalid("inputs", "neither base64 nor a data URL with base64 (data:audio/wav;base64,...)") from None
    if kind and not kind.startswith(_RAW_TYPES):
        raise ServiceError(
            "unsupported_media_type",
            "send the recording's bytes (application/octet-stream or audio/...), or JSON with base64 in inputs",
        )
    return Upload(None, await request.body()), TaskParameters()


def _decoded(text: str) -> bytes:
    """The bytes of base64 text; line breaks, the URL-safe alphabet, missing padding and data URLs are accepted."""
    if text[:5].lower() == "data:":
        head, comma, text = text.partition(",")
        if not comma or not head.lower().rstrip().endswith(";base64"):
            raise ValueError("a data URL without base64")
        text = unquote(text)
    text = text.translate(_SPACE_AND_ALPHABET).rstrip("=")
    return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)


def check_query(request: Request) -> None:
    """Refuse query parameters that the endpoint does not have; they would be ignored."""
    known = {parameter.alias for parameter in request.scope["route"].dependant.query_params}
    for name in request.query_params:
        if name not in known:
            where = "send options as form fields" if request.method == "POST" else "leave it out"
            raise invalid(name, f"not a query parameter of this endpoint; {where}")


def validated(model: type[Fields], fields: dict[str, str]) -> Fields:
    """The fields of a form as a ``model``; unknown fields and values that are not allowed are refused."""
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        raise _invalid_fields(error) from None


def _invalid_fields(error: ValidationError) -> ServiceError:
    return invalid_fields(
        (".".join(part for part in map(str, item["loc"]) if part.isidentifier()) or "body", item["msg"])
        for item in error.errors(include_url=False, include_context=False, include_input=False)
    )


def invalid(field: str, message: str) -> ServiceError:
    """The error for one wrong field."""
    return invalid_fields([(field, message)])


def _too_many(max_files: int) -> ServiceError:
    return ServiceError("too_many_files", f"a request may hold {max_files} recordings; send the rest in another one")
