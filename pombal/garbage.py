"""When Python looks for garbage. What a process imports it keeps: 200,000 objects, which by default are looked through
again and again while it starts, and twice more when it ends. That was a third of what a short command cost.

    starting()   rarely from now on: first thing in a process
    settled()    what is there now stays: as usual from now on, for what comes; a process that goes on to serve says it
    ending()     nothing is worth a look any more: a command that is through says it
"""

import gc

_USUAL = gc.get_threshold()
_RARELY = 100_000  # new objects before a look; all imports of a worker are twice as many


def starting() -> None:
    gc.set_threshold(_RARELY, *_USUAL[1:])


def settled() -> None:
    gc.freeze()
    gc.set_threshold(*_USUAL)


def ending() -> None:
    gc.freeze()
