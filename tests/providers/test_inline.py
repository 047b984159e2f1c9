"""A file inside an answer: decoded strictly, and never more of it than may be."""

import base64
import hashlib
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from providers.inline import Inline
from providers.media import MediaFault, Received


def fetched(text: str, most: int = 10_000_000) -> tuple[bytes, Received]:
    into = io.BytesIO()
    received = Inline(text, host="gateway.example").fetch(into, most)
    return into.getvalue(), received


@given(
    st.binary(max_size=20_000), st.sampled_from(["", "data:image/jpeg;base64,", "data:audio/ogg; codecs=opus;base64,"])
)
def test_what_was_encoded_comes_out(content: bytes, prefix: str) -> None:
    found, received = fetched(prefix.replace(" ", "") + base64.b64encode(content).decode())

    assert found == content
    assert (received.size, received.digest) == (len(content), hashlib.sha256(content).digest())
    assert received.head == content[:8192]


def test_a_large_one_is_decoded_in_pieces() -> None:
    content = bytes(range(256)) * 20_000

    assert fetched(base64.b64encode(content).decode())[0] == content


@pytest.mark.parametrize(
    "text",
    ["abc", "ab!d", "abcdÿ===", "ab=dabcd", "data:image/jpeg;base64", "data:text/html,<b>", "abcd\nabcd\n\n\n", "===="],
)
def test_what_is_not_base64_is_refused(text: str) -> None:
    with pytest.raises(MediaFault) as refused:
        fetched(text)

    assert refused.value.code == "encoded"


def test_padding_in_the_middle_is_refused() -> None:
    with pytest.raises(MediaFault, match="encoded"):
        fetched("YQ==" + "A" * 2 * 1024 * 1024)


def test_the_limit_is_the_decoded_size_and_nothing_beyond_is_decoded() -> None:
    text = base64.b64encode(bytes(1000)).decode()
    into = io.BytesIO()

    assert fetched(text, 1000)[1].size == 1000
    with pytest.raises(MediaFault) as refused:
        Inline(text, host="gateway.example").fetch(into, 999)
    assert (refused.value.code, refused.value.is_final, into.getvalue()) == ("too_large", True, b"")
