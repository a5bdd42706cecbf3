"""All peers, in the order of a first look: what costs least first."""

from __future__ import annotations

from peers.bitdelta import BITDELTA
from peers.bounds import BOUNDS
from peers.dume import DUME
from peers.lorahub import LORAHUB
from peers.ours import FITS, OURS, OURS_TRAINED
from peers.packages import PACKAGES
from peers.peer import Peer
from peers.peft_rows import PEFT_ROWS
from peers.trained import TRAINED
from peers.twin import TWIN
from peers.wemoe import WEMOE

PEERS: list[Peer] = [
    *BITDELTA,
    *BOUNDS,
    *OURS,
    *DUME,
    *PACKAGES,
    *FITS,
    *PEFT_ROWS,
    *LORAHUB,
    *TWIN,
    *WEMOE,
    *TRAINED,
    *OURS_TRAINED,
]
