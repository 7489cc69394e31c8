"""Can anybody else have written this replica since our step stopped? A pure decision.

A step may go on where it stopped only if nothing but the step itself changed the image since.
Reading everything back would prove that, at the cost of the whole step. Two cheap facts do too:

- Every writer of an image with the exclusive-lock feature must own its lock. If the lock still
  belongs to our dead worker, nobody came between; we fence the dead one and go on.
- Taking the lock, like every change of an image's settings or snapshots, gives the header object a
  new RADOS version, while opening it or reading from it does not (measured, Ceph 16.2). A worker
  that stops in good order lets go of the lock, reads that version and writes it into the guard.

A worker announces itself in the guard before it takes the lock, and says there what it has and when it
let go; each of these is a compare-and-swap, so two workers never write over each other's word. A crash
at any point leaves either a proof, or a state that is known to be in between (`UNSURE`: roll back), never
a guess. An image that is taken without proof stays untrusted until it was rolled back, whatever happens
on the way.
"""

from __future__ import annotations

from enum import Enum

from agent.model import Guard, Hand


class Standing(Enum):
    """What is known of an image in the middle of a step."""

    RESUMABLE = "nobody else can have written"
    UNSURE = "we stopped between two states"
    TOUCHED = "somebody else changed the image"


def hand_of(owner: str, guard: Guard | None) -> Hand | None:
    """Return which worker of ours on this image the lock's `owner` is, dead or alive; None for a stranger."""
    return next((hand for hand in guard.hands if hand.address == owner), None) if guard else None


def standing(owner: str, guard: Guard | None, version: int) -> Standing:
    """Judge an image that carries the mark of an unfinished step.

    `owner` is the address that owns the exclusive lock ("" for none), `guard` what our workers
    left, `version` the header's present RADOS version; all three were read before the image was opened.
    """
    if guard is None or (owner and hand_of(owner, guard) is None):
        return Standing.TOUCHED
    if owner:
        # A claimant that has the lock has not written yet, and knew what it would find.
        known = next((each for each in (guard.tenure, guard.claim) if each and each.hand.address == owner), None)
        return Standing.RESUMABLE if known and known.trusted else Standing.UNSURE
    last = guard.tenure
    if last is None or last.state == "holding":
        return Standing.TOUCHED  # the lock was broken by somebody else
    if last.state == "releasing":
        return Standing.UNSURE
    if last.version != version:
        return Standing.TOUCHED
    return Standing.RESUMABLE if last.trusted else Standing.UNSURE
