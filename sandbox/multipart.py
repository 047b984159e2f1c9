"""Reads `multipart/form-data` (RFC 7578), the form in which files are uploaded (whatsapp-cloud-api.md §12)."""

from email.message import Message
from email.parser import BytesHeaderParser
from typing import NamedTuple


class Part(NamedTuple):
    """One field; `content_type` is in lower case and without parameters, None when none was given."""

    data: memoryview
    filename: str | None
    content_type: str | None


def parts(body: bytes | bytearray, content_type: str) -> dict[str, Part] | None:
    """The fields by their names, the last one of a name; None when the body is no such form, or breaks off.

    `content_type` is the request's header. The data are views on the body.
    """
    header = Message()
    header["content-type"] = content_type
    boundary = header.get_boundary()
    if header.get_content_type() != "multipart/form-data" or not boundary:
        return None
    mark = b"--" + boundary.encode("latin-1", "replace")
    if not body.startswith(mark):
        return None
    found: dict[str, Part] = {}
    at = len(mark)
    view = memoryview(body)
    while body[at : at + 2] == b"\r\n":
        end_of_head = body.find(b"\r\n\r\n", at)
        end = body.find(b"\r\n" + mark, end_of_head)
        if end_of_head < 0 or end < 0:
            return None
        head = BytesHeaderParser().parsebytes(bytes(body[at + 2 : end_of_head + 4]))
        name = head.get_param("name", header="content-disposition")
        if not isinstance(name, str):
            return None
        found[name] = Part(
            view[end_of_head + 4 : end],
            head.get_filename(),
            head.get_content_type() if "content-type" in head else None,
        )
        at = end + 2 + len(mark)
    return found if body[at : at + 2] == b"--" else None
