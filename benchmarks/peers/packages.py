"""Peers that run their own published code, in the order of a first look."""

from __future__ import annotations

from peers.btx_peers import BTX
from peers.fusion_peers import FUSION
from peers.mergekit_peers import MERGES, MIXTURES
from peers.peer import Peer

PACKAGES: list[Peer] = [*MIXTURES, *MERGES, *BTX, *FUSION]
