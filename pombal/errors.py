"""The errors of pombal, named by what should happen next.

    PombalError
    ├── Permanent          a retry cannot help: dead-letter it now
    │   └── Rejected       the outside content cannot be understood or was refused
    └── Temporary          try again on the actor's schedule
        └── Unreachable    a store or provider gave no answer

A message is text for an operator: never a token, a message text, a phone number or a provider id.
"""


class PombalError(Exception):
    """Base of all errors that pombal raises on purpose."""


class Permanent(PombalError):
    """A retry cannot help."""


class Rejected(Permanent):
    """The outside content cannot be understood, or the provider refused it."""


class Temporary(PombalError):
    """A retry may help."""


class Unreachable(Temporary):
    """A store or a provider gave no answer."""


class Misconfigured(PombalError):
    """The process must not start like this; the message says what to set."""
