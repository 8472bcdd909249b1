"""Says where the bytes of a message are wrong, when the parser only says that they are.

Walks the wire format beside the message's descriptor: the first string that is no UTF-8, or the
first place where the bytes end too soon. For error messages alone; the parser decides what is a
message. https://protobuf.dev/programming-guides/encoding/
"""

from collections.abc import Iterator

from google.protobuf.descriptor import Descriptor, FieldDescriptor

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
_FIXED_BYTES = {_FIXED64: 8, _FIXED32: 4}
_MAX_VARINT_BYTES = 10
_MAX_DEPTH = 32


class _Malformed(Exception):
    """The bytes cannot be walked any further."""


def wire_fault(data: bytes, descriptor: Descriptor) -> tuple[str, str]:
    """Return (path of the field, what is wrong with it) for bytes that the parser refused."""
    try:
        for path, value in _strings(data, descriptor, "", 0):
            try:
                value.decode()
            except UnicodeDecodeError as error:
                return path, f"{len(value)} bytes that are no UTF-8 from byte {error.start} on"
    except _Malformed as error:
        return "request", f"{len(data)} bytes that are no message ({error})"
    return "request", f"{len(data)} bytes that are no message"


def _strings(
    data: bytes, descriptor: Descriptor, prefix: str, depth: int
) -> Iterator[tuple[str, bytes]]:
    """Yield the strings of a message and of those inside it, with their paths."""
    counts: dict[int, int] = {}  # field number -> entries so far
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        number, wire_type = key >> 3, key & 7
        if wire_type == _VARINT:
            _, position = _varint(data, position)
            continue
        length = _FIXED_BYTES.get(wire_type)
        if wire_type == _LENGTH:
            length, position = _varint(data, position)
        if length is None or number == 0:
            raise _Malformed(f"no field begins at byte {position - 1}")
        if position + length > len(data):
            raise _Malformed(f"field {number} ends {position + length - len(data)} bytes too soon")
        value, position = data[position : position + length], position + length
        field = descriptor.fields_by_number.get(number)
        if field is None or wire_type != _LENGTH:
            continue
        path = prefix + field.name
        # protobuf 5 has no `is_repeated`, and 7 no `label`.
        if isinstance(field.default_value, list):
            path += f"[{counts.get(number, 0)}]"
            counts[number] = counts.get(number, 0) + 1
        if field.type == FieldDescriptor.TYPE_STRING:
            yield path, value
        elif field.message_type is not None and depth < _MAX_DEPTH:
            yield from _strings(value, field.message_type, f"{path}.", depth + 1)


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """Return a varint and the position behind it."""
    value = 0
    for index, byte in enumerate(data[position : position + _MAX_VARINT_BYTES]):
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value, position + index + 1
    raise _Malformed(f"a number at byte {position} has no end")
