"""Many numbers at once in a fleet's database, as `pombal channel create` would make them one by one.

    python -m tests.chaos.make_shops TENANTS CHANNELS CONFIG      with the fleet's environment; prints JSON

One app and one API key per tenant, CHANNELS numbers in all; CONFIG is JSON that is added to each channel's.
"""

import json
import sys
from typing import Any
from uuid import uuid4

import msgspec

from pombal import garbage
from pombal.cli import admin


def main(tenants: int, channels: int, config: dict[str, object]) -> list[dict[str, Any]]:
    shops = []
    for n in range(tenants):
        slug, secret = f"t{uuid4().hex[:12]}", uuid4().hex
        tenant = admin.add_tenant(slug, "A tenant")
        _, api_key = admin.add_key(tenant.id, "chaos")
        made = []
        for m in range(channels // tenants + (n < channels % tenants)):
            number = str(uuid4().int % 10**15)
            given = {"phone_number_id": number, "waba_id": f"9{slug}", "app": slug, "access_token": secret, **config}
            if m == 0:
                given |= {"app_secret": secret, "verify_token": secret}
            name = f"{slug}-{m}"
            channel, _ = admin.add_meta_channel(tenant, name, msgspec.convert(given, admin.MetaConfig))
            made.append({"id": str(channel.id), "name": name, "phone_number_id": number, "waba_id": f"9{slug}"})
        shops.append(
            {"tenant_id": str(tenant.id), "slug": slug, "secret": secret, "api_key": api_key, "channels": made}
        )
    return shops


if __name__ == "__main__":
    garbage.starting()
    print(json.dumps(main(int(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3]))))  # noqa: T201 - its output
    garbage.ending()
