"""The OpenAPI 3.1 document, from the table of routes and the pydantic models."""

from __future__ import annotations

import http
from typing import Any

from pydantic.json_schema import models_json_schema

from yunque import __version__
from yunque.serving.routes import OPERATIONS, Operation
from yunque.serving.schemas import ErrorBody
from yunque.serving.service import Service
from yunque.serving.settings import ServerSettings

_REFERENCE = "#/components/schemas/"


def document(service: Service) -> dict[str, Any]:
    """The document of this server, with its own limits."""
    shown = [operation for operation in OPERATIONS if operation.access != "admin" or service.admin_keys]
    models: list[Any] = [ErrorBody]
    for operation in shown:
        models += [model for model in (operation.takes, operation.gives) if model is not None]
    _, definitions = models_json_schema(
        [(model, "validation") for model in dict.fromkeys(models)], ref_template=_REFERENCE + "{model}"
    )
    schemas = definitions["$defs"]
    _set_limits(schemas, service.settings)
    _set_names(schemas, service)
    paths: dict[str, Any] = {}
    for operation in shown:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _operation(operation, service)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "yunque", "version": __version__,
            "description": "Exported language models, OpenAI-compatible and plain.",
        },
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {name: {"type": "http", "scheme": "bearer"} for name in ("key", "admin")},
        },
    }  # fmt: skip


def _operation(operation: Operation, service: Service) -> dict[str, Any]:
    described: dict[str, Any] = {
        "summary": (operation.handler.__doc__ or "").strip(),
        "operationId": operation.handler.__name__,
        "responses": _responses(operation),
    }
    if operation.takes is not None:
        described["requestBody"] = {"required": True, "content": {"application/json": {"schema": _of(operation.takes)}}}
    if "{model}" in operation.path:
        described["parameters"] = [
            {"name": "model", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        ]
    needs_key = operation.access == "key" or (operation.access == "metrics" and service.settings.protect_metrics)
    if operation.access == "admin":
        described["security"] = [{"admin": []}]
    elif needs_key and service.api_keys:
        described["security"] = [{"key": []}]
    return described


def _responses(operation: Operation) -> dict[str, Any]:
    if operation.gives is None:
        content: dict[str, Any] = {"text/plain": {"schema": {"type": "string"}}}
    else:
        content = {"application/json": {"schema": _of(operation.gives)}}
    if operation.streams:
        content["text/event-stream"] = {}  # events of OpenAI's form, for which OpenAPI 3.1 has no words
    responses = {"200": {"description": "OK", "content": content}}
    for status, model in operation.otherwise:
        responses[str(status)] = {
            "description": _phrase(status), "content": {"application/json": {"schema": _of(model)}}
        }  # fmt: skip
    for status in sorted(operation.errors):
        responses[str(status)] = {
            "description": _phrase(status), "content": {"application/json": {"schema": _of(ErrorBody)}}
        }  # fmt: skip
        if status in (429, 503):
            responses[str(status)]["headers"] = {
                "Retry-After": {"description": "Seconds", "schema": {"type": "integer"}}
            }
    return responses


def _of(model: type) -> dict[str, str]:
    return {"$ref": _REFERENCE + model.__name__}


def _phrase(status: int) -> str:
    return http.HTTPStatus(status).phrase


def _set_names(schemas: dict[str, Any], service: Service) -> None:
    """Write which models there are."""
    served = [service.registry.get(name) for name in service.registry.names]
    generators = [each.name for each in served if each.generates]
    for model, names in (
        ("CompletionRequest", generators),
        ("ChatRequest", generators),
        ("GenerateRequest", generators),
        ("ClassifyRequest", [each.name for each in served if not each.generates]),
    ):
        described = schemas[model]["properties"]["model"]
        for variant in described.get("anyOf", [described]):
            if names and variant.get("type") == "string":
                variant["enum"] = names
                variant.pop("maxLength"), variant.pop("minLength")


def _set_limits(schemas: dict[str, Any], settings: ServerSettings) -> None:
    """Write the limits of this server beside those of the types."""
    for model, field, limit in (
        ("CompletionRequest", "max_tokens", settings.max_new_tokens),
        ("ChatRequest", "max_tokens", settings.max_new_tokens),
        ("ChatRequest", "max_completion_tokens", settings.max_new_tokens),
        ("GenerateRequest", "max_new_tokens", settings.max_new_tokens),
        ("GenerateRequest", "min_new_tokens", settings.max_new_tokens),
        ("CompletionRequest", "n", settings.max_choices),
        ("ChatRequest", "n", settings.max_choices),
    ):
        described = schemas[model]["properties"][field]
        for variant in described.get("anyOf", [described]):
            if variant.get("type") == "integer":
                variant["maximum"] = limit
