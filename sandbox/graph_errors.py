"""How Graph says no: an error's JSON, and for each code the HTTP status and title it usually comes with.

The codes and their meaning are those of whatsapp-cloud-api.md §13; sources disagree on the HTTP status, so a caller
must read the code.
"""

import secrets
from typing import NamedTuple

import msgspec

_UNKNOWN = (400, "Something went wrong")
_USUAL: dict[int, tuple[int, str]] = {
    0: (401, "Error validating access token: the session has been invalidated"),
    1: (500, "An unknown error occurred"),
    2: (503, "An unexpected error has occurred. Please retry your request later."),
    3: (500, "Application does not have the capability to make this API call."),
    4: (400, "Application request limit reached"),
    10: (403, "Application does not have permission for this action"),
    33: (400, "Parameter value is not valid"),
    100: (400, "Invalid parameter"),
    104: (401, "An access token is required to request this resource."),
    190: (401, "Error validating access token: Session has expired."),
    200: (403, "Permissions error"),
    368: (403, "Temporarily blocked for policies violations"),
    80007: (400, "Rate limit issues"),
    130403: (400, "Recipient is blocked by the business"),
    130429: (400, "Rate limit hit"),
    130472: (400, "User's number is part of an experiment"),
    130497: (403, "Business account is restricted from messaging users in this country."),
    131000: (500, "Something went wrong"),
    131005: (403, "Access denied"),
    131008: (400, "Required parameter is missing"),
    131009: (400, "Parameter value is not valid"),
    131016: (500, "Service unavailable"),
    131021: (400, "Recipient cannot be sender"),
    131026: (400, "Message undeliverable"),
    131030: (400, "Recipient phone number not in allowed list"),
    131031: (403, "Business account has been locked"),
    131037: (400, "Display name approval is needed"),
    131042: (400, "Business eligibility payment issue"),
    131045: (500, "Incorrect certificate"),
    131047: (400, "Re-engagement message"),
    131048: (400, "Spam rate limit hit"),
    131049: (400, "This message was not delivered to maintain healthy ecosystem engagement."),
    131050: (400, "User has stopped marketing messages from this business"),
    131051: (400, "Unsupported message type"),
    131053: (400, "Media upload error"),
    131056: (400, "(Business Account, Consumer Account) pair rate limit hit"),
    131057: (500, "Account in maintenance mode"),
    131062: (400, "Business-scoped user id is not supported for this message"),
    131063: (400, "Marketing templates are not supported on this endpoint"),
    131064: (400, "Template misclassification limit reached"),
    132000: (400, "Number of parameters does not match the expected number of params"),
    132001: (404, "Template name does not exist in the translation"),
    132005: (400, "Translated text too long"),
    132007: (400, "Template format character policy violated"),
    132012: (400, "Parameter format does not match format in the created template"),
    132015: (400, "Template is paused"),
    132016: (400, "Template is disabled"),
    132068: (400, "Flow is blocked"),
    132069: (400, "Flow is throttled"),
    133000: (500, "Incomplete deregistration"),
    133004: (503, "Server temporarily unavailable"),
    133005: (400, "Two step verification PIN mismatch"),
    133006: (400, "Phone number re-verification needed"),
    133010: (400, "Phone number not registered"),
    133015: (400, "Please wait a few minutes before attempting to register this phone number"),
    133016: (400, "Too many registrations"),
    134101: (400, "Template is still syncing"),
    135000: (400, "Generic user error"),
}


class GraphError(NamedTuple):
    """A refusal: what is answered, and with which HTTP status."""

    code: int
    http: int
    title: str
    details: str = ""
    subcode: int | None = None

    @property
    def message(self) -> str:
        # Errors about the token and unknown objects carry no number in front.
        return self.title if self.code in (0, 104, 190) or self.subcode == 33 else f"(#{self.code}) {self.title}"

    def json(self) -> bytes:
        """The body of the answer, with a trace id of its own."""
        error: dict[str, object] = {
            "message": self.message,
            "type": "GraphMethodException" if self.subcode == 33 else "OAuthException",
            "code": self.code,
        }
        if self.code == 2:
            error["is_transient"] = True
        if self.subcode is not None:
            error["error_subcode"] = self.subcode
        if self.details:
            error["error_data"] = {"messaging_product": "whatsapp", "details": self.details}
        error["fbtrace_id"] = "A" + secrets.token_urlsafe(16)
        return msgspec.json.encode({"error": error})


def refusal(
    code: int, details: str = "", *, title: str | None = None, http: int | None = None, subcode: int | None = None
) -> GraphError:
    """An error of this code as it usually comes; any code will do."""
    usual_http, usual_title = _USUAL.get(200 if 200 < code < 300 else code, _UNKNOWN)
    return GraphError(code, http or usual_http, title or usual_title, details, subcode)


def title(code: int) -> str:
    return refusal(code).title


def no_such_object(method: str, id: str) -> GraphError:
    """What Graph says of an id that is not there, or not for this token."""
    text = (
        f"Unsupported {method} request. Object with ID '{id}' does not exist, cannot be loaded due to missing "
        "permissions, or does not support this operation"
    )
    return refusal(100, title=text, subcode=33)
