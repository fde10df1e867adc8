"""Networks written in plain ``torch.nn``: captured, given bounds, and trained like any other."""

from modula_agd.bridge.bridged import Bridged as Bridged
from modula_agd.bridge.bridged import from_torch as from_torch
from modula_agd.bridge.declare import declare as declare
from modula_agd.bridge.declare import undeclare as undeclare
from modula_agd.bridge.flow import Call as Call
