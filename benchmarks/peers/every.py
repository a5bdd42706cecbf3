"""All peers, in the order of a first look."""

from __future__ import annotations

from peers.bounds import BOUNDS
from peers.ours import FITS, OURS
from peers.peer import Peer

PEERS: list[Peer] = [*BOUNDS, *OURS, *FITS]
