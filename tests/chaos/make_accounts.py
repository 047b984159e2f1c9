"""Many SIP accounts of one tenant at once, as `pombal sip create` would make them one by one; due only when told so.

    python -m tests.chaos.make_accounts COUNT PASSWORD GIVEN      with the fleet's environment; prints JSON

Their users are u0, u1 and so on; GIVEN is JSON of what else each has.
"""

import json
import sys
from typing import Any
from uuid import uuid4

from models import SipRegistration
from pombal import db
from pombal.cli import admin


def main(count: int, password: str, given: dict[str, Any]) -> dict[str, str]:
    """Ids by user."""
    tenant = admin.add_tenant(f"t{uuid4().hex[:12]}", "A tenant")
    rows = [
        SipRegistration.make(tenant.id, name=f"account-{n}", username=f"u{n}", password=password, **given)
        for n in range(count)
    ]
    made = {row.username: str(row.id) for row in rows}
    with db.session([tenant.id]) as s:
        s.add_all(rows)
        s.flush()
        for row in rows:
            row.next_refresh_at = None
    return made


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]))))  # noqa: T201 - its output
