"""The OpenAPI 3.1 document, made of the route table: it cannot drift from what is routed."""

from __future__ import annotations

from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

import msgspec

from sandrun import __version__
from sandrun.api.problems import Problem
from sandrun.api.routes import Body, Call

EVERYWHERE = (421, 503)
"""What every call may answer: the Host header is not ours, or not now."""


def document(calls: Sequence[Call], extra_types: Sequence[Any] = ()) -> dict[str, Any]:
    """The whole document. `extra_types` are put among the schemas though no body is one: frames of streams."""
    types = [Problem, *extra_types]
    for call in calls:
        for body in (*call.body, *(body for bodies in call.answers.values() for body in bodies)):
            if body.type is not None and body.type not in types:
                types.append(body.type)
    schemas, components = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    by_type = dict(zip(types, schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for call in calls:
        path = call.path.replace(":output}", "}")
        paths.setdefault(path, {})[call.method.lower()] = _operation(call, by_type)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Sandrun",
            "version": __version__,
            "description": "Runs untrusted code: a tarball or a program in, logs, outputs and a verdict out.",
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "servers": [{"url": "/"}],
        "paths": paths,
        "components": {"schemas": components},
    }


def _operation(call: Call, types: dict[Any, dict[str, Any]]) -> dict[str, Any]:
    operation: dict[str, Any] = {"operationId": call.name, "summary": call.about}
    if call.parameters:
        operation["parameters"] = [
            {
                "name": parameter.name,
                "in": parameter.where,
                "required": parameter.where == "path",
                "description": parameter.about,
                "schema": parameter.schema,
            }
            for parameter in call.parameters
        ]
    if call.body:
        operation["requestBody"] = {"required": True, "content": _content(call.body, types)}
    responses: dict[str, Any] = {}
    for status, bodies in call.answers.items():
        responses[str(status)] = {"description": HTTPStatus(status).phrase}
        if bodies:
            responses[str(status)]["content"] = _content(bodies, types)
    problem = {"application/json": {"schema": types[Problem]}}
    for status in (*call.problems, *EVERYWHERE):
        answer: dict[str, Any] = {"description": HTTPStatus(status).phrase, "content": problem}
        if status in (429, 503):
            answer["headers"] = {"Retry-After": {"description": "Seconds", "schema": {"type": "integer"}}}
        responses.setdefault(str(status), answer)
    operation["responses"] = responses
    return operation


def _content(bodies: Sequence[Body], types: dict[Any, dict[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for body in bodies:
        schema = body.schema if body.type is None else types[body.type]
        content[body.kind] = {"schema": {**(schema or {}), "description": body.about} if body.about else schema or {}}
    return content
