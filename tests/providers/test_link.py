"""A file behind a link that somebody else chose."""

import io
from ipaddress import ip_network

import pytest

from providers import guard
from providers.link import Link
from providers.media import MediaFault
from tests.sandbox.servers import a_meta


def test_a_link_inside_is_refused_before_anything_is_asked() -> None:
    with (
        a_meta() as url,
        guard.client(guarded=True, ports=None, schemes={"http"}) as client,
        pytest.raises(MediaFault) as refused,
    ):
        Link(client, f"{url}/health").fetch(io.BytesIO(), 1024)

    assert (refused.value.code, refused.value.is_final) == ("blocked_address", True)


def test_a_link_into_an_allowed_network_is_followed() -> None:
    into = io.BytesIO()
    with a_meta() as url:
        inside = [ip_network("127.0.0.0/8")]
        with guard.client(guarded=True, allowed=inside, ports=None, schemes={"http"}) as client:
            received = Link(client, f"{url}/health").fetch(into, 1024)

    assert received.size == len(into.getvalue()) > 0


@pytest.mark.parametrize("url", ["http://[::1", "nothing", "", "http://user:secret@127.0.0.1/"])
def test_what_is_no_address_names_no_user_and_is_refused(url: str) -> None:
    with guard.client(guarded=True) as client:
        link = Link(client, url)

        assert "secret" not in link.host
        with pytest.raises(MediaFault, match="blocked_address"):
            link.fetch(io.BytesIO(), 1024)
