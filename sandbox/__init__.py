"""A small outside world to develop and test against: for now Meta's side, which sends signed webhooks,
takes messages to send, and serves and takes files.

It shares no code with the fleet, so that it cannot repeat the fleet's mistakes.
"""
