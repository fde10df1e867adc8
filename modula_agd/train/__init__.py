"""Training from the command line or from Python: data, loop, checkpoints, plots. Needs the ``train`` extra."""

from modula_agd.train.architecture import ARCHITECTURES as ARCHITECTURES
from modula_agd.train.architecture import build as build
from modula_agd.train.checkpoint import Checkpoint as Checkpoint
from modula_agd.train.checkpoint import CheckpointError as CheckpointError
from modula_agd.train.checkpoint import load as load
from modula_agd.train.checkpoint import save as save
from modula_agd.train.data import Classification as Classification
from modula_agd.train.data import Examples as Examples
from modula_agd.train.data import classification as classification
from modula_agd.train.extras import MissingExtra as MissingExtra
from modula_agd.train.loop import Outcome as Outcome
from modula_agd.train.loop import Schedule as Schedule
from modula_agd.train.loop import train as train
from modula_agd.train.objective import LOSSES as LOSSES
from modula_agd.train.pixels import DataError as DataError
from modula_agd.train.plot import plot as plot
from modula_agd.train.run_folder import Evaluation as Evaluation
from modula_agd.train.run_folder import RunFolder as RunFolder
from modula_agd.train.text import Characters as Characters
from modula_agd.train.text import characters as characters
