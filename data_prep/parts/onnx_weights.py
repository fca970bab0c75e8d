"""Weights and graph names of an ONNX file, read from its protobuf wire format (no onnx package needed).

Source: onnx.proto3 of the ONNX specification; the field numbers below are its.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

GRAPH = 7  # ModelProto.graph
NODE, INITIALIZER = 1, 5  # GraphProto
INPUT, NODE_NAME, OP_TYPE = 1, 3, 4  # NodeProto
DIMS, DATA_TYPE, TENSOR_NAME, RAW_DATA = 1, 2, 8, 9  # TensorProto
DTYPES = {1: np.float32, 6: np.int32, 7: np.int64, 10: np.float16, 11: np.float64}

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True)
class Node:
    """One operator: its type, its name (a module path in exported torch models) and its input names."""

    op: str
    name: str
    inputs: tuple[str, ...]


def read(file: Path) -> tuple[dict[str, np.ndarray], list[Node]]:
    """Initialisers by name, and the nodes in graph order.

    Raises:
        ValueError: not an ONNX file with raw little-endian tensors of a known type.
    """
    try:
        return _read_model(memoryview(np.memmap(file, mode="r").data))
    except (IndexError, KeyError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not a readable ONNX file ({type(error).__name__}: {error})") from error


def _read_model(view: memoryview) -> tuple[dict[str, np.ndarray], list[Node]]:
    tensors: dict[str, np.ndarray] = {}
    nodes: list[Node] = []
    for field, graph in _fields(view):
        if field != GRAPH:
            continue
        for field, message in _fields(graph):
            if field == INITIALIZER:
                name, array = _tensor(message)
                tensors[name] = array
            elif field == NODE:
                nodes.append(_node(message))
    return tensors, nodes


def _varint(view: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = view[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def _fields(view: memoryview) -> Iterator[tuple[int, Any]]:
    """(field number, value) of every field of one message: an int, or a view of a nested message or a string."""
    at = 0
    while at < len(view):
        key, at = _varint(view, at)
        wire = key & 7
        value: int | memoryview
        if wire == VARINT:
            value, at = _varint(view, at)
        elif wire == BYTES:
            length, at = _varint(view, at)
            value, at = view[at : at + length], at + length
        elif wire in (FIXED64, FIXED32):
            length = 8 if wire == FIXED64 else 4
            value, at = view[at : at + length], at + length
        else:
            raise KeyError(f"wire type {wire}")
        yield key >> 3, value


def _text(value: memoryview) -> str:
    return bytes(value).decode()


def _tensor(message: memoryview) -> tuple[str, np.ndarray]:
    dims: list[int] = []
    dtype = raw = None
    name = ""
    for field, value in _fields(message):
        if field == DIMS and isinstance(value, int):
            dims.append(value)
        elif field == DIMS:  # packed
            at = 0
            while at < len(value):
                dim, at = _varint(value, at)
                dims.append(dim)
        elif field == DATA_TYPE:
            dtype = DTYPES[value]
        elif field == TENSOR_NAME:
            name = _text(value)
        elif field == RAW_DATA:
            raw = bytes(value)
    if raw is None:
        raise KeyError(f"tensor {name!r} without raw data")
    return name, np.frombuffer(raw, np.dtype(dtype).newbyteorder("<")).reshape(dims)


def _node(message: memoryview) -> Node:
    op = name = ""
    inputs: list[str] = []
    for field, value in _fields(message):
        if field == OP_TYPE:
            op = _text(value)
        elif field == NODE_NAME:
            name = _text(value)
        elif field == INPUT:
            inputs.append(_text(value))
    return Node(op, name, tuple(inputs))
