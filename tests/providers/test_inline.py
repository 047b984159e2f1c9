"""A file inside an answer: decoded strictly, and never more of it than may be."""

import base64
import hashlib
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from providers.inline import Decoder
from providers.media import MediaFault, Received


def fetched(
    text: bytes, most: int = 10_000_000, *, step: int = 0, into: io.BytesIO | None = None
) -> tuple[bytes, Received]:
    into = into or io.BytesIO()
    decoder = Decoder(into, most)
    for at in range(0, len(text), step or len(text) or 1):
        decoder.feed(text[at : at + (step or len(text))])
    received = decoder.finished()
    return into.getvalue(), received


PREFIXES = {
    b"": None,
    b"data:image/jpeg;base64,": "image/jpeg",
    b"data:audio/ogg; codecs=opus;base64,": "audio/ogg",
    b"data:;base64,": None,
    b"DATA:Application/PDF;BASE64,": "application/pdf",
    b"data:undefined;base64,": None,
    b"data:null;base64,": None,
    b"data:undefined/;x;base64,": None,
    b"data:application/pdf;name=a%20b.pdf;base64,": "application/pdf",
    b"data:application/pdf;name=nota (1).pdf;base64,": "application/pdf",
    "data:image/png;name=ação.png;base64,".encode(): "image/png",
    b"data:" + b"x" * 243 + b";base64,": None,
}


@given(st.binary(max_size=2_000), st.sampled_from(list(PREFIXES)), st.integers(0, 50))
def test_what_was_encoded_comes_out_however_it_is_cut(content: bytes, prefix: bytes, step: int) -> None:
    found, received = fetched(prefix + base64.b64encode(content), step=step)

    assert found == content
    assert (received.size, received.digest) == (len(content), hashlib.sha256(content).digest())
    assert (received.head, received.content_type) == (content[:8192], PREFIXES[prefix])


def test_only_its_beginning_is_kept() -> None:
    content = bytes(range(256)) * 20_000

    found, received = fetched(base64.b64encode(content), step=65_537)

    assert found == content
    assert received.head == content[:8192]


@pytest.mark.parametrize("step", [0, 1, 3])
@pytest.mark.parametrize(
    "text",
    [
        *(b"abc", b"ab!d", "abcdÿ===".encode(), b"ab=dabcd", b"data:image/jpeg;base64", b"data:text/html,<b>"),
        *(b"abcd\nabcd\n\n\n", b"====", b"YQ==YQ==", b"YQ==A", b"YQ=", b"ab-_", b"data:;base64,data:;base64,"),
        *(b"data:", b"dat", b"data:image/png;base64;base64,YQ==" + b"A" * 300, b"data:" + b"x" * 1000, b"YQ= ="),
        *(
            b"data:" + b"x" * 244 + b";base64,YQ==",
            b"data:base64,YQ==",
            b"data:undefined;base64,YQ=",
            b"data:a,b;base64,YQ==",
        ),
    ],
)
def test_what_is_not_base64_is_refused(text: bytes, step: int) -> None:
    with pytest.raises(MediaFault) as refused:
        fetched(text, step=step)

    assert refused.value.code == "encoded"


def test_a_word_that_begins_like_a_prefix_may_be_base64() -> None:
    assert fetched(b"data")[0] == base64.b64decode(b"data")


@pytest.mark.parametrize("step", [0, 7])
def test_the_limit_is_the_decoded_size_and_nothing_beyond_is_decoded(step: int) -> None:
    text = base64.b64encode(bytes(1000))
    into = io.BytesIO()

    assert fetched(text, 1000, step=step)[1].size == 1000
    with pytest.raises(MediaFault) as refused:
        fetched(text, 999, step=step, into=into)
    assert (refused.value.code, refused.value.is_final) == ("too_large", True)
    assert len(into.getvalue()) <= 999


def test_an_error_of_the_place_for_the_bytes_comes_through_as_it_is() -> None:
    class Full:
        def write(self, _chunk: bytes) -> None:
            raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        Decoder(Full(), 100).feed(b"YWJj")
